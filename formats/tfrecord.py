"""TFRecord files, plain or gzip: records with their position, and every damage as a value.

The framing is TensorFlow's (tensorflow/core/lib/io/record_writer.h): a little-endian uint64
length, the length's masked CRC-32C, the payload, the payload's masked CRC-32C. A reader that knows
the length is right can walk over a payload that is wrong, and over nothing else.
"""

from __future__ import annotations

import io
import re
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import google_crc32c

from formats.streams import GZIP, ExactStream, InflatedStream, skip

MAX_RECORD_BYTES = 512 << 20  # twice the default --max_image_bytes: an image and what is beside it

_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")

_SHARD = re.compile(r"(?P<prefix>.*)-(?P<index>\d{5,6})-of-(?P<total>\d{5,6})(?P<suffix>[^/]*)")
_NAME = re.compile(r".*(\.tfrecords?|\.tfrec|\.tfr|-\d{5,6}-of-\d{5,6})(\.gz)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Record:
    """One payload: `offset` of its header in bytes, `index` from 0, `data` as written.

    In a gzip file `offset` counts decompressed bytes.
    """

    offset: int
    index: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Damage:
    """A place that holds no readable record.

    `offset` is the damaged record's header in bytes (decompressed ones in a gzip file, as `message`
    then says) and `index` the position it would have had. `error_class` is BadChecksum or
    RecordTooLarge where reading goes on, BadLength, TruncatedRecord, TruncatedFile or GzipDamage
    where it ends. `bytes` is the payload's length in the first two cases, else what is left of the
    file, None where its size is unknown. `message` is one line without the file's bytes.
    """

    offset: int
    index: int
    error_class: str
    message: str
    bytes: int | None


def read_records(
    stream: BinaryIO, size: int | None, *, max_record_bytes: int = MAX_RECORD_BYTES
) -> Iterator[Record | Damage]:
    """The records of a TFRecord file in order, with a `Damage` for each place that holds none.

    `stream` stands at the file's first byte and need not be seekable; `size` is the file's in
    bytes, None where unknown. Gzip is known by content. A wrong payload checksum and a payload over
    `max_record_bytes` cost that record alone; any other damage ends the iteration after one
    `Damage`. A file cut between two records shows none unless `size` tells. Memory is one record.
    Only errors of `stream` itself are raised.
    """
    source = ExactStream(stream, size)
    head = source.read(_HEADER.size)
    # A plain file whose first payload has 35,615 bytes begins with gzip's magic: checksum first.
    if head.startswith(GZIP) and _length(head) is None:
        inflated = InflatedStream(source, head)
        head = inflated.read(_HEADER.size)
        yield from _walk(
            inflated, head, None, max_record_bytes, " (offset in the decompressed gzip stream)"
        )
    else:
        yield from _walk(source, head, size, max_record_bytes, "")


def is_tfrecord(head: bytes) -> bool:
    """Whether a file that begins with `head` is a TFRecord file, plain or gzip, by its content.

    True where the first header's checksum is right. `head` needs 12 bytes of a plain file, and of a
    gzip file as many as hold 12 decompressed ones (100 are enough but for a long file name).
    """
    if _length(head) is None and head.startswith(GZIP):
        head = InflatedStream(ExactStream(io.BytesIO(head), None), b"").read(_HEADER.size)
    return _length(head) is not None


def looks_like_tfrecord_name(name: str) -> bool:
    """Whether a name ends as TFRecord files do: .tfrecord(s), .tfrec, .tfr, -00003-of-00010, .gz.

    A name proves nothing; `is_tfrecord` looks inside.
    """
    return _NAME.fullmatch(name) is not None


def write_record(stream: BinaryIO, data: bytes) -> None:
    """Appends one record with its checksums to `stream`."""
    length = len(data).to_bytes(8, "little")
    stream.write(length + _FOOTER.pack(_masked_crc(length)))
    stream.write(data)
    stream.write(_FOOTER.pack(_masked_crc(data)))


def missing_shards(names: Iterable[str]) -> list[str]:
    """The `-NNNNN-of-MMMMM` names that `names` lacks, sorted within each set of shards.

    A set is what shares the text before and after the numbers and the total M. Names without
    numbers are passed over.
    """
    sets: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for name in names:
        if shard := _SHARD.fullmatch(name):
            sets[shard["prefix"], shard["total"], shard["suffix"]].add(shard["index"])
    missing = []
    for (prefix, total, suffix), present in sets.items():
        width = min(map(len, present))
        for index in (f"{i:0{width}}" for i in range(int(total))):
            if index not in present:
                missing.append(f"{prefix}-{index}-of-{total}{suffix}")
    return missing


def _masked_crc(data: bytes) -> int:
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _length(header: bytes) -> int | None:
    """The payload length that `header` (at least 12 bytes) begins with, None if it is no header."""
    if len(header) < _HEADER.size:
        return None
    length, crc = _HEADER.unpack_from(header)
    return length if crc == _masked_crc(header[:8]) else None


def _walk(
    source: ExactStream | InflatedStream,
    header: bytes,
    size: int | None,
    max_record_bytes: int,
    note: str,
) -> Iterator[Record | Damage]:
    """`read_records` of a source whose first header has been read; `note` ends each message."""
    offset = index = 0

    def damage(error_class: str, message: str, lost: int | None = None) -> Damage:
        if lost is None and size is not None:
            lost = max(size - offset, 0)
        return Damage(offset, index, error_class, message + note, lost)

    def cut(message: str) -> Damage:
        return damage(*(source.damage or ("TruncatedRecord", message)))

    while len(header) == _HEADER.size:
        length = _length(header)
        if length is None:
            yield damage("BadLength", "wrong length checksum: what follows cannot be walked over")
            return
        inside = f"the file ends inside a record of {length} bytes"
        if size is not None and offset + _HEADER.size + length + _FOOTER.size > size:
            yield cut(inside)
            return
        data = source.read(length) if length <= max_record_bytes else None
        complete = skip(source, length) if data is None else len(data) == length
        # One read for this record's footer and the next one's header.
        seam = source.read(_FOOTER.size + _HEADER.size) if complete else b""
        if len(seam) < _FOOTER.size:
            yield cut(inside)
            return
        if data is None:
            message = f"a record of {length} bytes, over the limit of {max_record_bytes}"
            yield damage("RecordTooLarge", message, length)
        elif _FOOTER.unpack_from(seam)[0] != _masked_crc(data):
            yield damage("BadChecksum", f"wrong checksum of a record of {length} bytes", length)
        else:
            yield Record(offset, index, data)
        header = seam[_FOOTER.size :]
        offset += _HEADER.size + length + _FOOTER.size
        index += 1
    if header or source.damage:
        yield cut(f"{len(header)} bytes where a header of {_HEADER.size} should be")
