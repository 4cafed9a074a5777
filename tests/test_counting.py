"""--sink null and --stop_after: the job without its output, through the true `main([...])`."""

import pytest
from pictures import jpeg, truncated

from formats import table
from pipeline.options import Options
from storage.errors import RequestError

GOOD, BAD = 5, 2


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(GOOD):
        (folder / f"{number}.jpg").write_bytes(jpeg(40 + number, 30))
    for number in range(BAD):
        (folder / f"bad-{number}.jpg").write_bytes(truncated(jpeg(50 + number, 30)))
    (folder / "large.jpg").write_bytes(jpeg(400, 300) + bytes(1 << 20))
    return folder


FLAGS = {"max_failure_rate": 1, "max_image_bytes": 1 << 20}
READ_FAILURE = {"read/TooManyBytes": 1}


def test_null_makes_the_rows_counts_them_and_writes_nothing(job, pictures, tmp_path, monkeypatch):
    made = []
    true = table.features_table
    monkeypatch.setattr(
        table, "features_table", lambda rows, *spec: made.extend(rows) or true(rows, *spec)
    )
    ran = job(pictures, sink="null", **FLAGS)
    seconds, rate = ran.line.pop("seconds"), ran.line.pop("images_per_second")
    (decode_failures,) = (n for name, n in ran.line["failures_by"].items() if "decode/" in name)
    assert ran.code == 0
    assert ran.line == {
        "status": "counted",
        "output": None,
        "manifest": None,
        "images": GOOD + BAD + 1,
        "features": GOOD,
        "failures": BAD + 1,
        "skipped": 0,
        "failures_by": {**ran.line["failures_by"], **READ_FAILURE},
    }
    assert decode_failures == BAD
    assert seconds > 0
    assert rate == pytest.approx((GOOD + BAD + 1) / seconds, rel=0.01)
    assert len(made) == GOOD
    assert not ran.output.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures"]


@pytest.mark.parametrize(
    ("last", "passed", "failures"), [("read", GOOD + BAD, 1), ("decode", GOOD, BAD + 1)]
)
def test_a_run_that_ends_early_counts_what_came_so_far(job, pictures, last, passed, failures):
    ran = job(pictures, sink="null", stop_after=last, **FLAGS)
    assert ran.code == 0
    assert (ran.line["passed"], ran.line["failures"]) == (passed, failures)
    assert (ran.line["images"], ran.line["features"]) == (GOOD + BAD + 1, 0)
    assert sum(ran.line["failures_by"].values()) == failures


def test_too_many_failures_are_told_without_an_output_too(job, pictures):
    flags = {**FLAGS, "max_failure_rate": 0.3}  # 3 of 8
    ran = job(pictures, sink="null", **flags)
    assert (ran.code, ran.line["status"], ran.line["output"]) == (3, "too_many_failures", None)
    assert f"{BAD + 1} of {GOOD + BAD + 1} images failed" in ran.stderr


def test_an_output_that_is_there_is_left_alone(job, pictures, tmp_path):
    there = tmp_path / "out"
    there.mkdir()
    (there / "note").write_text("mine")
    ran = job(pictures, sink="null", output=there, **FLAGS)
    assert (ran.code, ran.line["output"]) == (0, None)
    assert [path.name for path in there.iterdir()] == ["note"]


def test_no_output_is_needed(job, pictures):
    ran = job(pictures, sink="null", output="", **FLAGS)
    assert (ran.code, ran.line["features"]) == (0, GOOD)
    ran = job(pictures, sink="null", output="", dry_run=True)
    assert (ran.code, ran.line["status"], ran.line["output"]) == (0, "dry_run", None)


def test_a_broken_run_is_told_without_an_output(job, tmp_path):
    path = tmp_path / "cut.tfrecord"
    path.write_bytes((100).to_bytes(8, "little"))
    ran = job(path, sink="null", input_format="tfrecord", on_damage="fail")
    assert (ran.code, ran.line["status"], ran.line["output"]) == (1, "failed", None)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"sink": "null", "if_exists": "resume"}, "--if_exists resume"),
        ({"sink": "null", "if_exists": "overwrite"}, "--if_exists overwrite"),
        ({"sink": "null", "rows_per_file": 3}, "--rows_per_file 3"),
        ({"sink": "null", "compression": "none"}, "--compression none"),
        (
            {"decode_isolation": "none", "decode_seconds": 5},
            "--decode_seconds 5: bounds",
        ),
        ({"stop_after": "decode"}, "--sink null"),
    ],
)
def test_flags_that_would_mean_nothing_are_refused(flags, named):
    with pytest.raises(RequestError, match=named):
        Options(input=("a",), model="m", output="o", **flags)


def test_without_null_an_output_is_required():
    with pytest.raises(RequestError, match="--output is required"):
        Options(input=("a",), model="m")
