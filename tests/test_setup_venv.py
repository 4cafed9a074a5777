"""setup_venv.sh: what it installs, and what it knows to be there, without installing anything."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What it is made of.
PROJECT = (
    *("pyproject.toml", "setup.py", "formats/_resampling.c"),
    *("models/_separable.c", "models/_separable_avx512.c"),
)


@pytest.fixture
def held(tmp_path):
    """Calls setup_venv.sh for a lock of a commit, both by name; what pip then installs."""
    shutil.copy(ROOT / "setup_venv.sh", tmp_path)
    for folder in ("formats", "models"):
        (tmp_path / folder).mkdir()
    for name in PROJECT:
        (tmp_path / name).touch()
    (tmp_path / "requirements").mkdir()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "made-for").write_text(".".join(map(str, sys.version_info[:2])))
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/installed\n')
    python.chmod(0o755)

    def call(lock, commit):
        for name in ("runtime", "test"):
            (tmp_path / "requirements" / f"{name}.txt").write_text(f"{name} of {commit}")
        (tmp_path / "installed").write_text("")
        subprocess.run(
            [tmp_path / "setup_venv.sh", tmp_path / "requirements" / f"{lock}.txt"],
            env={**os.environ, "PYTHON": sys.executable},
            capture_output=True,
            check=True,
        )
        return (tmp_path / "installed").read_text().count("--requirement")

    return call


@pytest.mark.parametrize("name", PROJECT)
def test_the_project_is_installed_again_when_what_makes_it_has_changed(held, tmp_path, name):
    held("runtime", "a")
    installed = tmp_path / "installed"
    held("runtime", "a")
    assert "--editable" not in installed.read_text()
    (tmp_path / name).write_text("changed")
    held("runtime", "a")
    assert "--editable" in installed.read_text()


def test_locks_of_one_commit_stand_side_by_side(held):
    calls = [held(lock, "a") for lock in ("runtime", "test", "runtime", "test")]
    assert calls == [1, 1, 0, 0]


def test_a_lock_is_installed_again_after_one_of_another_commit(held):
    held("runtime", "a")
    held("test", "b")
    assert held("runtime", "a") == 1
    assert held("test", "b") == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [([], "tell which lock"), (["requirements/gone.txt"], "requirements/gone.txt: no such lock")],
)
def test_without_a_lock_nothing_is_forgotten(held, tmp_path, words, told):
    held("runtime", "a")
    call = [tmp_path / "setup_venv.sh", *words]
    ran = subprocess.run(call, capture_output=True, text=True, check=False)
    assert ran.returncode != 0
    assert told in ran.stderr
    assert held("runtime", "a") == 0
