"""The Airflow operator that runs `python -m pipeline.extract` and carries its verdict.

Beam's own BeamRunPythonPipelineOperator runs the job too, but it drops the JSON line and retries
whatever the exit code. This one keeps the JSON line as XCom and retries only what may pass.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Mapping
from typing import Any

from airflow.providers.apache.beam.hooks.beam import beam_options_to_args
from airflow.sdk import BaseOperator, Context
from airflow.sdk.exceptions import AirflowException, AirflowFailException

WRONG_REQUEST, TOO_MANY_FAILURES = 2, 3
DATAFLOW_JOB = re.compile(r"Created job with id: \[([^]\s]+)\]")
GRACE = 3  # seconds that a job has to end after SIGTERM; Airflow kills the task itself after 5
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_libc = ctypes.CDLL(None)


class ExtractFeaturesOperator(BaseOperator):
    """Runs the job as a child process and waits for it, on Dataflow too.

    `py_interpreter` is the Python of the job's environment, which is not Airflow's. `runner` and
    `pipeline_options` are as BeamRunPythonPipelineOperator takes them: the flags by name, True for
    one without a value, a list for one that is repeated; without `runner` the job's own default
    counts. `more_options` is a JSON object of further ones, as a template can give it. All four are
    templated.

    XCom `return_value` is the job's JSON line, on exits 0, 1 and 3; `dataflow_job_id` the id of a
    job on Dataflow. Exits 2 (wrong request) and 3 (too many failures) fail without a retry, since
    they would come again; every other one but 0 is retried. A task that is killed takes its child
    along; a job that runs on Dataflow goes on there.
    """

    template_fields = ("runner", "py_interpreter", "pipeline_options", "more_options")
    template_fields_renderers = {"pipeline_options": "json", "more_options": "json"}

    def __init__(
        self,
        *,
        py_interpreter: str,
        pipeline_options: Mapping[str, Any],
        more_options: str = "{}",
        runner: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.py_interpreter = py_interpreter
        self.pipeline_options = dict(pipeline_options)
        self.more_options = more_options
        self.runner = runner
        self._child: subprocess.Popen[str] | None = None

    def execute(self, context: Context) -> dict[str, Any] | None:
        """Run the job; returns its JSON line."""
        flags = {
            **({"runner": self.runner} if self.runner else {}),
            **self.pipeline_options,
            **json.loads(self.more_options),
        }
        command = [self.py_interpreter, "-m", "pipeline.extract", *beam_options_to_args(flags)]
        self.log.info("running %s", shlex.join(command))
        result, last = None, ""
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, "PYTHONSAFEPATH": "1"},  # a folder here called models would be ours
            start_new_session=True,
            preexec_fn=_end_with_parent,
        ) as self._child:
            try:
                assert self._child.stdout
                for line in map(str.rstrip, self._child.stdout):
                    self.log.info("%s", line)
                    if found := _result(line):
                        result = found
                    elif line:
                        last = line
                    if job := DATAFLOW_JOB.search(line):
                        context["ti"].xcom_push(key="dataflow_job_id", value=job[1])
            except BaseException:  # such as the task's execution_timeout
                self.on_kill()
                raise
        code, last = self._child.returncode, last or "it wrote nothing to say why"
        if code == 0:
            return result
        if result:
            context["ti"].xcom_push(key="return_value", value=result)
        if code == WRONG_REQUEST:
            raise AirflowFailException(f"wrong request, exit 2: {last}")
        if code == TOO_MANY_FAILURES:
            raise AirflowFailException(f"too many failures, exit 3: {last}")
        raise AirflowException(f"the job {_ended(code)}: {last}")

    def on_kill(self) -> None:
        """End the child and what it started."""
        if self._child is None or self._child.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGTERM)
            try:
                self._child.wait(GRACE)
            except subprocess.TimeoutExpired:
                os.killpg(self._child.pid, signal.SIGKILL)


def _result(line: str) -> dict[str, Any] | None:
    """The job's JSON line, None for any other."""
    if not line.startswith('{"status"'):
        return None
    try:
        return dict(json.loads(line))
    except ValueError:
        return None


def _ended(code: int) -> str:
    """How a job with exit `code` ended; below 0 it is the signal that killed it."""
    if code >= 0:
        return f"failed, exit {code}"
    names = {known.value: known.name for known in signal.Signals}
    why = ", as for want of memory" if -code == signal.SIGKILL else ""
    return f"was killed by {names.get(-code, f'signal {-code}')}{why}"


def _end_with_parent() -> None:
    """Have the kernel end this process when the task's is killed, even by SIGKILL.

    Else the job would go on beside its own retry.
    """
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
