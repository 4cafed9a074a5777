"""What `--input` stands for: which files, of which format, in which units of work."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, TypeVar, cast

from formats import containers, example, fields, listing, parquet, replay, tfrecord, webdataset
from formats.containers import CONTAINERS, PARQUET, TFRECORD, WEBDATASET, Wanted
from formats.example import ExampleKeys, ExampleTypes
from formats.fields import Found
from formats.image import looks_like
from formats.listing import Entry
from formats.records import utf8
from formats.replay import Failed
from formats.tfrecord import Record
from storage import files, steady
from storage.errors import RequestError, RunError
from storage.files import FileInfo
from storage.steady import SteadyStream

IMAGES, MANIFEST, FAILURES = "images", "manifest", "failures"
_HEAD_BYTES = 4096
_DOUBTS = 5  # of one kind that are told
_HEADS = 16  # files of which the beginning is looked at, where all names agree
_IMAGES_A_UNIT = 128  # enough to fill batches, few enough to spread over workers
_SAMPLED_FILES = 8  # files that are looked at for types
_SAMPLED_ROWS = 1000  # rows of a manifest, which cost little
_SAMPLED_BYTES = 64 << 20  # of records, all held at once

_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class Source:
    """An input pattern and the format of its files.

    `output`: where the run writes, whose own files are no input wherever they lie; empty for none.
    `some`: whether files were found, as whoever lists it later must find some too.
    """

    pattern: str
    format: str
    output: str = ""
    some: bool = False


@dataclass(frozen=True, slots=True)
class Unit:
    """Work for one reader: one container, a run of image files, or a run of a manifest's entries.

    `limit`: most records to read, None for all. `wanted`: which of them, None for all.
    """

    format: str
    files: tuple[FileInfo, ...]
    limit: int | None = None
    entries: tuple[Entry, ...] = ()
    wanted: Wanted | None = None


_TFDS_SHARD = re.compile(r"-(?P<split>[^-.]+)\.[^-]*-(?P<index>\d{5})-of-(?P<total>\d{5})$")


# What a run makes of itself in its output; whatever else lies there may be input.
_OWN = re.compile(
    r"_SUCCESS|_run-[^/]*"
    r"|(_failed/[^/]+/)?(manifest\.json|report\.html|(features|failures)/part-[^/]*\.parquet)"
)


def _is_own(path: str, output: str) -> bool:
    return path.startswith(f"{output}/") and bool(_OWN.fullmatch(path, len(output) + 1))


def _find(source: Source) -> Iterator[FileInfo]:
    """The files of `source`, but the run's own."""
    found = files.find(source.pattern)
    return (i for i in found if not _is_own(i.path, source.output)) if source.output else found


def detect_format(found: Sequence[FileInfo]) -> str:
    """The format of the files of one pattern, by their names and beginnings.

    Raises OSError where the only one cannot be read.

    `tfrecord` where every file is one, by its name or its beginning; `parquet` or `webdataset`
    where every name ends as such and any of the first files begins so (a damaged one is a failure
    of its own); `manifest` where every name does and any holds no picture; otherwise `images`.
    Empty files, and those that cannot be read, tell nothing unless their names do.
    """
    telling = [info for info in found if info.size or _tells_by_name(info.path)]
    if not telling:
        return IMAGES
    if len(telling) == 1:
        steady.read_at_most(telling[0].path, 1)  # nothing but this one, so the request is wrong
    if _all_tfrecords(telling):
        return TFRECORD
    for kind, endings, begins in (
        (PARQUET, parquet.ENDINGS, lambda head: head.startswith(parquet.MAGIC)),
        (WEBDATASET, webdataset.ENDINGS, webdataset.is_tar),
        (MANIFEST, listing.ENDINGS, lambda head: looks_like(head) is None),
    ):
        if not all(info.path.lower().endswith(endings) for info in telling):
            continue
        looked_at = [info for info in telling[:_HEADS] if info.size]
        if not looked_at or any(begins(_head(info) or b"") for info in looked_at):
            return kind
    return IMAGES


def _tells_by_name(path: str) -> bool:
    endings = (*parquet.ENDINGS, *webdataset.ENDINGS, *listing.ENDINGS)
    return tfrecord.looks_like_tfrecord_name(path) or path.lower().endswith(endings)


def _all_tfrecords(telling: Sequence[FileInfo]) -> bool:
    found, unreadable = False, 0
    for info in telling:
        if not tfrecord.looks_like_tfrecord_name(info.path):
            head = _head(info)
            if head is None:
                unreadable += 1
                if unreadable > _HEADS:  # each may be tried for seconds
                    return False
                continue
            if not tfrecord.is_tfrecord(head):
                return False
        found = True
    return found


