"""Maven artifacts -> a folder of jars, fetched once, each held against a pinned sha256.

python -m engines.jars flink           # fetch what engines/flink.xml names, print the folder
python -m engines.jars flink --pin     # after a change of flink.xml: write engines/flink.sha256
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

from engines.processes import EngineError, finished

ENGINES = ("flink", "spark")
_HERE = Path(__file__).parent
_PLUGIN = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies"
_TRIES = 3
_SECONDS = 900  # for one try


def cache() -> Path:
    """Where what was fetched or built stays: `image-features/engines` in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(base) / "image-features" / "engines"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def jars(engine: str) -> Path:
    """The folder of the jars of `engine`, fetched where they are not there yet.

    Raises EngineError where Maven cannot get one, or one is not what was pinned.
    """
    pins = read_pins(_HERE / f"{engine}.sha256")
    name = hashlib.sha256(repr(sorted(pins.items())).encode()).hexdigest()[:16]
    folder = cache() / f"{engine}-{name}"
    with open(cache() / f"{engine}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two at once would fetch twice
        if folder.is_dir() and not differences(folder, pins):
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=cache(), prefix=f".{engine}-") as scratch:
            fetched = Path(scratch) / "lib"
            _fetch(engine, fetched)
            if wrong := differences(fetched, pins):
                raise EngineError(f"{engine}: {'; '.join(wrong[:5])}")
            fetched.rename(folder)  # appears whole
    return folder


def read_pins(path: Path) -> dict[str, str]:
    """File name to sha256, as `sha256sum` writes them."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {name: digest for digest, name in lines}


def digests(folder: Path) -> dict[str, str]:
    """File name to sha256 of what lies in `folder`."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


def differences(folder: Path, pins: dict[str, str]) -> list[str]:
    """How the files of `folder` differ from `pins`, a line each."""
    there = digests(folder)
    return [
        *(f"{name} is missing" for name in sorted(set(pins) - set(there))),
        *(f"{name} is not pinned" for name in sorted(set(there) - set(pins))),
        *(
            f"{name} has sha256 {there[name]}, pinned is {pins[name]}"
            for name in sorted(set(there) & set(pins))
            if there[name] != pins[name]
        ),
    ]


def _fetch(engine: str, target: Path) -> None:
    """Let Maven copy what the pom names to `target`; what came before a cut is kept by it."""
    command = [
        *("mvn", "--batch-mode", "--quiet", "--strict-checksums", "--update-snapshots"),
        *("--file", str(_HERE / f"{engine}.xml"), _PLUGIN),
        *(f"-Dmaven.repo.local={cache() / 'maven'}", f"-DoutputDirectory={target}"),
        "-DincludeScope=runtime",
    ]
    for _ in range(_TRIES):
        done = finished(command, _SECONDS)
        if done.returncode == 0:
            return
        shutil.rmtree(target, ignore_errors=True)
    raise EngineError(f"{engine}: Maven cannot get the jars\n{(done.stdout + done.stderr)[-2000:]}")


def main() -> int:
    """Fetch, or pin, and print where the jars lie."""
    parser = argparse.ArgumentParser(prog="python -m engines.jars", allow_abbrev=False)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--pin", action="store_true", help="write the digests of what Maven gives")
    request = parser.parse_args()
    try:
        if request.pin:
            _pin(request.engine)
        sys.stdout.write(f"{jars(request.engine)}\n")
    except EngineError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _pin(engine: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        fetched = Path(scratch) / "lib"
        _fetch(engine, fetched)
        lines = [f"{digest}  {name}\n" for name, digest in digests(fetched).items()]
    (_HERE / f"{engine}.sha256").write_text("".join(lines))


if __name__ == "__main__":
    sys.exit(main())
