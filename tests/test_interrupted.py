"""How a run ends before its time: what it takes along, and what it says."""

from __future__ import annotations

import io
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import exports
import pytest
from pictures import jpeg

from pipeline import extract, job
from storage import temporaries
from storage.errors import RunError
from storage.files import NewFile

ROOT = Path(__file__).parents[1]


def test_abandon_all_takes_what_is_tracked_and_lets_no_more_be_made(tmp_path, monkeypatch):
    folder, kept = tmp_path / "folder", tmp_path / "kept"
    for path in (folder, kept):
        path.mkdir()
        (path / "a").touch()
        temporaries.track(str(path))
    temporaries.forget(str(kept))
    monkeypatch.setattr(temporaries, "making", threading.RLock())
    made = threading.Event()

    def another():
        NewFile(str(tmp_path / "late"))
        made.set()

    temporaries.abandon_all(for_good=True)
    thread = threading.Thread(target=another, daemon=True)
    thread.start()
    assert not made.wait(0.2)  # its file would outlive the process
    assert sorted(tmp_path.iterdir()) == [kept]
    temporaries.making.release()
    thread.join(10)
    assert made.is_set()
    temporaries.abandon_all()
    assert sorted(tmp_path.iterdir()) == [kept]


def test_a_failure_is_told_once_and_without_beams_traceback():
    stream = io.StringIO()
    handler = extract.log_handler(stream)
    beam_log = logging.getLogger("apache_beam.runners.common")
    warning = "Resource module is not available for current platform, memory usage cannot be"
    for error in (OSError("full"), RunError("damage"), KeyError("a fault of ours")):
        try:
            raise error
        except Exception:
            record = beam_log.makeRecord("apache_beam.x", 40, "", 0, "m", (), sys.exc_info())
            handler.handle(record)
    handler.handle(logging.LogRecord("root", 30, "", 0, warning, (), None))
    handler.handle(logging.LogRecord("pipeline", 40, "", 0, "told", (), None))
    assert stream.getvalue().count("ERROR") == 2
    assert "a fault of ours" in stream.getvalue()
    assert "full" not in stream.getvalue()
    assert stream.getvalue().endswith("ERROR pipeline: told\n")


@pytest.mark.parametrize("seconds", [0.1, 0.4, 1.5])
def test_a_signal_while_libraries_are_imported(tmp_path, seconds):
    """No import of ours, half done, makes the answer a traceback."""
    call = [sys.executable, "-m", "pipeline.extract", "--input=x", "--model=y", "--output=z"]
    call.append("--runner=NoSuchRunner")  # Beam is imported to say so
    process = subprocess.Popen(call, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert process.returncode in (143, -15, 2)  # -15 before the first line, 2 after the last
    assert "Traceback" not in told


def answered(command, **streams):
    """A process that has run `command`, Python text, as one of our commands."""
    code = "import os, signal\nfrom pipeline.extract import run_process\n"
    code += f"def command():\n    {command}\n    return 0\nrun_process(command)"
    env = {**os.environ, "PYTHONUNBUFFERED": ""}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, timeout=60, **streams)


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("os.kill(os.getpid(), signal.SIGINT)", 130),
        ("os.kill(os.getpid(), signal.SIGTERM)", 143),
        ("print('told')", 0),
    ],
)
def test_a_process_ends_as_it_should_though_nobody_reads_what_it_says(command, code):
    end, unread = os.pipe()
    os.close(end)
    ended = answered(command, stdout=unread, stderr=unread)
    os.close(unread)
    assert ended.returncode == code


def test_a_signal_ends_a_process_whose_files_cannot_be_removed():
    """As on a disk that is gone: to remove what lies there raises."""
    code = (
        "from storage import temporaries; temporaries.track('/dev/null/x'); "  # no such folder
        "os.kill(os.getpid(), signal.SIGTERM)"
    )
    ended = answered(code, stderr=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stderr) == (143, "interrupted by SIGTERM\n")


