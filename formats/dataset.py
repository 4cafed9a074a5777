"""An output directory: its data files, what settles them, and the manifest that commits them.

manifest.json            the commit: a reader goes by it alone
_SUCCESS                 written last
features/part-*.parquet  failures/part-*.parquet
_failed/RUN_ID/          what a run left that had too many failures
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from formats import table
from formats.records import Failure, one_line
from storage import files
from storage.errors import RequestError, RunError

FORMAT_VERSION = 1
FEATURES, FAILURES = "features", "failures"
DIGEST_BYTES = 16
ROW_META = "image_features.rows"  # schema metadata: JSON of all that decides what a row holds
_DERIVED = re.compile(r"-(settled-\d+|duplicates-\w+)\.parquet$")  # what `settle` made of others
_BEGAN = re.compile(r"-(\d{8}T\d{6}Z)-")  # in a run's id
_LEFTOVER = re.compile(
    r"(features|failures)/part-[^/]*|((features|failures)/)?\.tmp-[^/]*|_run-[^/]*"
)


@dataclass(frozen=True, slots=True)
class PartFile:
    """A data file that is closed: `path` relative to the output, `bytes` and `sha256` of the file.

    `keys` holds `DIGEST_BYTES` of each row's key, row after row; `reasons` counts
    "stage/error_class" of a failures file.
    """

    path: str
    rows: int
    sha256: str
    keys: bytes
    bytes: int
    reasons: Mapping[str, int] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """`features` or `failures`."""
        return self.path.partition("/")[0]

    def listed(self) -> dict[str, Any]:
        """The file's entry in the manifest."""
        return {"path": self.path, "rows": self.rows, "bytes": self.bytes, "sha256": self.sha256}


def key_digest(key: str) -> bytes:
    """`DIGEST_BYTES` that stand for `key` where millions of keys are held at once."""
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()


def place_digest(source: str, index: int | None) -> bytes:
    """`DIGEST_BYTES` that stand for a place, an image's source and record index."""
    return key_digest(f"{source}\n{index}")


class PartWriter:
    """Writes one data file, batch by batch. Nothing appears before `close`."""

    def __init__(self, output: str, kind: str, name: str, schema: pa.Schema, compression: str):
        self.path = f"{kind}/{name}.parquet"
        self._file = files.NewFile(files.join(output, self.path))
        try:
            self._writer = table.parquet_writer(self._file, schema, compression)  # type: ignore[arg-type]
        except BaseException:  # it has begun to write
            self._file.abort()
            raise
        self._keys: list[bytes] = []
        self._reasons: Counter[str] = Counter()

    @property
    def rows(self) -> int:
        """Rows written so far."""
        return len(self._keys)

    @property
    def bytes(self) -> int:
        """Bytes written so far, without the footer."""
        return self._file.size

    def write(self, batch: pa.RecordBatch) -> None:
        """`batch` as one row group. Raises OSError."""
        self._writer.write_batch(batch, row_group_size=batch.num_rows)
        self._keys += [key_digest(key) for key in batch.column("key").to_pylist()]
        if self.path.startswith(f"{FAILURES}/"):  # a carried column may be named `stage`
            stages, classes = (batch.column(name).to_pylist() for name in ("stage", "error_class"))
            self._reasons.update(f"{s}/{c}" for s, c in zip(stages, classes, strict=True))

    def close(self) -> PartFile:
        """The file as it now stands under its name. Raises OSError, and then nothing does."""
        try:
            self._writer.close()
            self._file.close()
        except BaseException:
            self.abort()
            raise
        return PartFile(
            self.path,
            self.rows,
            self._file.sha256,
            b"".join(self._keys),
            self._file.size,
            dict(self._reasons),
        )

    def abort(self) -> None:
        """Drop what was written."""
        self._writer.is_open = False  # else its finalizer would write on
        self._file.abort()


# --- reading what is there ---------------------------------------------------------------------


