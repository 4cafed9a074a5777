"""The job on a standalone Spark cluster: its output and its verdicts."""

from __future__ import annotations

import pytest
from clusters import assert_same_output, brought_up, run_job, write_input

from engines import spark

pytestmark = pytest.mark.engines


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A master and two workers, ended with the module's last test."""
    with brought_up(spark.up, tmp_path_factory.mktemp("spark")) as running:
        yield running


def test_the_rows_are_those_of_the_direct_runner(cluster, tmp_path):
    inputs = write_input(tmp_path / "in")
    ran = run_job(tmp_path, "spark", inputs, *cluster.flags)
    assert_same_output(ran, run_job(tmp_path, "direct", inputs))


def test_too_many_failures_are_exit_3(cluster, tmp_path):
    inputs = write_input(tmp_path / "in")
    ran = run_job(tmp_path, "spark", inputs, "--max_failure_rate=0.01", *cluster.flags)
    assert (ran.code, ran.line["status"]) == (3, "too_many_failures")
    assert not (ran.output / "manifest.json").exists()
