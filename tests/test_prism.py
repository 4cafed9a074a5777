"""The job on Prism, built by Go: its output and its verdicts."""

from __future__ import annotations

import pytest
from clusters import assert_same_output, need, run_job, write_input

from engines import prism

pytestmark = pytest.mark.engines


@pytest.fixture(scope="module")
def flags():
    """What the job is given to run on Prism."""
    need("go")
    return ["--runner=PrismRunner", f"--prism_location={prism.binary()}"]


def test_the_rows_are_those_of_the_direct_runner(flags, tmp_path):
    inputs = write_input(tmp_path / "in")
    ran = run_job(tmp_path, "prism", inputs, *flags)
    assert_same_output(ran, run_job(tmp_path, "direct", inputs))


def test_too_many_failures_are_exit_3(flags, tmp_path):
    inputs = write_input(tmp_path / "in")
    ran = run_job(tmp_path, "prism", inputs, "--max_failure_rate=0.01", *flags)
    assert (ran.code, ran.line["status"]) == (3, "too_many_failures")


def test_a_failing_run_is_exit_1_with_its_reason(flags, tmp_path):
    inputs = write_input(tmp_path / "in")
    ran = run_job(tmp_path, "prism", inputs, "--on_damage=fail", *flags)
    assert (ran.code, ran.line["status"]) == (1, "failed")
    assert "--on_damage record" in ran.stderr
    assert not (ran.output / "manifest.json").exists()
