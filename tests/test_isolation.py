"""Decoding in processes that may die: the same pixels, and each fault costs one picture."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import crashing
import exports
import numpy as np
import pictures
import pytest
from beams import pipe

from formats import isolation
from formats.example import serialize_example
from formats.image import Preprocessing, decode_image
from formats.isolation import DecodeProcesses, Limits, shared_processes
from formats.records import ImageError, ImageRecord, ImageRef
from formats.tfrecord import write_record
from storage.errors import RunError
from transforms import decode
from transforms.decode import DecodeImages

HOW = Preprocessing(24)
LIMITS = Limits(seconds=60, memory=128 << 20)
BRIEF = Limits(seconds=0.5, memory=128 << 20)
PICTURE = pictures.jpeg(64, 48)
ROOT = Path(__file__).parents[1]


@pytest.fixture
def start():
    """Makes DecodeProcesses that the test need not close."""
    made = []

    def call(limits=LIMITS, decoder=crashing.decode_image, how=HOW):
        made.append(DecodeProcesses(how, limits, decoder))
        return made[-1]

    yield call
    for processes in made:
        processes.close()


def failure(processes, data) -> ImageError:
    with pytest.raises(ImageError) as raised:
        processes.decode(data)
    return raised.value


def group(processes) -> int:
    return processes._server._process.pid


def running(process_group: int) -> list[int]:
    """The processes of a group that still run; one that is dead and not yet reaped does not."""
    return [pid for pid, (state, _, of) in states().items() if of == process_group and state != "Z"]


def states() -> dict[int, tuple[str, int, int]]:
    """State, parent and group of every process, by its id."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, of, *_ = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended in the meantime
            continue
        found[int(path.parent.name)] = state, int(parent), int(of)
    return found


def soon(condition, seconds=60) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


# ---------------------------------------------------------------- what comes back


def test_pixels_and_sizes_are_those_of_the_plain_decoder(start):
    processes = start(decoder=decode_image)
    for name, data in pictures.good().items():
        expected, got = decode_image(data, HOW), processes.decode(data)
        np.testing.assert_array_equal(got[0], expected[0], err_msg=name)
        assert got[0].dtype == np.uint8
        assert got[1:] == expected[1:]


def test_pixels_stay_what_they_are_when_the_next_picture_comes(start):
    processes = start()
    first = processes.decode(PICTURE)[0]
    kept = first.copy()
    other = processes.decode(pictures.jpeg(64, 48, "L"))[0]
    assert len(processes._idle) == 1
    np.testing.assert_array_equal(first, kept)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("how", [Preprocessing(1), Preprocessing(331, "pad", "bilinear")])
def test_every_preprocessing_reaches_the_processes(start, how):
    got = start(decoder=decode_image, how=how).decode(PICTURE)
    np.testing.assert_array_equal(got[0], decode_image(PICTURE, how)[0])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no picture",
        pictures.truncated(PICTURE),
        pictures.declaring("png", 30000, 30000),
        pictures.encode(pictures.photo(), "TIFF"),
    ],
)
def test_errors_are_those_of_the_plain_decoder(start, data):
    with pytest.raises(ImageError) as plain:
        decode_image(data, HOW)
    error = failure(start(decoder=decode_image), data)
    assert (error.error_class, error.message) == (plain.value.error_class, plain.value.message)


def test_a_large_file_goes_through(start):
    data = pictures.encode(np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), "u1"), "BMP")
    np.testing.assert_array_equal(start().decode(data)[0], decode_image(data, HOW)[0])


