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
    packages = Path(found.stdout.strip()).parent
    for old in library.glob("setuptools*"):  # Python 3.11 brings one
        shutil.rmtree(old)
    shutil.rmtree(library / "_distutils_hack", ignore_errors=True)
    for package in (*packages.glob("setuptools*"), packages / "_distutils_hack"):
        os.symlink(package, library / package.name)
    return str(folder / "bin" / "python"), library
