"""An output directory: its data files, what settles them, and the manifest that commits them.

manifest.json            the commit: a reader goes by it alone
_SUCCESS                 written last
features/part-*.parquet  failures/part-*.parquet
_failed/RUN_ID/          what a run left that had too many failures
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from formats import table
from formats.digests import (
    DIGEST_BYTES,
    Bytes,
    DigestSet,
    image_digests,
    key_digest,
    key_digests,
    place_digest,
    place_digests,
    repeated_rows,
    standing,
)
from formats.records import Failure, one_line, place_key
from storage import files, steady
from storage.errors import RequestError, RunError
from storage.steady import SteadyStream

FORMAT_VERSION = 1
FEATURES, FAILURES = "features", "failures"
_READERS = 16  # files of a store that are read at once
_BATCH_ROWS = 1 << 14  # rows whose key is held as text at once, for each of them
_COPY_BYTES = 1 << 20
_TOLD, _SHORT = 5, 40  # differences that are told of, and characters of a value in them
ROW_META = "image_features.rows"  # schema metadata: JSON of all that decides what a row holds
_DERIVED = re.compile(r"-((settled|retried)-\d+|duplicates-\w+)\.parquet$")  # made of others
_BEGAN = re.compile(r"-(\d{8}T\d{6}Z)-")  # in a run's id
_PART = re.compile(r"(features|failures)/part-[^/]*\.parquet")
_PLACE = ["source", "record_index"]
_DUPLICATE = "DuplicateKey"
# What is relied on of a manifest, and of each file in it.
_FIELDS: dict[str, type] = {
    "run_id": str,
    "status": str,
    "counts": dict,
    "run": dict,
    "files": list,
}
_ENTRY: dict[str, type] = {"path": str, "rows": int, "bytes": int, "sha256": str}
_LEFTOVER = re.compile(
    r"(features|failures)/part-[^/]*|(_failed/[^/]+/)?((features|failures)/)?\.tmp-[^/]*|_run-[^/]*"
)

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class PartFile:
    """A data file that is closed: `path` relative to the output, `bytes` and `sha256` of the file.

    `keys` holds the digest of each row's key (see `formats.digests`), row after row; `reasons`
    counts "stage/error_class" of a failures file.
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
        self._keys = bytearray()
        self.rows = 0  # written so far
        self._reasons: Counter[str] = Counter()

    @property
    def bytes(self) -> int:
        """Bytes written so far, without the footer."""
        return self._file.size

    def write(self, batch: pa.RecordBatch) -> None:
        """`batch` as one row group. Raises OSError."""
        self._writer.write_batch(batch, row_group_size=batch.num_rows)
        self._keys += key_digests(batch.column("key"))
        self.rows += batch.num_rows
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
            bytes(self._keys),
            self._file.size,
            dict(self._reasons),
        )

    def abort(self) -> None:
        """Drop what was written."""
        self._writer.is_open = False  # else its finalizer would write on
        self._file.abort()


# --- reading what is there ---------------------------------------------------------------------


class NewerVersion(RequestError):
    """A manifest that a newer version of this program wrote."""


def read_manifest(output: str) -> dict[str, Any] | None:
    """The manifest of `output`, None where there is none. RequestError where it cannot be used."""
    path = files.join(output, "manifest.json")
    if not files.is_file(path):
        return None
    try:
        manifest = json.loads(steady.read_bytes(path))
    except ValueError as error:
        raise RequestError(f"{path}: not a manifest ({error}); its data cannot be read") from None
    check_version(path, manifest)
    try:
        for fields, types in [(manifest, _FIELDS), *((e, _ENTRY) for e in manifest["files"])]:
            for name, kind in types.items():
                if not isinstance(fields[name], kind):
                    raise TypeError(f"{name} is no {kind.__name__}")
    except (ValueError, KeyError, TypeError) as error:
        raise RequestError(
            f"{path}: not a manifest ({type(error).__name__}: {str(error)[:200]}); its data cannot "
            "be read"
        ) from None
    return dict(manifest)


def replaceable_manifest(output: str, if_exists: str) -> dict[str, Any] | None:
    """As `read_manifest`, but None too for one that cannot be used and is to be overwritten.

    Not of a newer version: which files it names is not known, and they would stay.
    """
    try:
        return read_manifest(output)
    except NewerVersion:
        raise
    except RequestError:
        if if_exists != "overwrite":
            raise
        return None


