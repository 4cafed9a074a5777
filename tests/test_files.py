"""Files by path or URI: what a pattern lists, and files that appear whole or not at all."""

from __future__ import annotations

import errno
import gc
import glob
import hashlib
import io
import itertools
import os
import re
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from storage import files, retries, temporaries
from storage.errors import RequestError
from storage.files import FileInfo, NewFile


def tree(folder, *names):
    """Files of one byte each, with the folders that they need."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return folder


def found(folder, pattern=""):
    """What `pattern` below `folder` lists, relative to it."""
    infos = list(files.find(f"{folder}/{pattern}" if pattern else str(folder)))
    return [os.path.relpath(info.path, folder) for info in infos]


def all_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("path", "remote"),
    [
        ("/d/a.jpg", False),
        ("a b.jpg", False),
        ("C:x", False),
        ("gs://b/o", True),
        ("s3://b/o", True),
        ("GS://b/o", True),
    ],
)
def test_which_paths_are_remote(path, remote):
    assert files.is_remote(path) is remote


@pytest.mark.parametrize("uri", ["hdfs://n/x", "http://h/x", "ftp://h/x", "a+b://x"])
def test_a_scheme_that_we_cannot_read_is_a_wrong_request(uri):
    with pytest.raises(RequestError, match="no filesystem for"):
        files.is_remote(uri)


def test_no_credentials_are_looked_for_where_none_are_wanted(monkeypatch):
    from apache_beam.internal.gcp import auth
    from apache_beam.options.pipeline_options import PipelineOptions

    def default(scopes):
        raise AssertionError("they were looked for")

    monkeypatch.setattr(auth._Credentials, "_credentials_init", False)
    monkeypatch.setattr(auth._Credentials, "_credentials", None)
    monkeypatch.setattr(auth.google.auth, "default", default)
    files.configure_stores(["--no_auth"])
    assert auth.get_service_credentials(PipelineOptions([])) is None


def test_a_store_without_a_bucket_is_a_wrong_request():
    for uri in ("gs://", "s3:///", "GS://"):
        with pytest.raises(RequestError, match="names no bucket"):
            files.is_remote(uri)


def test_absolute_is_what_rows_and_manifests_show(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert files.absolute("a/../b.jpg") == f"{tmp_path}/b.jpg"
    assert files.absolute("file:///d/a%20b.jpg") == "/d/a%20b.jpg"
    assert files.absolute("~/x") == "/home/someone/x"
    assert files.absolute("gs://b/a b/../c") == "gs://b/a b/../c"


def test_join_takes_paths_and_uris_with_or_without_a_slash():
    assert files.join("/d/", "a", "b") == "/d/a/b"
    assert files.join("gs://b", "a") == files.join("gs://b/", "a") == "gs://b/a"


# ---------------------------------------------------------------- find


NAMES = ["a.jpg", "b.txt", "c", ".hidden.jpg", "_SUCCESS", "sub/d.jpg", "sub/_x", "sub/.y", "z/e"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("", ["a.jpg", "b.txt", "c", "sub/d.jpg", "z/e"]),
        ("sub", ["sub/d.jpg"]),
        ("sub/", ["sub/d.jpg"]),
        ("a.jpg", ["a.jpg"]),
        (".hidden.jpg", [".hidden.jpg"]),  # named in full, it is meant
        ("_SUCCESS", ["_SUCCESS"]),
        ("*.jpg", ["a.jpg"]),
        ("s*", ["sub/d.jpg"]),
        ("[ab].*", ["a.jpg", "b.txt"]),
        ("?", ["c", "z/e"]),
        ("**/*.jpg", ["a.jpg", "sub/d.jpg"]),
        ("nothing", []),
        ("*.png", []),
    ],
)
def test_find(tmp_path, pattern, expected):
    assert found(tree(tmp_path, *NAMES), pattern) == expected


def test_find_lists_a_file_once_that_a_glob_matches_twice(tmp_path):
    tree(tmp_path, *NAMES)
    twice = found(tmp_path, "**")  # the folder itself, and what is in it
    assert len(twice) == len(set(twice))
    assert {"a.jpg", "sub/d.jpg", "z/e"} <= set(twice)


def test_find_takes_a_name_with_brackets_as_it_is_when_it_is_there(tmp_path):
    tree(tmp_path, "a[1].jpg", "a1.jpg", "d[x]/b.jpg", "dx/c.jpg")
    assert found(tmp_path, "a[1].jpg") == ["a[1].jpg"]
    assert found(tmp_path, "d[x]") == ["d[x]/b.jpg"]
    (tmp_path / "a[1].jpg").unlink()
    assert found(tmp_path, "a[1].jpg") == ["a1.jpg"]


def test_find_lists_in_the_order_of_names(tmp_path):
    names = [f"{n:02}/{m}" for n in range(20) for m in "abc"]
    assert found(tree(tmp_path, *reversed(names))) == names


def test_find_tells_sizes_and_absolute_paths(tmp_path, monkeypatch):
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "seven").write_bytes(b"1234567")
    monkeypatch.chdir(tmp_path)
    assert list(files.find(".")) == [
        FileInfo(f"{tmp_path}/empty", 0),
        FileInfo(f"{tmp_path}/seven", 7),
    ]


def test_find_follows_links_but_not_in_a_ring(tmp_path):
    inside = tree(tmp_path / "in", "a.jpg", "sub/b.jpg")
    outside = tree(tmp_path / "other", "c.jpg")
    (inside / "sub" / "ring").symlink_to(inside)
    (inside / "link").symlink_to(outside)
    (inside / "gone").symlink_to(tmp_path / "nothing")
    assert found(inside) == ["a.jpg", "sub/b.jpg", "link/c.jpg"]


def test_a_folder_goes_by_its_own_name_whatever_links_lead_there(tmp_path):
    """Or rows would be of another folder's pictures once the link is pointed elsewhere."""
    for name in ("v2", "v3"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "x").write_bytes(b"")
    (tmp_path / "apart").mkdir()
    (tmp_path / "apart" / "y").write_bytes(b"")
    (tmp_path / "in" / "aside").symlink_to(tmp_path / "apart")
    for target in ("v2", "v3"):
        (tmp_path / "in" / "current").unlink(missing_ok=True)
        (tmp_path / "in" / "current").symlink_to(target)
        found = [info.path for info in files.find(str(tmp_path / "in"))]
        assert found == [f"{tmp_path}/in/{name}" for name in ("v2/x", "v3/x", "aside/y")]


