"""Local files and folders of this process that nobody wants once it ends before its time."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

making = threading.RLock()  # held while one is made and tracked
_tracked: set[str] = set()


def track(path: str) -> str:
    """`path`, a file or folder that `abandon_all` is to remove."""
    _tracked.add(path)
    return path


def forget(path: str) -> None:
    """Take back `track`: what lay there is gone, or stays."""
    _tracked.discard(path)


def tracked() -> list[str]:
    """What `abandon_all` would remove."""
    return sorted(_tracked)


def abandon_all(for_good: bool = False) -> None:
    """Remove all that is tracked.

    With `for_good` no thread can make a further one: the process is about to end.
    """
    held = making.acquire(timeout=5)  # a disk that hangs must not hold the end back
    for path in tracked():
        if os.path.isdir(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):  # of a disk that is gone, or read only by now
                Path(path).unlink(missing_ok=True)
    if held and not for_good:
        making.release()


@contextlib.contextmanager
def scratch(parent: str | Path | None = None, prefix: str | None = None) -> Iterator[Path]:
    """A temporary folder, gone at the end of the block or of an interrupted run."""
    folder = track(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        forget(folder)