def check_version(path: str, manifest: Mapping[str, Any]) -> None:
    """Raise RequestError unless this program reads the version of the manifest at `path`."""
    version = manifest.get("format_version") if isinstance(manifest, Mapping) else None
    if not isinstance(version, int):
        raise RequestError(
            f"{path}: not a manifest, for it has no format_version that is a number; its data "
            "cannot be read"
        )
    if version > FORMAT_VERSION:
        raise NewerVersion(
            f"{path}: format_version {version} is newer than {FORMAT_VERSION}, which this version "
            "reads; use a newer version of this program"
        )


def open_part(output: str, path: str, size: int | None = None) -> pq.ParquetFile:
    """The data file at `path` below `output`, of `size` bytes, page checksums verified on reading.

    Reads are tried again as `storage.steady` has it. Raises OSError, and pa.ArrowInvalid for a file
    that is not whole: one without its footer, of a killed writer, is refused.
    """
    full = files.join(output, path)
    stream = SteadyStream(full, files.size_of(full) if size is None else size)
    return pq.ParquetFile(stream, page_checksum_verification=True)


def _list_parts(output: str) -> dict[str, int]:
    """Everything right below the folders of `output` that hold data files, with its size."""
    found = {}
    for kind in (FEATURES, FAILURES):
        folder = files.join(output, kind, "")
        for info in files.list_folder(folder):
            name = info.path[len(folder) :]
            if "/" not in name:
                found[f"{kind}/{name}"] = info.size
    return found


def _is_data(path: str) -> bool:
    """Whether `path`, relative to an output, is the name of a data file."""
    name = path.rpartition("/")[2]
    return name.startswith("part-") and name.endswith(".parquet")


def describe_part(
    output: str, path: str, size: int, entry: Mapping[str, Any] | None = None
) -> PartFile:
    """The PartFile of a data file of `size` bytes that an earlier run wrote.

    `entry`: what its manifest tells of it, which then stands: the file's size and rows are held
    against it, and its digest is carried on, so that damage stays as visible as it was. Without it
    the whole file is read. Raises RunError where the two differ.
    """
    keys, reasons = bytearray(), Counter[str]()
    failures = path.startswith(f"{FAILURES}/")
    names = ["key", "stage", "error_class"] if failures else ["key"]
    with open_part(output, path, size) as part:
        for batch in _column_batches(part, names):
            keys += key_digests(batch.column("key"))
            if failures:
                pairs = (batch.column(name).to_pylist() for name in names[1:])
                reasons.update(f"{s}/{c}" for s, c in zip(*pairs, strict=True))
    rows = len(keys) // DIGEST_BYTES
    if entry is not None and (entry["bytes"], entry["rows"]) != (size, rows):
        raise RunError(
            f"{output}: {path} is not what the manifest tells of; resuming would "
            "vouch for damaged rows; restore it, or use --if_exists overwrite"
        )
    sha256 = entry["sha256"] if entry else sha256_of(output, path, size)
    return PartFile(path, rows, sha256, bytes(keys), size, dict(reasons))


