"""Prism, Beam's own portable runner, built by Go from the sources of this Beam's release.

python -m engines.prism      # builds it once, prints where it lies
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import shutil
import sys
import tempfile
from pathlib import Path

from engines.jars import cache
from engines.processes import EngineError, finished

_MODULE = "github.com/apache/beam/sdks/v2/go/cmd/prism"
_SECONDS = 1200
_TRIES = 3


def binary() -> Path:
    """The path of a Prism of the installed Beam's version, built where there is none yet.

    Go holds what it fetches against its public checksum database. Raises EngineError.
    """
    version = importlib.metadata.version("apache-beam")
    path = cache() / f"prism-{version}"
    with open(cache() / "prism.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two at once would build twice
        if path.exists():
            return path
        with tempfile.TemporaryDirectory(dir=cache(), prefix=".prism-") as scratch:
            _build(f"{_MODULE}@v{version}", scratch)
            shutil.move(Path(scratch) / "prism", path)  # appears whole
    return path


def _build(package: str, folder: str) -> None:
    for _ in range(_TRIES):  # what was fetched before a cut is kept by Go
        env = {"GOBIN": folder, "CGO_ENABLED": "0"}
        done = finished(["go", "install", package], _SECONDS, env)
        if done.returncode == 0:
            return
    raise EngineError(f"{package} cannot be built\n{done.stderr[-2000:]}")


def main() -> int:
    """Build, and print the path."""
    try:
        sys.stdout.write(f"{binary()}\n")
    except EngineError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
