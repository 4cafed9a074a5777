"""Decoding in processes of its own, so that a decoder's crash or hang costs one picture.

A fork server, started afresh, imports Pillow and NumPy and nothing of TensorFlow or Beam; it forks
the processes that decode. Encoded bytes go to them over sockets, and pixels come back in memory
that both sides share. All of them end when their starter closes them or dies, however it dies.

This bounds faults, and is no sandbox: the processes run as the same user.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import functools
import gc
import importlib
import json
import mmap
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from formats.image import Preprocessing, decode_image
from formats.records import ImageError
from storage.errors import RunError

Pixels = tuple[np.ndarray, int, int]
Decoder = Callable[[bytes, Preprocessing], Pixels]

CRASHED, TIMEOUT, OUT_OF_MEMORY = "DecoderCrashed", "DecodeTimeout", "DecoderOutOfMemory"

_REQUEST = struct.Struct("<Q")  # bytes of the encoded picture, which follows
_REPLY = struct.Struct("<III")  # bytes of an error's JSON, which follows (0: none), width, height
_ORDER = struct.Struct("<i")  # to the fork server: 0 to start a process, else the pid to end
_FILES = 1 << 16  # open at once at most, where the limit may be raised so far
_PIECE = 4 << 20  # bytes on their way
_NO_MEMORY = 77  # exit status of a process that has none left for the bytes themselves
# What a process does to itself. Any other signal came from outside, and may not be the picture's.
_OWN_FAULTS = {
    -getattr(signal, f"SIG{name}") for name in ("ABRT", "BUS", "FPE", "ILL", "SEGV", "SYS", "TRAP")
}
_START = (
    "import json, sys; order = json.loads(sys.argv[1]); sys.path[:] = order.pop('path'); "
    "from formats.isolation import serve; serve(**order)"
)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one picture may take: `seconds` of time, `memory` in bytes beyond an idle process.

    A process that gets a core only now and then may take longer, and no more of the core's time.
    """

    seconds: float = 30.0
    memory: int = 2 << 30


class DecodeProcesses:
    """Processes that decode by `how` within `limits`, as many as there are threads that ask.

    `decoder` is a function that can be imported by its name. Safe to use from several threads.
    """

    def __init__(self, how: Preprocessing, limits: Limits, decoder: Decoder = decode_image):
        self._how = how
        self._limits = limits
        self._decoder = decoder
        self._lock = threading.Lock()
        self._closed = False
        _allow_files()
        ahead = _ahead.pop((limits, decoder), None)
        # At once, so that it imports while the first pictures are read.
        self._server: _ForkServer | None = ahead or self._new_server()
        self._idle: list[_Process] = []

    def decode(self, data: bytes) -> Pixels:
        """As `decode_image`; raises ImageError also with these classes.

        DecoderCrashed, DecodeTimeout, DecoderOutOfMemory. A process that something else has killed
        is replaced, and its picture tried once more. RunError where no process can be started.
        """
        for fresh in (False, True):
            process = self._take(fresh)
            try:
                answer = process.ask(data)
            except TimeoutError:
                process.end()
                message = f"not decoded within --decode_seconds {self._limits.seconds:g}"
                raise ImageError(TIMEOUT, message) from None
            except (EOFError, ConnectionError):
                status, words = process.end()
                outside = status < 0 and status not in _OWN_FAULTS
                if not fresh and (outside or (status == _NO_MEMORY and process.used)):
                    continue
                raise self._cause(status, words) from None
            except BaseException:
                process.end()
                raise
            if isinstance(answer, ImageError) and answer.error_class == OUT_OF_MEMORY:
                process.end()  # what earlier pictures left in it must not fail this one, or others
                if fresh or not process.used:
                    raise self._no_memory(answer.message)
                continue
            process.used = True
            with self._lock:
                closed = self._closed
                if not closed:
                    self._idle.append(process)
            if closed:
                process.close()
            if isinstance(answer, tuple):
                return answer
            raise answer
        raise AssertionError("the second try ends in an answer or an error")

    def close(self) -> None:
        """End every process; nothing is decoded any more."""
        with self._lock:
            self._closed = True
            server, idle = self._server, self._idle
            self._server, self._idle = None, []
        for process in idle:
            process.close()
        if server:
            server.close()

    def _new_server(self) -> _ForkServer:
        return _ForkServer(self._limits.memory, self._decoder)

    def _take(self, fresh: bool) -> _Process:
        with self._lock:
            if self._closed:
                raise RunError("nothing is decoded any more: the step that asks has ended")
            if self._idle and not fresh:
                return self._idle.pop()
            for _ in range(2):  # a second server where something has killed the first
                self._server = self._server or self._new_server()
                try:
                    return self._server.start(self._how, self._limits.seconds)
                except (EOFError, OSError) as error:
                    reason = self._server.close() or str(error)
                    self._server = None
            raise RunError(f"no process for decoding can be started: {reason}")

    def _cause(self, status: int, words: str) -> ImageError:
        if status == _NO_MEMORY:
            return self._no_memory("they do not even hold the encoded bytes")
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        if status == -signal.SIGKILL:
            how += ", twice, as by the kernel when the machine has no memory left"
        return ImageError(CRASHED, f"the decoder ended by {how}; {words}".rstrip("; "))

    def _no_memory(self, why: str) -> ImageError:
        limit = f"--decode_memory {self._limits.memory} bytes do not suffice"
        return ImageError(OUT_OF_MEMORY, f"{limit}; {why}")


