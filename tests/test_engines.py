"""The engines' ground: pinned files, processes that are waited for and ended, free ports."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import socket
import sys
from pathlib import Path

import pytest

from engines import flink, jars, prism, processes
from engines.cluster import Cluster
from engines.processes import EngineError

HERE = Path(jars.__file__).parent
SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, subprocess, sys, time\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "print(child.pid, flush=True); time.sleep(600)",
]


@pytest.mark.parametrize("engine", jars.ENGINES)
def test_every_jar_of_an_engine_is_pinned_once(engine):
    lines = (HERE / f"{engine}.sha256").read_text().splitlines()
    pins = jars.read_pins(HERE / f"{engine}.sha256")
    assert len(pins) == len(lines) > 50
    assert all(len(digest) == 64 and name.endswith(".jar") for name, digest in pins.items())


def test_a_file_that_is_not_what_was_pinned_is_named(tmp_path):
    for name in ("same", "changed", "more"):
        (tmp_path / name).write_bytes(name.encode())
    pins = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("same", "changed", "gone")}
    assert jars.differences(tmp_path, jars.digests(tmp_path)) == []
    (tmp_path / "changed").write_bytes(b"changeD")
    missing, unpinned, changed = jars.differences(tmp_path, pins)
    assert missing == "gone is missing"
    assert unpinned == "more is not pinned"
    assert changed.startswith("changed has sha256 ")


def test_a_process_that_ends_early_is_told_with_its_log(tmp_path):
    process = processes.start("early", [sys.executable, "-c", "print('no port')"], tmp_path)
    with pytest.raises(EngineError, match=r"(?s)early has ended.*no port"):
        processes.wait_for("a port", lambda: False, 60, [process])


def test_waiting_is_bounded(tmp_path):
    process = processes.start("slow", SLEEP, tmp_path)
    try:
        with pytest.raises(EngineError, match="not within 1 s"):
            processes.wait_for("a port", lambda: False, 1, [process])
    finally:
        process.stop()
    assert not process.running()


def test_what_ignores_sigterm_is_killed_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "_GRACE", 1)
    process = processes.start("stubborn", STUBBORN, tmp_path)
    processes.wait_for("its child", lambda: process.log.read_text().strip(), 60, [process])
    child = processes.Process("child", int(process.log.read_text()), tmp_path / "child.log")
    assert child.running()
    process.stop()
    assert not process.running()
    processes.wait_for("the child's end", lambda: not child.running(), 30)


def test_a_cluster_is_brought_down_by_another_process_than_brought_it_up(tmp_path):
    cluster = Cluster.new(tmp_path, 2, ("job", "pool"))
    cluster.begin("one", SLEEP)
    cluster.begin("two", SLEEP)
    Cluster.load(tmp_path).down()
    assert not any(process.running() for process in cluster.processes)
    assert not (tmp_path / "tmp").exists()
    with pytest.raises(EngineError, match="no cluster"):  # it is forgotten
        Cluster.load(tmp_path)
    with pytest.raises(EngineError, match="no cluster"):
        Cluster.load(tmp_path / "elsewhere")


def test_what_a_cluster_that_died_left_behind_is_removed(tmp_path):
    cluster = Cluster.new(tmp_path, 2, ("job",))
    (cluster.folder / "tmp" / "home").mkdir()
    assert not list((Cluster.new(tmp_path, 2, ("job",)).folder / "tmp").iterdir())


def test_a_folder_of_another_kind_keeps_its_tmp(tmp_path):
    mine = tmp_path / "tmp" / "mine.txt"
    mine.parent.mkdir()
    mine.touch()
    with pytest.raises(EngineError, match="of no cluster"):
        Cluster.new(tmp_path, 2, ("job",))
    assert mine.exists()


def test_a_process_that_ends_while_it_is_looked_at(tmp_path, monkeypatch):
    process = processes.start("brief", SLEEP, tmp_path)
    process.kill()
    named = processes.Process("brief", process.pid, process.log)
    first = iter([["S", *"0" * 30]])
    monkeypatch.setattr(processes, "_stat", lambda pid: next(first, []))
    named.stop()
    assert not named.running()


def test_a_number_that_another_process_has_been_given_is_left_alone(tmp_path):
    """As after the machine's restart: cluster.json tells of processes that ended long ago."""
    cluster = Cluster.new(tmp_path, 2, ("job",))
    cluster.begin("stranger", SLEEP)
    (stranger,) = cluster.processes
    state = json.loads((tmp_path / "cluster.json").read_text())
    state["processes"][0][3] -= 1
    (tmp_path / "cluster.json").write_text(json.dumps(state))
    try:
        (named,) = Cluster.load(tmp_path).processes
        assert not named.running()
        assert named.group() == []
        named.kill()
        Cluster.load(tmp_path).down()
        assert stranger.running()
    finally:
        stranger.stop()


def test_a_second_cluster_in_a_folder_is_refused_while_the_first_runs(tmp_path):
    cluster = Cluster.new(tmp_path, 2, ("job",))
    cluster.begin("first", SLEEP)
    with pytest.raises(EngineError, match=r"a cluster runs here \(first\); bring it down first"):
        Cluster.new(tmp_path, 2, ("job",))
    assert cluster.processes[0].running()
    cluster.down()
    assert Cluster.new(tmp_path, 2, ("job",)).processes == []


def test_more_subtasks_than_slots_are_refused_before_anything_starts(tmp_path):
    with pytest.raises(EngineError, match="--parallelism 5: 2 TaskManagers of 2 slots have only 4"):
        flink.up(tmp_path / "flink", parallelism=5)
    assert not (tmp_path / "flink").exists()


@pytest.mark.parametrize(
    ("command", "told"),
    [(["sleep", "60"], "not done within 0.3 s"), (["no-such-program"], "not on PATH")],
)
def test_what_does_not_end_or_is_not_there_is_told_in_one_line(command, told):
    with pytest.raises(EngineError, match=told):
        processes.finished(command, 0.3)


@pytest.mark.parametrize(("module", "argv"), [(jars, ["jars", "flink"]), (prism, ["prism"])])
def test_a_fetch_that_fails_is_one_line_and_exit_1(module, argv, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", argv)
    assert module.main() == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"error: (mvn|go): not on PATH; install it\n", err)


def test_ports_are_free_and_different():
    ports = processes.free_ports(5)
    assert len(set(ports)) == 5
    assert not any(map(processes.listening, ports))
    with socket.create_server(("127.0.0.1", ports[0])):
        assert processes.listening(ports[0])


def test_a_killed_process_is_seen_as_ended(tmp_path):
    process = processes.start("one", SLEEP, tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    processes.wait_for("its end", lambda: not process.running(), 30)
