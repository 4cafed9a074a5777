"""The errors that end a run, told apart by who can mend them."""

from __future__ import annotations


class RequestError(ValueError):
    """The request is wrong (flag, model, input, output): one line, exit code 2, before any work."""


class RunError(RuntimeError):
    """The run cannot go on, and its message says all there is to say: one line, exit code 1."""
