"""Our kernels for separable convolutions against oneDNN's, in turn in one process: CPU time.

    python -m benchmarks.kernels --networks nasnet_mobile nasnet_large --turns 12

In float32, on one core, batches as the job chooses them, each turn `--seconds` long by each. What
the job asks itself at its start (`models/kernels.py`), of whole networks and at length, and whether
the vectors are the same; where a CPU has AVX-512 both of ours are measured, by AVX2 too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks import results
from benchmarks.bare import fixed_pictures
from benchmarks.processes import note
from benchmarks.throughput import Place
from models import loading
from models.kernels import chosen_width, compiled_width, register
from models.loading import LoadedModel, LoadSpec, default_batch_size

PART = "kernels"
NAMES = {8: "vectors of 8 (AVX2)", 16: "vectors of 16 (AVX-512)"}


def load_by(model: str, width: int) -> LoadedModel:
    """The prepared `model` by kernels of `width`, 0 for oneDNN's."""
    loading.chosen_width = lambda: width  # type: ignore[assignment]
    loading._loaded.clear()
    return loading.load(LoadSpec(model))


def measure(
    models: list[LoadedModel], turns: int, seconds: float
) -> tuple[list[list[float]], list[float]]:
    """CPU ms an image of each of `models`, by turn; and how far the vectors of those behind the
    first are from its, the largest error over the largest value.
    """
    side = models[0].info.image_size
    pixels = fixed_pictures(default_batch_size(side, "float32", False), side)

    def turn(model: LoadedModel) -> float:
        start, cpu, count = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - start < seconds:
            count += len(next(iter(model(pixels).values())))
        return (time.process_time() - cpu) / count * 1000

    exact, *others = (model(pixels) for model in models)

    def off(vectors: Mapping[str, np.ndarray], name: str) -> float:
        return float(np.abs(vectors[name] - exact[name]).max() / np.abs(exact[name]).max())

    apart = [max(off(vectors, name) for name in exact) for vectors in others]
    return [[turn(model) for model in models] for _ in range(turns)], apart


def table(runs: results.Runs) -> str:
    """What was measured, in Markdown."""
    rows = [
        "| network, ours | CPU time of / that of oneDNN's | CPU ms an image | vectors | turns |",
        "|---|---|---|---|---|",
    ]
    for name, found in runs.items():
        last = found[-1]
        apart = f"{last['apart']:.0e} apart" if last["apart"] else "same bits"
        rows.append(
            f"| {name} | {last['ratio']:.2f} ({last['least']:.2f} to {last['most']:.2f}) "
            f"| {last['cpu_ms']:.1f} / {last['onednn_cpu_ms']:.1f} "
            f"| {apart} | {last['turns']} |"
        )
    return "\n".join([*rows, "", results.caption(found[-1] for found in runs.values())])


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="*", default=["nasnet_mobile"])
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=1)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "benchmark")
    parser.add_argument("--results", type=Path, default=results.ROOT, help="where docs/ lies")
    request = parser.parse_args()
    widest = compiled_width()
    if not widest:
        parser.error("this CPU has no kernels of ours, or no compiler made them")
    if len(cores := sorted(os.sched_getaffinity(0))) > 1:  # TensorFlow's threads run already
        alone = ["taskset", "--cpu-list", str(cores[0]), sys.executable, "-m", "benchmarks.kernels"]
        os.execvp(alone[0], [*alone, *sys.argv[1:]])
    asked = chosen_width()
    note(f"the job would take {NAMES[asked] if asked else 'those of oneDNN'} here")
    widths = [widest, *(width for width in (8,) if width < widest and register(width))]
    place = Place(request.work)
    place.folder.mkdir(parents=True, exist_ok=True)
    for network in request.networks:
        models = [load_by(place.prepared(network), width) for width in (0, *widths)]
        taken, apart = measure(models, request.turns, request.seconds)
        onednn, *ours = zip(*taken, strict=True)
        for width, mine, off in zip(widths, ours, apart, strict=True):
            ratios = [one / other for one, other in zip(mine, onednn, strict=True)]
            name = f"{network}, {NAMES[width]}"
            figures = {
                "ratio": statistics.median(ratios),
                "least": min(ratios),
                "most": max(ratios),
                "cpu_ms": statistics.median(mine),
                "onednn_cpu_ms": statistics.median(onednn),
                "turns": request.turns,
                "apart": off,
            }
            results.add(request.results, PART, name, figures)
            note(f"{name}: {figures['ratio']:.3f} of oneDNN's CPU time")
    results.show_each(request.results, PART, table)


if __name__ == "__main__":
    main()
