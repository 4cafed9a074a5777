"""Process start to TensorFlow's import, to the first vectors, and to the job's first row in a file.

    python -m benchmarks.startup --networks nasnet_mobile --repeat 5

Every way as a process of its own, in turn; TensorFlow's import is what the others are held against.
None is timed to its exit. The job reads 32 pictures and closes a file after each row.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.pictures import write_records
from benchmarks.processes import note, run
from benchmarks.throughput import Place, ours

PART = "startup"
SIDES = {"nasnet_mobile": 224, "nasnet_large": 331}
ALLOWED = {"nasnet_mobile": 2, "nasnet_large": 6}  # seconds beyond TensorFlow's import

IMPORT = "import tensorflow"
HUB = """
import tensorflow as tf, tensorflow_hub as hub
hub.load({model!r})(tf.zeros([8, {side}, {side}, 3])).numpy()
"""
OURS = """
import numpy as np
from models.loading import LoadSpec, load
load(LoadSpec({prepared!r}))(np.zeros([8, {side}, {side}, 3], np.uint8))
"""
TOLD = """
import json, time
print(json.dumps({{"first_at": time.time()}}))
"""


def beyond(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each run, the seconds from TensorFlow's import to the first row."""
    return [{"seconds": one["first row"] - one["import tensorflow"]} for one in found]


def table(runs: results.Runs) -> str:
    """What was measured, in Markdown."""
    names = ("import tensorflow", "hub.load, a first call", "prepared, a first call", "first row")
    rows = [
        f"| seconds | {' | '.join(names)} | beyond the import | target |",
        "|---|---|---|---|---|---|---|",
    ]
    for network, most in ALLOWED.items():
        found = runs.get(network, [])
        if not found:
            continue
        cells = [results.spread(found, name, 1) for name in names]
        rows.append(
            f"| {network} | {' | '.join(cells)} | {results.spread(beyond(found), 'seconds', 1)} "
            f"| at most {most} |"
        )
    every = [one for found in runs.values() for one in found]
    return "\n".join([*rows, "", results.caption(every)])


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="*", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--fresh", action="store_true", help="forget earlier runs")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "benchmark")
    parser.add_argument("--results", type=Path, default=results.ROOT, help="where docs/ lies")
    request = parser.parse_args()
    place = Place(request.work)
    place.folder.mkdir(parents=True, exist_ok=True)
    records = write_records(place.folder, 32, 1)
    if request.fresh:
        results.forget(request.results, PART, request.networks)
    for _ in range(request.repeat):
        for network in request.networks:
            model, prepared = place.model(network), place.prepared(network)
            given = {"model": model, "prepared": prepared, "side": SIDES[network]}
            figures = {}
            for name, code in (
                ("import tensorflow", IMPORT),
                ("hub.load, a first call", HUB),
                ("prepared, a first call", OURS),
            ):
                command = [sys.executable, "-c", (code + TOLD).format(**given)]
                figures[name] = run(command)["first"]
            shutil.rmtree(place.output, ignore_errors=True)
            job = ours("--rows_per_file", "1", "--precision", request.precision)(place, records)
            job[job.index("--model") + 1] = prepared
            figures["first row"] = run(job, watch=place.output / "features")["first"]
            figures["precision"] = request.precision
            results.add(request.results, PART, network, figures)
            note(f"{network}: first row after {figures['first row']:.1f} s")
    results.show_each(request.results, PART, table)


if __name__ == "__main__":
    main()
