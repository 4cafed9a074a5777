"""Two Python workers against one on a Flink cluster of this machine, one core each.

    python -m benchmarks.scaling --images 1500 4500 --repeat 3

In each round one worker and then two run the job over a small and a large input; what is compared
is the marginal cost between the two inputs, so that start-up does not count. Each round goes to
docs/performance.json, and the table of all of them to docs/ENGINES.md.
Whatever else uses a core during a round is in its figure: the load is told with it.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.pictures import write_records
from engines import flink
from pipeline.demo import build_seeded_model

# Units of work go to workers by the hash of a random key. With 24 of them the larger share is 14 in
# the median, which bounds the ratio of two workers by 24/14 = 1.71; with 480 it is 247, and 1.94.
SHARDS = 480
PART = "scaling"


def seconds(flags: list[str], model: str, records: str, output: Path) -> float:
    """How long the job takes over `records`, its wait for the cluster included."""
    command = [
        *(sys.executable, "-m", "pipeline.extract", f"--input={records}", f"--model={model}"),
        *(f"--output={output}", "--if_exists=overwrite", "--jpeg_scaling=off"),
        *("--inference_threads=1", *flags),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])


def rate(workers: int, model: str, inputs: dict[int, str], folder: Path) -> tuple[float, float]:
    """Marginal images/s of `workers` workers, and the seconds that a job of no image would take."""
    cluster = flink.up(
        folder / f"flink-{workers}",
        task_managers=workers,
        slots=1,
        parallelism=workers,
        cores_each=1,
    )
    try:
        took = {
            count: seconds(cluster.flags, model, records, folder / "out")
            for count, records in inputs.items()
        }
    finally:
        cluster.down()
    small, large = sorted(took)
    marginal = (large - small) / (took[large] - took[small])
    return marginal, took[small] - small / marginal


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a model directory; default: nasnet_mobile, seeded")
    parser.add_argument("--images", type=int, nargs=2, default=[1500, 4500])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--fresh", action="store_true", help="forget earlier rounds")
    parser.add_argument("--results", type=Path, default=results.ROOT, help="where docs/ lies")
    parser.add_argument("--folder", type=Path, help="for inputs and logs, default: a temporary one")
    request = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the cluster is brought down
    with tempfile.TemporaryDirectory(prefix="scaling-") as scratch:
        folder = request.folder or Path(scratch)
        model = request.model or str(folder / "nasnet_mobile")
        build_seeded_model(model)
        inputs = {count: write_records(folder / "in", count, SHARDS) for count in request.images}
        if request.fresh:
            results.forget(request.results, PART, ["flink"])
        for _ in range(request.repeat):
            one, idle = rate(1, model, inputs, folder)
            two, _ = rate(2, model, inputs, folder)
            run = {"one": one, "two": two, "ratio": two / one, "start_up": idle}
            results.add(request.results, PART, "flink", run)
        results.show_each(request.results, PART, lambda runs: table(runs["flink"]))


def table(runs: list[dict[str, Any]]) -> str:
    """The rounds and their median, in Markdown."""
    lines = [
        "| one worker, images/s | two, images/s | ratio | start-up, s | load |",
        "|---|---|---|---|---|",
    ]
    for run in runs:
        lines.append(
            f"| {run['one']:.1f} | {run['two']:.1f} | {run['ratio']:.2f} | {run['start_up']:.0f} "
            f"| {run['of']['load']} |"
        )
    median = results.median(runs, "ratio")
    return "\n".join([*lines, "", f"Median ratio {median:.2f}. {results.caption(runs)}"])


if __name__ == "__main__":
    main()
