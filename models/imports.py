"""Importing a package without another that it would import and that we do not use."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def without(package: str) -> Iterator[None]:
    """Unless `package` has been imported before, importing it fails inside of this."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]
