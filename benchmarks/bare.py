"""The ceilings: our prepared function on pixels in memory, and our decoding alone.

    python -m benchmarks.bare model --model PREPARED --precision bfloat16 --seconds 10
    python -m benchmarks.bare decode --records 'DIR/photos-*' --seconds 10

Batch size and threads as the job chooses them. Ends with one JSON line: images, and the seconds
and CPU seconds of them after warming up (`steady_seconds`, `steady_cpu`).
"""

from __future__ import annotations

import argparse
import functools
import glob
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

SIDE = 224


class Timed(Protocol):
    """How long to measure, in seconds."""

    seconds: float


def timed(
    several: Callable[[int], int], request: Timed | Any, at_once: int | None = None
) -> dict[str, float]:
    """`several(n)` runs n batches and returns how many images that were: figures of a steady state.

    Warms up with `at_once` batches (one a core of this process), then runs so many as take about
    `request.seconds`.
    """
    at_once = at_once or len(os.sched_getaffinity(0))
    several(at_once)
    start = time.perf_counter()
    several(2 * at_once)
    one = (time.perf_counter() - start) / (2 * at_once)
    count = max(2 * at_once, int(request.seconds / one))
    start, cpu = time.perf_counter(), time.process_time()
    images = several(count)
    return {
        "images": images,
        "steady_seconds": time.perf_counter() - start,
        "steady_cpu": time.process_time() - cpu,
    }


def fixed_pictures(count: int, side: int) -> np.ndarray:
    """Photographs as pixels, uint8 [count, side, side, 3]."""
    from benchmarks.pictures import crops
    from formats.image import Preprocessing, decode_image

    how = Preprocessing(side)
    return np.stack([decode_image(data, how)[0] for data in crops(min(count, 50))] * count)[:count]


def encoded(records: str) -> Iterator[bytes]:
    """The encoded images of TFRecord files, as our reader gives them."""
    import pyarrow as pa

    from formats.example import ExampleKeys, ExampleTypes, parse_examples
    from formats.tfrecord import Record, read_records

    for path in sorted(glob.glob(records)):
        with open(path, "rb") as stream:
            found = read_records(stream, os.path.getsize(path))
            while held := list(itertools.islice(found, 64)):
                whole = [item for item in held if isinstance(item, Record)]
                types = ExampleTypes(pa.int64(), {})
                for item in parse_examples(whole, path, ExampleKeys(), types):
                    yield item.data  # type: ignore[union-attr]


def decoded(records: str, side: int) -> Iterator[np.ndarray]:
    """The pixels of TFRecord files, uint8 [side, side, 3], decoded ahead on a thread a core."""
    from formats.image import Preprocessing, decode_image
    from transforms.lookahead import cpu_threads, map_ahead

    how = Preprocessing(side, jpeg_scaling="off")
    decode = functools.partial(decode_image, how=how)
    for pixels, *_ in map_ahead(decode, encoded(records), cpu_threads(), 128):
        yield pixels


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("model", "decode"))
    parser.add_argument("--model", help="prepared, or any other")
    parser.add_argument("--records")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--engine", default="tensorflow")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--outputs", nargs="*", default=())
    parser.add_argument("--seconds", type=float, default=10)
    request = parser.parse_args()
    several = _decoding(request.records) if request.what == "decode" else _model(request)
    print(json.dumps(timed(several, request)))


def _decoding(records: str) -> Callable[[int], int]:
    from formats.image import Preprocessing, decode_image
    from transforms.lookahead import cpu_threads

    data = list(itertools.islice(encoded(records), 250))
    decode = functools.partial(decode_image, how=Preprocessing(SIDE, jpeg_scaling="off"))
    # Counted, not kept: memory touched for the first time would be a part of every picture's cost.
    return lambda count: sum(1 for _ in cpu_threads().map(decode, (data * count)[: 50 * count]))


def _model(request: Any) -> Callable[[int], int]:
    from models.loading import LoadSpec, default_batch_size, default_copies, has_gpu, load

    on_gpu = has_gpu(request.engine)
    copies = default_copies(on_gpu)
    spec = LoadSpec(
        request.model,
        tuple(request.outputs),
        precision=request.precision,
        copies=copies,
        engine=request.engine,
    )
    model = load(spec)
    side = model.info.image_size
    size = request.batch or default_batch_size(side, request.precision, on_gpu)
    pixels = fixed_pictures(size, side)
    lanes = ThreadPoolExecutor(copies)

    def once(_: int) -> int:
        return len(next(iter(model(pixels).values())))

    return lambda count: sum(lanes.map(once, range(count)))


if __name__ == "__main__":
    main()