def test_find_passes_over_what_is_no_regular_file(tmp_path):
    tree(tmp_path, "a.jpg")
    os.mkfifo(tmp_path / "pipe")
    assert found(tmp_path) == ["a.jpg"]
    assert found(tmp_path, "pipe") == []


def test_find_takes_names_that_are_no_utf8(tmp_path):
    with open(os.fsencode(tmp_path) + b"/caf\xe9.jpg", "wb"):
        pass
    assert found(tmp_path) == ["caf\udce9.jpg"]


def refuse(monkeypatch, call, name):
    """`os.<call>` refuses what is named so; a real chmod does not stop root."""
    real = getattr(os, call)

    def refusing(path, **how):
        if str(path).endswith(name):
            raise PermissionError(13, "Permission denied", path)
        return real(path, **how)

    monkeypatch.setattr(os, call, refusing)


def test_find_raises_where_a_folder_below_refuses(tmp_path, monkeypatch):
    tree(tmp_path, "a.jpg", "locked/b.jpg")
    refuse(monkeypatch, "scandir", "locked")
    with pytest.raises(PermissionError):
        found(tmp_path)


@pytest.mark.parametrize("pattern", ["*/*.jpg", "**/*.jpg", "locked/*.jpg"])
def test_a_glob_raises_where_a_folder_refuses(tmp_path, monkeypatch, pattern):
    tree(tmp_path, "a/a.jpg", "locked/b.jpg")
    assert "locked/b.jpg" in found(tmp_path, pattern)
    refuse(monkeypatch, "listdir", "locked")
    with pytest.raises(PermissionError):
        found(tmp_path, pattern)


