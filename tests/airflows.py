"""A real Airflow for the tests, in an environment and a home of its own.

The environment is made once from requirements/airflow.txt, and kept in a folder that is named by
the lock's digest.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements" / "airflow.txt"
STARTED = 300  # seconds in which anything of Airflow has ended, on a loaded machine too


@functools.cache
def environment() -> Path:
    """The folder of an environment that holds Airflow by its lock; some two minutes if it is new.

    One is kept a lock and Python under `.cache/`; those of earlier locks are removed.
    """
    version = "{}.{}".format(*sys.version_info)
    digest = hashlib.sha256(version.encode() + LOCK.read_bytes()).hexdigest()[:16]
    cache = ROOT / ".cache"
    cache.mkdir(exist_ok=True)
    venv = cache / f"airflow-{digest}"
    with (cache / "airflow.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (venv / "whole").exists():
            return venv
        for other in cache.glob("airflow-*"):
            shutil.rmtree(other)
        subprocess.run([sys.executable, "-m", "venv", venv], check=True, timeout=120)
        pip = [venv / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps"]
        pip += ["--disable-pip-version-check", "--require-hashes"]
        subprocess.run([*pip, "--requirement", LOCK], check=True, timeout=1200)
        (venv / "whole").touch()
    return venv


def free_port() -> int:
    """A port of this machine that nothing listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Airflow:
    """An Airflow with its home, a database made, and `dags/` as its DAGs."""

    home: Path
    env: dict[str, str]

    def command(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        """`airflow WORDS`, ended."""
        return self.python(str(environment() / "bin" / "airflow"), *words, **env)

    def python(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Airflow's Python with `words`, ended."""
        return subprocess.run(
            [environment() / "bin" / "python", *words],
            env={**self.env, **env},
            cwd=self.home,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=STARTED,
        )


def make(home: Path, variable: dict[str, Any]) -> Airflow:
    """An Airflow in the empty folder `home`; `variable` is what its DAGs read."""
    port = free_port()
    told = {
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
        "AIRFLOW__CORE__PARALLELISM": "2",
        "AIRFLOW__CORE__DEFAULT_TASK_RETRY_DELAY": "1",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"http://127.0.0.1:{port}/execution/",
        "AIRFLOW__API__HOST": "127.0.0.1",
        "AIRFLOW__API__PORT": str(port),
        "AIRFLOW__API__BASE_URL": f"http://127.0.0.1:{port}",
        "AIRFLOW__API__WORKERS": "1",
        "AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT": str(free_port()),
        "AIRFLOW__LOGGING__TRIGGER_LOG_SERVER_PORT": str(free_port()),
        "AIRFLOW__SCHEDULER__SCHEDULER_HEARTBEAT_SEC": "1",
        "AIRFLOW__SCHEDULER__ENABLE_HEALTH_CHECK": "False",
        "AIRFLOW_VAR_IMAGE_FEATURES": json.dumps(variable),
        "PATH": f"{environment() / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),  # for the job, where its environment holds another checkout
        "AIRFLOW_CONN_GOOGLE_CLOUD_DEFAULT": "google-cloud-platform://",
        "NO_GCE_CHECK": "true",  # that no one waits for Google's metadata server
    }
    inherited = {key: value for key, value in os.environ.items() if key[:7] != "AIRFLOW"}
    airflow = Airflow(home, inherited | told)
    made = airflow.command("db", "migrate")
    assert made.returncode == 0, made.stdout[-2000:]
    return airflow


class Standalone:
    """A running `airflow standalone`, asked and told through its REST API."""

    def __init__(self, airflow: Airflow) -> None:
        self.airflow = airflow
        self.address = airflow.env["AIRFLOW__API__BASE_URL"]
        self._token = ""

    def ask(self, path: str, body: Any = None, method: str | None = None) -> dict[str, Any]:
        """The API's answer to `path` under /api/v2. Raises HTTPError."""
        if not self._token:
            with urllib.request.urlopen(f"{self.address}/auth/token", timeout=30) as answer:
                self._token = json.loads(answer.read())["access_token"]
        request = urllib.request.Request(
            f"{self.address}/api/v2/{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"},
            method=method,
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return dict(json.loads(answer.read()))

    def unpause(self, dag: str) -> None:
        """Let the DAG's runs begin."""
        self.ask(f"dags/{dag}", {"is_paused": False}, "PATCH")

    def trigger(self, dag: str, date: str) -> str:
        """Ask for a run of `dag` at the logical date; returns its id."""
        body = {"logical_date": f"{date}T00:00:00Z", "dag_run_id": f"for-{date}"}
        return str(self.ask(f"dags/{dag}/dagRuns", body)["dag_run_id"])

    def task(self, dag: str, run: str, task: str = "extract") -> dict[str, Any]:
        """The task's instance: state, try_number, ..."""
        return self.ask(f"dags/{dag}/dagRuns/{run}/taskInstances/{task}")

    def clear(self, dag: str, run: str) -> None:
        """Clear all tasks of the run, so that they run again."""
        body = {"dry_run": False, "dag_run_id": run, "only_failed": False, "reset_dag_runs": True}
        self.ask(f"dags/{dag}/clearTaskInstances", body)

    def xcom(self, dag: str, run: str, key: str = "return_value") -> Any:
        """What the task `extract` left under `key`."""
        path = f"dags/{dag}/dagRuns/{run}/taskInstances/extract/xcomEntries/{key}"
        return self.ask(f"{path}?deserialize=true")["value"]

    def log(self, dag: str, run: str, attempt: int) -> str:
        """The log of one try of `extract`."""
        return json.dumps(
            self.ask(f"dags/{dag}/dagRuns/{run}/taskInstances/extract/logs/{attempt}")
        )

    def ended(self, dag: str, run: str, seconds: float = STARTED) -> str:
        """Wait for the run's end; returns its state."""
        return await_(lambda: self._final(dag, run), seconds, f"the end of {dag} {run}")

    def _final(self, dag: str, run: str) -> str | None:
        state = str(self.ask(f"dags/{dag}/dagRuns/{run}")["state"])
        return state if state in ("success", "failed") else None


@contextlib.contextmanager
def standalone(airflow: Airflow) -> Iterator[Standalone]:
    """`airflow standalone`: scheduler, DAG processor, API server, triggerer and LocalExecutor."""
    log = airflow.home / "standalone.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [environment() / "bin" / "airflow", "standalone"],
            env=airflow.env,
            cwd=airflow.home,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Standalone(airflow)

    def ready() -> bool:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            return server.ask("dags")["total_entries"] >= 2
        except (OSError, urllib.error.HTTPError):
            return False

    try:
        await_(ready, STARTED, f"Airflow, whose log is {log}")
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
        # Tasks have sessions of their own; all carry this home in their environment.
        await_(lambda: not [_kill(pid) for pid in _of(airflow)], 30, "the end of Airflow")


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, os.WNOHANG)


def _of(airflow: Airflow) -> list[int]:
    """The processes that `airflow` started and that are still there."""
    mark = f"AIRFLOW_HOME={airflow.home}".encode()
    return [pid for pid, folder in _processes() if mark in _read(folder / "environ").split(b"\0")]


def jobs(output: Path | str) -> list[int]:
    """The processes of the job that write to `output`."""
    mark = f"--output={output}".encode()
    return [pid for pid, folder in _processes() if mark in _read(folder / "cmdline").split(b"\0")]


def parent(pid: int) -> int:
    """The process that started `pid`."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("PPid:")[2].split()[0])


def _processes() -> Iterator[tuple[int, Path]]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            yield int(folder.name), folder


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended
        return b""


def await_(ready: Callable[[], Any], seconds: float, what: str) -> Any:
    """What `ready` gives once it is true; it is asked for at most `seconds`."""
    end = time.monotonic() + seconds
    while not (value := ready()):
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.05)
    return value
