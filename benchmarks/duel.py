"""Two contenders at the same time, a core each, and then with the cores swapped: CPU time by ratio.

    python -m benchmarks.duel bare_f32_openvino bare_f32 --repeat 4

What slows a machine down slows both, so that a few per cent can be told where runs one after
another differ by twenty. A job has one lane there, and both share the last cache as lanes do. A
turn is two duels; each side goes through its runs by itself, so that the slower one ends alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from benchmarks import results
from benchmarks.processes import note
from benchmarks.throughput import CONTENDERS, Place, make, measure

PART = "duel"
SHARDS = 4


def duel(
    names: Sequence[str], cores: Sequence[int], place: Place, images: Sequence[int]
) -> list[float]:
    """CPU ms an image of each of `names`, on the core of `cores` in its place."""

    def one(name: str, core: int) -> float:
        contender = replace(CONTENDERS[name], first=())
        apart = replace(place, into=f"output-{core}")
        figures = measure(contender, apart, images, SHARDS, ("taskset", "--cpu-list", str(core)))
        return float(figures["cpu_ms"])

    with ThreadPoolExecutor(len(names)) as both:
        return list(both.map(one, names, cores))


def table(runs: results.Runs) -> str:
    """Every pair that has run."""
    rows = ["| CPU time of / that of | ratio | CPU ms an image | duels |", "|---|---|---|---|"]
    for name, found in runs.items():
        one, other = (CONTENDERS[side].shown for side in name.split(" / "))
        ratios = [run["cpu_ms"] / run["other_cpu_ms"] for run in found]
        each = " / ".join(results.spread(found, side, 1) for side in ("cpu_ms", "other_cpu_ms"))
        rows.append(
            f"| {one} / {other} | {statistics.geometric_mean(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) | {each} | {len(found)} |"
        )
    every = [run for found in runs.values() for run in found]
    return "\n".join([*rows, "", results.caption(every)])


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs=2, choices=CONTENDERS, metavar="NAME")
    parser.add_argument("--images", type=int, nargs=2, default=(500, 2500))
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "benchmark")
    parser.add_argument("--results", type=Path, default=results.ROOT, help="where docs/ lies")
    request = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        parser.error("this process may run on one core only; two contenders want one each")
    place = Place(request.work)
    place.folder.mkdir(parents=True, exist_ok=True)
    for name in request.names:
        make(CONTENDERS[name], place, request.images, SHARDS)
    name = " / ".join(request.names)
    for turn in range(request.repeat):
        for order in (cores, cores[::-1]):
            try:
                mine, other = duel(request.names, order, place, request.images)
            except RuntimeError as error:  # what ran before is shown all the same
                note(f"{name}: {error}")
                continue
            results.add(request.results, PART, name, {"cpu_ms": mine, "other_cpu_ms": other})
            note(f"{turn + 1}: {name}: CPU {mine:.2f} / {other:.2f} ms, {mine / other:.3f}")
    results.show_each(request.results, PART, table)


if __name__ == "__main__":
    main()
