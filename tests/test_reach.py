"""A store that does not answer is told of in one line, soon; one that does is not disturbed."""

from __future__ import annotations

import logging
import threading

import pytest
import servers

from storage import files, reach
from storage.errors import RequestError


def test_a_local_path_is_asked_here():
    asked = []
    assert reach.soon("/d/a", lambda: asked.append(threading.current_thread()) or 7) == 7
    assert asked == [threading.current_thread()]


def test_what_a_store_says_is_passed_on():
    assert reach.soon("gs://b/a", lambda: 7) == 7
    with pytest.raises(PermissionError, match="not yours"):
        reach.soon("gs://b/a", lambda: (_ for _ in ()).throw(PermissionError("not yours")))


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("gs://b/photos/2026/*.jpg", "gs://b/photos/2026"),
        ("gs://b/[ab]/x", "gs://b"),
        ("s3://b/photos", "s3://b/photos"),
        ("s3://b/**", "s3://b"),
    ],
)
def test_a_glob_is_asked_for_no_further_than_its_folder(monkeypatch, path, asked):
    """Nothing would match its own name, and a million objects be listed in vain."""
    found = []
    monkeypatch.setattr(files, "occupied", found.append)
    reach.check(path)
    assert found == [asked]


def test_a_store_that_never_answers(monkeypatch):
    monkeypatch.setattr(reach, "PATIENCE", 0.05)
    held = threading.Event()
    with pytest.raises(RequestError, match=r"gs://b/a: the store does not answer \(no answer\)"):
        reach.soon("gs://b/a", held.wait)
    held.set()


def test_beams_retries_are_heard_and_not_shown(caplog):
    held = threading.Event()

    def retries():
        log = logging.getLogger("apache_beam.utils.retry")
        for reason in ("google.auth.Error: none", "x.Error: ('refused', 1)\n Traceback", "y: z\n"):
            log.warning("waiting before retrying because we caught exception: %s", reason)
        held.wait()

    with pytest.raises(RequestError, match=r"does not answer \(y: z\)") as caught:
        reach.soon("s3://b/a", retries)
    held.set()
    assert "\n" not in str(caught.value)
    assert caplog.text == ""


def test_one_that_is_given_up_says_nothing_later_either(caplog, monkeypatch):
    monkeypatch.setattr(reach, "PATIENCE", 0.05)
    held, said = threading.Event(), threading.Event()
    log = logging.getLogger("apache_beam.utils.retry")

    def retries():
        held.wait()
        log.warning("waiting before retrying")
        said.set()

    with pytest.raises(RequestError):
        reach.soon("s3://b/a", retries)
    log.warning("of another thread")
    held.set()
    assert said.wait(10)
    assert [record.getMessage() for record in caplog.records] == ["of another thread"]


def test_an_address_at_which_nobody_listens(tmp_path, job):
    (tmp_path / "a.jpg").write_bytes(b"x")
    flags = {"s3_endpoint_url": servers.nobody(), "s3_region_name": "us-east-1"}
    flags |= {"s3_access_key_id": "a", "s3_secret_access_key": "b-secret"}
    ran = job(tmp_path / "a.jpg", output="s3://bucket/out", **flags)
    assert ran.code == 2
    assert "error: s3://bucket/out: the store does not answer (" in ran.stderr
    assert "Could not connect" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert "b-secret" not in ran.stderr
