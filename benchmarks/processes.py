"""One command as a process of its own: its time, CPU, peak memory, and when its first row came."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_EVERY = 0.25  # seconds between two looks at the memory
_MIB = 1 << 20
_PAGE = os.sysconf("SC_PAGE_SIZE")


def run(command: Sequence[str], watch: Path | None = None, limit: float = 600) -> dict[str, Any]:
    """Run `command` to its end; what its last line of stdout tells (JSON), and beside it:

    `seconds`: wall clock. `cpu`: seconds of the process and its children. `peak_mib`: resident
    memory of the process and all below it, sampled, at least its own true peak. `first`: seconds
    until the first file appeared below `watch`, else from the `first_at` that it told (seconds
    since 1970). Raises RuntimeError with the end of stderr where the command fails, or is killed
    after `limit` seconds.
    """
    start, clock = time.time(), time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    noise: list[bytes] = []
    reader = threading.Thread(target=lambda: noise.append(process.stderr.read()))  # type: ignore[union-attr]
    reader.start()
    looker = _Looker(process.pid, watch)
    looker.start()
    killer = threading.Timer(limit, os.killpg, (process.pid, signal.SIGKILL))
    killer.start()
    try:
        told = process.stdout.read().splitlines()
        _, status, usage = os.wait4(process.pid, 0)
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    finally:
        killer.cancel()
    seconds = time.perf_counter() - clock
    process.returncode = os.waitstatus_to_exitcode(status)
    looker.end.set()
    looker.join()
    reader.join()
    if process.returncode or not told:
        tail = b"".join(noise)[-2000:].decode(errors="replace")
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{tail}")
    line = json.loads(told[-1])
    first_at = looker.first_at or line.pop("first_at", None)
    return {
        **line,
        "seconds": seconds,
        "cpu": usage.ru_utime + usage.ru_stime,
        "peak_mib": max(usage.ru_maxrss * 1024, looker.peak) / _MIB,
        "first": first_at - start if first_at else None,
    }


class _Looker(threading.Thread):
    """Looks at the memory of a process and all below it, and for a first file below `watch`."""

    def __init__(self, pid: int, watch: Path | None):
        super().__init__(daemon=True)
        self._pid = pid
        self._watch = watch
        self.end = threading.Event()
        self.peak = 0
        self.first_at: float | None = None

    def run(self) -> None:
        every = 0.02 if self._watch else _EVERY
        looked = 0.0
        while not self.end.wait(every):
            if self._watch and self.first_at is None and any(self._watch.glob("part-*")):
                self.first_at = time.time()
            if time.monotonic() - looked > _EVERY:
                looked = time.monotonic()
                self.peak = max(self.peak, sum(map(_resident, _tree(self._pid))))


def _tree(pid: int) -> list[int]:
    """`pid` and all its descendants that live."""
    found = [pid]
    for parent in found:
        for thread in _entries(f"/proc/{parent}/task"):
            try:
                children = Path(f"/proc/{parent}/task/{thread}/children").read_text()
            except OSError:
                continue
            found += map(int, children.split())
    return found


def _entries(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0


def load() -> float:
    """The machine's load average of the last minute, told beside what is measured."""
    return os.getloadavg()[0]


def note(text: str) -> None:
    """`text` as one line of progress, with the time and the load."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} load {load():.1f}: {text}\n")
