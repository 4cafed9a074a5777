"""What more images, more shards and smaller files cost: memory and CPU an image, ours alone.

    python -m benchmarks.growth --only memory
    python -m benchmarks.growth --only images shards files --repeat 1

memory: the peak of the process tree at 2,000 and 20,000 images. images: what an image costs from
500 to 2,000 and from 2,000 to 50,000. shards: 10,000 images in 1 file and in 500. files: the same
as 10,000 JPEG files against 4 TFRecords. Start-up is taken off by a run over 500 images. Every
second turn goes backwards, so that no case always comes first. Runs are added to
docs/performance.json.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.pictures import write_files, write_records
from benchmarks.processes import note, run
from benchmarks.throughput import Place, ours

PART = "growth"
_MORE = ("images", "seconds", "cpu")  # of which a larger run takes more
BASE = 500  # images
IMAGES = (2000, 20000, 50000, 10000)  # small, large, huge, and of the other cases


def inputs(
    small: int, large: int, huge: int, many: int
) -> dict[str, tuple[str, Callable[..., str], tuple[int, int]]]:
    """Case -> what it belongs to, what makes its input below a folder, (images, shards)."""
    return {
        "base": ("memory images shards files", write_records, (BASE, 4)),
        "small": ("memory images", write_records, (small, 4)),
        "large": ("memory", write_records, (large, 4)),
        "huge": ("images", write_records, (huge, 4)),
        "one_shard": ("shards", write_records, (many, 1)),
        "500_shards": ("shards", write_records, (many, 500)),
        "few_records": ("files", write_records, (many, 4)),
        "many_files": ("files", write_files, (many, 0)),
    }


def costs(runs: results.Runs) -> results.Runs:
    """Images/s, CPU ms an image and the share of the cores that was busy, of each run but the
    base's, whose start-up is taken off: that of the base's run nearest in time, within an hour.
    """

    def cost(one: dict[str, Any]) -> dict[str, Any] | None:
        off = results.nearest(one, runs.get("base", []))
        if off is None:
            return None
        images, seconds, cpu = (one[figure] - off[figure] for figure in _MORE)
        return {
            **one,
            "images_per_second": images / seconds,
            "cpu_ms": 1000 * cpu / images,
            "busy": cpu / seconds / one["of"]["cores"],
        }

    rest = {name: list(map(cost, found)) for name, found in runs.items() if name != "base"}
    return {name: [one for one in found if one] for name, found in rest.items()}


def table(runs: results.Runs) -> str:
    """What was measured, in Markdown."""
    rows = [
        "| | images | images/s, start-up taken off | CPU ms an image | cores busy | peak MiB |",
        "|---|---|---|---|---|---|",
    ]
    for name, cost in costs(runs).items():
        found = runs[name]
        busy = results.spread(cost, "busy", 2)
        rows.append(
            f"| {name.replace('_', ' ')} | {found[-1]['images']} "
            f"| {results.spread(cost, 'images_per_second')} | {results.spread(cost, 'cpu_ms', 2)} "
            f"| {busy} | {results.spread(found, 'peak_mib')} |"
        )
    every = [one for found in runs.values() for one in found]
    return "\n".join([*rows, "", results.caption(every)])


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cases = ("memory", "images", "shards", "files")
    parser.add_argument("--only", nargs="*", default=list(cases), choices=cases)
    parser.add_argument("--images", type=int, nargs=4, default=IMAGES)
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--fresh", action="store_true", help="forget earlier runs of these")
    parser.add_argument("--make", action="store_true", help="inputs and models only, and no run")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "benchmark")
    parser.add_argument("--results", type=Path, default=results.ROOT, help="where docs/ lies")
    request = parser.parse_args()
    place = Place(request.work)
    commands = {}
    for name, (belongs, write, (images, shards)) in inputs(*request.images).items():
        if set(belongs.split()) & set(request.only):
            folder = place.folder / f"shards-{shards}"
            folder.mkdir(parents=True, exist_ok=True)
            pattern = write(folder, images, shards) if shards else write(folder, images)
            commands[name] = ours("--precision", request.precision)(place, pattern)
    if request.make:
        return
    if request.fresh:
        results.forget(request.results, PART, commands)
    for turn in range(request.repeat):
        for name, command in list(commands.items())[:: -1 if turn % 2 else 1]:
            shutil.rmtree(place.output, ignore_errors=True)
            told = run(command, limit=3600)
            if told["failures"]:
                raise SystemExit(f"{name}: {told['failures']} pictures failed, which cost no model")
            kept = {figure: told[figure] for figure in ("images", "seconds", "cpu", "peak_mib")}
            results.add(request.results, PART, name, {**kept, "precision": request.precision})
            note(f"{name}: {kept['seconds']:.1f} s, {kept['peak_mib']:.0f} MiB")
    results.show_each(request.results, PART, table)


if __name__ == "__main__":
    main()
