"""Rival: the stock way on Beam, a pass for each vector: RunInference over hub.KerasLayer.

    python -m benchmarks.rival_beam --records 'DIR/photos-*' --models CLASSIFIER FEATURE_VECTOR

ReadFromTFRecord, TensorFlow's decoder in a Map, Beam's TFModelHandlerTensor with its own inference
function, WriteToParquet of rows as dicts; FnApiRunner. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import apache_beam as beam
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow as tf
import tensorflow_hub as hub
from apache_beam.ml.inference.base import KeyedModelHandler, PredictionResult, RunInference
from apache_beam.ml.inference.tensorflow_inference import TFModelHandlerTensor

from pipeline.preflight import DIRECT_RUNNER

SIDE = 224


class HubHandler(TFModelHandlerTensor):
    """Beam's handler; only loading differs, which under Keras 3 refuses every SavedModel."""

    def load_model(self) -> Any:
        """The model as the documentation of TF Hub loads it."""
        return hub.KerasLayer(self._model_uri)


def parse(example: bytes) -> tuple[str, tf.Tensor]:
    """A key and a picture, float32 [224, 224, 3] in 0..1, of a serialized tf.Example."""
    spec = {
        "image/encoded": tf.io.FixedLenFeature([], tf.string),
        "image/class/label": tf.io.FixedLenFeature([], tf.int64),
    }
    features = tf.io.parse_single_example(example, spec)
    image = tf.io.decode_jpeg(features["image/encoded"], channels=3)
    key = str(features["image/class/label"].numpy())
    return key, tf.image.resize(image, [SIDE, SIDE], antialias=True) / 255.0


def row(keyed: tuple[str, PredictionResult]) -> dict[str, Any]:
    """A Parquet row of one prediction."""
    return {"key": keyed[0], "vector": keyed[1].inference.numpy().tolist()}


def main() -> None:
    """Run a pass for each model and print the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--records", required=True)
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--batch", type=int, default=32)
    request = parser.parse_args()
    folder = tempfile.mkdtemp()
    schema = pa.schema([("key", pa.string()), ("vector", pa.list_(pa.float32()))])
    for number, model in enumerate(request.models):
        handler = HubHandler(model, min_batch_size=request.batch, max_batch_size=request.batch)
        with beam.Pipeline(runner=DIRECT_RUNNER) as pipeline:
            _ = (
                pipeline
                | beam.io.ReadFromTFRecord(request.records)
                | beam.Map(parse)
                | RunInference(KeyedModelHandler(handler))
                | beam.Map(row)
                | beam.io.WriteToParquet(f"{folder}/pass-{number}", schema)
            )
    files = Path(folder).glob("pass-*")
    rows = sum(pq.read_metadata(path).num_rows for path in files)
    shutil.rmtree(folder)
    print(json.dumps({"images": rows // len(request.models)}))


if __name__ == "__main__":
    main()
