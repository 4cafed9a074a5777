"""ReadImages: input sources -> encoded images, with what could not be read beside them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa

from formats import example, inputs, tfrecord
from formats.dataset import key_digest, place_digest
from formats.inputs import Source, Unit
from formats.records import Failure, ImageError, ImageRecord, ImageRef, digest
from formats.table import utf8
from storage import files
from storage.errors import RunError
from storage.files import FileInfo
from transforms.lookahead import io_threads, map_ahead
from transforms.metrics import inc_counter

_PARSE_RECORDS = 64  # records parsed in one call
_PARSE_BYTES = 16 << 20  # ... or this many bytes of them
_READ_AHEAD = 32  # image files being read at once


@dataclass(frozen=True)
class Reading:
    """How sources are read: features by name, their types, caps in bytes, and what damage does."""

    keys: example.ExampleKeys = field(default_factory=example.ExampleKeys)
    types: example.ExampleTypes = field(
        default_factory=lambda: example.ExampleTypes(pa.int64(), {})
    )
    max_image_bytes: int = 256 << 20
    on_damage: str = "record"


def read_image_file(info: FileInfo, max_bytes: int) -> ImageRecord | Failure:
    """One file as one image; Failure where it is too large or cannot be read."""
    name = utf8(info.path) or ""
    ref = ImageRef(name, name)
    if info.size > max_bytes:
        return Failure.of(ref, "read", too_many_bytes(info.size, max_bytes), size=info.size)
    try:
        data = files.read_bytes(info.path)
    except OSError as error:
        reason = ImageError(type(error).__name__, str(error))
        return Failure.of(ref, "read", reason, size=info.size)
    return _capped(ImageRecord(ref, data), max_bytes)  # it may have grown since it was listed


def _capped(record: ImageRecord, max_bytes: int) -> ImageRecord | Failure:
    size = len(record.data)
    if size <= max_bytes:
        return record
    reason = too_many_bytes(size, max_bytes)
    return Failure.of(record.ref, "read", reason, digest(record.data), size)


def too_many_bytes(size: int, limit: int) -> ImageError:
    """The reason to refuse an encoded image of `size` bytes."""
    return ImageError("TooManyBytes", f"{size} bytes, more than --max_image_bytes {limit}")


def read_image_files(unit: Unit, how: Reading) -> Iterator[ImageRecord | Failure]:
    """The image files of `unit`, several being read at once."""
    read = functools.partial(read_image_file, max_bytes=how.max_image_bytes)
    return map_ahead(read, unit.files, io_threads(), _READ_AHEAD, weigh=lambda info: info.size)


def read_tfrecord(unit: Unit, how: Reading) -> Iterator[ImageRecord | Failure]:
    """The images of one TFRecord file, and a Failure for each damaged place.

    Raises RunError at damage when `how.on_damage` is "fail".
    """
    (info,) = unit.files
    source = utf8(info.path) or ""
    held: list[tfrecord.Record] = []
    for item in itertools.islice(_walk(info, source, how), unit.limit):
        if isinstance(item, tfrecord.Record):
            held.append(item)
            if len(held) == _PARSE_RECORDS or sum(len(r.data) for r in held) > _PARSE_BYTES:
                yield from _parse(held, source, how)
                held = []
        else:
            yield item
    yield from _parse(held, source, how)


def _walk(info: FileInfo, source: str, how: Reading) -> Iterator[tfrecord.Record | Failure]:
    try:
        for item in inputs.walk(info):
            yield item if isinstance(item, tfrecord.Record) else _damaged(item, source, how)
    except OSError as error:
        reason = ImageError(type(error).__name__, str(error))
        yield Failure.of(ImageRef(source, source), "read", reason, size=info.size)


def _damaged(damage: tfrecord.Damage, source: str, how: Reading) -> Failure:
    if how.on_damage == "fail":
        raise RunError(
            f"{source}: {damage.error_class} at byte {damage.offset}: {damage.message}; "
            "--on_damage record would go on and note it as a failure"
        )
    ref = ImageRef(f"{source}@{damage.offset}", source, damage.index)
    reason = ImageError(damage.error_class, damage.message)
    return Failure.of(ref, "read", reason, size=damage.bytes)


def _parse(
    records: list[tfrecord.Record], source: str, how: Reading
) -> Iterator[ImageRecord | Failure]:
    if not records:
        return
    for item in example.parse_examples(records, source, how.keys, how.types):
        yield _capped(item, how.max_image_bytes) if isinstance(item, ImageRecord) else item


READERS = {inputs.TFRECORD: read_tfrecord, inputs.IMAGES: read_image_files}


_ORDER = np.dtype([("a", "<u8"), ("b", "<u8")])  # a digest as two numbers, to sort by the first


class Finished:
    """What need not be done: digests of places and keys (see `formats.dataset.Resumed`).

    16 bytes each; look-up by bisection.
    """

    def __init__(self, finished: bytes = b"", again: bytes = b""):
        self._finished = _sorted(finished)
        self._again = _sorted(again)

    @classmethod
    def read(cls, path: str | None) -> Finished:
        """What `write` put at `path`; nothing for None."""
        data = files.read_bytes(path) if path else bytes(8)
        end = 8 + int.from_bytes(data[:8], "little")
        return cls(data[8:end], data[end:])

    @staticmethod
    def write(path: str, finished: bytes, again: bytes) -> None:
        """Store the digests for the workers."""
        files.write_bytes(path, len(finished).to_bytes(8, "little") + finished + again)

    def __contains__(self, item: ImageRecord | Failure) -> bool:
        at = item if isinstance(item, Failure) else item.ref
        return self.holds(at.key, at.source, at.record_index)

    def holds(self, key: str, source: str, index: int | None) -> bool:
        """Whether the image of this key at this place is finished."""
        place = place_digest(source, index)
        if _among(self._again, place):
            return False
        return _among(self._finished, place) or _among(self._finished, key_digest(key))


def _sorted(digests: bytes) -> np.ndarray:
    return np.sort(np.frombuffer(digests, _ORDER), order="a")


def _among(digests: np.ndarray, digest: bytes) -> bool:
    wanted = np.frombuffer(digest, _ORDER)[0]
    at = int(np.searchsorted(digests["a"], wanted["a"]))
    while at < len(digests) and digests[at]["a"] == wanted["a"]:
        if digests[at]["b"] == wanted["b"]:
            return True
        at += 1
    return False


class _ReadUnits(beam.DoFn):
    def __init__(self, how: Reading, finished: str | None):
        self._how = how
        self._finished_path = finished

    def setup(self) -> None:
        self._finished = Finished.read(self._finished_path)

    def process(self, unit: Unit) -> Iterator[Any]:
        skipped = 0
        if unit.format == inputs.IMAGES:  # their places are known before they are read
            names = [utf8(file.path) or "" for file in unit.files]
            waiting = [
                file
                for name, file in zip(names, unit.files, strict=True)
                if not self._finished.holds(name, name, None)
            ]
            skipped = len(unit.files) - len(waiting)
            unit = dataclasses.replace(unit, files=tuple(waiting))
        for item in READERS[unit.format](unit, self._how):
            if item in self._finished:
                skipped += 1
            elif isinstance(item, Failure):
                inc_counter("ReadImages", "failures")
                yield beam.pvalue.TaggedOutput("failures", item)
            else:
                inc_counter("ReadImages", "images")
                inc_counter("ReadImages", "bytes", len(item.data))
                yield item
        if skipped:
            yield beam.pvalue.TaggedOutput("skipped", skipped)


class ReadImages(beam.PTransform):
    """Sources -> `images` (ImageRecord), `failures` (Failure) and `skipped` (int: how many).

    `finished`: path of the digests of what earlier runs finished (see `Finished`), or None.
    Only names cross the shuffle; every object is read whole, once.
    """

    def __init__(self, how: Reading, limit: int | None = None, finished: str | None = None):
        super().__init__()
        self._how = how
        self._limit = limit
        self._finished = finished

    def expand(self, sources: beam.PCollection[list[Source]]) -> Any:
        """A PCollection of one list of sources -> the three outputs."""
        return (
            sources
            | "ListUnits" >> beam.FlatMap(inputs.list_units, self._limit)
            | "Spread" >> beam.Reshuffle()
            | "ReadUnits"
            >> beam.ParDo(_ReadUnits(self._how, self._finished)).with_outputs(
                "failures", "skipped", main="images"
            )
        )
