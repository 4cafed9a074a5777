"""Whether a store answers, told within seconds: its clients try for minutes and log every try."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

from storage import files
from storage.errors import RequestError

PATIENCE = 30.0  # seconds; looking for Google's credentials alone takes up to 20
TRIES = 2  # failures of Beam's own retries after which the rest is not waited for
_LOGGERS = ("apache_beam.utils.retry", "apache_beam.internal.gcp.auth")

Result = TypeVar("Result")


class _Heard(logging.Handler):
    """What a store's client says while it tries on."""

    def __init__(self) -> None:
        super().__init__()
        self.done = threading.Event()
        self.reason = "no answer"
        self._tries = 0

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        told, _, error = text.partition("because we caught exception: ")
        self.reason = " ".join((error or told).strip().partition("\n")[0].split())[:300]
        # Without Google's credentials it goes on as anybody, where it is let in.
        self._tries += bool(error) and not error.startswith("google.auth.")
        if self._tries >= TRIES:
            self.done.set()


@contextlib.contextmanager
def _listening() -> Iterator[_Heard]:
    heard = _Heard()
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [logger.propagate for logger in loggers]
    try:
        for logger in loggers:
            logger.addHandler(heard)
            logger.propagate = False
        yield heard
    finally:
        for logger, propagate in zip(loggers, before, strict=True):
            logger.removeHandler(heard)
            logger.propagate = propagate


def soon(path: str, call: Callable[[], Result]) -> Result:
    """`call()`, which asks the store of `path` for something, in at most `PATIENCE` seconds.

    Raises what it raises, and RequestError, with the reason that its client told, where it still
    tries. Local paths are not waited for.
    """
    if not files.is_remote(path):
        return call()
    results: list[Result] = []
    errors: list[Exception] = []

    def ask() -> None:
        try:
            results.append(call())
        except Exception as error:
            errors.append(error)
        finally:
            heard.done.set()

    with _listening() as heard:
        threading.Thread(target=ask, daemon=True).start()
        heard.done.wait(PATIENCE)
    if errors:
        raise errors[0]
    if not results:
        raise RequestError(
            f"{path}: the store does not answer ({heard.reason}); look at the address, the "
            "credentials and Beam's flags for them (see --help)"
        )
    return results[0]


def check(path: str) -> None:
    """Raise RequestError unless the store of `path` answers, if only by an error: that is told by
    what is asked of it next, which knows its flag.
    """
    with contextlib.suppress(OSError):
        soon(path, lambda: files.occupied(path))
