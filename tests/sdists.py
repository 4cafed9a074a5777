"""The project as Beam ships it to workers: its sdist, and an environment of nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def built_sdist(folder: Path) -> Path:
    """The sdist that `--setup_file ./setup.py` stages, made in `folder`."""
    command = f"{sys.executable} setup.py -q egg_info --egg-base {folder} sdist -d {folder}"
    subprocess.run(command.split(), cwd=ROOT, capture_output=True, check=True)
    (archive,) = folder.glob("*.tar.gz")
    return archive


def bare_environment(folder: Path) -> tuple[str, Path]:
    """The interpreter and library of a new environment of pip and the lock's setuptools alone."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], capture_output=True, check=True)
    (library,) = folder.glob("lib/python*/site-packages")
    where = [sys.executable, "-c", "import setuptools; print(setuptools.__path__[0])"]
    found = subprocess.run(where, capture_output=True, check=True, text=True)
    for name in ("setuptools", "_distutils_hack"):  # of which Python 3.11 brings old ones
        shutil.rmtree(library / name, ignore_errors=True)
        os.symlink(Path(found.stdout.strip()).parent / name, library / name)
    return str(folder / "bin" / "python"), library
