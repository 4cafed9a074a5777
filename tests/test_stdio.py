"""Commands whose stdin, stdout or stderr is not as it should be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import exports
import pytest
from pictures import jpeg

from storage import stdio

ROOT = Path(__file__).parents[1]
WRONG = {
    "extract": ["--inptu", "x"],
    "demo": ["--root", "/dev/null", "--inptu", "x"],
    "models": ["inspect"],
    "plan": ["--images", "1", "--model", "none"],
    "report": ["/nothing/here"],
    "verify": ["/nothing/here"],
}


@pytest.fixture
def unread():
    """The end to write to of a pipe that nobody reads."""
    end, unread = os.pipe()
    os.close(end)
    yield unread
    os.close(unread)


@pytest.mark.parametrize("command", WRONG)
def test_a_wrong_request_is_exit_2_though_nobody_reads_why(command, unread):
    call = [sys.executable, "-m", f"pipeline.{command}", *WRONG[command]]
    ended = subprocess.run(call, stdout=subprocess.PIPE, stderr=unread, cwd=ROOT)
    assert (ended.returncode, ended.stdout) == (2, b"")


RIGHT = {
    "models": ["inspect", "{model}"],
    "plan": ["--images", "1e6", "--model", "nasnet_mobile"],
    "report": ["{output}"],
    "verify": ["{output}"],
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    from pipeline import extract

    folder = tmp_path_factory.mktemp("stdio")
    (folder / "0.jpg").write_bytes(jpeg())
    model, output = exports.exported("saved_model", "classification"), str(folder / "out")
    assert extract.main(["--input", str(folder), "--model", model, "--output", output]) == 0
    return {"model": model, "output": output}


@pytest.mark.parametrize("command", RIGHT)
def test_an_answer_that_nobody_reads_is_exit_0(command, places, unread):
    words = [word.format(**places) for word in RIGHT[command]]
    call = [sys.executable, "-m", f"pipeline.{command}", *words]
    assert subprocess.run(call, stdout=unread, stderr=unread, cwd=ROOT).returncode == 0


def test_an_error_is_one_line_without_credentials(capsys):
    stdio.tell_error(ValueError("a\n  b of https://user:hunter2secret@host/x"))
    assert capsys.readouterr().err == "error: a b of https://***@host/x\n"


def test_no_command_shows_credentials(capsys):
    from pipeline import demo, plan

    place = "https://user:hunter2secret@host/x.tar.gz"
    assert plan.main(["--images", "1", "--model", place]) == 2
    assert demo.main(["--root", "/dev/null", place]) == 2
    for line in capsys.readouterr().err.splitlines():
        assert line.startswith("error: ")
        assert "https://***@host/x.tar.gz" in line


@pytest.mark.parametrize("closed", [">&-", "<&- 2>&-"])
def test_a_command_works_whatever_its_caller_has_closed(tmp_path, closed):
    (tmp_path / "0.jpg").write_bytes(jpeg())
    model = exports.exported("saved_model", "classification")
    flags = f"--input {tmp_path}/*.jpg --model {model} --output {tmp_path}/out"
    for command in (f"extract {flags}", f"verify {tmp_path}/out"):
        call = f"exec {sys.executable} -m pipeline.{command} {closed}"
        assert subprocess.run(call, shell=True, cwd=ROOT, capture_output=True).returncode == 0
