"""Runs the faults that are asked for and prints their table, in Markdown."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path

from benchmarks.faults.world import Row, World

FAULTS = ("repeats", "kills", "disks", "inputs", "stores", "fetches")


def main() -> int:
    """Exit 0 where every figure is reached, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("fault", nargs="*", help=f"of {', '.join(FAULTS)}; none: all")
    parser.add_argument("--folder", type=Path, required=True, help="to work in; may be emptied")
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the random moments and orders")
    parser.add_argument("--model", help="none: a network of one cell")
    parser.add_argument("--corpus", type=Path, help="pictures with a manifest.csv of outcomes")
    request = parser.parse_args()
    unknown = set(request.fault) - set(FAULTS)
    if unknown:
        parser.error(f"{', '.join(unknown)}: none of {', '.join(FAULTS)}")
    corpus = request.corpus and request.corpus.resolve()  # keys are whole paths
    world = World(request.folder, request.times, request.seed, request.model, corpus)
    rows: list[Row] = []
    print("| fault | figure | reached |\n|---|---|---|", flush=True)
    for name in request.fault or FAULTS:
        started = time.monotonic()
        for row in importlib.import_module(f"benchmarks.faults.{name}").check(world):
            rows.append(row)
            print(row.markdown(), flush=True)
        print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    return 0 if all(row.reached for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
