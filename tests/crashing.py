"""A decoder that does what a broken one does, for pictures whose bytes end in the word for it."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time

import numpy as np

from formats.image import Preprocessing
from formats.image import decode_image as decode_really
from formats.records import ImageError

_TAKEN = []


def take_memory() -> None:
    """Takes 4 GiB of it, if it gets them."""
    _TAKEN.append(np.ones(4 << 30, np.uint8))


def hold_the_lock() -> None:
    """Hangs without ever letting another thread of its interpreter run."""
    ctypes.PyDLL(None).sleep(600)


def speak() -> None:
    """Aborts with a last word, as the C library's allocator does."""
    os.write(2, b"noise\ncorrupted double-linked list\n")
    os.abort()


def get_little_of_a_core() -> None:
    """Computes a fifth of 3 s, as behind others on a busy machine, and then for half a second."""
    end = time.monotonic() + 3
    while time.monotonic() < end:
        compute(0.01)
        time.sleep(0.04)
    compute(0.5)


def compute(seconds: float) -> None:
    """Takes so much of a core."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def compute_forever() -> None:
    """Hangs, and keeps its core busy."""
    compute(3600)


def be_frozen() -> None:
    """Waits, and computes later: at first it gets nothing of a core."""
    time.sleep(0.3)
    compute(0.2)


FAULTS = {
    b"FREEZE": be_frozen,
    b"LEAK": lambda: _TAKEN.append(np.ones(40 << 20, np.uint8)),
    b"STARVED": get_little_of_a_core,
    b"BUSY": compute_forever,
    b"WARN": lambda: os.write(2, b"of another\n"),
    b"SPEAK": speak,
    b"ABORT": os.abort,
    b"SEGFAULT": lambda: ctypes.string_at(0),
    b"SLEEP": lambda: time.sleep(600),
    b"HANG": hold_the_lock,
    b"MEMORY": take_memory,
    b"EXIT": lambda: os._exit(3),
    b"KILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    b"BUG": lambda: 1 // 0,
}


def decode_image(data: bytes, how: Preprocessing) -> tuple[np.ndarray, int, int]:
    """As the true one, but for a fault that `data` asks for at its end."""
    for word, fault in FAULTS.items():
        if data.endswith(word):
            try:
                fault()
            except MemoryError as error:  # what the true one does with it
                raise ImageError("CorruptImage", "MemoryError") from error
    return decode_really(data, how)


def decode_slowly(data: bytes, how: Preprocessing) -> tuple[np.ndarray, int, int]:
    """As the true one, a second later."""
    time.sleep(1)
    return decode_really(data, how)


def look_around(data: bytes, how: Preprocessing) -> tuple[np.ndarray, int, int]:
    """Tells of the process it runs in, as the message of an error."""
    seen = {
        "modules": sorted(sys.modules),
        "nice": os.nice(0),
        "threads": len(os.listdir("/proc/self/task")),
        "environment": sorted(os.environ),
        "files": sorted(os.readlink(f"/proc/self/fd/{fd}").split(":")[0] for fd in range(3)),
    }
    raise ImageError("Seen", json.dumps(seen))


def run_job() -> None:
    """The job as a process of its own, with this decoder."""
    from pipeline import extract
    from transforms import decode

    decode.decode_image = decode_image
    extract.run_process(extract.main)
