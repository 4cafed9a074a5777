"""One command as a process of its own: its time, CPU, peak memory, and when its first row came."""

from __future__ import annotations

import contextlib
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

_EVERY = 1.0  # seconds between two looks at the memory, each of a few milliseconds
_MIB = 1 << 20
_TICKS = os.sysconf("SC_CLK_TCK")


def run(command: Sequence[str], watch: Path | None = None, limit: float = 600) -> dict[str, Any]:
    """Run `command` to its end; what its last line of stdout tells (JSON), and beside it:

    `seconds`: wall clock. `cpu`: seconds of the process and all below it, also of those
    that it leaves behind (these up to the last look). `peak_mib`: memory of the process and all
    below it, what they share counted once (PSS), sampled; at least the process's own true peak.
    `first`: seconds until the first file appeared below `watch`, else until the `first_at` that it
    told (seconds since 1970). Raises RuntimeError with the end of stderr where the command fails,
    or is killed after `limit` seconds.
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
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what it left behind would disturb the next
    reader.join()
    if process.returncode or not told:
        tail = b"".join(noise)[-2000:].decode(errors="replace")
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{tail}")
    line = json.loads(told[-1])
    first_at = looker.first_at or line.pop("first_at", None)
    return {
        **line,
        "seconds": seconds,
        "cpu": max(usage.ru_utime + usage.ru_stime, looker.cpu),
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
        self.cpu = 0.0
        self.first_at: float | None = None

    def run(self) -> None:
        every = 0.02 if self._watch else _EVERY / 4
        looked = looked_at_cpu = 0.0
        while not self.end.wait(every):
            if self._watch and self.first_at is None and any(self._watch.glob("part-*")):
                self.first_at = time.time()
            if time.monotonic() - looked_at_cpu > _EVERY / 4:
                looked_at_cpu = time.monotonic()
                self.cpu = max(self.cpu, sum(map(_cpu, _tree(self._pid))))
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


def _cpu(pid: int) -> float:
    """CPU seconds of `pid` and of those below it that it has waited for."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return sum(map(int, fields[11:15])) / _TICKS  # utime, stime, cutime, cstime


def _resident(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def load() -> float:
    """The machine's load average of the last minute, told beside what is measured."""
    return os.getloadavg()[0]


def note(text: str) -> None:
    """`text` as one line of progress, with the time and the load."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} load {load():.1f}: {text}\n")
