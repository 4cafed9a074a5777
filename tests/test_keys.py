"""Millions of keys through commit, resume and look-up, in memory that is bounded by bytes a row."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FIXED_MIB = 96  # Arrow's pools, one file's columns, and what is imported late
# The digests are 16 bytes; 9 more find repeats; a resume holds keys twice while they are sorted.
BYTES_A_ROW = {"commit of new rows": 32, "resume": 64, "look-up": 32, "commit of 1000": 32}


@pytest.mark.parametrize(
    "rows", [200_000, pytest.param(10_000_000, marks=pytest.mark.engines)], ids=["200k", "10M"]
)
def test_memory_is_bounded_by_bytes_a_row(tmp_path, rows):
    command = [sys.executable, "-m", "benchmarks.keys", f"--rows={rows}"]
    told = subprocess.run(
        [*command, f"--folder={tmp_path / 'keys'}"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    lines = [json.loads(line) for line in told.stdout.splitlines()]
    phases = {
        line["what"]: line["peak_mib"] - line["imports_mib"] for line in lines if "what" in line
    }
    assert len(phases) == len(BYTES_A_ROW)
    for what, used in phases.items():
        (bound,) = [size for name, size in BYTES_A_ROW.items() if what.startswith(name)]
        assert used <= FIXED_MIB + bound * rows / 2**20, (what, phases)