_ahead: dict[tuple[Limits, Decoder], _ForkServer] = {}


def start_ahead(limits: Limits, decoder: Decoder = decode_image) -> None:
    """Start now what the next DecodeProcesses of these arguments will be forked from, so that it
    imports meanwhile. `drop_ahead` ends what nobody has taken.
    """
    if (limits, decoder) not in _ahead:
        _ahead[limits, decoder] = _ForkServer(limits.memory, decoder)


def drop_ahead() -> None:
    """End what `start_ahead` has started and nobody uses."""
    while _ahead:
        _ahead.popitem()[1].close()


_shared: dict[tuple[Preprocessing, Limits, Decoder], list[Any]] = {}  # processes, users
_sharing = threading.RLock()  # the garbage collector may end a user while it is held


@contextlib.contextmanager
def shared_processes(
    how: Preprocessing, limits: Limits | None, decoder: Decoder = decode_image
) -> Iterator[DecodeProcesses | None]:
    """The DecodeProcesses of this process for these arguments; closed when the last user leaves.

    None without `limits`: whoever asks decodes by itself.
    """
    if limits is None:
        yield None
        return
    key = (how, limits, decoder)
    with _sharing:
        entry = _shared.get(key)
        if entry is None:
            entry = _shared[key] = [DecodeProcesses(*key), 0]
        entry[1] += 1
    try:
        yield entry[0]
    finally:
        with _sharing:
            entry[1] -= 1
            last = not entry[1]
            if last:
                del _shared[key]
        if last:
            entry[0].close()


# ---------------------------------------------------------------- the starter's side


class _ForkServer:
    """The process that forks those that decode, and the line that all their lives hang on."""

    def __init__(self, memory: int, decoder: Decoder):
        self._lock = threading.Lock()
        self._errors, self._words = _errors_file(), ""
        self._control, theirs = _pair(socket.SOCK_SEQPACKET)
        life_line, self._life = os.pipe()
        order = {
            # Last where this package is, for an import hook may have found it.
            "path": [*map(os.path.abspath, sys.path), str(Path(__file__).parents[1])],
            "control": theirs.fileno(),
            "life_line": life_line,
            "module": decoder.__module__,
            "function": decoder.__qualname__,
            "memory": memory,
        }
        # No credential of the environment; no threads in NumPy, which forks would lack.
        env = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        if "LD_LIBRARY_PATH" in os.environ:
            env["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _START, json.dumps(order)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                pass_fds=(theirs.fileno(), life_line),
                env=env,
                process_group=0,  # the life line's signal goes to all of it, a terminal's to none
            )
        except BaseException:
            self._control.close()
            os.close(self._life)
            os.close(self._errors)
            raise
        finally:
            theirs.close()
            os.close(life_line)

    def start(self, how: Preprocessing, seconds: float) -> _Process:
        """A new process that decodes by `how`, a picture within `seconds`.

        EOFError or OSError where this server is gone; RunError where this process has no file left.
        """
        try:
            ours, theirs = _pair(socket.SOCK_STREAM)
            process = _Process(self, ours, how.size, seconds)
        except OSError as error:
            raise RunError(f"no process for decoding can be started: {error}") from None
        try:
            with theirs:
                process.pid = self._ask(0, [theirs.fileno(), *process.files])
            os.close(process.files.pop())  # mapped by now
            if process.pid < 0:
                reason = os.strerror(-process.pid)
                raise RunError(f"no process for decoding can be started: {reason}")
            process.tell(how)
        except BaseException:
            process.close()
            raise
        return process

    def end(self, pid: int) -> int:
        """Kill the process `pid` where it still runs; its exit status, negative for a signal."""
        try:
            return self._ask(pid)
        except (EOFError, OSError):  # this server is gone, and nobody else may end what it started
            self.close()
            return -signal.SIGKILL

    def _ask(self, order: int, files: Sequence[int] = ()) -> int:
        with self._lock:
            socket.send_fds(self._control, [_ORDER.pack(order)], files)
            reply = self._control.recv(_ORDER.size)
        if not reply:
            raise EOFError
        return int(_ORDER.unpack(reply)[0])

    def close(self) -> str:
        """End it and all that it has forked; what it said last on stderr."""
        with self._lock:
            if self._life >= 0:
                self._control.close()  # it ends and reaps its children
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(5)
                os.close(self._life)  # ends what is left
                self._life = -1
                self._process.wait()
                self._words = _last_line(self._errors)
                os.close(self._errors)
        return self._words