@pytest.mark.parametrize("pattern", ["locked", "locked/b.jpg", "locked/*"])
def test_a_file_that_cannot_be_asked_for_raises(tmp_path, monkeypatch, pattern):
    tree(tmp_path, "locked/b.jpg")
    refuse(monkeypatch, "stat", "b.jpg")
    with pytest.raises(PermissionError):
        found(tmp_path, pattern)


PARTS = ["*", "**", "a", "b", "*.jpg", ".*", "[ab]*", "?", "link", "e[[]1].jpg", "c["]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_glob_matches_what_pythons_does(tmp_path, depth):
    names = ["a/b/c.jpg", "a/b/.h.jpg", "a/.x/c.jpg", "a/d.png", "e[1].jpg", "_f/q.jpg", "g.jpg"]
    tree(tmp_path, *names)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    for parts in itertools.product(PARTS, repeat=depth):
        pattern = "/".join(parts)
        expected = []
        for path in sorted(glob.glob(f"{tmp_path}/{pattern}", recursive=True)):
            below = files._walk(path.rstrip("/")) if os.path.isdir(path) else [path]
            expected += [os.path.relpath(n, tmp_path) for n in below if os.path.isfile(n)]
        assert found(tmp_path, pattern) == list(dict.fromkeys(expected)), pattern


def test_a_glob_follows_links_but_not_in_a_ring(tmp_path):
    tree(tmp_path, "a/b.jpg", "a/c/d.jpg")
    (tmp_path / "a" / "c" / "ring").symlink_to(tmp_path / "a")
    assert found(tmp_path, "**/*.jpg") == ["a/b.jpg", "a/c/d.jpg"]


# ---------------------------------------------------------------- a store of objects


class Store:
    """Beam's FileSystems over a dictionary, as far as storage.files uses it."""

    def __init__(self, objects=()):
        self.objects = dict.fromkeys(objects, b"x")
        self.broken = False

    def match(self, patterns, limits=None):
        from apache_beam.io.filesystem import BeamIOError, FileMetadata, FileSystem, MatchResult

        if self.broken:
            raise BeamIOError("Match operation failed", {patterns[0]: "403"})
        wanted = re.compile(FileSystem.translate_pattern(patterns[0]))
        hits = [FileMetadata(p, len(d)) for p, d in self.objects.items() if wanted.match(p)]
        return [MatchResult(patterns[0], hits[: limits[0]] if limits else hits)]

    def create(self, path, mime_type, compression_type):
        store = self

        class Upload(io.BytesIO):
            def close(self):
                if not self.closed:
                    store.objects[path] = self.getvalue()
                super().close()

        if self.broken:
            raise OSError("503")
        return Upload()

    def open(self, path, mime_type, compression_type):
        return io.BytesIO(self.objects[path])

    def exists(self, path):
        if path.count("/") < 3:
            raise ValueError("GCS path must be in the form gs://<bucket>/<object>")
        return path in self.objects

    def delete(self, paths):
        for path in paths:  # globs, as Beam's gs:// has it
            for meta in self.match([path])[0].metadata_list:
                del self.objects[meta.path]


@pytest.fixture
def store(monkeypatch):
    names = ["d/a.jpg", "d/_x", "d/sub/c.jpg", "d2/e.jpg", "d3/a[1].jpg", "d3/a1.jpg"]
    fake = Store([f"gs://b/{name}" for name in names])
    monkeypatch.setattr(files, "_beam", lambda: fake)
    return fake


D2, D3 = ["gs://b/d2/e.jpg"], ["gs://b/d3/a1.jpg", "gs://b/d3/a[1].jpg"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("gs://b/d", ["gs://b/d/a.jpg", "gs://b/d/sub/c.jpg"]),
        ("gs://b/d/", ["gs://b/d/a.jpg", "gs://b/d/sub/c.jpg"]),
        ("gs://b/d/a.jpg", ["gs://b/d/a.jpg"]),
        ("gs://b/d/_x", ["gs://b/d/_x"]),
        ("gs://b/d/*.jpg", ["gs://b/d/a.jpg"]),
        ("gs://b/d3/a[1].jpg", ["gs://b/d3/a[1].jpg"]),
        ("gs://b/d3/a[12].jpg", ["gs://b/d3/a1.jpg"]),
        ("gs://b/nothing", []),
        ("gs://b/nothing*", []),
        ("gs://b/d/s*", ["gs://b/d/sub/c.jpg"]),
        ("gs://b/d*/", ["gs://b/d/a.jpg", "gs://b/d/sub/c.jpg", *D2, *D3]),
        ("gs://b", ["gs://b/d/a.jpg", "gs://b/d/sub/c.jpg", *D2, *D3]),
    ],
)
def test_find_in_a_store(store, pattern, expected):
    assert [info.path for info in files.find(pattern)] == expected


