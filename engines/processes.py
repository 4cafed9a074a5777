"""Processes that belong together: each with a log, waited for with a bound, all ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

_GRACE = 10  # seconds to end after SIGTERM
_STEP = 0.2  # seconds between two looks
_TAIL = 4000  # characters of a log that an error shows

Found = TypeVar("Found")


class EngineError(Exception):
    """An engine could not be had, or did not do what was waited for; the message shows its log."""


@dataclass
class Process:
    """A process, leader of a process group of its own, and the file of what it printed.

    `began`: when it was started, in clock ticks since boot. A process of another time has been
    given the same number since; nothing is asked of it.
    """

    name: str
    pid: int
    log: Path
    child: subprocess.Popen[bytes] | None = None
    began: int | None = None

    def running(self) -> bool:
        """Whether it has not ended."""
        if self.child is not None:
            return self.child.poll() is None
        stat = _stat(self.pid)
        return bool(stat) and stat[0] != "Z" and not self._replaced()

    def group(self) -> list[int]:
        """The process ids of its group that run: itself, and what it has started."""
        if self._replaced():
            return []
        pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
        stats = {pid: _stat(pid) for pid in pids}
        ours = str(self.pid)
        return [pid for pid, stat in stats.items() if stat and stat[2] == ours and stat[0] != "Z"]

    def kill(self) -> None:
        """End it and what it started at once, as a lost machine would."""
        self._signal(signal.SIGKILL)
        self._wait()

    def stop(self) -> None:
        """Ask it to end; kill its group where it, or what it started, has not within seconds."""
        if self.running():
            with contextlib.suppress(ProcessLookupError):  # it has ended since
                os.kill(self.pid, signal.SIGTERM)
            self._wait()
        self._signal(signal.SIGKILL)
        self._wait()

    def tail(self) -> str:
        """The end of its log."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return f"--- {self.name}, {self.log}\n{text[-_TAIL:]}"

    def _replaced(self) -> bool:
        return None not in (self.began, began(self.pid)) and self.began != began(self.pid)

    def _signal(self, number: int) -> None:
        if self._replaced():
            return
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            pass

    def _wait(self) -> None:
        until = time.monotonic() + _GRACE
        while self.running() and time.monotonic() < until:
            time.sleep(_STEP / 4)


def began(pid: int) -> int | None:
    """When process `pid` was started, in clock ticks since boot; None where there is none."""
    stat = _stat(pid)
    return int(stat[19]) if stat else None


def _stat(pid: int) -> list[str]:
    """proc(5)'s fields of process `pid` from the third on; empty where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def start(
    name: str,
    argv: Sequence[str],
    folder: Path,
    env: Mapping[str, str] | None = None,
    cores: Sequence[int] | None = None,
) -> Process:
    """Start `argv` with its output in `folder`/NAME.log, on `cores` only where they are given."""
    log = folder / f"{name}.log"
    with open(log, "ab") as output:
        child = subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
    if cores:
        os.sched_setaffinity(child.pid, cores)
    return Process(name, child.pid, log, child, began(child.pid))


def finished(
    command: Sequence[str], seconds: float, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`command`, run to its end, and what it printed; EngineError where it takes longer."""
    try:
        return subprocess.run(
            command,
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            timeout=seconds,
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        raise EngineError(f"{command[0]}: not on PATH; install it") from None
    except subprocess.TimeoutExpired:
        raise EngineError(f"{command[0]}: not done within {seconds:g} s; try again") from None


def wait_for(
    what: str,
    look: Callable[[], Found | None],
    seconds: float,
    processes: Sequence[Process] = (),
) -> Found:
    """What `look` finds, as soon as it is true.

    Raises EngineError, with the end of the logs, after `seconds`, or when a process has ended.
    """
    until = time.monotonic() + seconds
    while True:
        if found := look():
            return found
        dead = [process for process in processes if not process.running()]
        if dead or time.monotonic() > until:
            why = f"{dead[0].name} has ended" if dead else f"not within {seconds:g} s"
            logs = "\n".join(process.tail() for process in dead or processes)
            raise EngineError(f"{what}: {why}\n{logs}")
        time.sleep(_STEP)


def listening(port: int) -> bool:
    """Whether a server accepts connections at `port` of this machine."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens at, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
