"""The job as a process on a real engine, and its output held against DirectRunner's."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import exports
import pictures
import pytest
from conftest import Ran

from engines.cluster import Cluster
from engines.processes import Process, start, wait_for
from formats.example import serialize_example
from formats.tfrecord import write_record

ROOT = Path(__file__).parents[1]
SECONDS = 300  # for a whole job on a busy machine


def need(*programs: str) -> None:
    """Skip the test where one of `programs` is not there."""
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}, which is not on PATH")


@contextlib.contextmanager
def brought_up(up: Callable[[Path], Cluster], folder: Path) -> Iterator[Cluster]:
    """The cluster that `up` starts in `folder`, ended with the last test of it, and wholly."""
    need("java", "mvn")
    running = up(folder)
    yield running
    running.down()
    assert not [process.name for process in running.processes if process.group()]


def write_input(folder: Path) -> list[Path]:
    """Inputs of both kinds, bad ones too: a folder of 36 files and four shards of records."""
    files, shards = folder / "files", folder / "shards"
    files.mkdir(parents=True)
    shards.mkdir()
    for number in range(34):
        data = pictures.encode(pictures.photo(90, 60, number), "JPEG")
        (files / f"photo-{number:02}.jpg").write_bytes(data)
    (files / "cut.jpg").write_bytes(pictures.truncated(pictures.jpeg()))
    (files / "text.jpg").write_bytes(b"no picture at all")
    for shard in range(4):
        photos = [pictures.photo(50, 70, 100 * shard + n) for n in range(9)]
        records = [
            {"image/encoded": [data], "image/class/label": [number]}
            for number, data in enumerate([*(pictures.encode(p, "PNG") for p in photos), b"none"])
        ]
        stream = io.BytesIO()
        for record in records:
            write_record(stream, serialize_example(record))
        data = bytearray(stream.getvalue())
        data[len(data) // 2] ^= shard == 0  # in the first shard one payload is damaged
        (shards / f"data-{shard:05}-of-00004").write_bytes(data)
    return [files, shards]


def write_many(folder: Path, count: int) -> Path:
    """A folder of `count` large photographs, slow to decode; ten are different."""
    folder.mkdir(parents=True)
    for number in range(10):
        data = pictures.encode(pictures.photo(2400, 1800, number), "JPEG")
        (folder / f"photo-{number:04}.jpg").write_bytes(data)
    for number in range(10, count):
        os.link(folder / f"photo-{number % 10:04}.jpg", folder / f"photo-{number:04}.jpg")
    return folder


def first_file(output: Path) -> Path | None:
    """A closed file of features, once the job has written one."""
    return next(output.glob("features/part-*.parquet"), None)


def start_job(folder: Path, name: str, inputs: Sequence[Path], *flags: str) -> Process:
    """The job with the one-cell model, running; its output is `folder`/`name`."""
    argv = [sys.executable, "-m", "pipeline.extract", f"--output={folder / name}"]
    argv += [f"--model={exports.exported('saved_model', 'classification')}"]
    argv += [f"--input={path}" for path in inputs]
    return start(f"job-{name}", [*argv, *flags], folder, {"PYTHONPATH": str(ROOT)})


def finish(job: Process, folder: Path, seconds: float = SECONDS) -> Ran:
    """Wait for a job that `start_job` began."""
    try:
        wait_for("the job's end", lambda: not job.running(), seconds)
        wait_for("the end of what the job started", lambda: not job.group(), 30)
    finally:
        job.stop()
    assert job.child is not None
    lines = job.log.read_text().splitlines()
    told = next((line for line in reversed(lines) if line.startswith("{")), "null")
    output = folder / job.name.removeprefix("job-")
    return Ran(job.child.returncode, json.loads(told), job.log.read_text(), output)


def run_job(folder: Path, name: str, inputs: Sequence[Path], *flags: str) -> Ran:
    """The job from start to end."""
    return finish(start_job(folder, name, inputs, *flags), folder)


def assert_same_output(ran: Ran, direct: Ran) -> None:
    """Both are whole and hold the same rows, bit for bit, of features and of failures."""
    for one in (ran, direct):
        assert one.code == 0, one.stderr[-4000:]
    counts = ("status", "images", "features", "failures", "skipped")
    assert [ran.line[name] for name in counts] == [direct.line[name] for name in counts]
    assert ran.manifest["failures_by"] == direct.manifest["failures_by"]
    assert ran.manifest["counts"] == direct.manifest["counts"]
    for kind in ("features", "failures"):
        ours, theirs = ran.table(kind), direct.table(kind)
        assert ours.num_rows == theirs.num_rows > 0
        assert ours.schema.names == theirs.schema.names
        assert bits(ours) == bits(theirs)
    assert verified(ran.output) == 0


def bits(table: Any) -> dict[str, tuple[Any, ...]]:
    """Rows by key, each value by its bytes where it is a vector."""
    rows = {}
    for row in table.to_pylist():
        values = (v.hex() if isinstance(v, float) else v for v in row.values())
        rows[row["key"]] = tuple(
            tuple(x.hex() for x in v) if v and isinstance(v, list) else v for v in values
        )
    assert len(rows) == table.num_rows
    return rows


def verified(output: Path) -> int:
    """The exit code of `pipeline.verify`."""
    command = [sys.executable, "-m", "pipeline.verify", str(output)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, timeout=120).returncode
