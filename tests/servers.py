"""Real servers on loopback: HTTP with faults, and stores that speak the gs:// and s3:// protocols.

Each runs in threads of this process, on a free port, and ends with its `with` block.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import os
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

BUCKET = "bucket"
_STEP = 0.02  # seconds between the pieces of a slow answer


@dataclass(frozen=True)
class Answer:
    """What a path gives.

    `sent` bytes of `data` (None: all) under a Content-Length of all of them, if `length` is on;
    in `pieces`, slowly; then, if `stall` is on, nothing until the server ends. The first `busy`
    requests are answered 503. With `cuts` only so many are cut to `sent`. `location` makes it a
    redirect.
    """

    data: bytes = b""
    status: int = 200
    sent: int | None = None
    length: bool = True
    pieces: int = 1
    stall: bool = False
    busy: int = 0
    cuts: int | None = None
    location: str | None = None


@dataclass
class Site:
    """A running HTTP server: its `address`, the `answers` by path, the `requests` so far by path.

    `headers` holds those of each request.
    `halfway` is set once an answer that will stall has sent its bytes.
    """

    address: str
    answers: dict[str, Answer] = field(default_factory=dict)
    requests: Counter[str] = field(default_factory=Counter)
    headers: list[Any] = field(default_factory=list)
    halfway: threading.Event = field(default_factory=threading.Event)
    closing: threading.Event = field(default_factory=threading.Event)

    def give(self, path: str, data: bytes = b"", **how) -> str:
        """Answer `path` with `data`; returns its URL."""
        self.answers[path] = Answer(data, **how)
        return f"{self.address}{path}"


class _Handler(http.server.BaseHTTPRequestHandler):
    site: Site

    def do_GET(self) -> None:
        path = self.path
        self.site.requests[path] += 1
        self.site.headers.append(self.headers)
        answer = self.site.answers.get(path)
        if answer is None:
            return self.send_error(404)
        if self.site.requests[path] <= answer.busy:
            return self.send_error(503)
        self.send_response(302 if answer.location else answer.status)
        if answer.location:
            self.send_header("Location", answer.location)
        if answer.length:
            self.send_header("Content-Length", str(len(answer.data)))
        self.end_headers()
        self.send(answer)
        return None

    def send(self, answer: Answer) -> None:
        cut = answer.cuts is None or self.site.requests[self.path] <= answer.cuts
        body = answer.data[: answer.sent if cut else None]
        size = -(-len(body) // answer.pieces) or 1
        with contextlib.suppress(ConnectionError):
            for start in range(0, len(body), size):
                self.wfile.write(body[start : start + size])
                if answer.pieces > 1:
                    time.sleep(_STEP)
            if answer.stall:
                self.wfile.flush()
                self.site.halfway.set()
                self.site.closing.wait()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def http_site() -> Iterator[Site]:
    """An HTTP server with nothing on it yet."""
    handler = type("Handler", (_Handler,), {})
    with _serving(handler) as server:
        handler.site = site = Site(f"http://127.0.0.1:{server.server_port}")
        try:
            yield site
        finally:
            site.closing.set()


@contextlib.contextmanager
def _serving(handler: Any) -> Iterator[http.server.ThreadingHTTPServer]:
    """A server with a thread a connection, which answers by `handler`."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def nobody() -> str:
    """An address at which nothing listens."""
    with http_site() as site:
        return site.address


@dataclass(frozen=True)
class Store:
    """A running object store: the URI of its empty bucket, and Beam's flags to reach it."""

    uri: str
    flags: dict[str, str | bool]

    @property
    def argv(self) -> list[str]:
        """The flags as words of a command line."""
        return [
            f"--{name}" if value is True else f"--{name}={value}"
            for name, value in self.flags.items()
        ]


@contextlib.contextmanager
def gs_store() -> Iterator[Store]:
    """Google Cloud Storage, emulated."""
    from apache_beam.internal.gcp.auth import _Credentials
    from gcp_storage_emulator.handlers import buckets
    from gcp_storage_emulator.server import RequestHandler
    from gcp_storage_emulator.storage import Storage

    storage = Storage(use_memory_fs=True)
    buckets.create_bucket(BUCKET, storage)
    # Beam looks for credentials despite --no_auth, 20 s long where there are none.
    no_credentials = mock.patch.multiple(_Credentials, _credentials_init=True, _credentials=None)
    # The emulator's own server has one thread, which one client that stays connected holds.
    with no_credentials, _serving(functools.partial(RequestHandler, storage)) as server:
        address = f"http://127.0.0.1:{server.server_port}"
        with mock.patch.dict(os.environ, {"STORAGE_EMULATOR_HOST": address}):
            yield Store(f"gs://{BUCKET}", {"no_auth": True})


@contextlib.contextmanager
def s3_store() -> Iterator[Store]:
    """Amazon's S3, emulated."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    address = f"http://127.0.0.1:{port}"
    _answers(f"{address}/moto-api/")
    flags = {
        "s3_endpoint_url": address,
        "s3_region_name": "us-east-1",
        "s3_access_key_id": "testing",
        "s3_secret_access_key": "testing",
    }
    try:
        client = boto3.client(
            "s3",
            endpoint_url=address,
            region_name="us-east-1",
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
        )
        client.create_bucket(Bucket=BUCKET)
        yield Store(f"s3://{BUCKET}", flags)
    finally:
        urllib.request.urlopen(
            urllib.request.Request(f"{address}/moto-api/reset", method="POST"), timeout=10
        ).close()
        server.stop()


STORES = {"gs": gs_store, "s3": s3_store}


def _answers(url: str) -> None:
    """Wait until the server behind `url` answers."""
    for _ in range(200):
        try:
            urllib.request.urlopen(url, timeout=10).close()
            return
        except OSError:
            time.sleep(0.05)
    raise AssertionError(f"{url} does not answer")