def _head(info: FileInfo) -> bytes | None:
    """The beginning of a file; None of one that cannot be read, which will be a failure row."""
    try:
        return steady.read_at_most(info.path, _HEAD_BYTES)
    except OSError:
        return None


def survey(
    patterns: Iterable[str], input_format: str, allow_empty: bool, output: str = ""
) -> tuple[list[Source], list[str]]:
    """The sources that `patterns` stand for, and warnings about what looks incomplete.

    What an earlier run made in `output` is left out of them, with a warning. Raises RequestError
    for a pattern that matches nothing (unless `allow_empty`), cannot be listed, or holds two files
    that rows would show by one name.
    """
    sources, warnings = [], []
    output = output.rstrip("/")
    patterns = list(patterns)
    taken: dict[str, set[str]] = {}  # by format
    for pattern in patterns:
        if input_format == FAILURES:
            failed = files.absolute(pattern).rstrip("/")
            if not replay.count_failures(failed) and not allow_empty:
                raise RequestError(
                    f"--input {pattern}: nothing failed there that could be tried again; the run "
                    "would be empty; "
                    "--allow_empty where that is expected"
                )
            sources.append(Source(failed, FAILURES))
            continue
        try:
            listed = list(files.find(pattern))
            found = [info for info in listed if not (output and _is_own(info.path, output))]
            _check_names(pattern, found)
            if own := len(listed) - len(found):
                warnings.append(
                    f"--input {pattern}: {own} of its files are what an earlier run wrote to "
                    f"--output {output}; they are not read"
                )
            if not found and not allow_empty:
                raise RequestError(
                    f"--input {pattern}: matches nothing; the run would be empty; give another "
                    "pattern, or --allow_empty where that is expected"
                )
            if not listed:
                warnings.append(f"--input {pattern}: matches nothing, as --allow_empty lets it")
            kind = detect_format(found) if input_format == "auto" else input_format
        except OSError as error:
            raise RequestError(f"--input {pattern}: cannot be read ({error})") from None
        if len(patterns) > 1:
            paths = {info.path for info in found}
            for other, before in taken.items():
                if other != kind and (both := paths & before):
                    warnings.append(
                        f"--input {pattern}: {min(both)} is read as {other}, as an earlier --input "
                        f"has it, and not as {kind}; name it first, or leave it out of that one"
                    )
            taken.setdefault(kind, set()).update(paths)
        sources.append(Source(files.absolute(pattern), kind, output, bool(found)))
        if kind != IMAGES:
            warnings += _doubts(found)
    return sources, warnings


def _check_names(pattern: str, found: Sequence[FileInfo]) -> None:
    """Raise RequestError where two files have one name in rows, of which one would vanish."""
    odd = {utf8(info.path) for info in found if utf8(info.path) != info.path}
    if twice := odd and odd.intersection(info.path for info in found):
        raise RequestError(
            f"--input {pattern}: two files are both called {min(filter(None, twice))} in rows, for "
            "the name of one is no UTF-8; rename it"
        )


def known_counts(sources: Iterable[Source]) -> dict[str, int]:
    """Records by TFRecord file, as the data set's own dataset_info.json tells (TFDS's format)."""
    counts: dict[str, int] = {}
    lengths: dict[str, dict[str, list[int]]] = {}  # folder -> split -> records by shard
    for source in sources:
        for info in _find(source) if source.format == TFRECORD else ():
            folder, _, name = info.path.rpartition("/")
            if folder not in lengths:
                lengths[folder] = _shard_lengths(f"{folder}/dataset_info.json")
            shard = _TFDS_SHARD.search(name)
            told = lengths[folder].get(shard["split"], []) if shard else []
            if shard and len(told) == int(shard["total"]) > int(shard["index"]):
                counts[utf8(info.path) or ""] = told[int(shard["index"])]
    return counts


def read_whole(sources: Iterable[Source], output: str) -> Iterator[str]:
    """The files of many images that `sources` stand for, and those of what failed in `output`.

    Named as in rows. Raises OSError.
    """
    for source in sources:
        if source == Source(output.rstrip("/"), FAILURES):
            # Of other sources just what failed is read, and known by its place; what is missing at
            # an end would not be told of again.
            yield from (
                failed.source
                for failed in replay.failed_sources(output)
                if failed.damage or (any(failed.images.values()) and not failed.lacking)
            )
        elif source.format not in (IMAGES, FAILURES):
            yield from (utf8(info.path) or "" for info in files.find(source.pattern))


