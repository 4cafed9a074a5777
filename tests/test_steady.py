"""Transient errors are tried again, from where reading stopped; lasting ones are raised at once."""

from __future__ import annotations

import io
import os
from types import SimpleNamespace

import numpy as np
import pytest

from storage import files, retries
from storage.retries import ShortRead
from storage.steady import SteadyStream, read_at_most, read_bytes

DATA = np.random.default_rng(0).bytes(5000)


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """The seconds that were waited, without waiting, and without chance.

    By this module alone: threads that earlier tests have left behind sleep too.
    """
    waited = []
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.2)
    monkeypatch.setattr(retries, "random", SimpleNamespace(uniform=lambda low, high: high))
    monkeypatch.setattr(retries, "time", SimpleNamespace(sleep=waited.append))
    return waited


class Store:
    """What `files` reads from: `errors` are raised by the next reads and openings, in turn."""

    def __init__(self, data=DATA):
        self.data = data
        self.errors = []
        self.opened = 0

    def trouble(self):
        error = self.errors.pop(0) if self.errors else None
        if error is not None:
            raise error

    def open_read(self, path):
        self.opened += 1
        self.trouble()
        store = self

        class Handle(io.BytesIO):
            def read(self, count=-1):
                store.trouble()
                return super().read(count)

        return Handle(self.data)


@pytest.fixture
def store(monkeypatch):
    made = Store()
    monkeypatch.setattr(files, "open_read", made.open_read)
    return made


def coded(code):
    error = type("S3ClientError", (Exception,), {})("no")
    error.code = code
    return error


def test_a_transient_error_is_tried_again_twice_with_growing_waits(store, waits):
    store.errors = [OSError("1"), None, OSError("2")]
    retries = []
    assert read_bytes("/a", 5000, lambda: retries.append(1)) == DATA
    assert waits == [0.2, 0.4]
    assert len(retries) == 2


def test_the_third_error_is_raised(store):
    store.errors = [OSError("1"), OSError("2"), OSError("3"), OSError("4")]
    with pytest.raises(OSError, match="3"):
        read_bytes("/a")


@pytest.mark.parametrize(
    "error", [FileNotFoundError(), PermissionError(), IsADirectoryError(), NotADirectoryError()]
)
def test_what_another_try_would_not_change_is_raised_at_once(store, waits, error):
    store.errors = [error]
    with pytest.raises(type(error)):
        read_bytes("/a")
    assert (waits, store.opened) == ([], 1)


@pytest.mark.parametrize(
    ("code", "kind"), [(404, FileNotFoundError), (403, PermissionError), (401, PermissionError)]
)
def test_a_stores_own_words_for_missing_and_forbidden(store, waits, code, kind):
    store.errors = [coded(code)]
    with pytest.raises(kind, match="s3://b/a: no"):
        read_bytes("s3://b/a")
    assert waits == []
    wrapped = OSError("s3://b/a: no")
    wrapped.__cause__ = coded(code)
    store.errors = [wrapped]
    with pytest.raises(kind):
        read_bytes("s3://b/a")


def test_a_store_that_raises_classes_of_its_own_is_tried_again(store):
    store.errors = [coded(503)]
    assert read_bytes("gs://b/a") == DATA
    store.errors = [coded(503)] * 6
    with pytest.raises(OSError, match="gs://b/a: no"):
        read_bytes("gs://b/a")


def test_a_store_is_tried_for_seconds_with_growing_waits(store, waits):
    store.errors = [coded(503)] * 5
    assert read_bytes("gs://b/a") == DATA
    assert waits == [0.2, 0.4, 0.8, 1.6, 3.2]


def test_waits_differ_by_chance(monkeypatch, store, waits):
    monkeypatch.setattr(retries.random, "uniform", lambda low, high: low)
    store.errors = [coded(503)] * 2
    assert read_bytes("gs://b/a") == DATA
    assert waits == [0.1, 0.2]


@pytest.mark.parametrize(
    ("told", "waited"), [("2", 2), ("9999", 30), ("0", 0.2), ("Wed, 21 Oct", 0.2), (None, 0.2)]
)
def test_a_server_may_ask_for_a_wait(store, waits, told, waited):
    error = OSError("busy")
    error.headers = {"Retry-After": told} if told else {}
    store.errors = [error]
    assert read_bytes("https://h/a") == DATA
    assert waits == [waited]