def _column_batches(part: pq.ParquetFile, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    return part.iter_batches(_BATCH_ROWS, columns=list(names), use_threads=False)


def _of_each(
    output: str, function: Callable[[Item], Result], items: Sequence[Item]
) -> Iterator[Result]:
    """`function` of each of `items`, in order; some at once on a store, which takes its time."""
    if not files.is_remote(output):
        yield from map(function, items)
        return
    with ThreadPoolExecutor(_READERS) as threads:
        yield from threads.map(function, items)


def sha256_of(output: str, path: str, size: int) -> str:
    """SHA-256 of the file `path` of `output`, which has `size` bytes. Raises OSError."""
    found = hashlib.sha256()
    with SteadyStream(files.join(output, path), size) as stream:
        while block := stream.read(_COPY_BYTES):
            found.update(block)
    return found.hexdigest()


# --- resuming ----------------------------------------------------------------------------------


def features_schema(output: str, manifest: Mapping[str, Any] | None) -> pa.Schema | None:
    """The schema that features have in `output`, None where there are none, or none that is whole.

    Of those that `manifest` names, else of those that a killed run has left. Raises OSError.
    """
    named = [entry["path"] for entry in manifest["files"]] if manifest else []
    for path in [*named, *sorted(filter(_is_data, _list_parts(output)))]:
        if not path.startswith(f"{FEATURES}/"):
            continue
        with contextlib.suppress(pa.ArrowInvalid, FileNotFoundError):
            with open_part(output, path) as part:
                schema = part.schema_arrow
            if ROW_META.encode() in (schema.metadata or {}):  # else another program's
                return schema
    return None


@dataclass(frozen=True)
class Resumed:
    """What a resumed run starts from.

    `kept`: files that stay; `retried`: failures that stay where they are not read again; `retired`:
    files to delete at the commit. `finished`: digests of the keys that are published, of the other
    kept rows' key and place together, and of the places of damage and of files that are listed by
    another name. `reread`: of the sources of `retried` that are read whole again. `counts`: records
    that each container is known to have had, by source.
    """

    kept: tuple[str, ...] = ()
    retried: tuple[str, ...] = ()
    retired: tuple[str, ...] = ()
    finished: Bytes = b""
    reread: bytes = b""
    counts: Mapping[str, int] = field(default_factory=dict)


def resume(
    output: str,
    manifest: Mapping[str, Any] | None,
    rows: Mapping[str, Any],
    retry: Iterable[str] | None = None,
) -> Resumed:
    """What of `output` is finished: the manifest's files, and whole ones that a killed run left.

    `rows` is all that decides what a row holds; RequestError, naming the difference, where the
    files there were made otherwise (beside a manifest only its own files count: what a killed run
    left is retired then). Where `retry` is given failures count as not finished: it names the
    sources of many images that the run will read whole, in which each failure is tried again.

    Of each file only footer, keys and places are read: its size tells a file that was cut or
    replaced, page checksums what is read here, and `python -m pipeline.verify` all the rest.
    Memory: 16 bytes a row, twice that for files that a list names by another name.
    """
    listed = {entry["path"]: entry for entry in manifest["files"]} if manifest else {}
    superseded = set(manifest.get("superseded", ())) if manifest else set()
    below = len(files.join(output, ""))
    present = {info.path[below:]: info.size for info in files.list_folder(output)}
    sizes = {path: size for path, size in present.items() if _PART.fullmatch(path)}

    def again(path: str) -> bool:
        return retry is not None and path.startswith(f"{FAILURES}/")

    def may_stay(path: str) -> bool:
        if path in superseded:
            return False
        # What a file was made of is still there; a killed run that was overwritten since may have
        # had other pictures.
        made_anew = _DERIVED.search(path) or (manifest and _is_older(path, manifest["run_id"]))
        return path in listed or not (made_anew or again(path))

    def look(path: str) -> _Look | None:
        return _look(output, path, sizes[path], rows, path in listed, again(path))

    seen = sorted(filter(may_stay, filter(_is_data, sizes)))
    looks = {
        path: found for path, found in zip(seen, _of_each(output, look, seen), strict=True) if found
    }
    lost = set(listed).difference(looks)
    if lost:
        raise RequestError(
            f"--output {output}: {min(lost)} is named by the manifest and missing or damaged; "
            "resuming would lose its rows; restore it, or use --if_exists overwrite"
        )
    for path, entry in listed.items():
        if sizes[path] != entry["bytes"]:
            raise RequestError(
                f"--output {output}: {path} is not what the manifest tells of; resuming "
                "would publish altered rows; restore it, or use --if_exists overwrite"
            )
    kept: list[str] = []
    finished = bytearray()
    retried: list[str] = []
    sources: set[str] = set()  # of these
    counts: dict[str, int] = {}
    for path in seen:
        found = looks.pop(path, None)  # let go of, so that nothing is held twice
        if found is None or (found.other and path not in listed and manifest):
            continue
        if found.other:
            raise RequestError(
                f"--if_exists resume: {files.join(output, path)} was made with another "
                f"{found.other}; one output would hold two kinds of rows; use the earlier options, "
                "another --output or --if_exists overwrite"
            )
        if found.sources is not None:
            retried.append(path)
            sources |= found.sources
            continue
        kept.append(path)
        finished += found.finished
        for name, count in found.counts.items():
            counts[name] = max(counts.get(name, 0), count)
    retired = sorted(
        path
        for path in present.keys() - {*kept, *retried}
        if _LEFTOVER.fullmatch(path) and files.abandoned(files.join(output, path))
    )
    reread = b"".join(map(key_digest, sorted(sources.intersection(retry or ()))))
    return Resumed(tuple(kept), tuple(retried), tuple(retired), finished, reread, counts)


@dataclass(frozen=True)
class _Look:
    """What resuming learns of a whole file: what is `other` in how its rows were made, else of its
    rows what `Resumed` has of all; `sources`, and nothing else, of failures to be tried again.
    """

    other: str | None = None
    sources: set[str] | None = None
    finished: Bytes = b""
    counts: Mapping[str, int] = field(default_factory=dict)


def _look(
    output: str, path: str, size: int, rows: Mapping[str, Any], is_listed: bool, again: bool
) -> _Look | None:
    """What there is to know of a file, by opening it once; None where it is not whole."""
    try:
        part = open_part(output, path, size)
    except pa.ArrowInvalid:
        return None
    with part:
        if again:
            sources: set[str] = set()
            for batch in _column_batches(part, ["source"]):
                sources.update(batch.column(0).unique().to_pylist())
            return _Look(sources=sources)
        if path.startswith(FAILURES):  # they have no such values
            rows = {name: v for name, v in rows.items() if name not in ("label", "columns")}
        other = _other_rows(part.schema_arrow.metadata or {}, rows)
        if other:
            return _Look(other)
        finished = bytearray()
        counts: dict[str, int] = {}
        for batch in _column_batches(part, ["key", *_PLACE]):
            key, source, index = batch.columns
            if is_listed:
                finished += key_digests(key)
            else:  # another image of this id may yet come first
                finished += image_digests(key, source, index)
            # Not of a record with an id: it may have moved, and another stand in its place.
            known = pc.and_(pc.is_null(index), pc.not_equal(key, source.cast(pa.string())))
            records = pa.table({"source": source, "index": index})
            if path.startswith(FAILURES):
                damage = _is_damage(key, source)
                known = pc.or_(known, damage)
                records = records.filter(pc.invert(damage))  # which may lie behind the last one
            finished += place_digests(source.filter(known), index.filter(known))
            most = records.group_by("source").aggregate([("index", "max")])
            for name, last in zip(*most.columns, strict=True):
                if last.is_valid:
                    text = name.as_py()
                    counts[text] = max(counts.get(text, 0), last.as_py() + 1)
    return _Look(finished=finished, counts=counts)


def _is_damage(key: pa.Array, source: pa.Array) -> pa.Array:
    """Which failures tell of damage to their source, by their keys: `source@offset`."""
    without_offset = pc.replace_substring_regex(key, r"@\d+$", "@")
    return pc.equal(without_offset, pc.binary_join_element_wise(source.cast(pa.string()), "", "@"))


def _is_older(path: str, run_id: str) -> bool:
    """Whether the run that wrote the data file `path` began before the run `run_id`, or with it."""
    began, published = (_BEGAN.search(name) for name in (path, f"-{run_id}"))
    return bool(began and published and began[1] <= published[1])


def _other_rows(metadata: Mapping[bytes, bytes], rows: Mapping[str, Any]) -> str | None:
    """What was different when a file with `metadata` was made: each name, then and now."""
    there = json.loads(metadata.get(ROW_META.encode(), b"{}"))
    now = json.loads(json.dumps(table.utf8_within(rows)))
    for made in (there, now):
        if isinstance(keys := made.get("keys"), list):  # by the flags that tell them
            made["keys"] = dict(zip(("image_key", "id_key", "label_key"), keys, strict=False))
    told = [
        f"{name[:_SHORT]} ({_short(old)}, now {_short(new)})"
        for part, value in now.items()
        for name, old, new in _differences(part, there.get(part), value)
    ]
    more = [f"{len(told) - _TOLD} more"] if len(told) > _TOLD else []
    return ", ".join(told[:_TOLD] + more) or None


def _differences(name: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """What differs between two values as JSON holds them, down to the leaves: name, old, new."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _differences(f"{name}.{key}", old.get(key), new.get(key))
    elif isinstance(old, list) and isinstance(new, list) and len(f"{old}{new}") > _SHORT:
        for at, (one, other) in enumerate(itertools.zip_longest(old, new)):
            yield from _differences(f"{name}[{at}]", one, other)
    elif old != new:
        yield name, old, new


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHORT else text[: _SHORT - 3] + "..."


# --- settling ----------------------------------------------------------------------------------


def _still_failed(
    run: Publication, failures: Sequence[PartFile], fresh: Sequence[PartFile]
) -> tuple[list[PartFile], set[bytes]]:
    """`failures` of earlier runs without those that this run, which wrote `fresh`, has tried again.

    That is what has its key or place in `fresh`, and whatever was told of a source that was read
    whole again; but not an image that lost its id to another, as long as that one need not be read.
    With them the digests of the keys that were tried again.
    """
    tried_again: set[bytes] = set()
    if not failures:
        return [], tried_again
    keys = DigestSet.of(b"".join(part.keys for part in fresh))

    def places_of(part: PartFile) -> bytes:
        with open_part(run.output, part.path, part.bytes) as reader:
            return b"".join(place_digests(*b.columns) for b in _column_batches(reader, _PLACE))

    places = DigestSet.of(b"".join(_of_each(run.output, places_of, fresh)))
    reread = DigestSet.of(run.reread)
    left = []
    for number, part in enumerate(failures):
        dropped: set[int] = set()
        start = 0
        names = ["key", *_PLACE, "error_class"]
        with open_part(run.output, part.path, part.bytes) as reader:
            for batch in _column_batches(reader, names):
                rows = zip(*(column.to_pylist() for column in batch.columns), strict=True)
                for row, (key, source, index, error_class) in enumerate(rows, start):
                    digest = key_digest(key)
                    if (
                        digest in keys
                        or place_digest(source, index) in places
                        or (error_class != _DUPLICATE and key_digest(source) in reread)
                    ):
                        dropped.add(row)
                        tried_again.add(digest)
                start += batch.num_rows
        if dropped:
            name = f"part-{run.run_id}-retried-{number}"
            part = _without(run.output, part, dropped, name, run.compression)
        left.append(part)
    return [part for part in left if part.rows], tried_again


def settle(
    output: str, kept: Sequence[PartFile], fresh: Sequence[PartFile], name: str, compression: str
) -> tuple[list[PartFile], list[PartFile]]:
    """`kept` (of earlier runs) and `fresh` (of this one) with each key once in both together.

    Of images with one id the smallest (source, index) keeps it, and the others become failures of
    class DuplicateKey under `source#index`, with `#2` or more after it where that is another's key.
    Copies of one image, which a retried bundle leaves,
    are dropped but one, features before failures. Files that lose rows are written anew as
    `part-NAME-...`.
    """
    parts = [*kept, *fresh]
    repeated = repeated_rows([part.keys for part in parts])
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
    lost = []  # (row, who keeps its key)
    for before, row in zip([None, *rows[:-1]], rows, strict=True):
        if before is None or before[0] != row[0]:
            winner = row
            continue
        dropped.setdefault(row[4], set()).add(row[5])
        if row[1:3] != before[1:3]:
            lost.append((row, winner))
    losers: tuple[list[Failure], list[Failure]] = ([], [])  # of earlier runs, of this one
    free = _free_keys([_place_key(row) for row, _ in lost], [part.keys for part in parts])
    for new_key, (row, winner) in zip(free, lost, strict=True):
        losers[row[4] >= len(kept)].append(_duplicate(row, winner, new_key))
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


def _free_keys(wanted: Sequence[str], taken: Sequence[Bytes]) -> list[str]:
    """`wanted`, where that is among the digests `taken` or stood before with `#2` or more added."""
    found: dict[int, str] = {}
    given: set[str] = set()
    number = 0
    while len(found) < len(wanted):
        number += 1
        end = f"#{number}" if number > 1 else ""
        tried = {at: key + end for at, key in enumerate(wanted) if at not in found}
        there = standing([key_digest(key) for key in tried.values()], taken)
        for at, key in tried.items():
            if key not in given and key_digest(key) not in there:
                given.add(key)
                found[at] = key
    return [found[at] for at in range(len(wanted))]


def _place_key(row: tuple[Any, ...]) -> str:
    return place_key(row[1], None if row[2] < 0 else row[2])  # as `settle` holds them


def _duplicate(row: tuple[Any, ...], winner: tuple[Any, ...], new_key: str) -> Failure:
    key, source, place, *_, sha256 = row
    where = _place_key(winner)
    return Failure(
        new_key,
        source,
        None if place < 0 else place,
        "read",
        _DUPLICATE,
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
    `kept`: data files of earlier runs that stay (resume), relative paths; `retried`: failures of
    which those stay that were not tried again, and `reread`: digests of the sources that were read
    whole for it. `retired`: data files of killed runs to delete after the commit.
    """

    output: str
    run_id: str
    if_exists: str
    replaces: str | None
    max_failure_rate: float
    compression: str
    described: Mapping[str, Any]
    kept: tuple[str, ...] = ()
    retried: tuple[str, ...] = ()
    reread: bytes = b""
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
    gone or changed that this run counts on. On a local disk one run commits at a time; on a store
    the last of two that write their manifest at once wins, and the other finds that out, or that
    what it named is gone.
    """
    with files.alone(run.output):
        return _publish(run, list(written), skipped, timing)


def _publish(
    run: Publication,
    written: Sequence[PartFile],
    skipped: int,
    timing: Callable[[], Mapping[str, Any]],
) -> dict[str, Any]:
    before = replaceable_manifest(run.output, run.if_exists)
    if before and before["run_id"] == run.run_id:  # a retried commit
        _finish(run, before)
    there = _list_parts(run.output)
    ours = _written_by(run, there)
    listed = {entry["path"]: entry for entry in before["files"]} if before else {}
    verdict = read_verdict(run.output, run.run_id)
    if verdict:
        if verdict["status"] != "complete":
            _delete(run, ours - set(listed))
        return verdict
    fresh = sorted(written, key=lambda part: part.path)
    if before and before["run_id"] != run.replaces and run.if_exists != "overwrite":
        _delete(run, ours - set(listed))
        raise RunError(
            f"{run.output}: run {before['run_id']} has published here since this run began; its "
            "data were not touched and this run's were dropped; --if_exists resume goes on from "
            "it, or give another --output"
        )
    doomed = set(before.get("superseded", ())) if before else set()
    gone = {part.path for part in fresh} - (ours - doomed)
    if gone:
        raise RunError(
            f"{run.output}: {min(gone)} of this run is gone; another run has replaced it, or a "
            "person has deleted it; nothing was published"
        )
    if lost := {*run.kept, *run.retried} - set(there):
        raise RunError(f"{run.output}: {min(lost)} is gone, which this run goes on from")

    def describe(path: str) -> PartFile:
        return describe_part(run.output, path, there[path], listed.get(path))

    kept, retried = (
        list(_of_each(run.output, describe, paths)) for paths in (run.kept, run.retried)
    )
    still, tried_again = _still_failed(run, retried, fresh)
    kept += still
    earlier, new = settle(run.output, kept, fresh, run.run_id, run.compression)
    parts = [*earlier, *new]
    there = _list_parts(run.output)
    ours = _written_by(run, there)
    counts = _counts(new)
    this_run = {**counts, "images": counts["images"] + skipped, "skipped": skipped}
    # What had failed before and fails again makes the output no worse.
    again = len(standing(tried_again, [part.keys for part in new if part.kind == FAILURES]))
    failed, taken_on = counts["failures"] - again, counts["images"] - again
    if taken_on and failed / taken_on > run.max_failure_rate:
        return _reject(run, new, this_run, ours - set(listed), timing)
    final = {part.path for part in parts}
    superseded = {*listed, *run.kept, *run.retried, *doomed, *ours} & set(there) | set(run.retired)
    manifest = _manifest(run, "complete", parts, this_run, superseded - final, timing)
    now = replaceable_manifest(run.output, run.if_exists)
    if _run_id(now) != _run_id(before):  # of a run on a store, just now
        return _publish(run, written, skipped, timing)
    _write_manifest(run.output, manifest)
    _finish(run, manifest)
    return {"status": "complete", "run": this_run}


def _manifest(
    run: Publication,
    status: str,
    parts: Iterable[PartFile],
    this_run: Mapping[str, int],
    superseded: Iterable[str],
    timing: Callable[[], Mapping[str, Any]],
) -> dict[str, Any]:
    reasons: Counter[str] = Counter()
    for part in parts:
        reasons.update(part.reasons)
    return {
        "format_version": FORMAT_VERSION,
        "run_id": run.run_id,
        "status": status,
        **run.described,
        "counts": _counts(parts),
        "run": this_run,
        "failures_by": dict(sorted(reasons.items())),
        "files": [part.listed() for part in sorted(parts, key=lambda part: part.path)],
        "superseded": sorted(superseded),
        "timing": dict(timing()),
    }


def _write_manifest(folder: str, manifest: Mapping[str, Any]) -> None:
    text = json.dumps(table.utf8_within(manifest), indent=1, ensure_ascii=False)
    files.write_bytes(files.join(folder, "manifest.json"), text.encode())


def _run_id(manifest: Mapping[str, Any] | None) -> str | None:
    return str(manifest["run_id"]) if manifest else None


def _counts(parts: Iterable[PartFile]) -> dict[str, int]:
    rows = {FEATURES: 0, FAILURES: 0}
    for part in parts:
        rows[part.kind] += part.rows
    return {"images": sum(rows.values()), **rows}


def _finish(run: Publication, manifest: Mapping[str, Any]) -> None:
    """After the manifest: the marker, then what it no longer names.

    RunError where another run's has taken its place: then only this run's files are to go. And
    where a file is gone that it names, as another run that was publishing may take it away.
    """
    now = read_manifest(run.output)
    there = _list_parts(run.output)
    named = {entry["path"] for entry in now["files"]} if now else set()
    if _run_id(now) != run.run_id:
        _delete(run, _written_by(run, there) - named)
        raise RunError(f"{run.output}: run {_run_id(now)} has published over this one")
    if lost := named - set(there):
        raise RunError(
            f"{run.output}: {min(lost)} is gone, which another run replaced while this one was "
            "published, so that the output is not whole; run it again with --if_exists overwrite"
        )
    # Not empty: Beam's s3:// client cannot make an empty object.
    files.write_bytes(files.join(run.output, "_SUCCESS"), f"{run.run_id}\n".encode())
    _delete(run, manifest["superseded"])


def _written_by(run: Publication, there: Iterable[str]) -> set[str]:
    """What of `there` is this run's, of bundles that were tried again or lost too."""
    return {path for path in there if f"part-{run.run_id}-" in path}


def _delete(run: Publication, paths: Iterable[str]) -> None:
    full = (files.join(run.output, path) for path in sorted({*paths, finished_name(run.run_id)}))
    files.delete([path for path in full if files.abandoned(path)])


def finished_name(run_id: str) -> str:
    """Where below its output run `run_id` keeps for its workers what they need not do again."""
    return f"_run-{run_id}.finished"


def _reject(
    run: Publication,
    new: Sequence[PartFile],
    this_run: dict[str, int],
    written: set[str],
    timing: Callable[[], Mapping[str, Any]],
) -> dict[str, Any]:
    """Keep the failures readable under `_failed/RUN_ID/`, an output of its own with a manifest.

    What the run has `written` is taken back.
    """
    folder = files.join(run.output, "_failed", run.run_id)
    failed = [part for part in new if part.kind == FAILURES]
    for part in failed:
        data = steady.read_bytes(files.join(run.output, part.path), part.bytes)
        files.write_bytes(files.join(folder, part.path), data)
    status = "too_many_failures"
    _write_manifest(folder, _manifest(run, status, failed, this_run, (), timing))
    _delete(run, written)
    return {"status": status, "run": this_run}


def read_verdict(output: str, run_id: str) -> dict[str, Any] | None:
    """What became of run `run_id`: as `publish` returned it, None where it never committed."""
    for folder in (output, files.join(output, "_failed", run_id)):
        manifest = None
        with contextlib.suppress(RequestError):  # what cannot be read is no verdict
            manifest = read_manifest(folder)
        if manifest and manifest["run_id"] == run_id:
            return {"status": manifest["status"], "run": manifest["run"]}
    return None