def read_manifest(output: str) -> dict[str, Any] | None:
    """The manifest of `output`, None where there is none. RequestError where it cannot be used."""
    path = files.join(output, "manifest.json")
    if not files.is_file(path):
        return None
    try:
        manifest = json.loads(files.read_bytes(path))
        newer = (version := manifest["format_version"]) > FORMAT_VERSION
    except (ValueError, KeyError, TypeError) as error:
        raise RequestError(f"{path}: not a manifest ({error}); its data cannot be read") from None
    if newer:
        raise RequestError(
            f"{path}: format_version {version} is newer than {FORMAT_VERSION}, which this version "
            "reads; use a newer version of this program"
        )
    return dict(manifest)


def open_part(output: str, path: str) -> pq.ParquetFile:
    """The data file at `path` below `output`, page checksums verified on reading."""
    return pq.ParquetFile(
        files.open_read(files.join(output, path)), page_checksum_verification=True
    )


def _data_files(output: str) -> Iterator[str]:
    """Relative paths of all data files under `output`, named by a manifest or not."""
    for kind in (FEATURES, FAILURES):
        folder = files.join(output, kind, "")
        for info in files.list_folder(folder):
            name = info.path[len(folder) :]
            if name.startswith("part-") and name.endswith(".parquet") and "/" not in name:
                yield f"{kind}/{name}"


def whole_parts(output: str) -> Iterator[str]:
    """Those data files that are whole.

    A Parquet file without its footer (of a killed writer) is refused by its reader, and skipped.
    """
    for path in _data_files(output):
        try:
            open_part(output, path).close()
        except pa.ArrowInvalid:
            continue
        yield path


def describe_part(output: str, path: str) -> PartFile:
    """The PartFile of a data file that an earlier run wrote."""
    data = files.read_bytes(files.join(output, path))
    with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as part:
        names = ["key"] + (["stage", "error_class"] if path.startswith(FAILURES) else [])
        columns = part.read(names).to_pydict()
    reasons = Counter(
        f"{s}/{c}"
        for s, c in zip(columns.get("stage", []), columns.get("error_class", []), strict=True)
    )
    return PartFile(
        path,
        len(columns["key"]),
        hashlib.sha256(data).hexdigest(),
        b"".join(map(key_digest, columns["key"])),
        len(data),
        dict(reasons),
    )


# --- resuming ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resumed:
    """What a resumed run starts from.

    `kept`: files that stay; `retired`: files to delete at the commit. `finished`: digests of the
    places of all kept rows, and of the keys of the published ones; `again`: of the places of what
    failed and is to be tried again, whatever its key. `counts`: records that each container is
    known to have had, by source.
    """

    kept: tuple[str, ...] = ()
    retired: tuple[str, ...] = ()
    finished: bytes = b""
    again: bytes = b""
    counts: Mapping[str, int] = field(default_factory=dict)


def resume(
    output: str, manifest: Mapping[str, Any] | None, rows: Mapping[str, Any], retry_failures: bool
) -> Resumed:
    """What of `output` is finished: the manifest's files, and whole ones that a killed run left.

    `rows` is all that decides what a row holds; RequestError, naming the difference, where the
    files there were made otherwise (beside a manifest only its own files count: what a killed run
    left is retired then). With `retry_failures` failures count as not finished.
    """
    published = {entry["path"] for entry in manifest["files"]} if manifest else set()
    superseded = set(manifest.get("superseded", ())) if manifest else set()
    whole = set(whole_parts(output)) - superseded
    lost = published - whole
    if lost:
        raise RequestError(
            f"--output {output}: {min(lost)} is named by the manifest and missing or damaged; "
            "resuming would lose its rows; restore it, or use --if_exists overwrite"
        )
    for entry in manifest["files"] if manifest else ():
        data = files.read_bytes(files.join(output, entry["path"]))
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise RequestError(
                f"--output {output}: {entry['path']} is not what the manifest tells of; resuming "
                "would publish altered rows; restore it, or use --if_exists overwrite"
            )
    kept: list[str] = []
    finished: list[bytes] = []
    again: list[bytes] = []
    counts: dict[str, int] = {}
    for path in sorted(whole):
        if retry_failures and path.startswith(FAILURES):
            with open_part(output, path) as part:
                columns = part.read(["source", "record_index"]).to_pydict()
            again += map(place_digest, columns["source"], columns["record_index"])
            continue
        if path not in published and _DERIVED.search(path):
            continue  # the files it was made of are still there
        if path not in published and manifest and _is_older(path, manifest["run_id"]):
            continue  # of a killed run that was overwritten since, perhaps of other pictures
        with open_part(output, path) as part:
            other = _other_rows(part.schema_arrow.metadata or {}, rows)
            if other and path not in published and manifest:
                continue
            if other:
                raise RequestError(
                    f"--if_exists resume: {files.join(output, path)} was made with another "
                    f"{other}; one output would hold two kinds of rows; use the earlier options, "
                    "another --output or --if_exists overwrite"
                )
            columns = part.read(["key", "source", "record_index"]).to_pydict()
        kept.append(path)
        for source, index in zip(columns["source"], columns["record_index"], strict=True):
            if index is not None:
                counts[source] = max(counts.get(source, 0), index + 1)
        finished += map(place_digest, columns["source"], columns["record_index"])
        if path in published:  # before that, another image of this id may yet come first
            finished += map(key_digest, columns["key"])
    below = len(files.join(output, ""))
    present = {info.path[below:] for info in files.list_folder(output)}
    retired = sorted(path for path in present - set(kept) if _LEFTOVER.fullmatch(path))
    return Resumed(tuple(kept), tuple(retired), b"".join(finished), b"".join(again), counts)


