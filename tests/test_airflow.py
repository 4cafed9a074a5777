"""The DAGs in a real Airflow, and what its operators send held against our command line.

Airflow is in an environment of its own and runs the job with this one's Python.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import airflows
import exports
import pyarrow.parquet as pq
import pytest
import servers
from airflows import Airflow, Standalone, await_
from pictures import jpeg, truncated

from pipeline import extract, verify
from pipeline.options import parse
from storage import files

OURS, BEAMS = "image_features", "image_features_by_beam_operator"
MANY = 2000  # pictures of the run that is killed


def write_day(folder: Path, count: int, seed: int = 0) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number}.jpg").write_bytes(jpeg(24 + number % 50, 24 + seed))


def rows(output: Path) -> dict[str, tuple[str, tuple[float, ...]]]:
    """Key to digest and embedding of all that the manifest names; the output is whole."""
    assert verify.main([str(output)]) == 0
    manifest = json.loads((output / "manifest.json").read_text())
    found = [
        (row["key"], (row["sha256"], tuple(row["embedding"])))
        for entry in manifest["files"]
        if entry["path"].startswith("features/")
        for row in pq.read_table(output / entry["path"]).to_pylist()
    ]
    assert len(dict(found)) == len(found)
    return dict(found)


@dataclass(frozen=True)
class Place:
    """What the DAGs' variable names: a folder of days, and where their outputs go."""

    input: Path
    output: Path
    model: str

    def variable(self, **more: Any) -> dict[str, Any]:
        return {
            "input": str(self.input),
            "output": str(self.output),
            "model": self.model,
            "python": sys.executable,
            **more,
        }

    def direct(self, day: str, output: Path) -> dict[str, tuple[str, tuple[float, ...]]]:
        """The rows of a run of the job itself on `day`."""
        words = ["--input", str(self.input / day), "--model", self.model, "--output", str(output)]
        assert extract.main(words) == 0
        return rows(output)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    folder = tmp_path_factory.mktemp("airflow")
    model = shutil.copytree(exports.exported("saved_model", "classification"), folder / "model")
    place = Place(folder / "in", folder / "out", str(model))
    write_day(place.input / "2026-11-01", 6)
    write_day(place.input / "2026-11-02", 5, seed=1)
    return place


@pytest.fixture(scope="module")
def airflow(place, tmp_path_factory) -> Airflow:
    variable = place.variable(options={"rows_per_file": 20, "batch_size": 8})
    variable |= {"input": f"{place.input}/", "output": f"{place.output}/"}  # as people write them
    return airflows.make(tmp_path_factory.mktemp("home"), variable)


# --- what the operators send --------------------------------------------------------------------


def test_what_beams_operator_adds_is_taken():
    """Its form of flags: one word each with `=`, its label, a name of the job, repeated lists."""
    options, beam = parse(
        [
            "--runner=DirectRunner",
            "--input=in/a",
            "--input=in/b",
            "--model=m",
            "--output=out",
            "--outputs=embedding",
            "--outputs=logits",
            "--columns=a,b",
            "--columns=c",
            "--value_range=-1,1",
            "--allow_empty",
            "--labels=airflow-version=v3-3-2",
            "--job_name=extract-1a2b3c4d",
            "--project=p",
            "--region=r",
            "--service_account_email=a@b",
            "--impersonate_service_account=a@b",
            "--no_use_public_ips",
        ]
    )
    assert options.input == ("in/a", "in/b")
    assert options.outputs == ("embedding", "logits")
    assert options.columns == ("a", "b", "c")
    assert options.value_range == (-1, 1)
    assert options.allow_empty
    assert "--labels=airflow-version=v3-3-2" in beam