def test_a_run_fails_with_its_reason_though_its_files_cannot_be_removed(caplog):
    temporaries.track("/dev/null/x")
    try:
        line = job.failed("/out", OSError("the disk is gone"), 0)
    finally:
        temporaries.forget("/dev/null/x")
    assert line["status"] == "failed"
    assert "the disk is gone" in caplog.text


def test_a_signal_is_told_of_though_stderr_is_held_back():
    """As it is while TensorFlow is imported."""
    held = "os.dup2(os.open(os.devnull, os.O_WRONLY), 2); os.kill(os.getpid(), signal.SIGTERM)"
    ended = answered(held, stderr=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stderr) == (143, "interrupted by SIGTERM\n")


FAR = """Pipeline BeamApp-1 failed in state FAILED: java.lang.RuntimeException: Error received from
SDK harness for instruction 1: Traceback (most recent call last):
  File "apache_beam/runners/common.py", line 1512, in process
    raise RunError("x")
storage.errors.RunError: /in/a: BadChecksum at byte 7; it ends here

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
RuntimeError: storage.errors.RunError: /in/a: BadChecksum [while running 'ReadUnits']
"""


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError(FAR), "/in/a: BadChecksum at byte 7; it ends here"),
        (RuntimeError(FAR.replace("storage.errors.RunError", "ValueError")), "ValueError: /in/a: "),
        (RuntimeError("far"), "RuntimeError: far"),
        (TimeoutError(), "TimeoutError, without a reason"),
    ],
)
def test_the_reason_of_a_worker_elsewhere_is_told(error, told):
    assert job.failure_line(error).startswith(told)


@pytest.mark.parametrize(
    ("error", "goes_on"),
    [
        (OSError("the stream was reset"), True),
        (RuntimeError("failed in state FAILED"), False),  # a job server's
        (RuntimeError("Dataflow pipeline failed. State: FAILED, Error:\nNone"), False),
    ],
)
def test_a_job_that_may_go_on_elsewhere_is_told_of(error, goes_on, tmp_path, monkeypatch, caplog):
    def lost(plan, beam_args):
        assert "the job may go on" in job.left_behind
        raise error

    monkeypatch.setattr(job.portable, "goes_on", lambda beam_args: True)
    monkeypatch.setattr(job, "run_graph", lost)
    (tmp_path / "a.jpg").write_bytes(jpeg())
    model = exports.exported("saved_model", "classification")
    flags = {"input": tmp_path / "a.jpg", "model": model, "output": tmp_path / "out"}
    argv = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    argv += ["--precision", "bfloat16"]
    argv.append("--job_name=elsewhere")  # Beam's flags are looked at where there are any
    assert extract.main(argv) == 1
    assert "--inference_threads is not given" in caplog.text
    assert "CPUs of the workers that have neither AMX" in caplog.text
    assert ("the job may go on" in caplog.text) is goes_on


@pytest.mark.parametrize(
    ("if_exists", "told"),
    [
        ("error", "--if_exists resume goes on from here"),
        ("resume", "--if_exists resume goes on from here"),
        # Of a picture that both runs have, resuming would keep the old row.
        ("overwrite", "run it again with --if_exists overwrite; the old output stands"),
        ("null", "it wrote nothing; run it again"),
    ],
)
def test_an_interrupted_run_says_how_it_is_gone_on_with(if_exists, told, tmp_path):
    """The process that a signal breaks into is the job itself, by its own main."""
    (tmp_path / "a.jpg").write_bytes(jpeg())
    model = exports.exported("saved_model", "classification")
    flags = {"input": tmp_path / "a.jpg", "model": model, "output": tmp_path / "out"}
    flags |= {"sink": "null"} if if_exists == "null" else {"if_exists": if_exists}
    argv = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    code = [
        "import os, signal",
        "from pipeline import extract, job",
        "job.run_graph = lambda *_: os.kill(os.getpid(), signal.SIGTERM)",
        f"extract.run_process(lambda: extract.main({argv!r}))",
    ]
    ended = subprocess.run(
        [sys.executable, "-c", "\n".join(code)], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 143
    assert ended.stderr.splitlines()[-1] == f"interrupted by SIGTERM; {told}"