def _is_older(path: str, run_id: str) -> bool:
    """Whether the run that wrote the data file `path` began before the run `run_id`, or with it."""
    began, published = (_BEGAN.search(name) for name in (path, f"-{run_id}"))
    return bool(began and published and began[1] <= published[1])


def _other_rows(metadata: Mapping[bytes, bytes], rows: Mapping[str, Any]) -> str | None:
    """What was different when a file with `metadata` was made: its name, then and now."""
    there = json.loads(metadata.get(ROW_META.encode(), b"{}"))
    for name, value in json.loads(json.dumps(rows)).items():
        if there.get(name) != value:
            return f"{name} ({_short(there.get(name))}, now {_short(value)})"
    return None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."


# --- settling ----------------------------------------------------------------------------------


def repeated_keys(parts: Sequence[PartFile]) -> dict[int, list[int]]:
    """Rows whose key (by digest) stands more than once: index into `parts` -> row numbers."""
    if not parts:
        return {}
    digests = np.concatenate([np.frombuffer(p.keys, ">u8").reshape(-1, 2) for p in parts])
    order = np.lexsort((digests[:, 1], digests[:, 0]))
    equal = (digests[order[1:]] == digests[order[:-1]]).all(axis=1)
    repeated = np.zeros(len(digests), bool)
    repeated[order[1:][equal]] = True
    repeated[order[:-1][equal]] = True
    starts = np.cumsum([0, *(p.rows for p in parts)])
    found: dict[int, list[int]] = {}
    for row in np.flatnonzero(repeated).tolist():
        index = int(np.searchsorted(starts, row, side="right")) - 1
        found.setdefault(index, []).append(row - int(starts[index]))
    return found


