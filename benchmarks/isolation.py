"""What decoding in processes of its own costs, against the job's threads, in turn.

    python -m benchmarks.isolation decode
    python -m benchmarks.isolation job --model DIR [--precision bfloat16] --images 3000

`decode` decodes the same 500 x 375 JPEGs on one thread a core; `job` runs the whole job in this
process, its model loaded once. Each round runs both ways, the first alternating; what counts is the
median of the rounds' ratios, above 1 where processes are slower, of seconds and of CPU seconds (the
decoding processes' too), which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.pictures import crops, write_records
from formats.image import Preprocessing, decode_image
from formats.isolation import DecodeProcesses, Limits
from transforms.lookahead import cpu_threads

HOW = Preprocessing(224, jpeg_scaling="off")
WAYS = ("none", "process")


def cpu_seconds() -> float:
    """CPU seconds of this process and of all below it, those that have ended too."""
    parents, spent = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            parents[path.parent.name] = fields[1]
            spent[path.parent.name] = sum(map(int, fields[11:15]))
    ours = {str(os.getpid())}
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return sum(spent[pid] for pid in ours) / os.sysconf("SC_CLK_TCK")


def rounds(run: Callable[[str], None], count: int) -> dict[str, dict[str, float]]:
    """Medians of `count` rounds of `run` by way, in seconds, and of the ratio process : none."""
    for way in WAYS:
        run(way)  # warm
    seen: dict[str, dict[str, list[float]]] = {
        unit: {way: [] for way in WAYS} for unit in ("seconds", "cpu_seconds")
    }
    for number in range(count):
        for way in WAYS if number % 2 else reversed(WAYS):
            cpu, start = cpu_seconds(), time.perf_counter()
            run(way)
            seen["seconds"][way].append(time.perf_counter() - start)
            seen["cpu_seconds"][way].append(cpu_seconds() - cpu)
        told = {unit: [round(by[way][-1], 2) for way in WAYS] for unit, by in seen.items()}
        sys.stderr.write(f"round {number + 1}: {told}\n")
    return {unit: summary(by["none"], by["process"]) for unit, by in seen.items()}


def summary(none: list[float], process: list[float]) -> dict[str, float]:
    """Medians, and the least and most of the ratio."""
    ratios = [ours / theirs for ours, theirs in zip(process, none, strict=True)]
    told = {
        "none": statistics.median(none),
        "process": statistics.median(process),
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
    }
    return {name: round(value, 3) for name, value in told.items()}


def decoding(images: int, count: int) -> dict[str, dict[str, float]]:
    """The cost of decoding alone."""
    made = crops()
    pictures = [made[number % len(made)] for number in range(images)]
    processes = DecodeProcesses(HOW, Limits())
    decode = {"none": lambda data: decode_image(data, HOW), "process": processes.decode}

    def run(way: str) -> None:
        for _ in cpu_threads().map(decode[way], pictures):
            pass

    try:
        return rounds(run, count)
    finally:
        processes.close()


def whole_job(images: int, count: int, model: str, precision: str) -> dict[str, dict[str, float]]:
    """The cost in the whole job: TFRecords in, Parquet out."""
    from pipeline import extract

    with tempfile.TemporaryDirectory() as work:
        pattern = write_records(Path(work) / "in", images, 4)

        def run(way: str) -> None:
            argv = ["--input", pattern, "--model", model, "--output", f"{work}/out"]
            argv += ["--if_exists", "overwrite", "--jpeg_scaling", "off"]
            argv += ["--precision", precision, "--decode_isolation", way]
            with contextlib.redirect_stdout(io.StringIO()) as told:
                code = extract.main(argv)
            if code:
                raise RuntimeError(told.getvalue())

        return rounds(run, count)


def main() -> None:
    """Measure one of the two and print it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("decode", "job"))
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--model", help="for the job")
    parser.add_argument("--precision", default="float32")
    request = parser.parse_args()
    if request.part == "decode":
        result = decoding(request.images, request.rounds)
    elif request.model:
        result = whole_job(request.images, request.rounds, request.model, request.precision)
    else:
        parser.error("the job needs --model")
    print(json.dumps({"cores": os.cpu_count(), "images": request.images, **result}))


if __name__ == "__main__":
    main()