def test_a_store_that_refuses_to_list_is_an_oserror(store):
    store.broken = True
    with pytest.raises(OSError, match="cannot be listed"):
        list(files.find("gs://b/d"))


def test_a_file_in_a_store_appears_on_close_alone(store):
    aborted, whole = NewFile("gs://b/x"), NewFile("gs://b/y")
    aborted.write(b"half")
    aborted.abort()
    whole.write(b"all")
    assert "gs://b/y" not in store.objects
    whole.close()
    assert store.objects["gs://b/y"] == b"all"
    assert "gs://b/x" not in store.objects
    assert files.read_bytes("gs://b/y") == b"all"
    files.delete(["gs://b/y", "gs://b/y-gone"])
    assert "gs://b/y" not in store.objects


def test_an_upload_to_s3_that_fails_half_way_is_never_completed(store, monkeypatch):
    from apache_beam.io.filesystemio import UploaderStream

    class Uploader:  # as Beam's S3Uploader: finish completes whatever parts there are
        def __init__(self):
            self.parts = []

        def put(self, data):
            if self.parts:
                raise OSError("cut")
            self.parts.append(bytes(data))

        def finish(self):
            store.objects["gs://b/cut"] = b"".join(self.parts)

    def create(*args, **options):
        return io.BufferedWriter(UploaderStream(Uploader()), 1)

    monkeypatch.setattr(store, "create", create)
    monkeypatch.setattr(files, "_COPY_BYTES", 3)
    file = NewFile("gs://b/cut")
    file.write(b"abcdef")
    with pytest.raises(OSError, match="cut"):
        file.close()
    gc.collect()
    assert "gs://b/cut" not in store.objects


def test_deletions_that_a_store_refuses_for_a_moment_are_tried_again(store, monkeypatch):
    waits = []
    monkeypatch.setattr(retries, "time", SimpleNamespace(sleep=waits.append))
    delete = store.delete

    def refusing(paths):
        """As S3 answers: some are gone, and one was an internal error."""
        if not waits:
            delete(paths[:1])
            raise OSError("We encountered an internal error. Please try again.")
        delete(paths)

    monkeypatch.setattr(store, "delete", refusing)
    files.delete(["gs://b/d/a.jpg", "gs://b/d2/e.jpg"])
    assert len(waits) == 1
    assert not {"gs://b/d/a.jpg", "gs://b/d2/e.jpg"} & set(store.objects)


def test_delete_takes_names_of_a_store_as_they_are(store):
    files.delete(["gs://b/d3/a[1].jpg", "gs://b/d/?"])
    assert "gs://b/d3/a[1].jpg" not in store.objects
    assert len(store.objects) == 5


def test_a_bucket_is_no_file(store):
    assert not files.is_file("gs://b")
    assert not files.is_file("gs://b/")
    assert files.is_file("gs://b/d/a.jpg")


def test_check_writable_of_a_store(store):
    before = dict(store.objects)
    files.check_writable("gs://b/out")
    assert store.objects == before
    store.broken = True
    with pytest.raises(RequestError, match=r"--output gs://b/out: cannot be written \(gs:.* 503\)"):
        files.check_writable("gs://b/out")


def test_occupied_of_a_store(store):
    assert files.occupied("gs://b/d/sub/")
    assert not files.occupied("gs://b/free")


# ---------------------------------------------------------------- new files


