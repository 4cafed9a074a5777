"""stdin, stdout and stderr of a command: what is wrong with them changes none of its answers."""

from __future__ import annotations

import contextlib
import os
import sys

from storage.secrets import hide


def tell_error(error: object) -> None:
    """Tell `error` on stderr, in one line and without credentials, whether or not it is read."""
    try:
        sys.stderr.write(f"error: {hide(' '.join(str(error).split()))}\n")
        sys.stderr.flush()
    except OSError:  # the reader has gone: the exit code still tells
        with contextlib.suppress(OSError, ValueError):  # else Python would try again and exit 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