def test_the_processes_know_no_tensorflow_no_beam_no_credential_and_one_thread(start, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted")
    seen = json.loads(failure(start(decoder=crashing.look_around), b"").message)
    heavy = {"tensorflow", "apache_beam", "grpc", "pyarrow", "google"}
    assert heavy & {name.split(".")[0] for name in seen["modules"]} == set()
    assert seen["threads"] == 1
    assert set(seen["environment"]) <= {
        "OPENBLAS_NUM_THREADS",
        "OMP_NUM_THREADS",
        "LD_LIBRARY_PATH",
        "LC_CTYPE",  # the interpreter's own
    }
    assert seen["files"][:2] == ["/dev/null", "/dev/null"]


def test_the_processes_have_their_share_of_a_busy_core(start):
    seen = json.loads(failure(start(decoder=crashing.look_around), b"").message)
    assert seen["nice"] == os.nice(0)  # a model that has no pause would starve those behind it


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("fault", "error_class", "says"),
    [
        (b"ABORT", "DecoderCrashed", "SIGABRT"),
        (b"SEGFAULT", "DecoderCrashed", "SIGSEGV"),
        (b"EXIT", "DecoderCrashed", "exit status 3"),
        (b"BUG", "DecoderCrashed", "ZeroDivisionError"),
        (b"KILL", "DecoderCrashed", "SIGKILL, twice"),
        (b"SLEEP", "DecodeTimeout", "--decode_seconds 0.5"),
        (b"HANG", "DecodeTimeout", "--decode_seconds 0.5"),
        (b"MEMORY", "DecoderOutOfMemory", "--decode_memory 134217728"),
    ],
)
def test_a_fault_costs_one_picture_and_says_what_it_was(start, fault, error_class, says):
    processes = start(BRIEF if error_class == "DecodeTimeout" else LIMITS)
    expected = decode_image(PICTURE, HOW)[0]
    for _ in range(2):
        np.testing.assert_array_equal(processes.decode(PICTURE)[0], expected)
        error = failure(processes, PICTURE + fault)
        assert error.error_class == error_class
        assert says in error.message
    np.testing.assert_array_equal(processes.decode(PICTURE)[0], expected)
    assert len(running(group(processes))) == 2  # the server and one that decodes


def test_what_a_decoder_says_last_is_in_the_message(start):
    error = failure(start(), PICTURE + b"SPEAK")
    assert error.message.endswith("corrupted double-linked list")


def test_a_decoder_that_gets_little_of_a_core_may_take_longer(start):
    processes = start(Limits(seconds=2.5, memory=128 << 20))
    np.testing.assert_array_equal(
        processes.decode(PICTURE + b"STARVED")[0], decode_image(PICTURE, HOW)[0]
    )
    assert failure(processes, PICTURE + b"BUSY").error_class == "DecodeTimeout"
    processes.decode(PICTURE)


def test_what_a_decoder_says_of_one_picture_is_not_told_of_another(start):
    processes = start()
    processes.decode(PICTURE + b"WARN")
    assert "of another" not in failure(processes, PICTURE + b"ABORT").message


@pytest.mark.parametrize(
    ("kind", "error_class"),
    [
        ("png", "DecoderOutOfMemory"),
        ("jpeg", "DecoderOutOfMemory"),
        ("webp", "CorruptImage"),  # its library does not tell one from the other
    ],
)
def test_a_real_picture_that_takes_too_much_memory_is_one_failure(start, kind, error_class):
    data = pictures.encode(np.zeros((2500, 2500, 3), np.uint8), kind.upper())
    plain = Preprocessing(24, jpeg_scaling="off")
    assert start(decoder=decode_image, how=plain).decode(data)[1:] == (2500, 2500)
    processes = start(Limits(60, 16 << 20), decode_image, plain)
    assert failure(processes, data).error_class == error_class
    assert processes.decode(PICTURE)[1:] == (64, 48)


def test_encoded_bytes_that_do_not_fit_are_told_as_such(start):
    processes = start(Limits(60, 16 << 20))
    assert failure(processes, PICTURE + bytes(64 << 20)).error_class == "DecoderOutOfMemory"
    assert processes.decode(PICTURE)[1:] == (64, 48)


def test_what_a_decoder_leaks_fails_no_picture(start):
    processes = start()
    for _ in range(8):
        assert processes.decode(PICTURE + b"LEAK")[1:] == (64, 48)
    assert failure(processes, PICTURE + b"MEMORY").error_class == "DecoderOutOfMemory"


_FROZEN = """
import crashing, pictures
from formats.image import Preprocessing
from formats.isolation import DecodeProcesses, Limits

processes = DecodeProcesses(Preprocessing(24), Limits(5, 128 << 20), crashing.decode_image)
picture = pictures.jpeg(64, 48)
processes.decode(picture)
print(processes._server._process.pid, flush=True)
print(processes.decode(picture + b"FREEZE")[1:], flush=True)
processes.close()
"""