def test_a_new_file_appears_whole_when_it_is_closed(tmp_path):
    path = tmp_path / "new" / "folder" / "a.bin"
    file = NewFile(str(path))
    assert file.write(b"abc") == 3
    assert file.write(memoryview(b"defg").cast("B")) == 4
    assert not path.exists()
    assert list(files.find(str(path.parent))) == []  # the temporary is no input
    file.close()
    assert path.read_bytes() == b"abcdefg"
    assert (file.size, file.sha256) == (7, hashlib.sha256(b"abcdefg").hexdigest())
    assert all_below(path.parent) == ["a.bin"]
    file.close()  # twice is once
    file.abort()  # and what has appeared stays
    assert path.read_bytes() == b"abcdefg"


def test_an_aborted_file_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    file = NewFile(str(path))
    file.write(b"new")
    file.abort()
    file.close()
    assert path.read_bytes() == b"old"
    assert all_below(tmp_path) == ["a.bin"]
    assert file.closed


@pytest.mark.parametrize("step", ["replace", "flush"])
def test_a_file_whose_close_fails_does_not_appear(tmp_path, monkeypatch, step):
    file = NewFile(str(tmp_path / "a.bin"))
    file.write(b"new")
    if step == "replace":
        monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
    else:
        os.close(file._handle.fileno())  # as a full disk: the buffered bytes are refused
    with pytest.raises(OSError, match=r"no|Bad file"):
        file.close()
    assert all_below(tmp_path) == []
    assert not [path for path in temporaries.tracked() if path.startswith(str(tmp_path))]


def test_abandon_all_removes_the_unfinished(tmp_path):
    done, open_file = NewFile(str(tmp_path / "done")), NewFile(str(tmp_path / "open"))
    done.close()
    open_file.write(b"half")
    assert len(all_below(tmp_path)) == 2
    temporaries.abandon_all()
    assert all_below(tmp_path) == ["done"]
    open_file.abort()


def test_write_bytes_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "m.json"
    files.write_bytes(str(path), b"one")
    files.write_bytes(str(path), b"two")
    assert path.read_bytes() == b"two"
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        files.write_bytes(str(path), b"three")
    assert path.read_bytes() == b"two"
    assert all_below(tmp_path) == ["m.json"]


def test_a_file_outlasts_a_power_cut_once_it_is_closed(tmp_path, monkeypatch):
    """Its bytes reach the disk before its name, its name and its folders' before `close` ends."""
    steps = []
    sync, replace = os.fsync, os.replace

    def synced(handle):
        path = os.readlink(f"/proc/self/fd/{handle}")
        steps.append(("sync", path, os.path.getsize(path) if os.path.isfile(path) else None))
        sync(handle)

    def renamed(old, new):
        steps.append(("rename", old, new))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    path = tmp_path / "new" / "folder" / "a.bin"
    file = NewFile(str(path))
    file.write(b"x" * 10)  # less than any buffer
    (temporary,) = path.parent.iterdir()
    file.close()
    assert steps == [
        ("sync", str(tmp_path), None),
        ("sync", str(tmp_path / "new"), None),
        ("sync", str(temporary), 10),
        ("rename", str(temporary), str(path)),
        ("sync", str(path.parent), None),
    ]


