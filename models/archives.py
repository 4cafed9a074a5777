"""Model archives (`.tar.gz`): unpacked by rules, whole or not at all."""

from __future__ import annotations

import shutil
import tarfile
import tempfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO

MAX_MEMBERS = 10_000
MAX_BYTES = 8 << 30  # unpacked: ten times the largest model of the hub's image families
_CHUNK = 1 << 20
_END_OF_TAR = 2 * 512  # zero bytes that close a tar


class ArchiveError(ValueError):
    """The archive is cut, altered, or holds what a model does not need: one line."""


def unpack(archive: Path, directory: Path) -> None:
    """Unpack `archive` into the new `directory`. Raises ArchiveError; then it is not there.

    Regular files and folders only, none outside `directory`, at most `MAX_MEMBERS` and `MAX_BYTES`.
    Every checksum is verified and the tar must be closed: gzip's own readers accept neither a tar
    cut between members nor, always, what follows the compressed data.
    """
    directory.mkdir()
    try:
        with tempfile.TemporaryFile(dir=directory.parent) as plain:
            _inflate(archive, plain)
            plain.seek(0)
            with tarfile.open(fileobj=plain, mode="r:") as tar:
                _extract(tar, directory)
                end = tar.offset
            plain.seek(end)
            if plain.read(_END_OF_TAR).strip(b"\0") or plain.tell() - end < _END_OF_TAR - 512:
                raise ArchiveError("the tar inside ends without its closing blocks: it was cut")
    except (tarfile.TarError, zlib.error, UnicodeError) as error:
        shutil.rmtree(directory)
        raise ArchiveError(f"damaged ({error})") from None
    except BaseException:
        shutil.rmtree(directory)
        raise


def _inflate(archive: Path, plain: IO[bytes]) -> None:
    """The one gzip member of `archive` into `plain`; zlib verifies its checksum and length."""
    size = 0
    inflater = zlib.decompressobj(wbits=31)
    with archive.open("rb") as packed:
        while chunk := packed.read(_CHUNK):
            while chunk:
                piece = inflater.decompress(chunk, _CHUNK)
                size += len(piece)
                if size > MAX_BYTES:
                    raise ArchiveError(f"unpacks to more than {MAX_BYTES >> 30} GiB")
                plain.write(piece)
                chunk = inflater.unconsumed_tail
            if inflater.eof and (inflater.unused_data or packed.read(1)):
                raise ArchiveError("bytes follow the compressed data")
    if not inflater.eof:
        raise ArchiveError("the compressed data end early: it was cut")


def _extract(tar: tarfile.TarFile, directory: Path) -> None:
    for count, member in enumerate(tar, 1):
        if count > MAX_MEMBERS:
            raise ArchiveError(f"more than {MAX_MEMBERS} members")
        name = PurePosixPath(member.name)
        if name.is_absolute() or ".." in name.parts or "\0" in member.name:
            raise ArchiveError(f"member {member.name[:100]!r} would lie outside the model")
        target = directory / name
        if member.isdir():
            target.mkdir(parents=True, exist_ok=True)
        elif member.isreg() and not member.issparse():  # a sparse one unpacks to any size
            target.parent.mkdir(parents=True, exist_ok=True)
            source = tar.extractfile(member)
            assert source is not None
            with target.open("xb") as file:
                shutil.copyfileobj(source, file, _CHUNK)
            if target.stat().st_size != member.size:
                raise ArchiveError(f"member {member.name[:100]!r} was cut")
        else:
            raise ArchiveError(f"member {member.name[:100]!r} is neither a plain file nor a folder")