def python(code, *words, **how):
    """A process of this Python that runs `code`, with the tests and the project to import."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, "-c", code, *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}, **how
    )


def test_a_job_that_was_frozen_loses_no_picture():
    """As by `docker pause`: clocks run on meanwhile."""
    with python(_FROZEN) as job:
        decoders = int(job.stdout.readline())
        time.sleep(0.1)
        job.send_signal(signal.SIGSTOP)
        os.killpg(decoders, signal.SIGSTOP)
        time.sleep(6)
        os.killpg(decoders, signal.SIGCONT)
        job.send_signal(signal.SIGCONT)
        assert job.stdout.read() == "(64, 48)\n"


_FEW_FILES = """
import collections, os, resource, sys
from concurrent.futures import ThreadPoolExecutor
import crashing, pictures
from formats.image import Preprocessing
from formats.isolation import DecodeProcesses, Limits

files = len(os.listdir("/proc/self/fd"))
most = min(files + int(sys.argv[1]), resource.getrlimit(resource.RLIMIT_NOFILE)[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (files + 12, most))
processes = DecodeProcesses(Preprocessing(24), Limits(60, 128 << 20), crashing.decode_image)
server = processes._server
picture = pictures.jpeg(64, 48)

def outcome(_):
    try:
        return str(processes.decode(picture)[1:])
    except Exception as error:
        return type(error).__name__

with ThreadPoolExecutor(8) as threads:
    outcomes = collections.Counter(threads.map(outcome, range(100)))
print(sorted(outcomes), processes._server is server)
processes.close()
"""


@pytest.mark.parametrize(
    ("more", "outcomes"),
    [("400", "['(64, 48)'] True\n"), ("12", "['(64, 48)', 'RunError'] True\n")],
)
def test_files_run_out_for_the_one_that_opens_them_and_nobody_else(more, outcomes):
    """Machines of many cores need more than the usual limit, which is raised as far as may be."""
    with python(_FEW_FILES, more) as job:
        assert job.stdout.read() == outcomes


def test_a_server_that_cannot_be_started_leaves_no_open_file(monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(isolation.subprocess, "Popen", refuse)
    for _ in range(3):
        with pytest.raises(OSError, match="Too many open files"):
            DecodeProcesses(HOW, LIMITS)
    assert len(os.listdir("/proc/self/fd")) == before


def test_after_its_end_nothing_is_started(start):
    processes = start()
    processes.decode(PICTURE)
    taken = processes._take(fresh=False)
    processes._idle.append(taken)
    processes.close()
    with pytest.raises(RunError, match="nothing is decoded any more"):
        processes.decode(PICTURE)
    assert processes._server is None


def test_a_picture_that_is_decoded_while_the_step_ends_leaves_nothing(start):
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    processes = start(decoder=crashing.decode_slowly)
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(processes.decode, PICTURE)
        assert soon(lambda: len(running(group(processes))) == 2)
        processes.close()
        assert answer.exception(60) is not None or answer.result()[1:] == (64, 48)
    del answer  # whose traceback holds the process and its memory
    gc.collect()
    assert processes._idle == []
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_user_may_end_while_another_begins():
    """As the garbage collector ends one, wherever it happens to run."""
    with contextlib.ExitStack() as user:
        user.enter_context(shared_processes(HOW, LIMITS, crashing.decode_image))

        def end_within():
            with isolation._sharing:
                user.close()

        thread = threading.Thread(target=end_within, daemon=True)
        thread.start()
        thread.join(20)
        assert not thread.is_alive()


def test_processes_killed_between_pictures_cost_none(start):
    processes = start()
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(processes.decode, [PICTURE] * 40))
    for process in processes._idle:
        os.kill(process.pid, signal.SIGKILL)
    for _ in range(6):
        assert processes.decode(PICTURE)[1:] == (64, 48)


def test_a_process_killed_during_a_picture_costs_none(start):
    processes = start(decoder=crashing.decode_slowly)
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(processes.decode, PICTURE)
        assert soon(lambda: len(running(group(processes))) == 2)
        (worker,) = set(running(group(processes))) - {group(processes)}
        os.kill(worker, signal.SIGKILL)
        assert answer.result(60)[1:] == (64, 48)


def test_a_process_that_is_stopped_and_goes_on_costs_no_picture(start):
    processes = start()
    processes.decode(PICTURE)
    (process,) = processes._idle
    data = PICTURE + bytes(16 << 20)  # more than the socket holds, so that it stops within it

    def stop_and_go(seconds=2.0):
        end = time.monotonic() + seconds
        while time.monotonic() < end and not answer.done():
            for order in (signal.SIGSTOP, signal.SIGCONT):
                os.kill(process.pid, order)
                time.sleep(0.001)

    with ThreadPoolExecutor(1) as threads:
        for _ in range(5):
            answer = threads.submit(processes.decode, data)
            stop_and_go()
            assert answer.result(60)[1:] == (64, 48)
    assert processes._idle == [process]


def test_a_default_timeout_of_sockets_changes_nothing(start):
    socket.setdefaulttimeout(60)
    try:
        processes = start()
        first = processes._take(fresh=True)
        time.sleep(0.5)  # now both wait for what has not been sent
        assert first.ask(PICTURE)[1:] == (64, 48)
        assert processes.decode(PICTURE)[1:] == (64, 48)
        first.close()
    finally:
        socket.setdefaulttimeout(None)


def test_what_was_started_ahead_is_taken_once_and_ends_where_it_is_not(start):
    isolation.start_ahead(LIMITS, crashing.decode_image)
    ahead = isolation._ahead[LIMITS, crashing.decode_image]._process.pid
    first, second = start(), start()
    assert group(first) == ahead != group(second)
    assert first.decode(PICTURE)[1:] == second.decode(PICTURE)[1:] == (64, 48)
    isolation.start_ahead(BRIEF, crashing.decode_image)
    left = isolation._ahead[BRIEF, crashing.decode_image]._process.pid
    isolation.drop_ahead()
    assert running(left) == []
    assert running(ahead)


def test_a_killed_fork_server_costs_none_and_leaves_none(start):
    processes = start()
    processes.decode(PICTURE)
    first = group(processes)
    os.kill(first, signal.SIGKILL)
    assert failure(processes, PICTURE + b"ABORT").error_class == "DecoderCrashed"
    for _ in range(3):
        assert processes.decode(PICTURE)[1:] == (64, 48)
    assert group(processes) != first
    assert soon(lambda: not running(first))


def test_a_hang_under_a_killed_fork_server_is_ended_too(start):
    processes = start(BRIEF)
    processes.decode(PICTURE)
    first = group(processes)
    os.kill(first, signal.SIGKILL)
    assert failure(processes, PICTURE + b"HANG").error_class == "DecodeTimeout"
    assert soon(lambda: not running(first))
    assert processes.decode(PICTURE)[1:] == (64, 48)


def test_faults_from_many_threads_cost_one_picture_each(start):
    processes = start()
    words = [b"ABORT", b"SEGFAULT", b"EXIT", b"MEMORY"]
    data = [PICTURE + (words[n % 4] if n % 5 == 0 else b"") for n in range(200)]

    def attempt(one):
        try:
            return processes.decode(one)[1:]
        except ImageError as error:
            return error.error_class

    with ThreadPoolExecutor(6) as threads:
        outcomes = list(threads.map(attempt, data))
    classes = ["DecoderCrashed"] * 3 + ["DecoderOutOfMemory"]
    assert outcomes == [classes[n % 4] if n % 5 == 0 else (64, 48) for n in range(200)]
    assert len(processes._idle) <= 6


def test_a_server_that_cannot_start_fails_the_run_and_says_why(start, monkeypatch):
    monkeypatch.setattr(crashing.decode_image, "__module__", "no_such_module")
    with pytest.raises(RunError, match=r"no process for decoding.*No module named 'no_such_mod"):
        start().decode(PICTURE)


# ---------------------------------------------------------------- nothing is left


def test_close_ends_everything_and_leaves_no_open_file(start):
    start().close()
    before = len(os.listdir("/proc/self/fd"))
    processes = start()
    for data in (PICTURE, PICTURE + b"ABORT", PICTURE):
        try:
            processes.decode(data)
        except ImageError:
            pass
    first = group(processes)
    assert len(running(first)) == 2
    processes.close()
    assert running(first) == []
    processes.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_last_user_closes_what_is_shared():
    with shared_processes(HOW, LIMITS) as processes:
        with shared_processes(HOW, LIMITS) as same, shared_processes(HOW, BRIEF) as other:
            assert same is processes
            assert other is not processes
        processes.decode(PICTURE)
        left = group(processes)
        assert running(left)
    assert running(left) == []
    assert isolation._shared == {}


JOB = "import crashing; crashing.run_job()"


def begun(argv: list[str]) -> tuple[subprocess.Popen, int]:
    """A job of its own that hangs in its decoder, and the group of the processes that decode."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    process = subprocess.Popen(
        [sys.executable, "-c", JOB, *argv],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

    def decoding():
        children = [pid for pid, (_, parent, _) in states().items() if parent == process.pid]
        return next((pid for pid in children if len(running(pid)) > 1), None)

    assert soon(lambda: decoding() or process.poll() is not None, 120)
    server = decoding()
    assert server, process.communicate()[1]
    return process, server


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_job_that_is_killed_leaves_no_process(tmp_path, number):
    (tmp_path / "a.jpg").write_bytes(PICTURE + b"HANG")
    model = exports.exported("saved_model", "classification")
    argv = ["--input", str(tmp_path / "a.jpg"), "--model", model, "--decode_seconds", "600"]
    process, server = begun([*argv, "--output", str(tmp_path / "out")])
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    assert soon(lambda: not running(server), 10)


# ---------------------------------------------------------------- the step and the job


WORDS = {
    "ABORT": "DecoderCrashed",
    "SEGFAULT": "DecoderCrashed",
    "HANG": "DecodeTimeout",
    "MEMORY": "DecoderOutOfMemory",
}


def test_the_transform_loses_no_neighbour(monkeypatch):
    monkeypatch.setattr(decode, "decode_image", crashing.decode_image)
    words = ["", "ABORT", "", "HANG", "", "", "SEGFAULT", "MEMORY", ""]
    records = [
        ImageRecord(ImageRef(f"{n}{word}", "/d/a", n), PICTURE + word.encode())
        for n, word in enumerate(words)
    ]
    out = pipe(records, DecodeImages(HOW, BRIEF))
    assert [image.ref.key for image in out.images] == ["0", "2", "4", "5", "8"]
    failures = {f.key.lstrip("0123456789"): (f.stage, f.error_class) for f in out.failures}
    assert failures == {word: ("decode", error) for word, error in WORDS.items()}
    assert isolation._shared == {}


def test_in_a_job_each_fault_is_one_row_and_the_rest_is_whole(tmp_path, job, monkeypatch):
    monkeypatch.setattr(decode, "decode_image", crashing.decode_image)
    words = [word for word in WORDS for _ in range(2)]
    with (tmp_path / "a.tfrecord").open("wb") as stream:
        for n in range(40):
            word = words[n // 5].encode() if n % 5 == 0 else b""
            write_record(stream, serialize_example({"image/encoded": PICTURE + word}))
    flags = {"decode_seconds": 1, "decode_memory": "128MiB", "max_failure_rate": 0.5}
    ran = job(tmp_path / "a.tfrecord", **flags)
    assert ran.code == 0, ran.stderr
    told = " ".join(row["message"] for row in ran.rows("failures").values())
    assert "--decode_seconds 1" in told
    assert f"--decode_memory {128 << 20} bytes" in told
    assert ran.manifest["counts"] == {"images": 40, "features": 32, "failures": 8}
    assert ran.manifest["failures_by"] == {
        "decode/DecodeTimeout": 2,
        "decode/DecoderCrashed": 4,
        "decode/DecoderOutOfMemory": 2,
    }
    assert sorted(row["record_index"] for row in ran.rows("features").values()) == [
        n for n in range(40) if n % 5
    ]
    assert isolation._shared == {}


def test_both_ways_write_the_same_rows(tmp_path, job):
    for name, data in {**pictures.good(), "cut": pictures.truncated(PICTURE)}.items():
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
    ran = {
        way: job(tmp_path / "in", output=tmp_path / way, decode_isolation=way)
        for way in ("process", "none")
    }
    assert ran["process"].code == ran["none"].code == 0
    for kind in ("features", "failures"):
        assert ran["process"].rows(kind) == ran["none"].rows(kind)