def test_the_job_runs_by_its_path_too(tmp_path):
    """Where its own folder comes first, `models` would be pipeline/models.py."""
    path = airflows.ROOT / "pipeline" / "extract.py"
    words = ["--input", "nothing/here", "--model", "no/model", "--output", str(tmp_path / "out")]
    told = subprocess.run(
        [sys.executable, path, *words],
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr.startswith("error: ")
    assert "no/model" in told.stderr


def test_airflow_and_the_job_agree_on_beam():
    def beam(lock: str) -> list[str]:
        text = (airflows.ROOT / "requirements" / lock).read_text()
        return re.findall(r"^apache-beam(?:\[.*\])?==(\S+)", text, re.M)

    assert beam("airflow.txt") == beam("runtime.txt") != []


# --- `airflow dags test` ------------------------------------------------------------------------


@pytest.mark.engines
def test_three_dated_runs_one_of_them_empty(airflow, place, tmp_path):
    for day in ("2026-11-01", "2026-11-02", "2026-11-03"):
        told = airflow.command("dags", "test", OURS, day)
        assert told.returncode == 0, told.stdout[-3000:]
        assert "state=success" in told.stdout
        # On a store an empty name between two slashes is another place.
        assert f"--input={place.input}/{day}/ " in told.stdout
        assert f"--output={place.output}/{day} " in told.stdout
    for day, count in (("2026-11-01", 6), ("2026-11-02", 5)):
        found = rows(place.output / day)
        assert len(found) == count
        assert found == place.direct(day, tmp_path / day)
    assert rows(place.output / "2026-11-03") == {}
    manifest = (place.output / "2026-11-01" / "manifest.json").read_bytes()
    written = {path: path.stat().st_mtime_ns for path in place.output.rglob("*.parquet")}
    again = airflow.command("dags", "test", OURS, "2026-11-01")
    assert "state=success" in again.stdout
    assert '"skipped": 6' in again.stdout
    listed = [json.loads(text)["files"] for text in (manifest, _manifest(place, "2026-11-01"))]
    assert listed[0] == listed[1]
    assert {p: p.stat().st_mtime_ns for p in place.output.rglob("*.parquet")} == written
    assert sorted(p.name for p in place.output.iterdir()) == [
        "2026-11-01",
        "2026-11-02",
        "2026-11-03",
    ]


def _manifest(place: Place, day: str) -> bytes:
    return (place.output / day / "manifest.json").read_bytes()


@pytest.mark.engines
def test_a_wrong_request_fails_at_once(airflow, place):
    wrong = json.dumps(place.variable(options={"no_such_flag": 1}))
    told = airflow.command("dags", "test", OURS, "2026-11-04", AIRFLOW_VAR_IMAGE_FEATURES=wrong)
    assert "state=failed" in told.stdout
    assert "wrong request, exit 2: error: --no_such_flag" in told.stdout
    assert told.stdout.count("[DAG TEST] running task") == 1
    assert not (place.output / "2026-11-04").exists()


@pytest.mark.engines
def test_a_backfill_can_take_on_what_has_run_as_the_readme_says(airflow):
    text = " ".join((airflows.ROOT / "README.md").read_text().split())
    (told,) = re.findall(r"`--reprocess-behavior (\w+)` takes those on again, `(\w+)`", text)
    help = airflow.command("backfill", "create", "--help").stdout
    (choices,) = re.findall(r"\[--reprocess-behavior {([\w,]+)}\]", help)
    assert set(told) < set(choices.split(","))


# --- an operator by itself, in Airflow's Python ---------------------------------------------------

EXECUTE = """
import json, signal, sys
from airflow.providers.apache.beam.operators.beam import BeamRunPythonPipelineOperator
from airflow.sdk.exceptions import AirflowException, TaskDeferred
from extract_operator import ExtractFeaturesOperator

class Instance:
    pushed = {}
    def xcom_push(self, key, value):
        self.pushed[key] = value

python, flags = json.loads(sys.argv[1])
context = {"ti": Instance(), "task_instance": Instance()}
common = {"task_id": "extract", "py_interpreter": python}
"""
BY_PATH = (
    EXECUTE
    + """
BeamRunPythonPipelineOperator(
    py_file=flags.pop("py_file"), pipeline_options=flags, deferrable=False, **common
).execute(context)
"""
)
KILLED = (
    EXECUTE
    + """
def after(seconds, act):
    task = ExtractFeaturesOperator(pipeline_options=flags, **common)
    signal.signal(signal.SIGALRM, lambda *_: act(task))
    signal.alarm(seconds)
    try:
        task.execute(context)
    except (AirflowException, TimeoutError) as error:
        return type(error).__name__, str(error), task._child.poll()

def run_out(task):
    raise TimeoutError("execution_timeout")

print(json.dumps([after(2, ExtractFeaturesOperator.on_kill), after(2, run_out)]))
"""
)
ENDED = (
    EXECUTE
    + """
try:
    ExtractFeaturesOperator(pipeline_options=flags, **common).execute(context)
except AirflowException as error:
    print(json.dumps(str(error)))
"""
)
DAGS_TOO = f"{airflows.ROOT}:{airflows.ROOT / 'dags'}"


@pytest.mark.engines
def test_beams_operator_runs_the_job_by_its_path(airflow, place, tmp_path):
    flags = {
        "py_file": str(airflows.ROOT / "pipeline" / "extract.py"),
        "input": [str(place.input / "2026-11-01" / "0.jpg"), str(place.input / "2026-11-02")],
        "model": place.model,
        "output": str(tmp_path / "out"),
        "outputs": ["embedding", "logits"],
    }
    what = json.dumps([sys.executable, flags])
    told = airflow.python("-c", BY_PATH, what, PYTHONPATH=str(airflows.ROOT / "dags"))
    assert told.returncode == 0, told.stdout[-3000:]
    assert "--labels=airflow-version=v" in told.stdout
    assert len(rows(tmp_path / "out")) == 6


@pytest.mark.engines
def test_a_task_that_is_ended_ends_its_job(airflow, place, tmp_path):
    flags = {"input": str(place.input), "model": place.model, "output": str(tmp_path / "out")}
    what = json.dumps([sys.executable, flags])
    told = airflow.python("-c", KILLED, what, PYTHONPATH=DAGS_TOO)
    assert told.returncode == 0, told.stdout[-3000:]
    killed, timed_out = json.loads(told.stdout.splitlines()[-1])
    ended = (143, -signal.SIGTERM)
    assert killed[0] == "AirflowException"
    assert killed[2] in ended
    assert timed_out[:2] == ["TimeoutError", "execution_timeout"]
    assert timed_out[2] in ended
    assert airflows.jobs(tmp_path / "out") == []
    assert not (tmp_path / "out").exists()


@pytest.mark.engines
@pytest.mark.parametrize(
    ("script", "told"),
    [
        (
            "kill -KILL $$",
            "the job was killed by SIGKILL, as for want of memory: it wrote nothing to say why",
        ),
        ("echo loading; kill -SEGV $$", "the job was killed by SIGSEGV: loading"),
        ("kill -40 $$", "the job was killed by signal 40: it wrote nothing to say why"),
        ("exit 1", "the job failed, exit 1: it wrote nothing to say why"),
    ],
)
def test_a_job_that_ends_without_a_word_is_told_of(airflow, tmp_path, script, told):
    job = tmp_path / "python"
    job.write_text(f"#!/bin/bash\n{script}\n")
    job.chmod(0o755)
    said = airflow.python("-c", ENDED, json.dumps([str(job), {}]), PYTHONPATH=DAGS_TOO)
    assert json.loads(said.stdout.splitlines()[-1]) == told


# --- Dataflow, as far as it goes without the service ---------------------------------------------

SUBMIT = (
    EXECUTE
    + """
service = {"project_id": "p", "location": "europe-west1", "job_name": "beams"}
beams = BeamRunPythonPipelineOperator(
    py_file="pipeline.extract", py_options=["-m"], pipeline_options=dict(flags),
    runner="DataflowRunner", dataflow_config=service, deferrable=True, **common,
)
try:
    beams.execute(context)
except TaskDeferred as deferred:
    trigger = deferred.trigger.serialize()[1]
by_beams, Instance.pushed = Instance.pushed["dataflow_job_id"], {}
ours = {"project": "p", "region": "europe-west1", "job_name": "ours", **flags}
try:
    ExtractFeaturesOperator(
        pipeline_options=ours, runner="DataflowRunner", **common
    ).execute(context)
except AirflowException as error:
    said = str(error)
print(json.dumps([by_beams, trigger["job_id"], Instance.pushed["dataflow_job_id"], said]))
"""
)


@pytest.mark.engines
def test_the_job_id_reaches_both_operators(airflow, place, tmp_path):
    """Beam's operator defers with it. The job is one that Beam made, and nothing ran it."""
    credentials = tmp_path / "credentials.json"  # Beam looks for some though it is told not to
    names = ("token", "refresh_token", "client_id", "client_secret")
    given = {"type": "authorized_user", "expiry": "2099-01-01T00:00:00Z"}
    credentials.write_text(json.dumps(given | dict.fromkeys(names, "x")))
    with servers.gs_store() as store, servers.dataflow_front() as (address, asked):
        files.configure_stores(store.argv)
        for path in Path(place.model).rglob("*"):
            if path.is_file():
                name = path.relative_to(place.model)
                files.write_bytes(f"{store.uri}/model/{name}", path.read_bytes())
        files.write_bytes(f"{store.uri}/in/a.jpg", jpeg(30, 30))
        flags = {
            "input": f"{store.uri}/in/",
            "model": f"{store.uri}/model",
            "output": f"{store.uri}/out",
            "temp_location": f"{store.uri}/tmp",
            "dataflow_endpoint": address,
            "sdk_container_image": "europe-docker.pkg.dev/p/features/worker:0.1.0",
            **store.flags,
        }
        env = {
            "GOOGLE_APPLICATION_CREDENTIALS": str(credentials),
            "STORAGE_EMULATOR_HOST": os.environ["STORAGE_EMULATOR_HOST"],
        }
        told = airflow.python(
            "-c", SUBMIT, json.dumps([sys.executable, flags]), PYTHONPATH=DAGS_TOO, **env
        )
        by_dag = _submitted_by_the_dag(airflow, place, store.uri, flags, env)
    assert told.returncode == 0, told.stdout[-3000:]
    *ids, said = json.loads(told.stdout.splitlines()[-1])
    assert ids == [servers.JOB] * 3
    assert "exit 1: ERROR pipeline: run" in said
    assert [name.split("-")[0] for name in asked[:2]] == ["beams", "ours"]
    assert "state=success" in by_dag, by_dag[-3000:]
    assert '"status": "submitted"' in by_dag
    assert asked[2:] == ["image-features-2026-11-01"]
    assert "sdk_pipeline_options" not in told.stdout  # all options, those of s3:// with its secret


def _submitted_by_the_dag(airflow, place, uri, flags, env) -> str:
    """What the DAG tells whose variable names Dataflow; it does not wait for a job nobody runs."""
    files.write_bytes(f"{uri}/days/2026-11-01/a.jpg", jpeg(30, 30))
    options = {name: v for name, v in flags.items() if name not in ("input", "model", "output")}
    service = {"project": "p", "region": "europe-west1", "no_wait_until_finish": True}
    variable = place.variable(
        input=f"{uri}/days",
        model=flags["model"],
        output=f"{uri}/by-day",
        runner="DataflowRunner",
        options={**options, **service},
    )
    told = json.dumps(variable)
    return airflow.command(
        "dags", "test", OURS, "2026-11-01", AIRFLOW_VAR_IMAGE_FEATURES=told, **env
    ).stdout


# --- a standalone Airflow -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(airflow, place) -> Iterator[Standalone]:
    write_day(place.input / "2026-11-10", MANY)
    write_day(place.input / "2026-11-11", 4)
    (place.input / "2026-11-12").mkdir()
    (place.input / "2026-11-12" / "a.jpg").write_bytes(jpeg(40, 30))
    (place.input / "2026-11-12" / "b.jpg").write_bytes(truncated(jpeg(40, 30)))
    with airflows.standalone(airflow) as server:
        server.unpause(OURS)
        server.unpause(BEAMS)
        yield server


@pytest.mark.engines
def test_the_schedule_runs_the_day_that_is_over(server, place):
    (run,) = await_(
        lambda: server.ask(f"dags/{OURS}/dagRuns?run_type=scheduled")["dag_runs"],
        60,
        "a scheduled run",
    )
    assert server.ended(OURS, run["dag_run_id"]) == "success"
    day = run["logical_date"][:10]
    after = datetime.datetime.fromisoformat(run["run_after"])
    assert after - datetime.datetime.fromisoformat(run["logical_date"]) == datetime.timedelta(1)
    line = server.xcom(OURS, run["dag_run_id"])
    assert (line["status"], line["output"]) == ("complete", str(place.output / day))


@pytest.mark.engines
def test_killed_runs_are_retried_and_leave_every_image_once(server, place, tmp_path):
    """First the job is killed at work, then the task's own process, which takes the job along."""
    output = place.output / "2026-11-10"
    run = server.trigger(OURS, "2026-11-10")

    def at_work() -> int | None:
        found = airflows.jobs(output)
        return found[0] if found and list(output.glob("features/part-*")) else None

    first = await_(at_work, 120, "the first files of the job")
    os.kill(first, signal.SIGKILL)
    written = set(output.glob("features/part-*"))
    assert not (output / "manifest.json").exists()

    def at_work_again() -> int | None:
        job = at_work()
        return job if job != first and set(output.glob("features/part-*")) - written else None

    second = await_(at_work_again, 120, "files of the second try")
    os.kill(airflows.parent(second), signal.SIGKILL)
    await_(lambda: not Path(f"/proc/{second}").exists(), 20, "the end of the job with its task")
    assert not (output / "manifest.json").exists()

    assert server.ended(OURS, run) == "success"
    assert server.task(OURS, run)["try_number"] == 3
    line = server.xcom(OURS, run)
    assert line["images"] == MANY
    assert line["skipped"] > 0
    assert rows(output) == place.direct("2026-11-10", tmp_path / "direct")


@pytest.mark.engines
def test_a_cleared_run_adds_what_came_late_and_nothing_else(server, place, tmp_path):
    run = server.trigger(OURS, "2026-11-11")
    assert server.ended(OURS, run) == "success"
    before = rows(place.output / "2026-11-11")
    server.clear(OURS, run)
    assert server.ended(OURS, run) == "success"
    assert server.xcom(OURS, run)["skipped"] == 4
    assert rows(place.output / "2026-11-11") == before
    (place.input / "2026-11-11" / "late.jpg").write_bytes(jpeg(50, 50))
    server.clear(OURS, run)
    assert server.ended(OURS, run) == "success"
    line = server.xcom(OURS, run)
    assert (line["features"], line["skipped"]) == (1, 4)
    after = rows(place.output / "2026-11-11")
    assert before.items() < after.items()
    assert after == place.direct("2026-11-11", tmp_path / "direct")


@pytest.mark.engines
def test_too_many_failures_are_not_retried_and_tell_their_counts(server, place):
    run = server.trigger(OURS, "2026-11-12")
    assert server.ended(OURS, run) == "failed"
    assert server.task(OURS, run)["try_number"] == 1
    line = server.xcom(OURS, run)
    assert (line["status"], line["images"], line["failures"]) == ("too_many_failures", 2, 1)
    log = server.log(OURS, run, 1)
    assert "too many failures, exit 3: " in log
    assert "1 of 2 images failed (1 decode/CorruptImage)" in log.partition("exit 3: ")[2]


@pytest.mark.engines
def test_beams_operator_runs_the_job_deferred(server, place, tmp_path):
    day = "2026-11-02"
    shutil.rmtree(place.output / day, ignore_errors=True)
    run = server.trigger(BEAMS, day)
    await_(lambda: server.task(BEAMS, run)["state"] == "deferred", 120, "a deferred task")
    assert server.ended(BEAMS, run) == "success"
    options = json.loads(_manifest(place, day))["options"]
    assert (options["rows_per_file"], options["batch_size"]) == (20, 8)  # the variable's
    assert rows(place.output / day) == place.direct(day, tmp_path / day)
