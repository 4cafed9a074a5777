"""An output held against its manifest: every file, every page, every row."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import pyarrow as pa

from formats import table
from formats.digests import key_digest, repeated_rows
from formats.manifest import check_fields, check_version
from formats.parts import FAILURES, FEATURES, PartFile, open_part, sha256_of
from formats.records import MESSAGE_LIMIT, one_line
from storage import files, steady
from storage.errors import RequestError

_PATH = re.compile(rf"({FEATURES}|{FAILURES})/[^/\\\x00-\x1f]+\.parquet")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_STAGES = ("read", "decode", "infer")
_COPY_BYTES = 1 << 20
_ROWS = 1024  # rows held at once
_TOLD = 20  # problems of one kind in one file that get a line each
_READ_ERRORS = (OSError, pa.ArrowException, ValueError, KeyError, TypeError, MemoryError)

Tell = Callable[[str], object]


def verify(output: str, tell: Tell) -> dict[str, Any]:
    """Hold the files of `output` against its manifest; `tell` gets a line for each problem.

    Presence, size, SHA-256, page checksums, rows, one schema for all files of a kind, keys unique
    over features and failures together, finite vectors of the right width, counts and reasons.
    Returns {"status": "ok" or "damaged", "output", "files", "images", "features", "failures",
    "problems"}; the three counts are of rows that could be read. Memory: 16 bytes a row, and a
    few rows. Raises RequestError where `output` is no output at all.
    """
    problems = 0

    def problem(text: str) -> None:
        nonlocal problems
        problems += 1
        tell(one_line(text))

    manifest = _manifest(output, problem)
    parts: list[PartFile] = []
    if manifest is not None:
        check = _Check(output, manifest, problem)
        parts = check.parts()
    counts = {
        kind: sum(part.rows for part in parts if part.kind == kind) for kind in (FEATURES, FAILURES)
    }
    return {
        "status": "damaged" if problems else "ok",
        "output": output,
        "files": len(parts),
        "images": sum(counts.values()),
        **counts,
        "problems": problems,
    }


def _manifest(output: str, problem: Tell) -> dict[str, Any] | None:
    """The manifest, None (and a problem) where what lies there is one no longer."""
    path = files.join(output, "manifest.json")
    if not files.is_file(path):
        raise RequestError(
            f"{output}: no output of this program, it has no manifest.json; give the --output of "
            "a run that was published"
        )
    try:
        manifest = json.loads(steady.read_bytes(path))
    except (ValueError, RecursionError) as error:
        if not any(files.occupied(files.join(output, kind)) for kind in (FEATURES, FAILURES)):
            raise RequestError(f"{path}: not a manifest ({error})") from None
        problem(f"manifest.json: cannot be read as JSON ({error})")
        return None
    check_version(path, manifest)
    wrong = _wrong_shape(manifest)
    if wrong:
        problem(f"manifest.json: {wrong}")
        return None
    return dict(manifest)


def _wrong_shape(manifest: Mapping[str, Any]) -> str | None:
    try:
        check_fields(manifest)
        [int(manifest["counts"][name]) for name in ("images", FEATURES, FAILURES)]
        [int(count) for count in manifest["failures_by"].values()]
        widths = {str(name): int(width) for name, width in manifest["model"]["outputs"].items()}
        if not widths:
            raise ValueError("model.outputs names no vector")
        asked = (manifest.get("options") or {}).get("outputs") or []
        if not isinstance(asked, list) or not set(asked) <= set(widths):
            raise ValueError(f"options.outputs {asked!r} is no list of the model's vectors")
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        return f"its fields are not those of a manifest ({type(error).__name__}: {error})"
    paths = [entry["path"] for entry in manifest["files"]]
    for path in paths:
        if not _PATH.fullmatch(path):
            return f"it names {path[:200]!r}, which is no data file of an output"
    twice = [path for path, count in Counter(paths).items() if count > 1]
    return f"it names {twice[0]} twice" if twice else None


class _Check:
    def __init__(self, output: str, manifest: Mapping[str, Any], problem: Tell):
        self._output = output
        self._manifest = manifest
        self._problem = problem
        self._widths: Mapping[str, int] = manifest["model"]["outputs"]
        asked = (manifest.get("options") or {}).get("outputs")
        self._vectors = tuple(asked or self._widths)  # that were to be written
        self._schemas: dict[str, tuple[str, pa.Schema]] = {}  # kind -> first file and its schema

    def parts(self) -> list[PartFile]:
        """Every file that could be opened, with the rows that could be read; problems are told."""
        found = [part for entry in self._manifest["files"] if (part := self._file(entry))]
        self._repeated(found)
        counts = {"images": sum(part.rows for part in found)}
        for kind in (FEATURES, FAILURES):
            counts[kind] = sum(part.rows for part in found if part.kind == kind)
        for name, count in counts.items():
            if (told := self._manifest["counts"][name]) != count:
                self._problem(f"manifest.json: counts.{name} is {told}, the files hold {count}")
        reasons: Counter[str] = Counter()
        for part in found:
            reasons.update(part.reasons)
        told_reasons = Counter(self._manifest["failures_by"])
        for reason in sorted(set(reasons) | set(told_reasons)):
            if reasons[reason] != told_reasons[reason]:
                self._problem(
                    f"manifest.json: failures_by has {told_reasons[reason]} of {reason}, the files "
                    f"hold {reasons[reason]}"
                )
        return found

    def _file(self, entry: Mapping[str, Any]) -> PartFile | None:
        path = entry["path"]
        try:
            size, sha256 = self._digest(path)
        except FileNotFoundError:
            self._problem(f"{path}: missing")
            return None
        except OSError as error:
            self._problem(f"{path}: cannot be read ({error})")
            return None
        if size != entry["bytes"]:
            self._problem(f"{path}: {size} bytes, the manifest tells of {entry['bytes']}")
        if sha256 != entry["sha256"]:
            self._problem(f"{path}: sha256 {sha256}, the manifest tells of {entry['sha256']}")
        rows, keys = 0, bytearray()
        reasons: Counter[str] = Counter()
        try:
            with open_part(self._output, path) as part:
                self._schema(path, part.schema_arrow)
                for batch in part.iter_batches(_ROWS, use_threads=False):
                    self._batch(path, batch, rows, reasons)
                    rows += batch.num_rows
                    for key in batch.column("key").to_pylist():
                        keys += key_digest(key or "")
        except _READ_ERRORS as error:
            self._problem(f"{path}: row {rows} and on cannot be read ({error})")
        if rows != entry["rows"]:
            self._problem(f"{path}: {rows} rows, the manifest tells of {entry['rows']}")
        return PartFile(path, rows, sha256, bytes(keys), size, dict(reasons))

    def _digest(self, path: str) -> tuple[int, str]:
        size = files.size_of(files.join(self._output, path))
        return size, sha256_of(self._output, path, size)

    def _schema(self, path: str, schema: pa.Schema) -> None:
        kind = path.partition("/")[0]
        first, expected = self._schemas.setdefault(kind, (path, schema))
        if not schema.equals(expected):
            differs = [f.name for f in schema if f not in expected] or [
                name for name in expected.names if name not in schema.names
            ]
            self._problem(f"{path}: another schema than {first} ({', '.join(differs) or 'order'})")
        if kind == FAILURES and not schema.equals(table.FAILURE_SCHEMA):
            self._problem(f"{path}: not the schema of failures")
        missing = [name for name in self._vectors if name not in schema.names]
        if kind == FEATURES and missing:
            self._problem(f"{path}: has no {' and no '.join(missing)}, which the run was to write")
        fingerprint = (schema.metadata or {}).get(b"model_fingerprint", b"").decode()
        # Failures hold no vectors, and those of a run by another model may stay.
        if kind == FEATURES and fingerprint != self._manifest["model"].get("fingerprint"):
            self._problem(f"{path}: rows of the model {fingerprint or '(none told)'}")

    def _batch(self, path: str, batch: pa.RecordBatch, start: int, reasons: Counter[str]) -> None:
        batch.validate(full=True)
        rows = batch.num_rows
        wrong = np.zeros(rows, bool)
        for field in batch.schema:
            if not field.nullable and batch.column(field.name).null_count:
                wrong |= np.asarray(batch.column(field.name).is_null())
        if path.startswith(f"{FAILURES}/"):
            for at, row in enumerate(batch.to_pylist()):
                reasons[f"{row['stage']}/{row['error_class']}"] += 1
                wrong[at] |= row["stage"] not in _STAGES
                wrong[at] |= len(row["message"] or "") >= MESSAGE_LIMIT
                wrong[at] |= bool(row["sha256"]) and not _SHA256.fullmatch(row["sha256"])
            self._rows(path, start, wrong, "holds what no failure does")
            return
        digests = batch.column("sha256").to_pylist()
        wrong |= np.array([not _SHA256.fullmatch(digest or "") for digest in digests], bool)
        for name in ("width", "height"):
            wrong |= ~np.array([(side or 0) >= 1 for side in batch.column(name).to_pylist()], bool)
        self._rows(path, start, wrong, "holds no digest or size of a picture")
        for name in {*self._widths, "embedding", "logits", "top_scores"} & set(batch.schema.names):
            expected = self._widths.get(name)
            bad = _bad_vectors(batch.column(name), expected)
            wide = f" of width {expected}" if expected else ""
            self._rows(path, start, bad, f"{name} is no finite vector{wide}")

    def _rows(self, path: str, start: int, wrong: np.ndarray, what: str) -> None:
        at = np.flatnonzero(wrong)
        for row in at[:_TOLD].tolist():
            self._problem(f"{path}: row {start + row}: {what}")
        if len(at) > _TOLD:
            self._problem(
                f"{path}: {len(at) - _TOLD} more rows up to {start + int(at[-1])}: {what}"
            )

    def _repeated(self, parts: list[PartFile]) -> None:
        repeated = repeated_rows([part.keys for part in parts])
        rows = [(parts[index].path, row) for index, found in repeated.items() for row in found]
        for path, row in rows[:_TOLD]:
            self._problem(f"{path}: row {row}: its key stands more than once")
        if len(rows) > _TOLD:
            self._problem(f"{len(rows) - _TOLD} more rows whose key stands more than once")


def _bad_vectors(column: pa.Array, width: int | None) -> np.ndarray:
    """Which rows of a list column are null, of another width than `width`, or not finite."""
    kind = column.type
    bad = np.asarray(column.is_null())
    if pa.types.is_fixed_size_list(kind):
        lengths = np.full(len(column), kind.list_size)
    elif pa.types.is_list(kind):
        lengths = np.asarray(column.value_lengths().fill_null(0))
    else:
        return np.ones(len(column), bool)
    if width is not None:
        bad = bad | (lengths != width)
    values = column.flatten()
    if not pa.types.is_floating(values.type):
        return np.ones(len(column), bool)
    present = np.where(np.asarray(column.is_null()), 0, lengths)
    owner = np.repeat(np.arange(len(column)), present)
    unfit = ~np.isfinite(np.asarray(values.fill_null(float("nan"))))
    return cast(np.ndarray, bad | (np.bincount(owner[unfit], minlength=len(column)) > 0))
