"""ReadImages: input sources -> encoded images, with what could not be read beside them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa

from formats import containers, example, inputs, listing, parquet, tfrecord
from formats.digests import Bytes, DigestSet, image_digest, key_digest, place_digest
from formats.fields import Found, refer, too_many_bytes
from formats.inputs import Source, Unit
from formats.listing import Entry
from formats.records import Failure, ImageError, ImageRecord, ImageRef, digest, place_key, utf8
from formats.timing import Timing
from storage import files, steady, web
from storage.errors import RunError
from storage.files import FileInfo
from storage.retries import ignore
from transforms.lookahead import io_threads, map_ahead
from transforms.metrics import inc_counter

_PARSE_RECORDS = 64  # records parsed in one call
_PARSE_BYTES = 16 << 20  # ... or this many bytes of them
_READ_AHEAD = 32  # image files being read at once


_UNKNOWN_BYTES = 4 << 20  # what a file weighs whose size was not listed

Retried = Callable[[], None]

log = logging.getLogger("pipeline")


@dataclass(frozen=True)
class Reading:
    """How sources are read: features by name, their types, caps in bytes, and what damage does.

    `allow_http`: whether http(s) addresses of a manifest are fetched. `counts`: records that each
    TFRecord file is known to have, by source, so that a cut between two of them is seen.
    """

    keys: example.ExampleKeys = field(default_factory=example.ExampleKeys)
    types: example.ExampleTypes = field(
        default_factory=lambda: example.ExampleTypes(pa.int64(), {})
    )
    max_image_bytes: int = 256 << 20
    on_damage: str = "record"
    allow_http: bool = False
    counts: Mapping[str, int] = field(default_factory=dict)


def read_image_file(
    info: FileInfo, max_bytes: int, on_retry: Retried = ignore
) -> ImageRecord | Failure:
    """One file as one image; Failure where it is too large or cannot be read."""
    name = utf8(info.path) or ""
    ref = ImageRef(name, name)
    if info.size > max_bytes:
        return Failure.of(ref, "read", too_many_bytes(info.size, max_bytes), size=info.size)
    try:
        data = steady.read_bytes(info.path, info.size, on_retry)
    except OSError as error:
        return Failure.of(ref, "read", _why(error), size=info.size)
    return _capped(ImageRecord(ref, data), max_bytes)  # it may have grown since it was listed


def _why(error: OSError) -> ImageError:
    return ImageError(type(error).__name__, str(error))


def _capped(record: ImageRecord, max_bytes: int) -> ImageRecord | Failure:
    size = len(record.data)
    if size <= max_bytes:
        return record
    reason = too_many_bytes(size, max_bytes)
    return Failure.of(record.ref, "read", reason, digest(record.data), size)


def read_image_files(
    unit: Unit, how: Reading, on_retry: Retried = ignore
) -> Iterator[ImageRecord | Failure]:
    """The image files of `unit`, several being read at once."""
    read = functools.partial(read_image_file, max_bytes=how.max_image_bytes, on_retry=on_retry)
    return map_ahead(read, unit.files, io_threads(), _READ_AHEAD, weigh=lambda info: info.size)


def read_entry(entry: Entry, how: Reading, on_retry: Retried = ignore) -> ImageRecord | Failure:
    """The image that a row of a manifest names; Failure where it cannot be had.

    Raises RunError for a manifest that cannot be read when `how.on_damage` is "fail".
    """
    source = listing.shown(entry.path)
    ref, error = refer(entry.key, source, entry.index, entry.values, how.keys, how.types)
    size = None
    if entry.wrong:
        if entry.index is None and how.on_damage == "fail":  # no row, but the manifest itself
            raise RunError(
                f"{source}: cannot be read on ({entry.wrong[1]}); --on_damage record would go on "
                "and note it as a failure"
            )
        error = ImageError(*entry.wrong)
    elif not error:
        try:
            record = ImageRecord(ref, _fetch(entry.path, how, on_retry))
            if len(record.data) <= how.max_image_bytes:
                return record
            message = f"more than --max_image_bytes {how.max_image_bytes}"
            error = ImageError("TooManyBytes", message)
        except OSError as raised:
            error = _why(raised)
        except ImageError as raised:
            error = raised
    return Failure.of(ref, "read", error, size=size)


def _fetch(path: str, how: Reading, on_retry: Retried) -> bytes:
    """The file at `path`, no more than a byte over the limit of it."""
    most = how.max_image_bytes + 1
    if path.lower().startswith(listing.WEB):
        if not how.allow_http:
            raise ImageError("HttpNotAllowed", "http(s) addresses are read with --allow_http only")
        return web.read_url(path, most, on_retry)
    if "://" in path and path.partition("://")[0].lower() not in files.REMOTE:
        scheme = path.partition("://")[0]
        raise ImageError("UnsupportedScheme", f"no filesystem for {scheme[:40]}://")
    return steady.read_at_most(path, most, on_retry)


def read_entries(
    unit: Unit, how: Reading, on_retry: Retried = ignore
) -> Iterator[ImageRecord | Failure]:
    """The images that the entries of `unit` name, several being read at once."""
    largest = _UNKNOWN_BYTES  # of what nothing tells the size of before it is read

    def read(entry: Entry) -> ImageRecord | Failure:
        nonlocal largest
        found = read_entry(entry, how, on_retry)
        if isinstance(found, ImageRecord):
            largest = max(largest, len(found.data))
        return found

    def weigh(entry: Entry) -> int:
        return largest if "://" in entry.path else _weight(entry, how.max_image_bytes)

    return map_ahead(read, unit.entries, io_threads(), _READ_AHEAD, weigh=weigh)


def _weight(entry: Entry, most: int) -> int:
    """How many bytes reading a local `entry` will hold."""
    try:
        return min(os.path.getsize(entry.path), most)
    except (OSError, ValueError):
        return 0


def read_container(
    unit: Unit, how: Reading, on_retry: Retried = ignore
) -> Iterator[ImageRecord | Failure]:
    """The images of one container, and a Failure for each damaged place.

    Raises RunError at damage when `how.on_damage` is "fail".
    """
    (info,) = unit.files
    source = utf8(info.path) or ""
    held: list[tfrecord.Record | Found] = []
    size = 0
    for item in itertools.islice(_walk(unit, source, how, on_retry), unit.limit):
        if isinstance(item, Failure):
            yield item
            continue
        held.append(item)
        size += len(item.data or b"")
        if len(held) == _PARSE_RECORDS or size > _PARSE_BYTES:
            yield from _parse(held, source, how)
            held, size = [], 0
    yield from _parse(held, source, how)


def _walk(
    unit: Unit, source: str, how: Reading, on_retry: Retried
) -> Iterator[tfrecord.Record | Found | Failure]:
    (info,) = unit.files
    found, whole = 0, unit.wanted is None and unit.format == inputs.TFRECORD
    awaited = dict(unit.wanted.keys) if unit.wanted else {}
    try:
        for item in containers.walk(
            info, unit.format, how.keys, how.max_image_bytes, unit.wanted, on_retry
        ):
            found = item.index + 1
            awaited.pop(item.index, None)
            if isinstance(item, tfrecord.Damage) and containers.hides_more(item.error_class):
                whole = False  # it tells of what it hides
                awaited = {at: key for at, key in awaited.items() if at < item.index}
            yield _damaged(item, source, how) if isinstance(item, tfrecord.Damage) else item
        for index in sorted(awaited):
            yield _missing(ImageRef(awaited[index], source, index), how)
        known = how.counts.get(source, 0)
        if whole and found < known:
            message = f"ends after {found} records, and is known to have had {known}"
            missing = tfrecord.Damage(info.size, found, "MissingRecords", message, None)
            # At no record's place: an earlier run may have finished the one that is missing.
            yield dataclasses.replace(_damaged(missing, source, how), record_index=None)
    except OSError as error:
        if how.on_damage == "fail":  # nobody knows how many images it hides
            raise RunError(
                f"{source}: cannot be read on after {found} images ({error}); --on_damage record "
                "would go on and note it as a failure"
            ) from None
        yield Failure.of(ImageRef(source, source), "read", _why(error), size=info.size)


def _missing(ref: ImageRef, how: Reading) -> Failure:
    """What is looked for by its index, and not there any more."""
    told = "the file ends before this record, which an earlier run has seen"
    if how.on_damage == "fail":
        raise RunError(f"{ref.key}: {told}; --on_damage record would note it as a failure")
    return Failure.of(ref, "read", ImageError("MissingRecords", told))


def _damaged(damage: tfrecord.Damage, source: str, how: Reading) -> Failure:
    if how.on_damage == "fail":
        where = "row" if damage.error_class == parquet.DAMAGE else "byte"
        raise RunError(
            f"{source}: {damage.error_class} at {where} {damage.offset}: {damage.message}; "
            "--on_damage record would go on and note it as a failure"
        )
    ref = ImageRef(f"{source}@{damage.offset}", source, damage.index)
    reason = ImageError(damage.error_class, damage.message)
    return Failure.of(ref, "read", reason, size=damage.bytes)


def _parse(
    items: list[tfrecord.Record | Found], source: str, how: Reading
) -> Iterator[ImageRecord | Failure]:
    for item in containers.parse(items, source, how.keys, how.types) if items else ():
        yield _capped(item, how.max_image_bytes) if isinstance(item, ImageRecord) else item


READERS = {
    inputs.IMAGES: read_image_files,
    inputs.MANIFEST: read_entries,
    **dict.fromkeys(containers.CONTAINERS, read_container),
}


class Finished:
    """What need not be done: digests of places and keys (see `formats.resuming.Resumed`)."""

    def __init__(self, finished: DigestSet | None = None):
        self._finished = DigestSet.of(b"") if finished is None else finished

    @classmethod
    def read(cls, path: str | None) -> Finished:
        """What `write` put at `path`; nothing for None. Local files stay on the disk.

        Nothing too where it is gone: an engine that begins a job anew after its commit, which took
        it along, will find the verdict.
        """
        try:
            return cls() if path is None else cls(DigestSet.stored(_mapped(path)))
        except FileNotFoundError:
            log.warning("%s is gone: what is finished is done again, or the job is over", path)
            return cls()

    @staticmethod
    def write(path: str, finished: Bytes) -> None:
        """Store the digests, one at least, for the workers."""
        files.write_pieces(path, DigestSet.of(finished).store())

    def __contains__(self, item: ImageRecord | Failure) -> bool:
        if not self._finished:  # most runs; digests would cost them a part in 200
            return False
        at = item if isinstance(item, Failure) else item.ref
        damaged = at.key.startswith(f"{at.source}@")
        if damaged and isinstance(item, Failure) and _hides_more(item):
            return self._has(at.key, at.source, at.record_index)  # other than its place's record
        has_id = not damaged and at.key != place_key(at.source, at.record_index)
        return self.holds(at.key, at.source, at.record_index, has_id)

    def apart(self, failure: Failure) -> Failure:
        """`failure`, at no record's place where that record is finished, and it hides others."""
        source, index = failure.source, failure.record_index
        if self._finished and _hides_more(failure) and self.holds(failure.key, source, index):
            return dataclasses.replace(failure, record_index=None)
        return failure

    def holds(self, key: str, source: str, index: int | None, has_id: bool = False) -> bool:
        """Whether the image of this key at this place is finished.

        With `has_id` the key is the image's own, wherever it lies: what was at its place says
        nothing then.
        """
        if not has_id and place_digest(source, index) in self._finished:
            return True
        keys = {key} if has_id else {key, place_key(source, index)}
        return any(self._has(name, source, index) for name in keys)

    def _has(self, key: str, source: str, index: int | None) -> bool:
        at = image_digest(key, source, index)
        return key_digest(key) in self._finished or at in self._finished


