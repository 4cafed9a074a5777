"""Files that hold many images, whatever their format: their records, and images made of these."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO, cast

from formats import example, fields, parquet, tfrecord, webdataset
from formats.example import ExampleKeys, ExampleTypes
from formats.fields import Found
from formats.records import Failure, ImageRecord
from formats.tfrecord import Damage, Record
from storage.files import FileInfo
from storage.retries import ignore
from storage.steady import SteadyStream

TFRECORD, PARQUET, WEBDATASET = "tfrecord", "parquet", "webdataset"
CONTAINERS = (TFRECORD, PARQUET, WEBDATASET)
_OF_ONE_RECORD = {"BadChecksum", "RecordTooLarge", webdataset.NAMELESS}


def hides_more(error_class: str) -> bool:
    """Whether damage of this class may hide records behind its own place."""
    return error_class not in _OF_ONE_RECORD


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which records of a container: those of `keys`, and from `start` on all but `without`.

    `keys`: by index, as an earlier run has told them.
    """

    keys: Mapping[int, str] = field(hash=False)
    start: int | None = None
    without: frozenset[int] = frozenset()

    def __contains__(self, index: int) -> bool:
        later = self.start is not None and index >= self.start and index not in self.without
        return later or index in self.keys

    @property
    def last(self) -> int | None:
        """The last index that can be wanted; None where there is no end."""
        return max(self.keys, default=-1) if self.start is None else None


def walk(
    info: FileInfo,
    format: str,
    keys: ExampleKeys,
    max_image_bytes: int,
    wanted: Wanted | None = None,
    on_retry: Callable[[], None] = ignore,
) -> Iterator[Record | Found | Damage]:
    """The records of one container that are `wanted`, in order, and its damaged places before them.

    What the format does not hold itself (a Parquet file's other columns, say) is left unread. A
    transient error is tried again from where reading stopped, and `on_retry` called. Raises
    OSError where it lasts.
    """
    with SteadyStream(info.path, info.size, on_retry) as steady:
        stream = cast(BinaryIO, steady)
        items: Iterator[Record | Found | Damage]
        if format == TFRECORD:
            # What stands beside the largest image may be as large again.
            most = max(tfrecord.MAX_RECORD_BYTES, 2 * max_image_bytes)
            items = tfrecord.read_records(stream, info.size, max_record_bytes=most)
        elif format == WEBDATASET:
            items = webdataset.read_images(stream, info.size, keys, max_image_bytes)
        elif info.size:
            items = parquet.read_images(stream, info.size, keys)
        else:
            items = iter(())
        yield from items if wanted is None else _chosen(items, wanted)


def _chosen(
    items: Iterable[Record | Found | Damage], wanted: Wanted
) -> Iterator[Record | Found | Damage]:
    for item in items:
        if item.index in wanted or isinstance(item, Damage):  # which may hide what is wanted
            yield item
        if wanted.last is not None and item.index >= wanted.last:
            return


def positions(
    info: FileInfo, format: str, keys: ExampleKeys, wanted: Wanted | None
) -> Iterator[int]:
    """The indices of what `walk` will find, most images left unread. Raises OSError."""
    if format != PARQUET:
        yield from (item.index for item in walk(info, format, keys, 0, wanted))
    elif info.size:
        with SteadyStream(info.path, info.size) as stream:
            rows = parquet.count_rows(cast(BinaryIO, stream))
        yield from (index for index in range(rows) if wanted is None or index in wanted)


def parse(
    items: Sequence[Record | Found], source: str, keys: ExampleKeys, types: ExampleTypes
) -> list[ImageRecord | Failure]:
    """One result for each record, in order: the image, or why there is none.

    `items` are all Record (of TFRecord) or all Found.
    """
    if items and isinstance(items[0], Record):
        return example.parse_examples(cast(Sequence[Record], items), source, keys, types)
    return fields.parse_found(cast(Sequence[Found], items), source, keys, types)
