"""Imports without what nobody uses, and without a look at the garbage."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from storage.imports import without

ROOT = Path(__file__).parents[1]


@pytest.fixture
def modules(tmp_path, monkeypatch) -> None:
    """Modules that are on the path and not imported: fresh and other."""
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("fresh", "other"):
        (tmp_path / f"{name}.py").write_text("")
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.usefixtures("modules")
def test_a_module_is_missing_inside_and_there_afterwards():
    with without("fresh", "other"):
        for name in ("fresh", "other"):
            with pytest.raises(ImportError):
                importlib.import_module(name)
    assert importlib.import_module("fresh").__name__ == "fresh"


@pytest.mark.usefixtures("modules")
def test_a_module_that_is_imported_stays():
    fresh = importlib.import_module("fresh")
    with without("fresh"):
        assert importlib.import_module("fresh") is fresh
    assert sys.modules["fresh"] is fresh


@pytest.mark.usefixtures("modules")
def test_an_error_inside_hides_nothing_for_good():
    with pytest.raises(RuntimeError), without("fresh"):
        raise RuntimeError
    importlib.import_module("fresh")


def test_garbage_is_looked_for_before_and_after_and_that_is_done_once():
    code = """
import gc
from storage.imports import uncollected

before = gc.get_freeze_count()
with uncollected():
    assert not gc.isenabled()
assert gc.isenabled() and gc.get_freeze_count() > before + 1000
with uncollected():
    assert gc.isenabled()
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("first", ["", "gc.disable()"])
def test_collecting_is_afterwards_as_before_whatever_happens(first):
    code = f"""
import gc
from storage.imports import uncollected

{first}
before = gc.isenabled()
try:
    with uncollected():
        assert not gc.isenabled()
        raise ImportError
except ImportError:
    assert gc.isenabled() == before
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_job_as_a_process_has_no_clients_of_what_it_does_not_use():
    """And Beam, which would import them, does without and says nothing."""
    code = """
import sys
from pipeline import extract

def command():
    import apache_beam
    from apache_beam.io.gcp import bigquery_tools, pubsub
    loaded = {name for name in extract._UNUSED if sys.modules[name] is not None}
    return 7 if not loaded else 1

extract.run_process(command)
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (7, "", "")
