"""Rival: OpenVINO on the frozen graph, on pixels in memory or in a loop with decoding.

    python -m benchmarks.rival_openvino --graph FROZEN.pb --precision bfloat16 --seconds 10
    python -m benchmarks.rival_openvino --graph FROZEN.pb --records 'DIR/photos-*'

The throughput hint chooses its streams and threads. Decoding is Pillow's in a thread a core, ours.
Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import queue
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from benchmarks.bare import decoded, fixed_pictures, timed
from transforms.lookahead import map_ahead


def compiled(graph: str, precision: str, batch: int, side: int) -> Any:
    """The graph at `graph` for batches of `batch`, its arithmetic as hinted."""
    import openvino as ov

    core = ov.Core()
    model = core.read_model(graph)
    model.reshape([batch, side, side, 3])
    hint = {"float32": ov.Type.f32, "bfloat16": ov.Type.bf16}[precision]
    return core.compile_model(
        model,
        "CPU",
        {
            ov.properties.hint.inference_precision: hint,
            ov.properties.hint.performance_mode: ov.properties.hint.PerformanceMode.THROUGHPUT,
        },
    )


def vectors(model: Any, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The model's vectors of `batches`, as many at once as OpenVINO advises."""
    lanes = model.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
    idle: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for _ in range(lanes):
        idle.put(model.create_infer_request())

    def infer(batch: np.ndarray) -> np.ndarray:
        request = idle.get()
        try:
            return np.array(request.infer({0: batch}, share_inputs=True)[0])
        finally:
            idle.put(request)

    with ThreadPoolExecutor(lanes) as threads:
        yield from map_ahead(infer, batches, threads, 2 * lanes)


def main() -> None:
    """Run and print the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--graph", required=True)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--records")
    request = parser.parse_args()
    model = compiled(request.graph, request.precision, request.batch, request.side)
    if not request.records:
        batch = fixed_pictures(request.batch, request.side).astype(np.float32) / 255
        print(json.dumps(timed(lambda n: sum(map(len, vectors(model, [batch] * n))), request)))
        return
    first_at, images = None, 0
    sizes: list[int] = []  # of the batches; the last is padded

    def batches() -> Iterator[np.ndarray]:
        pixels = decoded(request.records, request.side)
        while held := list(itertools.islice(pixels, request.batch)):
            batch = np.zeros((request.batch, *held[0].shape), np.float32)
            np.stack(held, out=batch[: len(held)])
            batch *= np.float32(1 / 255)
            sizes.append(len(held))
            yield batch

    for number, found in enumerate(vectors(model, batches())):
        first_at = first_at or time.time()
        images += len(found[: sizes[number]])
    print(json.dumps({"images": images, "first_at": first_at}))


if __name__ == "__main__":
    main()
