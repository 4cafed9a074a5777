"""TFRecord files, plain or gzip: records with their position, and every damage as a value.

The framing is TensorFlow's (tensorflow/core/lib/io/record_writer.h): a little-endian uint64
length, the length's masked CRC-32C, the payload, the payload's masked CRC-32C. A reader that knows
the length is right can walk over a payload that is wrong, and over nothing else.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import google_crc32c

MAX_RECORD_BYTES = 512 << 20  # twice --max_image_bytes: the largest image and what stands beside it

_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")
_GZIP = b"\x1f\x8b"
_PIECE = 16 << 20  # bytes asked of a stream at once: what a false length can allocate
_CHUNK = 64 << 10  # compressed bytes inflated at once
_BLOCK = 256 << 10  # bytes decompressed, or walked over, at once

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
    source = _Source(stream, size)
    head = source.read(_HEADER.size)
    # A plain file whose first payload has 35,615 bytes begins with gzip's magic: checksum first.
    if head.startswith(_GZIP) and _length(head) is None:
        inflated = _Inflated(source, head)
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
    if _length(head) is None and head.startswith(_GZIP):
        head = _Inflated(_Source(io.BytesIO(head), None), b"").read(_HEADER.size)
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
    source: _Source | _Inflated, header: bytes, size: int | None, max_record_bytes: int, note: str
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
        complete = _skip(source, length) if data is None else len(data) == length
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


def _skip(source: _Source | _Inflated, count: int) -> bool:
    """Reads `count` bytes away, a piece at a time; False where the source ends before."""
    while count and (piece := source.read(min(count, _BLOCK))):
        count -= len(piece)
    return count == 0


class _Source:
    """A stream that reads exactly, and knows when it ended before the size it should have."""

    def __init__(self, stream: BinaryIO, size: int | None):
        self._stream = stream
        self._size = size
        self.position = 0
        self.damage: tuple[str, str] | None = None

    def read(self, count: int) -> bytes:
        """The next `count` bytes, fewer only at the end."""
        data = self._stream.read(min(count, _PIECE))
        self.position += len(data)
        if len(data) == count:
            return data
        parts = [data]
        missing = count - len(data)
        while missing and (data := self._stream.read(min(missing, _PIECE))):
            parts.append(data)
            missing -= len(data)
            self.position += len(data)
        if missing and self._size is not None and self.position < self._size:
            message = f"the stream ends after {self.position} of the file's {self._size} bytes"
            self.damage = ("TruncatedFile", message)
        return b"".join(parts)


class _Inflated:
    """What a gzip source that begins with `head` decompresses to, up to where it is damaged."""

    def __init__(self, source: _Source, head: bytes):
        self._source = source
        self._blocks = _inflate(source, head)
        self._block = b""
        self._at = 0
        self._damage: tuple[str, str] | None = None

    @property
    def damage(self) -> tuple[str, str] | None:
        return self._source.damage or self._damage

    def read(self, count: int) -> bytes:
        """The next `count` bytes, fewer only at the end or where the source is damaged."""
        parts = []
        while count:
            if self._at == len(self._block):
                try:
                    self._block, self._at = next(self._blocks, b""), 0
                except zlib.error as error:
                    where = f"in the file's first {self._source.position} bytes"
                    self._damage = ("GzipDamage", f"gzip: {error} ({where})")
                    break
                if not self._block:
                    break
            part = self._block[self._at : self._at + count]
            parts.append(part)
            self._at += len(part)
            count -= len(part)
        return b"".join(parts)


def _inflate(source: _Source, data: bytes) -> Iterator[bytes]:
    """Decompressed blocks, none of them empty; zlib.error after the last one before a damage."""
    while data := data or source.read(_CHUNK):
        member = zlib.decompressobj(wbits=31)
        while not member.eof:
            data = data or source.read(_CHUNK)
            before = member.copy()
            try:
                block = member.decompress(data, _BLOCK)
            except zlib.error:
                # The failing call keeps back what it had made: make it again, byte by byte.
                for byte in data:
                    if block := before.decompress(bytes([byte])):
                        yield block
                raise
            if block:
                yield block
            elif not data:
                raise zlib.error("the file ends inside a gzip member")
            data = member.unused_data if member.eof else member.unconsumed_tail
