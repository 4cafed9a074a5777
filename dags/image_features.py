"""The features of each day's images: from INPUT/DATE/ to OUTPUT/DATE, where DATE is the day.

A run's data interval is one day (UTC) and it starts when the day is over; both places follow from
its logical date alone. Run again (a retry, a cleared task, a backfill) it adds what has come since
and changes nothing else. All that is not the date is in the Airflow variable `image_features`:

    {"input": "gs://B/photos", "output": "gs://B/features", "model": "gs://B/models/prepared",
     "python": "/opt/image-features/.venv/bin/python",
     "runner": "DataflowRunner",
     "options": {"project": "P", "region": "R", "temp_location": "gs://B/tmp",
                 "sdk_container_image": "R-docker.pkg.dev/P/image-features/worker:0.1.0-cpu"}}

`python` is that of the job's environment. `runner` may be left out for DirectRunner, and `options`
are any further flags of the job or of Beam.
"""

from __future__ import annotations

from datetime import UTC, datetime

from airflow.sdk import DAG, CronDataIntervalTimetable
from extract_operator import ExtractFeaturesOperator

with DAG(
    "image_features",
    schedule=CronDataIntervalTimetable("@daily", timezone="UTC"),
    start_date=datetime(2026, 1, 1, tzinfo=UTC),
    catchup=False,  # earlier days by `airflow backfill create`
    max_active_runs=1,
    # 5, 10 and 20 minutes after a failure: what a job on Dataflow, going on alone, may need.
    default_args={"retries": 3, "retry_exponential_backoff": True},
    doc_md=__doc__,
) as dag:
    ExtractFeaturesOperator(
        task_id="extract",
        max_active_tis_per_dag=1,  # it takes every core; a backfill counts its runs by itself
        py_interpreter="{{ var.json.image_features.python }}",
        runner="{{ var.json.image_features.runner | default('') }}",
        pipeline_options={
            "input": "{{ var.json.image_features.input.rstrip('/') }}/{{ ds }}/",
            "allow_empty": True,
            "model": "{{ var.json.image_features.model }}",
            "output": "{{ var.json.image_features.output.rstrip('/') }}/{{ ds }}",
            "if_exists": "resume",
            # Fixed: Dataflow refuses a second job of this name while the first one runs.
            "job_name": "image-features-{{ ds }}",
        },
        more_options="{{ var.json.image_features.options | default({}) | tojson }}",
    )
