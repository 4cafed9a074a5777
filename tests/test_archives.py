"""Archives: unpacked by rules, and never taken where one bit or the last block is missing."""

from __future__ import annotations

import gzip
import io
import os
import random
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import archives
from models.archives import ArchiveError, unpack

BLOCK = 512
FILES = {
    "saved_model.pb": random.Random(0).randbytes(3000),
    "variables/variables.index": b"index" * 100,
    "variables/variables.data-00000-of-00001": random.Random(1).randbytes(9000),
    "assets/empty": b"",
}


def tar_bytes(contents: dict[str, bytes] = FILES, extra: tuple[tarfile.TarInfo, ...] = ()) -> bytes:
    """A tar as the hub's are, its members starting with `./`."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        root = tarfile.TarInfo("./")
        root.type = tarfile.DIRTYPE
        tar.addfile(root)
        for name, data in contents.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for member in extra:
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    return file.getvalue()


def archive_bytes(contents: dict[str, bytes] = FILES, **how) -> bytes:
    return gzip.compress(tar_bytes(contents, **how), mtime=0)


def read_tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def unpacked(tmp_path):
    """Unpacks bytes; afterwards, where that failed, nothing may be left."""

    def call(data: bytes) -> dict[str, bytes]:
        (tmp_path / "archive").write_bytes(data)
        try:
            unpack(tmp_path / "archive", tmp_path / "model")
        except BaseException:
            assert os.listdir(tmp_path) == ["archive"]
            raise
        return read_tree(tmp_path / "model")

    return call


def test_a_whole_archive(unpacked):
    assert unpacked(archive_bytes()) == FILES


def member_boundaries() -> list[int]:
    with tarfile.open(fileobj=io.BytesIO(tar_bytes())) as tar:
        return [*[member.offset for member in tar][1:], tar.offset]


@pytest.mark.parametrize("at", member_boundaries())
def test_a_tar_cut_at_a_members_boundary(at, unpacked):
    with pytest.raises(ArchiveError, match="cut"):
        unpacked(gzip.compress(tar_bytes()[:at]))


def test_bytes_behind_the_end(unpacked):
    for more in (b"\0", b"more", gzip.compress(b"another", mtime=0)):
        with pytest.raises(ArchiveError, match="bytes follow"):
            unpacked(archive_bytes() + more)


@pytest.mark.parametrize("data", [b"", b"<html>not here</html>", gzip.compress(b"text", mtime=0)])
def test_what_is_no_archive(data, unpacked):
    with pytest.raises(ArchiveError):
        unpacked(data)


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, len(tar_bytes()) - 1), value=st.integers(1, 255))
def test_an_altered_tar_is_another_tar_or_no_tar(tmp_path_factory, at, value):
    """Here gzip's checksum holds, so the tar's own rules must: no error but the one documented."""
    data = bytearray(tar_bytes())
    data[at] ^= value
    folder = tmp_path_factory.mktemp("altered")
    (folder / "archive").write_bytes(gzip.compress(bytes(data), compresslevel=1))
    try:
        unpack(folder / "archive", folder / "model")
    except (ArchiveError, OSError):
        assert os.listdir(folder) == ["archive"]
    else:
        assert all(path.resolve().is_relative_to(folder) for path in folder.rglob("*"))


@pytest.mark.parametrize("name", ["../outside", "a/../../outside", "/outside", "./../outside"])
def test_a_path_out_of_the_model(name, unpacked, tmp_path):
    with pytest.raises(ArchiveError, match="outside the model"):
        unpacked(archive_bytes(extra=(tarfile.TarInfo(name),)))
    assert not (tmp_path.parent / "outside").exists()


SPECIAL = {
    "symlink": tarfile.SYMTYPE,
    "hard link": tarfile.LNKTYPE,
    "fifo": tarfile.FIFOTYPE,
    "character device": tarfile.CHRTYPE,
    "block device": tarfile.BLKTYPE,
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_neither_file_nor_folder(kind, unpacked):
    member = tarfile.TarInfo("special")
    member.type = SPECIAL[kind]
    member.linkname = "saved_model.pb" if kind == "hard link" else "/etc/passwd"
    with pytest.raises(ArchiveError, match="neither a plain file nor a folder"):
        unpacked(archive_bytes(extra=(member,)))


def test_a_sparse_file_which_unpacks_to_any_size(unpacked):
    member = tarfile.TarInfo("bomb")
    member.pax_headers = {
        "GNU.sparse.major": "0",
        "GNU.sparse.minor": "1",
        "GNU.sparse.map": "0,0",
        "GNU.sparse.size": str(1 << 50),
    }
    with pytest.raises(ArchiveError, match="plain file"):
        unpacked(archive_bytes(extra=(member,)))


def test_a_file_that_comes_twice(unpacked):
    with pytest.raises((ArchiveError, OSError)):
        unpacked(archive_bytes(extra=(tarfile.TarInfo("saved_model.pb"),)))


def test_the_count_cap(unpacked, monkeypatch):
    members = len(FILES) + 1
    monkeypatch.setattr(archives, "MAX_MEMBERS", members - 1)
    with pytest.raises(ArchiveError, match=f"more than {members - 1} members"):
        unpacked(archive_bytes())
    monkeypatch.setattr(archives, "MAX_MEMBERS", members)
    assert unpacked(archive_bytes()) == FILES


def test_a_bomb_stops_at_the_size_cap(unpacked, tmp_path, monkeypatch):
    limit = 4 << 20
    monkeypatch.setattr(archives, "MAX_BYTES", limit)
    bomb = archive_bytes({"saved_model.pb": bytes(64 << 20)})
    assert len(bomb) < 100_000
    with pytest.raises(ArchiveError, match="unpacks to more"):
        unpacked(bomb)
    plain = io.BytesIO()
    with pytest.raises(ArchiveError):
        archives._inflate(tmp_path / "archive", plain)
    assert plain.tell() <= limit


def test_permissions_are_not_the_archives(unpacked, tmp_path):
    member = tarfile.TarInfo("run.sh")
    member.mode = 0o4777
    unpacked(archive_bytes(extra=(member,)))
    assert (tmp_path / "model" / "run.sh").stat().st_mode & 0o7111 == 0