def _shard_lengths(path: str) -> dict[str, list[int]]:
    try:
        told = json.loads(files.read_bytes(path)) if files.is_file(path) else {}
        return {s["name"]: [int(n) for n in s["shardLengths"]] for s in told.get("splits", ())}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # of another format


def _doubts(shards: Sequence[FileInfo]) -> list[str]:
    """What of a set of shards looks incomplete, a line each of the first ones."""
    empty = [f"{info.path}: zero bytes, so no record" for info in shards if not info.size]
    missing = [
        f"{path}: this shard of its set is not there"
        for path in tfrecord.missing_shards(info.path for info in shards)
    ]
    return [*_first(empty), *_first(missing)]


def _first(lines: Sequence[str]) -> list[str]:
    rest = len(lines) - _DOUBTS
    return [*lines[:_DOUBTS], *([f"{rest} more like that last one"] if rest > 0 else [])]


# --- units of work -----------------------------------------------------------------------------


def list_units(
    sources: Iterable[Source], limit: int | None, keys: ExampleKeys | None = None
) -> Iterator[Unit]:
    """The work that `sources` hold, every file once, in the order given.

    Raises OSError, and RunError where nothing is left of one that had files.
    With `limit` the containers are walked, so that the units hold just the first `limit` images.
    `keys` tells which values of a manifest's rows are wanted.
    """
    keys = keys or ExampleKeys()
    seen: set[str] = set()
    listed = _Listed()
    for source in sources:
        for unit in _units_of(source, keys, seen, listed):
            if limit is None:
                yield unit
                continue
            unit, taken = _limited(unit, limit, keys)
            yield unit
            limit -= taken
            if limit <= 0:
                return


def _units_of(source: Source, keys: ExampleKeys, seen: set[str], listed: _Listed) -> Iterator[Unit]:
    if source.format == FAILURES:
        yield from _failed_units(source.pattern, keys)
        return
    fresh, found = [], False
    for info in _find(source):
        found = True
        if info.path not in seen:
            seen.add(info.path)
            fresh.append(info)
    if source.some and not found:
        raise RunError(
            f"--input {source.pattern}: had files when the run was planned, and has none where it "
            "is read; the run would publish nothing in their place; look whether the disk is still "
            "there, and on every worker"
        )
    if source.format == IMAGES:
        yield from (Unit(IMAGES, chunk) for chunk in _chunks(fresh))
    elif source.format == MANIFEST:
        entries = (entry for info in fresh for entry in listed.once(_entries(info, keys)))
        yield from (Unit(MANIFEST, (), None, chunk) for chunk in _chunks(entries))
    else:
        yield from (Unit(source.format, (info,)) for info in fresh)


def _chunks(items: Iterable[_Item]) -> Iterator[tuple[_Item, ...]]:
    remaining = iter(items)
    while chunk := tuple(itertools.islice(remaining, _IMAGES_A_UNIT)):
        yield chunk


def _limited(unit: Unit, limit: int, keys: ExampleKeys) -> tuple[Unit, int]:
    """`unit` with no more than `limit` images, and how many it has."""
    if unit.format == IMAGES:
        return dataclasses.replace(unit, files=unit.files[:limit]), len(unit.files[:limit])
    if unit.format == MANIFEST:
        return dataclasses.replace(unit, entries=unit.entries[:limit]), len(unit.entries[:limit])
    count, ends = 0, False
    try:
        found = containers.positions(unit.files[0], unit.format, keys, unit.wanted)
        for _ in itertools.islice(found, limit):
            count += 1
        ends = count < limit
    except OSError:
        count += 1  # reading it will end in a failure, which counts as an image
    # What ends before the limit is read to its end, where records may be known to be missing.
    return dataclasses.replace(unit, limit=None if ends else count), count


def _entries(info: FileInfo, keys: ExampleKeys) -> Iterator[Entry]:
    """The rows of one manifest; one that cannot be read is an entry that tells so."""
    try:
        with SteadyStream(info.path, info.size) as stream:
            names = fields.names_of(keys)
            yield from listing.read_entries(cast(BinaryIO, stream), info.path, names)
    except ValueError as error:
        yield _unreadable(info, "NoManifest", str(error))
    except OSError as error:
        yield _unreadable(info, type(error).__name__, str(error))


def _unreadable(info: FileInfo, error_class: str, message: str) -> Entry:
    return Entry(listing.shown(info.path), info.path, None, {}, (error_class, message))


