"""What may pass is tried again, after a wait: a store's moods, a network's."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

TRIES, REMOTE_TRIES = 3, 6  # a store's mood may last some seconds
FIRST_WAIT = 0.2  # seconds before the second try at most, twice that before the third, ...
_LONGEST_WAIT = 30  # seconds that a server may ask for (Retry-After)
_CODES = {401: PermissionError, 403: PermissionError, 404: FileNotFoundError}

Result = TypeVar("Result")


def ignore() -> None:
    """What is done about a retry where nobody counts them."""


class ShortRead(OSError):
    """A file gave fewer bytes than it was listed with."""


class BadAddress(OSError):
    """What is no address, of which nothing can be asked."""


_PERMANENT = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    BadAddress,
)


def attempt(
    function: Callable[[], Result], path: str, on_retry: Callable[[], None] = ignore
) -> Result:
    """`function()`, which reads or writes at `path`: `TRIES` times, `REMOTE_TRIES` at an address.

    `on_retry` is called between, and some time let pass: up to 6 s in all, or as a server asks.
    Raises OSError: at once where another try would change nothing (FileNotFoundError,
    PermissionError, a folder, what is no address), else after the last one.
    """
    wait = FIRST_WAIT
    for further in reversed(range(REMOTE_TRIES if "://" in path else TRIES)):
        try:
            return function()
        except Exception as raised:
            error = _told(path, raised)
            if error is None:
                raise
            if not further or isinstance(error, _PERMANENT):
                if error is raised:
                    raise
                raise error from raised
            asked = _asked(raised)
        on_retry()
        # Workers that a store refused at once should not all come back at once.
        time.sleep(max(asked, random.uniform(wait / 2, wait)))
        wait *= 2
    raise AssertionError("the last try returns or raises")


def _asked(error: Exception) -> int:
    """The seconds that a server's refusal asks to wait, 0 where it does not."""
    told = str((getattr(error, "headers", None) or {}).get("Retry-After", ""))
    return min(int(told), _LONGEST_WAIT) if told.isdecimal() else 0


def _told(path: str, error: Exception) -> OSError | None:
    """What a store's client raised, of whatever class, as an OSError; None for a fault of ours."""
    if isinstance(error, _PERMANENT):
        return error
    cause: BaseException | None = error
    while cause is not None:
        code = getattr(cause, "code", None)
        if isinstance(code, int) and code in _CODES:
            return _CODES[code](f"{path}: {_one_line(error)}")
        cause = cause.__cause__
    if isinstance(error, OSError):
        return error
    return OSError(f"{path}: {_one_line(error)}") if "://" in path else None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
