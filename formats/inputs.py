"""What `--input` stands for: which files, of which format, in which units of work."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from formats import tfrecord
from storage import files
from storage.errors import RequestError
from storage.files import FileInfo

TFRECORD, IMAGES = "tfrecord", "images"
_HEAD_BYTES = 4096
_IMAGES_A_UNIT = 128  # enough to fill batches, few enough to spread over workers


@dataclass(frozen=True, slots=True)
class Source:
    """An input pattern and the format of its files."""

    pattern: str
    format: str


@dataclass(frozen=True, slots=True)
class Unit:
    """Work for one reader: one container, or a run of image files.

    `limit`: most records to read, None for all.
    """

    format: str
    files: tuple[FileInfo, ...]
    limit: int | None = None


def detect_format(found: Sequence[FileInfo]) -> str:
    """`tfrecord` where every file is one, by its name or its beginning; otherwise `images`.

    Empty files tell nothing unless their names do. Raises OSError.
    """
    telling = [info for info in found if info.size or tfrecord.looks_like_tfrecord_name(info.path)]
    return TFRECORD if telling and all(map(_is_tfrecord, telling)) else IMAGES


def _is_tfrecord(info: FileInfo) -> bool:
    if tfrecord.looks_like_tfrecord_name(info.path):
        return True
    with files.open_read(info.path) as stream:
        return tfrecord.is_tfrecord(stream.read(_HEAD_BYTES))


def survey(
    patterns: Iterable[str], input_format: str, allow_empty: bool
) -> tuple[list[Source], list[str]]:
    """The sources that `patterns` stand for, and warnings about what looks incomplete.

    Raises RequestError for a pattern that matches nothing (unless `allow_empty`) or cannot be
    listed.
    """
    sources, warnings = [], []
    for pattern in patterns:
        try:
            found = list(files.find(pattern))
            if not found and not allow_empty:
                raise RequestError(
                    f"--input {pattern}: matches nothing; the run would be empty; give another "
                    "pattern, or --allow_empty where that is expected"
                )
            kind = detect_format(found) if input_format == "auto" else input_format
        except OSError as error:
            raise RequestError(f"--input {pattern}: cannot be read ({error})") from None
        sources.append(Source(pattern, kind))
        if kind == TFRECORD:
            warnings += _doubts(found)
    return sources, warnings


def _doubts(shards: Sequence[FileInfo]) -> list[str]:
    """What of a set of shards looks incomplete, a line each."""
    empty = [f"{info.path}: zero bytes, so no record" for info in shards if not info.size]
    missing = tfrecord.missing_shards(info.path for info in shards)
    return empty + [f"{path}: this shard of its set is not there" for path in missing]


def list_units(sources: Iterable[Source], limit: int | None) -> Iterator[Unit]:
    """The work that `sources` hold, every file once, in the order given. Raises OSError.

    With `limit` the containers are walked, so that the units hold just the first `limit` images.
    """
    seen: set[str] = set()
    for source in sources:
        fresh = []
        for info in files.find(source.pattern):
            if info.path not in seen:
                seen.add(info.path)
                fresh.append(info)
        if source.format == IMAGES:
            chosen = fresh if limit is None else fresh[:limit]
            units = [
                Unit(IMAGES, tuple(chosen[i : i + _IMAGES_A_UNIT]))
                for i in range(0, len(chosen), _IMAGES_A_UNIT)
            ]
            taken = len(chosen)
        else:
            units, taken = [Unit(source.format, (info,)) for info in fresh], 0
            if limit is not None:
                units, taken = _first_records(units, limit)
        yield from units
        if limit is not None:
            limit -= taken
            if limit <= 0:
                return


def _first_records(units: Sequence[Unit], limit: int) -> tuple[list[Unit], int]:
    chosen, taken = [], 0
    for unit in units:
        if taken == limit:
            break
        count = 0
        try:
            for _ in itertools.islice(walk(unit.files[0]), limit - taken):
                count += 1
        except OSError:
            count += 1  # reading it will end in a failure, which counts as an image
        taken += count
        chosen.append(Unit(unit.format, unit.files, count))
    return chosen, taken


def walk(info: FileInfo) -> Iterator[tfrecord.Record | tfrecord.Damage]:
    """The records of a TFRecord file, and its damaged places. Raises OSError."""
    with files.open_read(info.path) as stream:
        yield from tfrecord.read_records(stream, info.size)


def sample(sources: Sequence[Source], count: int) -> list[bytes]:
    """The first records of the TFRecord sources, at most `count`, for their types."""
    records = (
        record.data
        for unit in list_units([s for s in sources if s.format == TFRECORD], None)
        for record in walk(unit.files[0])
        if isinstance(record, tfrecord.Record)
    )
    return list(itertools.islice(records, count))