def settle(
    output: str, kept: Sequence[PartFile], fresh: Sequence[PartFile], name: str, compression: str
) -> tuple[list[PartFile], list[PartFile]]:
    """`kept` (of earlier runs) and `fresh` (of this one) with each key once in both together.

    Of images with one id the smallest (source, index) keeps it, and the others become failures of
    class DuplicateKey under `source#index`. Copies of one image, which a retried bundle leaves,
    are dropped but one, features before failures. Files that lose rows are written anew as
    `part-NAME-...`.
    """
    parts = [*kept, *fresh]
    repeated = repeated_keys(parts)
    if not repeated:
        return list(kept), list(fresh)
    rows = []  # (key, source, index or -1, whether a failure, part, row, sha256)
    for index, numbers in repeated.items():
        with open_part(output, parts[index].path) as part:
            columns = part.read(["key", "source", "record_index", "sha256"]).take(numbers)
        for number, row in zip(numbers, columns.to_pylist(), strict=True):
            place = -1 if row["record_index"] is None else row["record_index"]
            failed = parts[index].kind == FAILURES
            at = (row["key"], row["source"], place, failed, index, number)
            rows.append((*at, row["sha256"]))
    rows.sort(key=lambda row: row[:6])
    dropped: dict[int, set[int]] = {}
    losers: tuple[list[Failure], list[Failure]] = ([], [])  # of earlier runs, of this one
    for before, row in zip([None, *rows[:-1]], rows, strict=True):
        if before is None or before[0] != row[0]:
            winner = row
            continue
        dropped.setdefault(row[4], set()).add(row[5])
        if row[1:3] != before[1:3]:
            losers[row[4] >= len(kept)].append(_duplicate(row, winner))
    settled: tuple[list[PartFile], list[PartFile]] = ([], [])
    for index, part in enumerate(parts):
        if index in dropped:
            new_name = f"part-{name}-settled-{index}"
            part = _without(output, part, dropped[index], new_name, compression)
        settled[index >= len(kept)].append(part)
    schema = _failure_schema_like(output, parts[-1])
    for side, of, failures in zip(settled, ("earlier", "this"), losers, strict=True):
        if failures:
            new_name = f"part-{name}-duplicates-{of}"
            writer = PartWriter(output, FAILURES, new_name, schema, compression)
            writer.write(table.failures_table(failures, schema))
            side.append(writer.close())
    earlier, new = ([part for part in side if part.rows] for side in settled)
    return earlier, new


def _failure_schema_like(output: str, part: PartFile) -> pa.Schema:
    with open_part(output, part.path) as reader:
        metadata = reader.schema_arrow.metadata or {}
    return table.failure_schema({k.decode(): v.decode() for k, v in metadata.items()})


def _duplicate(row: tuple[Any, ...], winner: tuple[Any, ...]) -> Failure:
    key, source, place, *_, sha256 = row  # as `settle` holds them
    index = None if place < 0 else place
    where = f"{winner[1]}#{winner[2]}" if winner[2] >= 0 else winner[1]
    return Failure(
        f"{source}#{index}" if index is not None else source,
        source,
        index,
        "read",
        "DuplicateKey",
        one_line(f"the id {key[:100]} is that of {where[-300:]} too, which keeps it"),
        sha256,
    )


def _without(
    output: str, part: PartFile, dropped: set[int], name: str, compression: str
) -> PartFile:
    with open_part(output, part.path) as reader:
        writer = PartWriter(output, part.kind, name, reader.schema_arrow, compression)
        start = 0
        for number in range(reader.num_row_groups):
            group = reader.read_row_group(number)
            keep = [start + i not in dropped for i in range(group.num_rows)]
            start += group.num_rows
            for batch in group.filter(pa.array(keep)).combine_chunks().to_batches():
                writer.write(batch)
    return writer.close()


# --- publishing --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Publication:
    """What the commit needs to know of the run besides its files.

    `replaces`: run id of the manifest that was there when the run began, None where none was.
    `described`: the manifest's fields that are known before the run (options, model, ...).
    `kept`: data files of earlier runs that stay (resume), relative paths. `retired`: data files
    of killed runs to delete after the commit.
    """

    output: str
    run_id: str
    if_exists: str
    replaces: str | None
    max_failure_rate: float
    compression: str
    described: Mapping[str, Any]
    kept: tuple[str, ...] = ()
    retired: tuple[str, ...] = ()


