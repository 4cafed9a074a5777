"""Importing large packages quickly: without others that we do not use, and without garbage."""

from __future__ import annotations

import contextlib
import gc
import linecache
import sys
from collections.abc import Iterator

_uncollected: list[bool] = []  # holds something once that has been done


@contextlib.contextmanager
def without(*modules: str) -> Iterator[None]:
    """Importing one of `modules` fails inside of this, unless it has been imported before."""
    hidden = hide(*modules)
    try:
        yield
    finally:
        for module in hidden:
            del sys.modules[module]


def hide(*modules: str) -> list[str]:
    """Let this process do without `modules` from now on; returns those not imported by now."""
    hidden = [module for module in modules if module not in sys.modules]
    for module in hidden:
        sys.modules[module] = None  # type: ignore[assignment]
    return hidden


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Import inside of this without looking for garbage, which took a sixth of the time.

    What is there at the end is never looked at again, and the lines of sources that TensorFlow has
    read for traces of its registrations, 9 MiB, are dropped. Does so once a process, and not where
    nothing is collected anyway.
    """
    if not gc.isenabled() or _uncollected:
        yield
        return
    _uncollected.append(True)
    gc.disable()
    try:
        yield
    finally:
        linecache.clearcache()
        gc.freeze()
        gc.enable()
