"""What several test files share: the job called as `main([...])`, and what it wrote."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import exports
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, settings

import models.runtime  # noqa: F401  TensorFlow as the job has it, before a test file imports it
from pipeline import extract
from storage import retries

CORPUS = Path(__file__).parents[2] / "shared" / "corpus"

# Clients of stores ask a cloud's machines who they are: not the network's, not in tests.
os.environ.update(
    AWS_EC2_METADATA_DISABLED="true",
    GCE_METADATA_HOST="127.0.0.1:9",
    GCE_METADATA_IP="127.0.0.1:9",
    NO_GCE_CHECK="true",
)


# A loaded machine is no fault of the code.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    """Nothing is waited for between two tries."""
    monkeypatch.setattr(retries, "FIRST_WAIT", 0)


@dataclass
class Ran:
    """A finished call of the job."""

    code: int
    line: dict[str, Any] | None
    stderr: str
    output: Path

    @property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.output / "manifest.json").read_text())

    def table(self, kind: str) -> pa.Table:
        """All rows of `features` or `failures` that the manifest names, by key."""
        paths = [f["path"] for f in self.manifest["files"] if f["path"].startswith(kind)]
        if not paths:
            return pa.table({"key": pa.array([], pa.string())})
        tables = [
            pq.read_table(self.output / path, page_checksum_verification=True) for path in paths
        ]
        return pa.concat_tables(tables).sort_by("key")

    def rows(self, kind: str) -> dict[str, dict[str, Any]]:
        """The rows of `features` or `failures` by key, each key once."""
        rows = self.table(kind).to_pylist()
        by_key = {row["key"]: row for row in rows}
        assert len(by_key) == len(rows)
        return by_key


@pytest.fixture
def job(tmp_path, capsys, caplog, monkeypatch):
    """Calls `main` with flags by name; by default the one-cell model, into `tmp_path/out`."""

    if Path("/dev/nvidiactl").exists():  # the tests' environment has no CUDA, and would say so
        monkeypatch.setattr("models.loading.GPU_UNSEEN", False)

    def call(*inputs: Path | str, **flags: Any) -> Ran:
        flags = {"model": exports.exported("saved_model", "classification"), **flags}
        flags.setdefault("output", tmp_path / "out")
        argv = [word for path in inputs for word in ("--input", str(path))]
        for name, value in flags.items():
            argv += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        capsys.readouterr()
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="pipeline"):
            code = extract.main(argv)
        out, err = capsys.readouterr()
        lines = out.splitlines()
        line = json.loads(lines[-1]) if lines else None
        return Ran(code, line, err + caplog.text, Path(flags["output"]))

    return call


@pytest.fixture(scope="session")
def corpus() -> Path:
    """The folder of real and damaged pictures, where it is there."""
    if not CORPUS.is_dir():
        pytest.skip(f"no corpus at {CORPUS}")
    return CORPUS
