"""Real servers on loopback: HTTP with faults, and stores that speak the gs:// and s3:// protocols.

Each runs in threads of this process, on a free port, and ends with its `with` block.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import http.server
import json
import os
import re
import socket
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock
from urllib.parse import quote

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
    from gcp_storage_emulator.server import RequestHandler, Router
    from gcp_storage_emulator.storage import Storage

    storage = Storage(use_memory_fs=True)
    buckets.create_bucket(BUCKET, storage)
    # Beam looks for credentials despite --no_auth, 20 s long where there are none.
    no_credentials = mock.patch.multiple(_Credentials, _credentials_init=True, _credentials=None)
    # The emulator's own server has one thread, which one client that stays connected holds.
    handle, lock = Router.handle, threading.Lock()

    def one_by_one(router: Any, method: str) -> None:
        with lock:  # its storage is a dictionary that threads would change under each other
            handle(router, method)

    in_turn = mock.patch.object(Router, "handle", one_by_one)
    # At every change it would write down all that it holds, for a next start that never comes.
    forgetful = mock.patch.object(Storage, "_write_config_to_file", return_value=None)
    with (
        no_credentials,
        in_turn,
        forgetful,
        _serving(functools.partial(RequestHandler, storage)) as server,
    ):
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
PAGE = 1000  # objects that a page of a listing holds, at both services
BUSY, CUT, LOST, FORBIDDEN = "busy", "cut", "lost", "forbidden"


@dataclass
class Road:
    """What lies before a store: `requests` so far, as (method, path with query).

    `trouble`, called with method, path and body of each, tells what becomes of it: None passes;
    BUSY is answered 503; CUT is done, and half of the answer sent; LOST is not done, and not
    answered.
    """

    store: Store
    upstream: str
    requests: list[tuple[str, str]] = field(default_factory=list)
    trouble: Callable[[str, str, bytes], str | None] = lambda method, path, body: None

    def fill(self, names: Iterable[str]) -> None:
        """Objects of one byte of those names, put there past the road and any client."""
        if self.store.uri.startswith("s3:"):
            from moto.backends import get_backend
            from moto.core import DEFAULT_ACCOUNT_ID

            stored = get_backend("s3")[DEFAULT_ACCOUNT_ID]["aws"]
            for name in names:
                stored.put_object(BUCKET, name, b"x")
            return
        connection = http.client.HTTPConnection(self.upstream, timeout=60)
        for name in names:
            path = f"/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={quote(name, '')}"
            connection.request("POST", path, b"x")
            response = connection.getresponse()
            response.read()
            assert response.status == 200
        connection.close()


class _Proxy(http.server.BaseHTTPRequestHandler):
    road: Road

    def pass_on(self) -> None:
        if self.headers.get("Expect") == "100-continue":  # else boto3 waits a second
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            del self.headers["Expect"]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        assert "chunked" not in self.headers.get("Transfer-Encoding", "")
        self.road.requests.append((self.command, self.path))
        trouble = self.road.trouble(self.command, self.path, body)
        if trouble == LOST:
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if trouble in (BUSY, FORBIDDEN):
            self.send_error(503 if trouble == BUSY else 403)
            return
        # The emulator of gs:// knows no pages, and passes over the token.
        token = re.search(r"[?&]pageToken=(\d+)", self.path)
        connection = http.client.HTTPConnection(self.road.upstream, timeout=60)
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        listing = self.command == "GET" and self.path.partition("?")[0].endswith("/o")
        if listing and answer.status == 200 and self.road.store.uri.startswith("gs:"):
            data = _page(data, int(token[1]) if token else 0)
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date"):
                self.send_header(name, value)
        size = answer.getheader("Content-Length") if self.command == "HEAD" else len(data)
        self.send_header("Content-Length", str(size or 0))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if trouble == CUT else data)
        if trouble == CUT:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = pass_on

    def log_message(self, format: str, *args: object) -> None:
        pass


def _page(listing: bytes, start: int) -> bytes:
    told = {"items": [], **json.loads(listing)}
    if start + PAGE < len(told["items"]):
        told["nextPageToken"] = str(start + PAGE)
    told["items"] = told["items"][start : start + PAGE]
    return json.dumps(told).encode()


@contextlib.contextmanager
def bumpy_road(scheme: str) -> Iterator[Road]:
    """A store of `scheme`, gs or s3, reached through what can go wrong on the way."""
    with STORES[scheme]() as store:
        direct = store.flags.get("s3_endpoint_url") or os.environ["STORAGE_EMULATOR_HOST"]
        handler = type("Proxy", (_Proxy,), {})
        with _serving(handler) as server:
            address = f"http://127.0.0.1:{server.server_port}"
            flags = {k: address if v == direct else v for k, v in store.flags.items()}
            handler.road = Road(Store(store.uri, flags), str(direct).removeprefix("http://"))
            with mock.patch.dict(os.environ, {"STORAGE_EMULATOR_HOST": address}):
                yield handler.road


def _answers(url: str) -> None:
    """Wait until the server behind `url` answers."""
    for _ in range(200):
        try:
            urllib.request.urlopen(url, timeout=10).close()
            return
        except OSError:
            time.sleep(0.05)
    raise AssertionError(f"{url} does not answer")


JOB = "2026-11-20_00_00_00-1234567890123456789"


class _Dataflow(http.server.BaseHTTPRequestHandler):
    asked: list[str]

    def do_POST(self) -> None:
        job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(job["name"])
        self.answer({**job, "id": JOB, "currentState": "JOB_STATE_PENDING"})

    def do_GET(self) -> None:
        messages = self.path.partition("?")[0].endswith("/messages")
        self.answer({} if messages else {"id": JOB, "currentState": "JOB_STATE_DONE"})

    def answer(self, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def dataflow_front() -> Iterator[tuple[str, list[str]]]:
    """What a launcher sees of Dataflow: jobs are accepted as `JOB`, and done, but nothing is run.

    Gives the address for --dataflow_endpoint, and the names of the jobs so far.
    """
    handler = type("Handler", (_Dataflow,), {"asked": []})
    with _serving(handler) as server:
        yield f"http://localhost:{server.server_port}", handler.asked