def test_a_fault_of_ours_is_no_transient_error(store):
    store.errors = [ZeroDivisionError()]
    with pytest.raises(ZeroDivisionError):
        read_bytes("/a")


def test_fewer_bytes_than_listed_are_a_transient_error(store, monkeypatch):
    answers = [DATA[:10], DATA]
    monkeypatch.setattr(files, "read_bytes", lambda path: answers.pop(0))
    assert read_bytes("/a", 5000) == DATA
    answers = [DATA[:10]] * 3
    with pytest.raises(ShortRead, match="10 bytes came of the 5000"):
        read_bytes("/a", 5000)


def test_read_at_most(store):
    assert read_at_most("/a", 7) == DATA[:7]
    assert read_at_most("/a", 10**6) == DATA
    store.errors = [None, OSError()]
    assert read_at_most("/a", 10**6) == DATA


def test_what_never_ends_is_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(retries, "FIRST_WAIT", 0)
    os.mkfifo(tmp_path / "pipe")
    for path in (str(tmp_path / "pipe"), "/dev/zero"):
        with pytest.raises(OSError, match="a pipe, a socket or a device"):
            read_at_most(path, 10)
    with pytest.raises(IsADirectoryError):
        read_at_most(str(tmp_path), 10)


@pytest.mark.parametrize("size", [1, 7, 1000, 4999, 5000, 6000])
def test_a_stream_goes_on_where_it_was_cut(store, size):
    """An error at every opening and every second read, and no byte comes twice."""
    stream = SteadyStream("/a", 5000)
    read = []
    store.errors = [OSError(), None, OSError()]
    while piece := stream.read(size):
        read.append(piece)
        store.errors = [None, OSError(), None, OSError()] if len(read) % 3 else [OSError(), None]
    assert b"".join(read) == DATA
    assert all(len(piece) == size for piece in read[:-1])
    assert store.opened > 2


def test_a_stream_counts_its_retries_and_gives_up_at_last(store):
    retries = []
    stream = SteadyStream("/a", 5000, lambda: retries.append(1))
    assert stream.read(100) == DATA[:100]
    store.errors = [OSError("x")] * 3
    with pytest.raises(OSError, match="x") as caught:
        stream.read(100)
    assert len(retries) == 2
    assert stream.error is caught.value


def test_a_stream_that_ends_early_is_tried_again(store):
    store.data = DATA[:3000]
    stream = SteadyStream("/a", 5000)
    assert stream.read(100) == DATA[:100]
    assert stream.read(5000) == DATA[100:3000]
    assert stream.read(1) == b""
    assert stream.error is None
    assert store.opened == 3
    healed = SteadyStream("/a", 5000)
    assert healed.read(3000) == DATA[:3000]
    store.data = DATA
    assert healed.read() == DATA[3000:]


def test_what_is_added_to_a_file_is_not_read(store):
    """Half of a record that is being added would look like damage."""
    stream = SteadyStream("/a", 3000)
    assert stream.read(2990) == DATA[:2990]
    assert stream.read(100) == DATA[2990:3000]
    assert stream.read(1) == stream.read() == b""


def test_a_stream_can_be_sought_and_wrapped(store):
    stream = SteadyStream("/a", 5000)
    assert stream.seek(-10, io.SEEK_END) == 4990
    assert store.opened == 0
    assert stream.read() == DATA[-10:]
    stream.seek(100)
    store.errors = [OSError()]
    assert stream.read(10) == DATA[100:110]
    assert stream.tell() == 110
    assert io.BufferedReader(SteadyStream("/a", 5000)).read() == DATA


def test_a_handle_that_cannot_seek_is_opened_anew(store, monkeypatch):
    opened = []

    def open_read(path):
        handle = io.BytesIO(DATA)
        opened.append(handle)
        if len(opened) == 1:
            return SimpleNamespace(read=handle.read, close=handle.close, seek=None)
        return handle

    monkeypatch.setattr(files, "open_read", open_read)
    stream = SteadyStream("/a", 5000)
    stream.read(10)
    stream.seek(100)
    assert stream.read(5) == DATA[100:105]
    assert opened[0].closed
