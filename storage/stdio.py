"""stdin, stdout and stderr of a command: what is wrong with them changes none of its answers."""

from __future__ import annotations

import contextlib
import os
import sys

from storage.secrets import hide


def open_missing() -> None:
    """Open what the caller has closed of stdin, stdout and stderr (`>&-`) on /dev/null.

    To be called before any other file is opened, which would take the number, and be written into.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number's
            setattr(sys, name, os.fdopen(number, mode, errors="backslashreplace"))


def tell(text: str, stream: str = "stdout") -> OSError | None:
    """Write `text` and the end of a line; what stood in the way, as a reader that has gone, or a
    full disk: the exit code still tells.
    """
    target = getattr(sys, stream)
    try:
        target.write(text + "\n")
        target.flush()
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):  # else Python would try again and exit 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), target.fileno())
        return error
    return None


def tell_error(error: object) -> None:
    """Tell `error` on stderr, in one line and without credentials, whether or not it is read."""
    tell(f"error: {hide(' '.join(str(error).split()))}", "stderr")
