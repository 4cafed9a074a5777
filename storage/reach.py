"""Whether a store answers, told within seconds: its clients try for minutes and log every try."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

from storage import files
from storage.errors import RequestError

PATIENCE = 30.0  # seconds; looking for Google's credentials alone takes up to 20
TRIES = 2  # failures of Beam's own retries after which the rest is not waited for
_LOGGERS = ("apache_beam.utils.retry", "apache_beam.internal.gcp.auth")

Result = TypeVar("Result")


class _Asker(threading.Thread):
    """Asks a store; what its client says meanwhile is heard here and shown nowhere.

    It cannot be stopped: one that is no longer waited for asks on, unheard, until it ends.
    """

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.results: list[Any] = []
        self.errors: list[Exception] = []
        self.done = threading.Event()  # it ended, or tried often enough
        self.reason = "no answer"
        self._call = call
        self._tries = 0

    def run(self) -> None:
        loggers = [logging.getLogger(name) for name in _LOGGERS]
        for logger in loggers:
            logger.addFilter(self.hear)
        try:
            self.results.append(self._call())
        except Exception as error:
            self.errors.append(error)
        finally:
            for logger in loggers:
                logger.removeFilter(self.hear)
            self.done.set()

    def hear(self, record: logging.LogRecord) -> bool:
        """A logger's filter: whether `record` is another's, and to be shown."""
        if record.thread != self.ident:
            return True
        text = record.getMessage()
        told, _, error = text.partition("because we caught exception: ")
        self.reason = " ".join((error or told).strip().partition("\n")[0].split())[:300]
        # Without Google's credentials it goes on as anybody, where it is let in.
        self._tries += bool(error) and not error.startswith("google.auth.")
        if self._tries >= TRIES:
            self.done.set()
        return False


def soon(path: str, call: Callable[[], Result]) -> Result:
    """`call()`, which asks the store of `path` for something, in at most `PATIENCE` seconds.

    Raises what it raises, and RequestError, with the reason that its client told, where it still
    tries. Local paths are not waited for.
    """
    if not files.is_remote(path):
        return call()
    asker = _Asker(call)
    asker.start()
    asker.done.wait(PATIENCE)
    if asker.errors:
        raise asker.errors[0]
    if not asker.results:
        raise RequestError(
            f"{path}: the store does not answer ({asker.reason}); look at the address, the "
            "credentials and Beam's flags for them (see --help)"
        )
    return cast(Result, asker.results[0])


def check(path: str) -> None:
    """Raise RequestError unless the store of `path` answers, if only by an error: that is told by
    what is asked of it next, which knows its flag.
    """
    with contextlib.suppress(OSError):
        folder = files.above_glob(path)
        soon(folder, lambda: files.occupied(folder))