def publish(
    run: Publication,
    written: Iterable[PartFile],
    skipped: int,
    timing: Callable[[], Mapping[str, Any]],
) -> dict[str, Any]:
    """Settle, judge and commit a run; returns its verdict. Repeating it changes nothing.

    The verdict: {"status": "complete" or "too_many_failures", "run": {images, features, failures,
    skipped}}. Raises RunError where another run has published in the meantime, and where files are
    gone or changed that this run counts on.
    """
    before = read_manifest(run.output)
    if before and before["run_id"] == run.run_id:  # a retried commit
        _finish(run, before)
    verdict = read_verdict(run.output, run.run_id)
    if verdict:
        if verdict["status"] != "complete":
            _delete(run, _written_by(run))
        return verdict
    fresh = sorted(written, key=lambda part: part.path)
    listed = {entry["path"]: entry for entry in before["files"]} if before else {}
    if before and before["run_id"] != run.replaces and run.if_exists != "overwrite":
        _delete(run, _written_by(run) - set(listed))
        raise RunError(
            f"{run.output}: run {before['run_id']} has published here since this run began; its "
            "data were not touched and this run's were dropped; give another --output"
        )
    gone = {part.path for part in fresh} - _written_by(run)
    if gone:
        raise RunError(
            f"{run.output}: {min(gone)} of this run is gone; another run has replaced it, or a "
            "person has deleted it; nothing was published"
        )
    kept = [describe_part(run.output, path) for path in run.kept]
    for part in kept:
        if part.path in listed and listed[part.path]["sha256"] != part.sha256:
            raise RunError(
                f"{run.output}: {part.path} is not what the manifest tells of; resuming would "
                "vouch for damaged rows; restore it, or use --if_exists overwrite"
            )
    earlier, new = settle(run.output, kept, fresh, run.run_id, run.compression)
    parts = [*earlier, *new]
    counts = _counts(new)
    this_run = {**counts, "images": counts["images"] + skipped, "skipped": skipped}
    if counts["failures"] > run.max_failure_rate * counts["images"]:
        return _reject(run, new, this_run)
    reasons: Counter[str] = Counter()
    for part in parts:
        reasons.update(part.reasons)
    final = {part.path for part in parts}
    superseded = {*listed, *run.kept, *(before["superseded"] if before else ())}
    superseded = (superseded | _written_by(run)) & set(_data_files(run.output)) | set(run.retired)
    manifest = {
        "format_version": FORMAT_VERSION,
        "run_id": run.run_id,
        "status": "complete",
        **run.described,
        "counts": _counts(parts),
        "run": this_run,
        "failures_by": dict(sorted(reasons.items())),
        "files": [part.listed() for part in sorted(parts, key=lambda part: part.path)],
        "superseded": sorted(superseded - final),
        "timing": dict(timing()),
    }
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    files.write_bytes(files.join(run.output, "manifest.json"), text.encode())
    _finish(run, manifest)
    return {"status": "complete", "run": this_run}


def _counts(parts: Iterable[PartFile]) -> dict[str, int]:
    rows = {FEATURES: 0, FAILURES: 0}
    for part in parts:
        rows[part.kind] += part.rows
    return {"images": sum(rows.values()), **rows}


def _finish(run: Publication, manifest: Mapping[str, Any]) -> None:
    """After the manifest: the marker, then what it no longer names."""
    # Not empty: Beam's s3:// client cannot make an empty object.
    files.write_bytes(files.join(run.output, "_SUCCESS"), f"{run.run_id}\n".encode())
    _delete(run, manifest["superseded"])


def _delete(run: Publication, paths: Iterable[str]) -> None:
    files.delete([files.join(run.output, path) for path in sorted(paths)])


def _written_by(run: Publication) -> set[str]:
    """Data files of this run that are there, those of bundles that were tried again too."""
    return {p for p in _data_files(run.output) if f"/part-{run.run_id}-" in p}


def _reject(run: Publication, new: Sequence[PartFile], this_run: dict[str, int]) -> dict[str, Any]:
    """Keep the failures readable under `_failed/RUN_ID/` and take back what the run wrote."""
    folder = files.join(run.output, "_failed", run.run_id)
    verdict = {"status": "too_many_failures", "run": this_run}
    for part in new:
        if part.kind == FAILURES:
            data = files.read_bytes(files.join(run.output, part.path))
            files.write_bytes(files.join(folder, part.path), data)
    files.write_bytes(files.join(folder, "verdict.json"), json.dumps(verdict).encode())
    _delete(run, _written_by(run))
    return verdict


def read_verdict(output: str, run_id: str) -> dict[str, Any] | None:
    """What became of run `run_id`: as `publish` returned it, None where it never committed."""
    manifest = read_manifest(output)
    if manifest and manifest["run_id"] == run_id:
        return {"status": manifest["status"], "run": manifest["run"]}
    path = files.join(output, "_failed", run_id, "verdict.json")
    return dict(json.loads(files.read_bytes(path))) if files.is_file(path) else None
