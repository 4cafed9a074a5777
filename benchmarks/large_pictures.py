"""12-megapixel photographs by --jpeg_scaling auto and off: time, and how far the pixels differ.

    python -m benchmarks.large_pictures --count 15 --repeat 3

Decoded in turn on one thread; the difference is in levels of 0 to 255, over all pixels.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import results
from benchmarks.pictures import large_photographs
from benchmarks.processes import note
from formats.image import Preprocessing, decode_image

PART = "large_pictures"
SIDES = (224, 331)  # of what is decoded to, in pixels


def measure(data: list[bytes], side: int) -> dict[str, Any]:
    """Milliseconds of CPU a picture by either way, and mean and largest difference in levels."""
    spent = {"auto": 0.0, "off": 0.0}
    means, most = [], 0
    for picture in data:
        pixels = {}
        for scaling in spent:
            start = time.thread_time()
            pixels[scaling] = decode_image(picture, Preprocessing(side, jpeg_scaling=scaling))[0]
            spent[scaling] += time.thread_time() - start
        difference = np.abs(pixels["auto"].astype(int) - pixels["off"])
        means.append(float(difference.mean()))
        most = max(most, int(difference.max()))
    auto, off = (1000 * seconds / len(data) for seconds in spent.values())
    return {
        "auto_ms": auto,
        "off_ms": off,
        "times": off / auto,
        "mean_levels": float(np.mean(means)),
        "worst_mean_levels": max(means),
        "most_levels": most,
    }


def table(runs: results.Runs) -> str:
    """What was measured, in Markdown."""
    rows = [
        "| target | off, ms | auto, ms | times faster | mean levels (worst picture) | most |",
        "|---|---|---|---|---|---|",
    ]
    for side, found in runs.items():
        rows.append(
            f"| {side} | {results.spread(found, 'off_ms', 1)} "
            f"| {results.spread(found, 'auto_ms', 1)} | {results.spread(found, 'times', 1)} "
            f"| {found[-1]['mean_levels']:.2f} ({found[-1]['worst_mean_levels']:.2f}) "
            f"| {found[-1]['most_levels']} |"
        )
    return "\n".join([*rows, "", results.caption(one for found in runs.values() for one in found)])


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=15, help="photographs")
    parser.add_argument("--sides", type=int, nargs="*", default=SIDES)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--fresh", action="store_true", help="forget earlier runs")
    parser.add_argument("--results", type=Path, default=results.ROOT, help="where docs/ lies")
    request = parser.parse_args()
    data = large_photographs(request.count)
    if request.fresh:
        results.forget(request.results, PART, map(str, request.sides))
    for _ in range(request.repeat):
        for side in request.sides:
            figures = measure(data, side)
            results.add(request.results, PART, str(side), figures)
            note(f"{side}: {figures['times']:.1f} times faster")
    results.show_each(request.results, PART, table)


if __name__ == "__main__":
    main()
