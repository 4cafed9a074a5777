"""The job on a standalone Flink cluster: its output, verdicts, and what a lost machine costs."""

from __future__ import annotations

import os
import signal

import pytest
from clusters import (
    assert_same_output,
    brought_up,
    finish,
    first_file,
    run_job,
    start_job,
    verified,
    write_input,
    write_many,
)

from engines import flink
from engines.processes import wait_for

pytestmark = pytest.mark.engines
MANY = 400


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two TaskManagers, and what their processes printed where a test fails."""
    with brought_up(flink.up, tmp_path_factory.mktemp("flink")) as running:
        yield running


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A folder of photographs that takes seconds to decode."""
    return write_many(tmp_path_factory.mktemp("many") / "photos", MANY)


def interrupt(cluster, many, folder, harm):
    """The job, harmed by `harm` once it has written something; Flink must have had to restart."""
    flags = ("--rows_per_file=10", "--jpeg_scaling=off", *cluster.flags)
    before = {job["jid"] for job in flink.ask(cluster, "/jobs/overview")["jobs"]}
    job = start_job(folder, "out", [many], *flags)
    wait_for("a file of features", lambda: first_file(folder / "out"), 200, [job])
    harm()
    assert job.running()
    ran = finish(job, folder)
    assert ran.code == 0, ran.stderr[-3000:] + "".join(p.tail() for p in cluster.processes)
    (jid,) = {job["jid"] for job in flink.ask(cluster, "/jobs/overview")["jobs"]} - before
    assert flink.ask(cluster, f"/jobs/{jid}/exceptions")["exceptionHistory"]["entries"]
    return ran


def assert_every_image_once(ran, many):
    """Every photograph is in the output exactly once, and no file beside those of the manifest."""
    assert set(ran.rows("features")) == {str(path) for path in many.iterdir()}
    assert ran.line["features"] == MANY
    named = {entry["path"] for entry in ran.manifest["files"]}
    there = {str(path.relative_to(ran.output)) for path in ran.output.rglob("*.parquet")}
    assert there == named
    assert not list(ran.output.rglob(".tmp-*"))
    assert verified(ran.output) == 0


def managers_of_the_last_job(cluster):
    """The TaskManagers on which subtasks of it ran."""
    jobs = flink.ask(cluster, "/jobs/overview")["jobs"]
    job = "/jobs/" + max(jobs, key=lambda job: job["start-time"])["jid"]
    return {
        subtask["taskmanager-id"]
        for vertex in flink.ask(cluster, job)["vertices"]
        for subtask in flink.ask(cluster, f"{job}/vertices/{vertex['id']}")["subtasks"]
    }


def test_the_rows_are_those_of_the_direct_runner(cluster, tmp_path):
    inputs = write_input(tmp_path / "in")
    ran = run_job(tmp_path, "flink", inputs, *cluster.flags)
    assert len(managers_of_the_last_job(cluster)) == 2
    assert_same_output(ran, run_job(tmp_path, "direct", inputs))


def test_too_many_failures_are_exit_3(cluster, tmp_path):
    inputs = write_input(tmp_path / "in")
    ran = run_job(tmp_path, "flink", inputs, "--max_failure_rate=0.01", *cluster.flags)
    assert (ran.code, ran.line["status"]) == (3, "too_many_failures")
    assert not (ran.output / "manifest.json").exists()


def test_a_killed_python_worker_costs_no_image_and_repeats_none(cluster, many, tmp_path):
    def kill():
        os.kill(cluster.workers()[0], signal.SIGKILL)

    assert_every_image_once(interrupt(cluster, many, tmp_path, kill), many)


def test_a_killed_task_manager_costs_no_image_and_repeats_none(cluster, many, tmp_path):
    kill = cluster.process("taskmanager-0").kill  # the last test: nobody starts it again
    assert_every_image_once(interrupt(cluster, many, tmp_path, kill), many)
