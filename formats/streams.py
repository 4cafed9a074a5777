"""A container's bytes, plain or gzip, read exactly, with the damage that ended them as a value."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import BinaryIO

GZIP = b"\x1f\x8b"
BLOCK = 256 << 10  # bytes decompressed, or walked over, at once

_PIECE = 16 << 20  # bytes asked of a stream at once: what a false length can allocate
_CHUNK = 64 << 10  # compressed bytes inflated at once


def skip(source: ExactStream | InflatedStream, count: int) -> bool:
    """Reads `count` bytes away, a piece at a time; False where the source ends before."""
    while count and (piece := source.read(min(count, BLOCK))):
        count -= len(piece)
    return count == 0


class ExactStream:
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


class InflatedStream:
    """What a gzip source that begins with `head` decompresses to, up to where it is damaged."""

    def __init__(self, source: ExactStream, head: bytes):
        self._source = source
        self._blocks = _inflate(source, head)
        self._block = b""
        self._at = 0
        self._damage: tuple[str, str] | None = None

    @property
    def damage(self) -> tuple[str, str] | None:
        """What ended it before its time, as class and message; None where nothing did."""
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


def _inflate(source: ExactStream, data: bytes) -> Iterator[bytes]:
    """Decompressed blocks, none of them empty; zlib.error after the last one before a damage."""
    while data := data or source.read(_CHUNK):
        data = data.lstrip(b"\0")  # what a file is filled up with to whole blocks
        if not data:
            continue
        member = zlib.decompressobj(wbits=31)
        while not member.eof:
            data = data or source.read(_CHUNK)
            before = member.copy()
            try:
                block = member.decompress(data, BLOCK)
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
