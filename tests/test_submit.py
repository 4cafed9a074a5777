"""--no_wait_until_finish: the launcher hands the job over, and the job commits itself."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import exports
import pyarrow.parquet as pq
import pytest
from pictures import jpeg

ROOT = Path(__file__).parents[1]
ENVIRONMENT = "beam:env:harness_subprocess_python:v1"
WORKER = f"{sys.executable} -m apache_beam.runners.worker.sdk_worker_main"
PATIENCE = 240  # seconds for a job on a busy machine

pytestmark = pytest.mark.engines


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory) -> Iterator[str]:
    """Beam's job service, which runs jobs in processes of its own."""
    folder = tmp_path_factory.mktemp("service")
    port = folder / "port"
    service = "apache_beam.runners.portability.local_job_service_main"
    command = [sys.executable, "-m", service, "--port_file", str(port)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    try:
        wait_for(port.exists, process)
        yield f"localhost:{port.read_text()}"
    finally:
        process.terminate()
        process.wait(30)


def wait_for(there, process=None) -> None:
    for _ in range(PATIENCE * 10):
        if there():
            return
        assert process is None or process.poll() is None
        time.sleep(0.1)
    raise AssertionError("it never came")


def submit(endpoint: str, folder: Path, output: Path, *flags: str) -> subprocess.CompletedProcess:
    model = exports.exported("saved_model", "classification")
    argv = ["--input", str(folder), "--model", str(model), "--output", str(output), *flags]
    argv += ["--runner", "PortableRunner", "--job_endpoint", endpoint, "--no_wait_until_finish"]
    argv += ["--environment_type", ENVIRONMENT, "--environment_config", WORKER]
    return subprocess.run(
        [sys.executable, "-m", "pipeline.extract", *argv],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=PATIENCE,
    )  # fmt: skip


def keys(output: Path) -> list[str]:
    """The keys of the rows that the manifest names."""
    manifest = json.loads((output / "manifest.json").read_text())
    tables = [pq.read_table(output / entry["path"]) for entry in manifest["files"]]
    return sorted(key for table in tables for key in table["key"].to_pylist())


def names(output: Path) -> list[str]:
    found = (path for path in output.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(output)) for path in found)


def test_a_submitted_job_commits_itself_and_can_be_gone_on_from(tmp_path, endpoint):
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for run in (1, 2):
        (folder / f"{run}.jpg").write_bytes(jpeg(40 + run, 30))
        ended = submit(endpoint, folder, output, "--if_exists", "resume")
        line = json.loads(ended.stdout.splitlines()[-1])
        assert (ended.returncode, line["status"]) == (0, "submitted"), ended.stderr[-2000:]
        counts = ("manifest", "images", "features", "failures", "skipped", "images_per_second")
        assert [line[name] for name in counts] == [None] * len(counts)
        wait_for(lambda run=line["run_id"]: run in _text(output / "_SUCCESS"))
        wait_for(lambda: not any(name.startswith("_run-") for name in names(output)))
        told = json.loads((output / "manifest.json").read_text())
        assert told["run_id"] == line["run_id"]
        assert told["run"] == {"images": run, "features": 1, "failures": 0, "skipped": run - 1}
        assert keys(output) == [str(folder / f"{n}.jpg") for n in range(1, run + 1)]
    named = [entry["path"] for entry in told["files"]]
    assert names(output) == sorted([*named, "_SUCCESS", "manifest.json"])


def test_a_submitted_job_with_too_many_failures_publishes_nothing(tmp_path, endpoint):
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    (folder / "bad.jpg").write_bytes(b"nothing")
    ended = submit(endpoint, folder, output)
    line = json.loads(ended.stdout.splitlines()[-1])
    assert (ended.returncode, line["status"]) == (0, "submitted"), ended.stderr[-2000:]
    verdict = output / "_failed" / line["run_id"]
    wait_for((verdict / "manifest.json").exists)
    wait_for(lambda: not (output / "failures").exists() or not any((output / "failures").iterdir()))
    assert keys(verdict) == [str(folder / "bad.jpg")]
    assert not (output / "manifest.json").exists()


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""