@pytest.mark.parametrize(("code", "refused"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_folder_that_cannot_be_synced(tmp_path, monkeypatch, code, refused):
    """Some filesystems do not know how; a broken disk is told of."""
    sync = os.fsync

    def fails(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(code, "no")
        sync(handle)

    monkeypatch.setattr(os, "fsync", fails)
    if refused:
        with pytest.raises(OSError, match="no"):
            files.write_bytes(str(tmp_path / "a"), b"x")
    else:
        files.write_bytes(str(tmp_path / "a"), b"x")


def child(does, path):
    """A command that does something with `path`, says so on stdout, and stays."""
    lines = ["import sys", "from storage import files", f"kept = {does}", "print(flush=True)"]
    return [sys.executable, "-c", "\n".join([*lines, "sys.stdin.read()"]), str(path)]


def test_a_temporary_is_abandoned_once_its_process_is_gone(tmp_path):
    command = child("files.NewFile(sys.argv[1])", tmp_path / "a.bin")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        (temporary,) = map(str, tmp_path.iterdir())
        assert not files.abandoned(temporary)
        process.kill()
        process.wait()
        assert files.abandoned(temporary)
    assert files.abandoned(str(tmp_path / "another.bin"))
    assert files.abandoned(str(tmp_path / ".tmp-gone"))
    assert files.abandoned("gs://bucket/.tmp-1")


def test_alone_lets_one_process_in_and_a_killed_one_holds_nobody_up(tmp_path):
    folder = str(tmp_path / "new")
    command = child("(alone := files.alone(sys.argv[1])).__enter__()", folder)
    entered = threading.Event()

    def enter():
        with files.alone(folder):
            entered.set()

    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        waiting = threading.Thread(target=enter)
        waiting.start()
        assert not entered.wait(0.3)
        process.kill()
        waiting.join()
    assert entered.is_set()
    assert all_below(tmp_path) == ["new"]
    with files.alone("gs://bucket/a"), files.alone("gs://bucket/a"):
        pass  # a store keeps nobody out


# ---------------------------------------------------------------- folders


def test_delete_takes_what_is_there_and_minds_nothing_else(tmp_path):
    tree(tmp_path, "a", "b", "c")
    files.delete([f"{tmp_path}/{name}" for name in ("a", "a", "b", "gone", "no/folder")])
    assert all_below(tmp_path) == ["c"]


def test_occupied(tmp_path):
    assert not files.occupied(str(tmp_path / "free"))
    (tmp_path / "empty" / "too").mkdir(parents=True)
    assert not files.occupied(str(tmp_path))
    (tmp_path / "empty" / "link").symlink_to(tmp_path / "empty" / "too")
    assert files.occupied(str(tmp_path))
    (tmp_path / "empty" / "link").unlink()
    tree(tmp_path, ".x")
    assert files.occupied(str(tmp_path))
    assert files.occupied(str(tmp_path / ".x"))


def test_list_folder_shows_hidden_files_too(tmp_path):
    tree(tmp_path, "a", "sub/.tmp-1", "sub/deep/b")
    listed = files.list_folder(str(tmp_path))
    assert listed == [FileInfo(f"{tmp_path}/{n}", 1) for n in ("a", "sub/.tmp-1", "sub/deep/b")]
    assert files.list_folder(str(tmp_path / "nothing")) == []


def test_list_folder_passes_over_what_vanishes_meanwhile(tmp_path, monkeypatch):
    """As another run's temporary does, when it is renamed."""
    for name in "ab":
        (tmp_path / name).write_bytes(b"1")
    status = files._status

    def vanishing(path):
        (tmp_path / "b").unlink(missing_ok=True)
        return status(path)

    monkeypatch.setattr(files, "_status", vanishing)
    assert files.list_folder(str(tmp_path)) == [FileInfo(str(tmp_path / "a"), 1)]


def test_check_writable_leaves_no_trace(tmp_path):
    tree(tmp_path, "there/a")
    for folder in ("there", "new", "new/and/deeper"):
        files.check_writable(str(tmp_path / folder))
    assert all_below(tmp_path) == ["there", "there/a"]


@pytest.mark.parametrize("folder", ["file", "file/below", "file/far/below", "new/" + "x" * 300])
def test_check_writable_refuses_and_leaves_no_trace(tmp_path, folder):
    tree(tmp_path, "file")
    with pytest.raises(RequestError, match="cannot be written") as caught:
        files.check_writable(str(tmp_path / folder))
    assert "\n" not in str(caught.value)
    assert all_below(tmp_path) == ["file"]


def test_check_writable_refuses_where_writing_fails(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_bytes", full)
    with pytest.raises(RequestError, match="No space left"):
        files.check_writable(str(tmp_path / "new"))
    assert all_below(tmp_path) == []


def test_check_writable_leaves_a_folder_that_another_run_has_begun_to_use(tmp_path, monkeypatch):
    write = files.write_bytes

    def write_and_meet(path, data):
        write(path, data)
        tree(tmp_path, "out/of/another/run")

    monkeypatch.setattr(files, "write_bytes", write_and_meet)
    files.check_writable(str(tmp_path / "out" / "mine"))
    assert all_below(tmp_path) == ["out", "out/of", "out/of/another", "out/of/another/run"]
