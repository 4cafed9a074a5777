"""Ours against the rivals, in turn, on the same pictures and weights.

    python -m benchmarks.throughput --images 2000 12000 --repeat 3 --output docs/throughput

Each contender runs as a process of its own over a small and a large input; what is compared is the
marginal cost between the two, so that start-up does not count. Writes DIR.json and DIR.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.pictures import write_records
from pipeline.demo import build_seeded_model

Command = Callable[[str, str], list[str]]


def ours(*flags: str) -> Command:
    """The job as users run it."""
    return lambda records, model: [
        *(sys.executable, "-m", "pipeline.extract", "--input", records, "--model", model),
        *("--if_exists", "overwrite", "--output", f"{tempfile.gettempdir()}/benchmark-out"),
        *flags,
    ]


def rival(*flags: str) -> Command:
    """A loop of benchmarks/rivals.py."""
    return lambda records, model: [
        *(sys.executable, "-m", "benchmarks.rivals", *flags, "--records", records, "--model"),
        model,
    ]


CONTENDERS: dict[str, Command] = {
    "ours, bfloat16": ours("--precision", "bfloat16", "--jpeg_scaling", "off"),
    "tf.data + frozen, bfloat16": rival("frozen", "--precision", "bfloat16"),
    "tf.data + frozen, bfloat16, cheapest pixels": rival(
        "frozen", "--precision", "bfloat16", "--cheapest"
    ),
    "ours, float32": ours("--jpeg_scaling", "off"),
    "ours, float32, embedding alone": ours("--jpeg_scaling", "off", "--outputs", "embedding"),
    "tf.data + frozen, float32": rival("frozen"),
    "tf.data + frozen, float32, cheapest pixels": rival("frozen", "--cheapest"),
    "tf.data + signature, float32": rival("signature"),
}


def measure(command: list[str]) -> dict[str, float]:
    """Wall seconds, CPU seconds and peak memory (MiB) of one process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    line = process.stdout.read().splitlines()[-1]
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    told = json.loads(line)
    return {
        "images": told["images"],
        "seconds": seconds,
        "cpu": usage.ru_utime + usage.ru_stime,
        "peak_mib": usage.ru_maxrss / 1024,
    }


def marginal(small: dict[str, float], large: dict[str, float]) -> dict[str, float]:
    """What each further image costs, and the large run's peak."""
    images = large["images"] - small["images"]
    return {
        "images_per_second": images / (large["seconds"] - small["seconds"]),
        "cpu_ms_per_image": 1000 * (large["cpu"] - small["cpu"]) / images,
        "peak_mib": large["peak_mib"],
        "small_run_seconds": small["seconds"],
    }


def summarise(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Median, least and most of each figure."""
    return {
        name: {
            "median": statistics.median(run[name] for run in runs),
            "least": min(run[name] for run in runs),
            "most": max(run[name] for run in runs),
        }
        for name in runs[0]
    }


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    rows = [
        "| | images/s (least to most) | CPU ms/image | peak MiB | small run, s |",
        "|---|---|---|---|---|",
    ]
    for name, figures in results.items():
        rate = figures["images_per_second"]
        rows.append(
            f"| {name} | {rate['median']:.0f} ({rate['least']:.0f} to {rate['most']:.0f}) "
            f"| {figures['cpu_ms_per_image']['median']:.2f} "
            f"| {figures['peak_mib']['median']:.0f} "
            f"| {figures['small_run_seconds']['median']:.1f} |"
        )
    return "\n".join(rows)


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs=2, default=(2000, 12000))
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", action="append", help="a part of a contender's name")
    parser.add_argument("--model", help="a TF2 SavedModel; default nasnet_mobile, seeded")
    parser.add_argument("--work", default=f"{tempfile.gettempdir()}/benchmark")
    parser.add_argument("--output", help="where to write, without an ending")
    request = parser.parse_args()
    work = Path(request.work)
    model = request.model or str(work / "nasnet_mobile")
    build_seeded_model(model)
    records = [write_records(work, images, request.shards) for images in request.images]
    chosen = {
        name: command
        for name, command in CONTENDERS.items()
        if not request.only or any(part in name for part in request.only)
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    for turn in range(request.repeat):
        for name, command in chosen.items():
            small, large = (measure(command(pattern, model)) for pattern in records)
            runs[name].append(marginal(small, large))
            rate = runs[name][-1]
            sys.stderr.write(f"{turn + 1}: {name}: {rate['images_per_second']:.0f} images/s\n")
    results = {name: summarise(figures) for name, figures in runs.items()}
    print(table(results))
    if request.output:
        told = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": {name: version(name) for name in ("tensorflow", "apache-beam", "pillow")},
            "images": request.images,
            "repeat": request.repeat,
            "results": results,
        }
        Path(f"{request.output}.json").write_text(json.dumps(told, indent=1) + "\n")
        Path(f"{request.output}.md").write_text(table(results) + "\n")


if __name__ == "__main__":
    main()
