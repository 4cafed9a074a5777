"""What people run instead: hand-written loops over the same TFRecords and the same model.

    python -m benchmarks.rivals tf_data --records 'DIR/photos-*' --model DIR --precision bfloat16

Each prints one JSON line: images, seconds from the process's start to the first batch and in all.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

START = time.perf_counter()

import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
from tensorflow.python.framework.convert_to_constants import (  # noqa: E402
    convert_variables_to_constants_v2,
)

SIDE = 224


def decoded(records: str, batch: int, same_pixels: bool) -> tf.data.Dataset:
    """Batches of float32 pictures by tf.data: parallel decode, prefetch.

    `same_pixels`: accurate DCT and antialiased resizing, as ours; else TensorFlow's cheapest.
    """

    def parse(example: tf.Tensor) -> tf.Tensor:
        spec = {"image/encoded": tf.io.FixedLenFeature([], tf.string)}
        data = tf.io.parse_single_example(example, spec)["image/encoded"]
        method = "INTEGER_ACCURATE" if same_pixels else "INTEGER_FAST"
        image = tf.io.decode_jpeg(data, channels=3, dct_method=method)
        return tf.image.resize(image, [SIDE, SIDE], antialias=same_pixels) / 255.0

    files = tf.data.Dataset.list_files(records, shuffle=False)
    dataset = tf.data.TFRecordDataset(files, num_parallel_reads=tf.data.AUTOTUNE)
    dataset = dataset.map(parse, num_parallel_calls=tf.data.AUTOTUNE)
    return dataset.batch(batch).prefetch(tf.data.AUTOTUNE)


def frozen(model: str) -> Callable[[tf.Tensor], Any]:
    """The signature of a SavedModel, its variables frozen."""
    loaded = tf.saved_model.load(model)
    return convert_variables_to_constants_v2(loaded.signatures["serving_default"])


def signature(model: str) -> Callable[[tf.Tensor], Any]:
    """The signature of a SavedModel as it is."""
    loaded = tf.saved_model.load(model)
    function = loaded.signatures["serving_default"]
    return lambda images: [loaded, *function(inputs=images).values()][1:]


def outputs(batches: tf.data.Dataset, run: Callable[[tf.Tensor], Any]) -> Iterator[np.ndarray]:
    """The model's vectors, batch by batch."""
    for images in batches:
        yield run(images)[0].numpy()


def main() -> None:
    """Run one rival and print its figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("rival", choices=("frozen", "signature"))
    parser.add_argument("--records", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--cheapest", action="store_true")
    request = parser.parse_args()
    if request.precision == "bfloat16":
        tf.config.optimizer.set_experimental_options({"auto_mixed_precision_onednn_bfloat16": True})
    run = {"frozen": frozen, "signature": signature}[request.rival](request.model)
    batches = decoded(request.records, request.batch, not request.cheapest)
    first, images = None, 0
    for vectors in outputs(batches, run):
        first = first or time.perf_counter() - START
        images += len(vectors)
    seconds = time.perf_counter() - START
    print(json.dumps({"images": images, "first": first, "seconds": seconds}))


if __name__ == "__main__":
    main()