class _Process:
    """A process that decodes, at the other end of a socket.

    `files`: that of its stderr, and the memory that it puts pixels into.
    """

    def __init__(self, server: _ForkServer, connection: socket.socket, size: int, seconds: float):
        self.pid = 0
        self.used = False  # whether it has decoded anything
        self.files: list[int] = []
        self._clock = -1
        self._server = server
        self._connection = connection
        self._connection.settimeout(seconds)
        try:
            self.files.append(_errors_file())
            self.files.append(os.memfd_create("pixels"))
            os.ftruncate(self.files[1], size * size * 3)
            self._pixels = _mapped(self.files[1]).reshape(size, size, 3)
        except BaseException:
            self.close()
            raise

    def tell(self, how: Preprocessing) -> None:
        """Tell it how to decode, before the first picture."""
        with contextlib.suppress(OSError):  # a kernel that keeps no such accounts
            self._clock = os.open(f"/proc/{self.pid}/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        text = json.dumps(dataclasses.asdict(how)).encode()
        _send(self._connection, _REQUEST.pack(len(text)), memoryview(text))

    def ask(self, data: bytes) -> Pixels | ImageError:
        """What it makes of `data`. Raises TimeoutError; EOFError or ConnectionError if it died."""
        before = self._cpu_seconds()
        _send(self._connection, _REQUEST.pack(len(data)), memoryview(data))
        length, width, height = _REPLY.unpack(self._answer(before))
        if length:
            return ImageError(*json.loads(_receive(self._connection, length)))
        return self._pixels.copy(), width, height

    def _answer(self, before: float) -> bytes:
        """The head of its answer; `before`: what it had of a core until then. Raises TimeoutError.

        On a busy machine it may have had little of a core, and is waited for while it gets on.
        """
        most = self._connection.gettimeout() or 0.0
        waits, had, stalls = most, before, 0
        while True:
            try:
                head = _receive(self._connection, _REPLY.size)
            except TimeoutError:
                now = self._cpu_seconds()
                stalls = stalls + 1 if now - had < 0.01 * waits else 0
                if now - before >= most or stalls == 2:  # one may be of a job that was frozen
                    raise
                waits, had = most / 10, now
                self._connection.settimeout(waits)
            else:
                if waits != most:
                    self._connection.settimeout(most)
                return head

    def _cpu_seconds(self) -> float:
        """The time of a core that it has had so far, in seconds; 0 where that cannot be told."""
        if self._clock < 0:
            return 0.0
        try:
            return int(os.pread(self._clock, 100, 0).split()[0]) / 1e9
        except (OSError, ValueError, IndexError):  # it has ended
            return 0.0

    def end(self) -> tuple[int, str]:
        """Its exit status after killing it where it still runs, and its last words."""
        status, words = self._server.end(self.pid), _last_line(self.files[0])
        self.close()
        return status, words

    def close(self) -> None:
        """Let go of it."""
        self._connection.close()
        for file in (*self.files, *([self._clock] if self._clock >= 0 else [])):
            os.close(file)


def _allow_files() -> None:
    """Let this process open as many files as it may: four a process that decodes, one a core."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _pair(kind: int) -> tuple[socket.socket, socket.socket]:
    """Two connected sockets that block, whatever default timeout a library has set.

    Beam's client of gs:// sets one, and the other end would find its own not ready.
    """
    pair = socket.socketpair(socket.AF_UNIX, kind)
    for end in pair:
        end.setblocking(True)
        # A large picture in few pieces, as far as the kernel allows.
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _PIECE)
    return pair


def _mapped(file: int) -> np.ndarray:
    return np.frombuffer(mmap.mmap(file, 0), np.uint8)


def _send(connection: socket.socket, head: bytes, body: memoryview) -> None:
    sent = connection.sendmsg([head, body])  # one message wakes the other side once
    if sent < len(head) + len(body):
        connection.sendall(body[sent - len(head) :])


def _receive(connection: socket.socket, size: int) -> bytes:
    """The next `size` bytes; EOFError where the other end has closed before."""
    received = b""
    while len(received) < size:  # a signal ends MSG_WAITALL early, being stopped and going on too
        more = connection.recv(size - len(received), socket.MSG_WAITALL)
        if not more:
            raise EOFError
        received += more
    return received


def _errors_file() -> int:
    errors = os.memfd_create("errors")
    fcntl.fcntl(errors, fcntl.F_SETFL, os.O_APPEND)
    return errors


def _last_line(errors: int) -> str:
    end = os.pread(errors, 1000, max(0, os.fstat(errors).st_size - 1000))
    return "".join(end.decode(errors="replace").strip().splitlines()[-1:])


# ---------------------------------------------------------------- the processes' side


def serve(control: int, life_line: int, module: str, function: str, memory: int) -> None:
    """Be the fork server: start and end processes as `control` orders, until that is closed.

    `life_line`: a pipe that nobody writes to; when its other end closes, all of this group ends.
    """
    # The kernel's own signal, because a decoder that hangs may hold the interpreter's lock.
    fcntl.fcntl(life_line, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(life_line, fcntl.F_SETFL, os.O_ASYNC)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    decoder = getattr(importlib.import_module(module), function)
    orders = socket.socket(fileno=control)
    children: set[int] = set()
    gc.freeze()  # else the collector would write to every page that is shared
    while True:
        order, files, _, _ = socket.recv_fds(orders, _ORDER.size, 3)
        if not order:
            break
        (pid,) = _ORDER.unpack(order)
        if pid:
            reply = _end(pid)
            children.discard(pid)
        else:
            reply = _fork(orders, files, decoder, memory)
            if reply > 0:
                children.add(reply)
        orders.send(_ORDER.pack(reply))
    for pid in children:
        _end(pid)


def _end(pid: int) -> int:
    os.kill(pid, signal.SIGKILL)  # one that is dead already keeps the status it died with
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _fork(
    orders: socket.socket, files: Sequence[int], decoder: Callable[..., Pixels], memory: int
) -> int:
    """The pid of a new process; the errno, negative, where there is none.

    It answers on the first of `files`, writes errors to the second, and pixels to the third.
    """
    try:
        pid = os.fork()
    except OSError as error:
        pid = -(error.errno or errno.EAGAIN)
    if pid:
        for file in files:
            os.close(file)
        return pid
    status = 1
    try:
        orders.close()  # else the server's death would not close it
        connection, errors, memory_of_pixels = files
        os.dup2(errors, 2)
        pixels = _mapped(memory_of_pixels)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        most = pages * resource.getpagesize() + memory
        most = min(most, sys.maxsize if hard == resource.RLIM_INFINITY else hard)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        requests = socket.socket(fileno=connection)
        decode = functools.partial(decoder, how=_told(requests))
        while True:
            head = _receive(requests, _REQUEST.size)
            os.ftruncate(2, 0)
            _answer(requests, _REQUEST.unpack(head)[0], decode, pixels)
    except EOFError:  # its starter has gone
        status = 0
    except MemoryError:
        status = _NO_MEMORY
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _told(requests: socket.socket) -> Preprocessing:
    """What `_Process.tell` has sent."""
    head = _receive(requests, _REQUEST.size)
    how = json.loads(_receive(requests, _REQUEST.unpack(head)[0]))
    return Preprocessing(**how | {"formats": tuple(how["formats"])})


def _answer(
    requests: socket.socket, size: int, decode: Callable[[bytes], Pixels], shared: np.ndarray
) -> None:
    data = _receive(requests, size)
    try:
        pixels, width, height = decode(data)
    except ImageError as error:
        text = json.dumps([_class_of(error), error.message]).encode()
        _send(requests, _REPLY.pack(len(text), 0, 0), memoryview(text))
    else:
        shared[:] = pixels.reshape(-1)
        requests.sendall(_REPLY.pack(0, width, height))


def _class_of(error: ImageError) -> str:
    """Its class, or that Python or one of Pillow's decoders had no memory for the picture."""
    cause = error.__cause__
    if isinstance(cause, MemoryError) or "out of memory" in str(cause).lower():
        return OUT_OF_MEMORY
    return error.error_class
