"""The same job by the operator of Airflow's Beam provider, deferred to the triggerer.

For those who have that operator everywhere: it needs no code of ours, but it gives no JSON line,
and retries whatever the exit code. On Dataflow it waits for the job's state, which is DONE also for
a run with too many failures; `verify` after it tells, unless the day was published before: then it
holds what that run published. The variable is as in image_features.py; for Dataflow give the
operator `dataflow_config` and a temp_location besides, and `retries=0`: a retry would start a
second job beside one that still runs. A task that is killed while deferred leaves its job running.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from airflow.providers.apache.beam.operators.beam import BeamRunPythonPipelineOperator
from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG, Context


class RunPythonPipeline(BeamRunPythonPipelineOperator):
    """Beam's operator, its interpreter templated too, and a JSON object of further flags."""

    template_fields = (
        *BeamRunPythonPipelineOperator.template_fields,
        "py_interpreter",
        "more_options",
    )

    def __init__(self, *, more_options: str = "{}", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.more_options = more_options

    def execute(self, context: Context) -> Any:
        """Run the job, with the further flags among its own."""
        self.pipeline_options = {**self.pipeline_options, **json.loads(self.more_options)}
        return super().execute(context)


with DAG(
    "image_features_by_beam_operator",
    schedule=None,  # one of the two DAGs is enough: trigger it with a logical date
    start_date=datetime(2026, 1, 1, tzinfo=UTC),
    max_active_runs=1,
    default_args={"retries": 3},
    doc_md=__doc__,
) as dag:
    output = "{{ var.json.image_features.output.rstrip('/') }}/{{ ds }}"
    extract = RunPythonPipeline(
        task_id="extract",
        max_active_tis_per_dag=1,
        py_file="pipeline.extract",
        py_options=["-m"],
        py_interpreter="{{ var.json.image_features.python }}",
        runner="{{ var.json.image_features.runner | default('DirectRunner') }}",
        pipeline_options={
            "input": "{{ var.json.image_features.input.rstrip('/') }}/{{ ds }}/",
            "allow_empty": True,
            "model": "{{ var.json.image_features.model }}",
            "output": output,
            "if_exists": "resume",
        },
        more_options="{{ var.json.image_features.options | default({}) | tojson }}",
        deferrable=True,
    )
    verify = BashOperator(
        task_id="verify",
        bash_command='"$PYTHON" -m pipeline.verify "$OUTPUT"',
        env={"PYTHON": "{{ var.json.image_features.python }}", "OUTPUT": output},
        append_env=True,
    )
    extract >> verify
