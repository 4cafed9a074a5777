"""Reading that outlasts a store's moods: it goes on from where it stopped."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable
from typing import Any, BinaryIO

from storage import files
from storage.retries import ShortRead, attempt, ignore

_ENDLESS = {stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK}  # reading might never end


def read_bytes(path: str, size: int | None = None, on_retry: Callable[[], None] = ignore) -> bytes:
    """All bytes of `path`, which was listed with `size`. Raises OSError; ShortRead for fewer."""

    def read() -> bytes:
        data = files.read_bytes(path)
        if size is not None and len(data) < size:
            raise ShortRead(f"{path}: {len(data)} bytes came of the {size} that it was listed with")
        return data

    return attempt(read, path, on_retry)


def read_at_most(path: str, most: int, on_retry: Callable[[], None] = ignore) -> bytes:
    """The first `most` bytes of `path`, all where there are fewer. Raises OSError."""

    def read() -> bytes:
        if not files.is_remote(path) and _is_endless(path):
            raise OSError(f"{path}: a pipe, a socket or a device, no file")
        with files.open_read(path) as stream:
            return _exactly(stream, most)

    return attempt(read, path, on_retry)


def _is_endless(path: str) -> bool:
    try:
        return stat.S_IFMT(os.stat(path).st_mode) in _ENDLESS
    except OSError:  # which opening it tells
        return False


def _exactly(stream: BinaryIO, count: int) -> bytes:
    parts = []
    while count and (data := stream.read(min(count, 16 << 20))):
        parts.append(data)
        count -= len(data)
    return b"".join(parts)


class SteadyStream(io.RawIOBase):
    """`path` as a stream that opens it again, at the byte it had come to, where reading fails.

    `size` is what it was listed with; what has been added since is not read. A `read` gives fewer
    bytes than asked for only at the end; a file that ends before `size`, however often it is
    tried, ends there. Other lasting errors are
    raised as OSError and stand in `error`. Opens nothing before the first read.
    """

    def __init__(self, path: str, size: int, on_retry: Callable[[], None] = ignore):
        super().__init__()
        self._path = path
        self._size = size
        self._on_retry = on_retry
        self._handle: BinaryIO | None = None
        self._at = 0
        self._cut = False
        self.error: OSError | None = None

    def read(self, count: int | None = -1) -> bytes:
        """The next `count` bytes, all that are left for -1."""
        missing = max(self._size - self._at, 0)
        missing = missing if count is None or count < 0 else min(count, missing)
        parts = []
        while missing and not self._cut:
            try:
                part = attempt(lambda: self._piece(missing), self._path, self._on_retry)  # noqa: B023
            except ShortRead:
                self._cut = True
                break
            except OSError as error:
                self.error = error
                raise
            if not part:
                break
            parts.append(part)
            missing -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _piece(self, count: int) -> bytes:
        try:
            if self._handle is None:
                self._handle = files.open_read(self._path)
                if self._at:
                    self._handle.seek(self._at)
            data = self._handle.read(count)
            if not data and self._at < self._size:
                raise ShortRead(f"{self._path}: ends after {self._at} of {self._size} bytes")
        except BaseException:
            self._drop()
            raise
        self._at += len(data)
        return data

    def _drop(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            try:
                handle.close()
            except Exception:
                pass  # it has failed already, and a new one will be opened

    def readinto(self, buffer: Any) -> int:
        """As `io.RawIOBase` has it."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The position of the next byte to be read."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to another byte; opens nothing."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if start + offset != self._at:
            self._at = start + offset
            self._cut = False
            if self._handle is not None:
                try:
                    self._handle.seek(self._at)
                except Exception:
                    self._drop()
        return self._at

    def close(self) -> None:
        """Let go of the file."""
        self._drop()
        super().close()