def _hides_more(failure: Failure) -> bool:
    """Whether it is of a damaged place behind which other records may lie."""
    damaged = failure.key.startswith(f"{failure.source}@")
    return damaged and containers.hides_more(failure.error_class)


@functools.lru_cache(1)  # one for all threads of a worker
def _fetched(path: str) -> np.ndarray:
    return np.frombuffer(steady.read_bytes(path), np.uint8)


def _mapped(path: str) -> np.ndarray:
    if files.is_remote(path):
        return _fetched(path)
    return np.memmap(path, np.uint8, "r")


class _ReadUnits(beam.DoFn):
    def __init__(self, how: Reading, finished: str | None):
        self._how = how
        self._finished_path = finished

    def setup(self) -> None:
        self._finished = Finished.read(self._finished_path)

    def process(self, unit: Unit) -> Iterator[Any]:
        unit, skipped = self._waiting(unit)
        retries: list[None] = []  # filled by threads that Beam's counters do not know
        for item in READERS[unit.format](unit, self._how, lambda: retries.append(None)):
            if unit.format in inputs.CONTAINERS and item in self._finished:
                skipped += 1
            elif isinstance(item, Failure):
                inc_counter("ReadImages", "failures")
                yield beam.pvalue.TaggedOutput("failures", self._finished.apart(item))
            else:
                inc_counter("ReadImages", "images")
                inc_counter("ReadImages", "bytes", len(item.data))
                yield item
        if retries:
            inc_counter("ReadImages", "retries", len(retries))
            yield beam.pvalue.TaggedOutput("timings", Timing(retries=len(retries)))
        if skipped:
            yield beam.pvalue.TaggedOutput("skipped", skipped)

    def _waiting(self, unit: Unit) -> tuple[Unit, int]:
        """`unit` without the finished files, and how many: their places are known before."""
        if unit.format == inputs.IMAGES:
            names = [utf8(file.path) or "" for file in unit.files]
            waiting = [
                file
                for name, file in zip(names, unit.files, strict=True)
                if not self._finished.holds(name, name, None)
            ]
            left = dataclasses.replace(unit, files=tuple(waiting))
        elif unit.format == inputs.MANIFEST:
            entries = [entry for entry in unit.entries if not self._has(entry)]
            left = dataclasses.replace(unit, entries=tuple(entries))
        else:
            return unit, 0
        there, to_do = len(unit.files) + len(unit.entries), len(left.files) + len(left.entries)
        return left, there - to_do

    def _has(self, entry: Entry) -> bool:
        source = listing.shown(entry.path)
        ref, _ = refer(
            entry.key, source, entry.index, entry.values, self._how.keys, self._how.types
        )
        has_id = ref.key != entry.key
        # A relative uri may be another picture's in another folder; then settling tells of both.
        key = ref.key if has_id or entry.index is not None else source
        return self._finished.holds(key, source, entry.index, has_id)


class ReadImages(beam.PTransform):
    """Sources -> `images` (ImageRecord), `failures` (Failure), `skipped` (int: how many) and
    `timings` (Timing).

    `finished`: path of the digests of what earlier runs finished (see `Finished`), or None.
    Only names cross the shuffle; every object is read whole, once.
    """

    def __init__(self, how: Reading, limit: int | None = None, finished: str | None = None):
        super().__init__()
        self._how = how
        self._limit = limit
        self._finished = finished

    def expand(self, sources: beam.PCollection[list[Source]]) -> Any:
        """A PCollection of one list of sources -> the four outputs."""
        return (
            sources
            | "ListUnits" >> beam.FlatMap(inputs.list_units, self._limit, self._how.keys)
            | "Spread" >> beam.Reshuffle()
            | "ReadUnits"
            >> beam.ParDo(_ReadUnits(self._how, self._finished)).with_outputs(
                "failures", "skipped", "timings", main="images"
            )
        )
