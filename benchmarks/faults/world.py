"""What every fault needs: pictures, models, the job as a call and as a process, its rows."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import logging
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from formats.example import serialize_example
from formats.tfrecord import write_record

ROOT = Path(__file__).parents[2]
COMMITTED = {"manifest.json", "_SUCCESS"}


@dataclass(frozen=True)
class Row:
    """One line of the table: what was done, what came of it, and whether that is what must."""

    fault: str
    figure: str
    reached: bool

    def markdown(self) -> str:
        """The line."""
        return f"| {self.fault} | {self.figure} | {'yes' if self.reached else '**no**'} |"


@dataclass
class World:
    """A folder to work in, how often to try, and the random moments.

    `model`: a small exported network; made in `folder` where none is given. `corpus`: a folder of
    real and damaged pictures with a manifest.csv, None for none.
    """

    folder: Path
    times: int = 20
    seed: int = 0
    model: str | None = None
    corpus: Path | None = None
    random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model = self.model or network(self.folder / "model", seed=0)

    @property
    def stride(self) -> int:
        """Of places that are tried one by one, each so-many-th: all where `times` is 20."""
        return max(1, 20 // self.times)

    def fresh(self, name: str) -> Path:
        """A folder of that name that is not there, below which nothing is."""
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        return path


def network(directory: Path, seed: int) -> str:
    """A network of one cell with seeded weights at `directory`, unless it is there already."""
    from models.catalog import ONE_CELL
    from models.checkpoint import seeded
    from models.export import export_saved_model
    from models.networks import variable_shapes

    if not directory.exists():
        values = seeded(variable_shapes(ONE_CELL, "classification"), seed)
        export_saved_model(ONE_CELL, values, "classification", str(directory))
    return str(directory)


@functools.cache
def picture(number: int) -> bytes:
    """A JPEG of noise unlike any other, 2 kB."""
    pixels = np.random.default_rng(number).integers(0, 255, (30, 40, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def write_files(folder: Path, count: int) -> Path:
    """`count` JPEG files in the new `folder`."""
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number}.jpg").write_bytes(picture(number))
    return folder


def write_shards(folder: Path, numbers: Sequence[int], shards: int) -> str:
    """Examples of the pictures `numbers` with an `id`, in that order, dealt to TFRecord files."""
    folder.mkdir(parents=True)
    streams = [open(folder / f"x-{i:05}-of-{shards:05}", "wb") for i in range(shards)]  # noqa: SIM115
    for at, number in enumerate(numbers):
        features = {"image/encoded": picture(number), "id": b"%d" % number}
        write_record(streams[at % shards], serialize_example(features))
    for stream in streams:
        stream.close()
    return str(folder)


# --- the job -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ran:
    """A finished run: exit code, its JSON line (None for none) and stderr."""

    code: int
    line: Mapping[str, Any] | None
    stderr: str

    @property
    def short(self) -> bool:
        """Whether it told what was wrong in one line under 1 kB, without a traceback."""
        lines = [line for line in self.stderr.splitlines() if not line.startswith("WARNING")]
        return len(lines) == 1 and len(lines[0]) < 1024


def words(flags: Mapping[str, Any]) -> list[str]:
    """`flags` as a command line; a list repeats its flag, and True stands alone."""
    argv: list[str] = []
    for name, value in flags.items():
        for item in value if isinstance(value, list) else [value]:
            argv += [f"--{name}"] if item is True else [f"--{name}", str(item)]
    return argv


def call(**flags: Any) -> Ran:
    """The job in this process, which has loaded the model before."""
    from pipeline import extract

    out, err = io.StringIO(), io.StringIO()
    # As the process does it, in place of whatever a library or a test has set up.
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(logging.getLogger(), "handlers", [extract.log_handler(err)]),
    ):
        code = extract.main(words(flags))
    return Ran(code, _line(out.getvalue()), err.getvalue())


def start(env: Mapping[str, str] | None = None, **flags: Any) -> subprocess.Popen[str]:
    """The job as a process, in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.extract", *words(flags)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 300) -> Ran:
    """What became of it. Raises TimeoutExpired."""
    out, err = process.communicate(timeout=timeout)
    return Ran(process.returncode, _line(out), err)


def _line(out: str) -> Mapping[str, Any] | None:
    lines = out.splitlines()
    return json.loads(lines[-1]) if lines else None


# --- what it left ------------------------------------------------------------------------------


def manifest(output: Path) -> dict[str, Any] | None:
    """The manifest of `output`, None where nothing was published."""
    path = output / "manifest.json"
    return json.loads(path.read_text()) if path.exists() else None


def published(output: Path) -> list[dict[str, Any]]:
    """Every row that the manifest names, with its `kind`."""
    rows = []
    for entry in (manifest(output) or {"files": []})["files"]:
        for row in pq.read_table(output / entry["path"]).to_pylist():
            rows.append({"kind": entry["path"].partition("/")[0], **row})
    return rows


def row_hashes(output: Path) -> list[tuple[str, str]]:
    """Key and digest of each published row, sorted; where it was read from does not count."""
    found = []
    for row in published(output):
        told = {k: v for k, v in row.items() if k not in ("key", "source", "record_index")}
        if row["kind"] == "features":
            for name in ("embedding", "logits"):
                told[name] = np.asarray(row[name], np.float32).tobytes().hex()
        text = json.dumps(told, sort_keys=True)
        found.append((row["key"], hashlib.sha256(text.encode()).hexdigest()))
    return sorted(found)


def vectors(output: Path) -> dict[str, np.ndarray]:
    """Key to embedding and logits, one float32 vector."""
    return {
        row["key"]: np.asarray(row["embedding"] + row["logits"], np.float32)
        for row in published(output)
        if row["kind"] == "features"
    }


def leftovers(output: Path) -> list[str]:
    """What lies in `output` that its manifest does not name."""
    named = COMMITTED | {entry["path"] for entry in (manifest(output) or {"files": []})["files"]}
    return sorted(set(files_below(output)) - named)


def files_below(folder: Path) -> Iterator[str]:
    """Every file below `folder`, relative to it, hidden ones too."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield str(path.relative_to(folder))


def whole(output: Path) -> bool:
    """Whether `pipeline.verify` finds nothing wrong."""
    from formats.verification import verify

    return manifest(output) is not None and verify(str(output), lambda _: None)["status"] == "ok"