class _Listed:
    """The paths that manifests have named so far in a run, and the number of rows."""

    def __init__(self) -> None:
        self._paths: set[str] = set()
        self._rows = 0

    def once(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        """`entries`, a path's second and later ones with their row as index.

        So the first is the same image as ever, however rows are moved about, and the others are
        known apart from it.
        """
        for entry in entries:
            path = listing.shown(entry.path)
            if not entry.wrong and path in self._paths:
                entry = dataclasses.replace(entry, index=self._rows)
            self._paths.add(path)
            self._rows += 1
            yield entry


# --- what failed in an earlier run -------------------------------------------------------------


def _failed_units(output: str, keys: ExampleKeys) -> Iterator[Unit]:
    """The failures of an output as work: records by index, what damage hid, and single files."""
    before = replay.manifest_of(output).get("options", {}).get("input_format", "auto")
    entries: list[Entry] = []
    for failed in replay.failed_sources(output):
        info, kind = _format_of(failed, before)
        if info is None or kind == IMAGES:
            path = replay.path_of(failed.source)
            entries += [Entry(key, path) for key in failed.images]
            entries += [Entry(key, path, index) for index, key in failed.keys.items()]
            entries += [Entry(key, path, index) for index, key in failed.damage.items()]
        elif kind == MANIFEST:
            every = bool(failed.images)
            rows = enumerate(_entries(info, keys))
            entries += [entry for index, entry in rows if every or index in failed.keys]
        else:
            start = 0 if failed.images else min(failed.damage, default=None)
            done = frozenset(failed.done if start is not None else ())
            yield Unit(kind, (info,), wanted=Wanted(failed.keys, start, done))
    yield from (Unit(MANIFEST, (), None, chunk) for chunk in _chunks(entries))


def _format_of(failed: Failed, before: str) -> tuple[FileInfo | None, str]:
    """The source as it lies there now, and its format; None where it cannot be had."""
    if not (failed.keys or failed.damage or any(failed.images.values())):
        return None, IMAGES  # files that were read as images
    try:
        info = replay.listed(failed.source)
        kind = detect_format([info]) if info else IMAGES
    except OSError:
        return None, IMAGES  # trying to read it will tell so, for each of its images
    return info, before if kind == IMAGES and before in CONTAINERS else kind


# --- types -------------------------------------------------------------------------------------


def sample(sources: Sequence[Source], count: int) -> list[bytes]:
    """The first records of the TFRecord sources, at most `count`, for their types: of large ones
    as many as hold `_SAMPLED_BYTES`.
    """
    units = list_units([s for s in sources if s.format == TFRECORD], None)
    items = _of_readable((unit.files[0] for unit in units), _walk_for_types(TFRECORD))
    records: list[bytes] = []
    size = 0
    for item in items:
        if isinstance(item, Record):
            records.append(item.data)
            size += len(item.data)
            if len(records) == count or size >= _SAMPLED_BYTES:
                break
    return records


def _walk_for_types(
    format: str, keys: ExampleKeys | None = None
) -> Callable[[FileInfo], Iterator[Record | Found | tfrecord.Damage]]:
    return lambda info: containers.walk(info, format, keys or ExampleKeys(), 0)


def _of_readable(
    infos: Iterable[FileInfo], read: Callable[[FileInfo], Iterable[_Item]]
) -> Iterator[_Item]:
    """What `read` gives of each file; one that cannot be read will be a failure row.

    Raises OSError where none can be read.
    """
    unreadable, any_read = None, False
    for info in infos:
        try:
            for item in read(info):
                any_read = True
                yield item
            any_read = True
        except OSError as error:
            unreadable = error
    if unreadable and not any_read:
        raise unreadable


def _sound(given: Iterable[_Item | ValueError]) -> list[_Item]:
    """`given` without its errors, of which the first is raised where there is nothing else."""
    sound: list[_Item] = []
    errors = []
    for one in given:
        if isinstance(one, ValueError):
            errors.append(one)
        else:
            sound.append(one)
    if errors and not sound:
        raise errors[0]
    return sound


def infer_types(
    sources: Sequence[Source], keys: ExampleKeys, count: int, known: ExampleTypes | None = None
) -> ExampleTypes | None:
    """The one type of label and of each column that the first `count` records of each source show.

    `known`: what counts where they show none. None where no source can hold either. Raises
    ValueError, one line, for what cannot be had or differs between sources, and OSError.
    """
    given = [
        _failed_sources(source, keys) if source.format == FAILURES else [source]
        for source in sources
        if source.format != IMAGES
    ]
    holding = [source for group in given for source in group]
    if not holding:
        return None
    found = []
    if sampled := [record for group in given for record in sample(group, count)]:
        found.append(example.infer_types(sampled, keys))
    for source in holding:
        infos = itertools.islice((info for info in _find(source) if info.size), _SAMPLED_FILES)
        if source.format == PARQUET:
            found += _parquet_types(infos, keys)
        elif source.format == WEBDATASET:
            images = _images_of_tars(infos, keys, count)
            found += [fields.infer_types(images, keys)] if images else []
        elif source.format == MANIFEST:
            found += _manifest_types(infos, source.pattern, keys)
    return fields.unify(found, keys.columns, known)


def _images_of_tars(infos: Iterable[FileInfo], keys: ExampleKeys, count: int) -> list[Found]:
    items = _of_readable(infos, _walk_for_types(WEBDATASET, keys))
    return [item for item in itertools.islice(items, count) if isinstance(item, Found)]


def unseen(sources: Sequence[Source], keys: ExampleKeys, count: int) -> list[str]:
    """The names of id and label, where the user gave them, that none of the first `count` records
    of the TFRecords and tars has: a slip of the pen, or values that come later. Raises OSError.
    """
    asked = (keys.id, keys.label)
    names = [name for name in asked if name and name != ExampleKeys().label]
    given = [source for source in sources if source.format in (TFRECORD, WEBDATASET)]
    if not names or not given:
        return []
    there = example.names_there(sample(given, count), names)
    for source in given:
        if source.format == WEBDATASET:
            infos = itertools.islice((info for info in _find(source) if info.size), _SAMPLED_FILES)
            for image in _images_of_tars(infos, keys, count):
                there |= {name for name in names if image.values.get(name) is not None}
    return [name for name in names if name not in there]


def without_image(
    sources: Iterable[Source], keys: ExampleKeys, count: int
) -> Iterator[tuple[str, int, str]]:
    """The TFRecord and tar sources none of whose first `count` records has the image.

    Of each its pattern, how many records were looked at, and what the first one has instead. Where
    one of them is no record at all nothing is told. Raises OSError.
    """
    for source in sources:
        if source.format == TFRECORD:
            examples = sample([source], count)
            there = example.names_instead(examples, keys.image)
            if there is not None:
                yield source.pattern, len(examples), f"the example has {there}"
        elif source.format == WEBDATASET:
            infos = itertools.islice((info for info in _find(source) if info.size), _SAMPLED_FILES)
            images = _images_of_tars(infos, keys, count)
            errors = [image.error for image in images]
            told = [e.message for e in errors if e and e.error_class == "MissingFeature"]
            if told and len(told) == len(images):
                yield source.pattern, len(images), told[0]


def any_picture(sources: Iterable[Source]) -> bool:
    """Whether one of `sources` is of image files, or of their failures, and there are some.

    Raises OSError.
    """
    return any(
        replay.count_failures(source.pattern) > 0
        if source.format == FAILURES
        else any(True for _ in _find(source))
        for source in sources
        if source.format in (IMAGES, FAILURES)
    )


def _failed_sources(source: Source, keys: ExampleKeys) -> list[Source]:
    units = _failed_units(source.pattern, keys)
    return [Source(unit.files[0].path, unit.format) for unit in units if unit.files]


def _parquet_types(infos: Iterable[FileInfo], keys: ExampleKeys) -> list[ExampleTypes]:
    """What each file's schema gives; one that lacks a column counts where all lack one."""

    def read(info: FileInfo) -> Iterator[ExampleTypes | ValueError]:
        with SteadyStream(info.path, info.size) as stream:
            schema = parquet.read_schema(cast(BinaryIO, stream))
        if schema is not None:
            parquet.check_once(schema, info.path, keys)
            try:
                yield parquet.infer_types(schema, info.path, keys)
            except ValueError as error:
                yield error

    return _sound(_of_readable(infos, read))


def _manifest_types(
    infos: Iterable[FileInfo], pattern: str, keys: ExampleKeys
) -> list[ExampleTypes]:
    """What the rows give; a file that is no manifest counts where there is none."""

    def read(info: FileInfo) -> Iterator[Entry | ValueError]:
        with SteadyStream(info.path, info.size) as stream:
            names = fields.names_of(keys)
            try:
                entries = listing.read_entries(cast(BinaryIO, stream), info.path, names)
                yield from itertools.islice(entries, _SAMPLED_ROWS)
            except ValueError as error:
                yield error

    rows = _sound(_of_readable(infos, read))
    return [listing.infer_types(rows, pattern, keys)] if rows else []
