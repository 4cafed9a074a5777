"""Rival: a hand-tuned tf.data loop over the same TFRecords, with a frozen graph or the signature.

    python -m benchmarks.rival_tfdata --records 'DIR/photos-*' --frozen FILE --precision bfloat16

The graph is `benchmarks.frozen`'s, a model is taken by its signature. Vectors are brought to NumPy
and nothing is written. oneDNN is on, as in ours, where TensorFlow would leave it off (CPUs without
AVX-512 VNNI, where it doubles the rate). Ends with one JSON line, and without taking its iterator
down: that waits up to a minute, in one run of four, for tf.data's tuning thread to wake by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.frozen import OUTPUT

Run = Callable[[Any], Any]


def by_frozen(path: str, side: int) -> Run:
    """A function of pictures, float32 [N, side, side, 3] in 0..1, by the frozen graph at `path`."""
    import tensorflow as tf

    graph = tf.compat.v1.GraphDef.FromString(Path(path).read_bytes())
    (given,) = (node.name for node in graph.node if node.op == "Placeholder")

    def run(images: tf.Tensor) -> Any:
        (found,) = tf.graph_util.import_graph_def(
            graph, input_map={given: images}, return_elements=[f"{OUTPUT}:0"], name=""
        )
        return found

    shape = tf.TensorSpec([None, side, side, 3], tf.float32)
    return tf.compat.v1.wrap_function(run, [shape])  # type: ignore[no-any-return]


def by_signature(model: str, side: int) -> Run:
    """The same by the signature of the SavedModel as it is."""
    import tensorflow as tf

    loaded = tf.saved_model.load(model)
    signature = loaded.signatures["serving_default"]

    def run(images: tf.Tensor) -> Any:
        assert loaded is not None  # its variables live as long as it does
        (found,) = signature(inputs=images).values()
        return found

    return run


def pictures(records: str, batch: int, side: int, same_pixels: bool) -> Any:
    """Batches of float32 pictures by tf.data: parallel decoding.

    `same_pixels`: accurate DCT and antialiased resizing, as ours; else TensorFlow's cheapest.
    """
    import tensorflow as tf

    def parse(example: tf.Tensor) -> tf.Tensor:
        spec = {"image/encoded": tf.io.FixedLenFeature([], tf.string)}
        data = tf.io.parse_single_example(example, spec)["image/encoded"]
        method = "INTEGER_ACCURATE" if same_pixels else "INTEGER_FAST"
        image = tf.io.decode_jpeg(data, channels=3, dct_method=method)
        return tf.image.resize(image, [side, side], antialias=same_pixels) / 255.0

    files = tf.data.Dataset.list_files(records, shuffle=False)
    dataset = tf.data.TFRecordDataset(files, num_parallel_reads=tf.data.AUTOTUNE)
    dataset = dataset.map(parse, num_parallel_calls=tf.data.AUTOTUNE, deterministic=False)
    return dataset.batch(batch)


def main() -> None:
    """Run the loop and print its figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--records", required=True)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--frozen", help="the graph of benchmarks.frozen")
    source.add_argument("--signature", help="a SavedModel, run as it is")
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--pixels", choices=("same", "cheapest"), default="same")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument(
        "--lanes", type=int, default=0, help="batches at once to a core, in tf.data"
    )
    parser.add_argument("--intra", type=int, default=0, help="threads of one operation; 0: cores")
    parser.add_argument("--inter", type=int, default=0, help="operations at once; 0: cores")
    request = parser.parse_args()
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(request.intra)
    tf.config.threading.set_inter_op_parallelism_threads(request.inter)
    if request.precision == "bfloat16":
        tf.config.optimizer.set_experimental_options({"auto_mixed_precision_onednn_bfloat16": True})
    if request.frozen:
        model = by_frozen(request.frozen, request.side)
    else:
        model = by_signature(request.signature, request.side)
    dataset = pictures(request.records, request.batch, request.side, request.pixels == "same")
    if request.lanes:
        lanes = request.lanes * len(os.sched_getaffinity(0))
        dataset = dataset.map(model, num_parallel_calls=lanes, deterministic=False)
    first_at, kept = None, []
    batches = iter(dataset.prefetch(tf.data.AUTOTUNE))
    for batch in batches:
        kept.append((batch if request.lanes else model(batch)).numpy())
        if first_at is None:
            first_at = time.time()
    told = {
        "images": sum(map(len, kept)),
        "first_at": first_at,
    }
    print(json.dumps(told))
    sys.stdout.flush()
    os._exit(0)  # before `batches` is taken down


if __name__ == "__main__":
    main()
