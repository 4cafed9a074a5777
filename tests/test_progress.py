"""A long run tells how far it is, unless it is asked to be quiet."""

import logging
import re
import time

import pytest
from pictures import jpeg

from pipeline import job as extract_job
from pipeline import progress
from transforms.metrics import inc_counter


def lines(caplog) -> list[str]:
    return [line for line in caplog.messages if line.startswith("images: ")]


def until(told, wanted: int, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while len(told()) < wanted:
        assert time.monotonic() < end, told()
        time.sleep(0.01)


def test_counts_are_told_as_they_grow(caplog):
    caplog.set_level(logging.INFO, "pipeline")
    inc_counter("ReadImages", "images", 7)  # of an earlier run in this process
    with progress.told(every=0.02):
        time.sleep(0.1)
        assert not lines(caplog)  # nothing has come on
        inc_counter("ReadImages", "images", 1234)
        until(lambda: lines(caplog), 1)
        first = "images: 1,234 read, 0 through the model (0.0 a second), 0 failed"
        assert lines(caplog) == [first]
        inc_counter("ExtractFeatures", "batch_filled", 1000)
        inc_counter("ExtractFeatures", "reused", 30)
        inc_counter("DecodeImages", "failures", 4)
        until(lambda: [line for line in lines(caplog) if "1,030 through" in line], 1)
        until(lambda: [line for line in lines(caplog) if line.endswith(" 4 failed")], 1)
    told = len(lines(caplog))
    inc_counter("ReadImages", "images")
    time.sleep(0.1)
    assert len(lines(caplog)) == told  # the run is over


@pytest.mark.parametrize(
    ("stop_after", "told"),
    [("read", r"images: 9 read \(.*\), 0 failed"), ("decode", r"images: 9 read, 5 decoded \(.*")],
)
def test_a_run_that_ends_early_is_told_by_its_last_step(caplog, stop_after, told):
    caplog.set_level(logging.INFO, "pipeline")
    with progress.told(stop_after, every=0.02):
        inc_counter("DecodeImages", "images", 5)
        inc_counter("ReadImages", "images", 9)
        until(lambda: [line for line in lines(caplog) if re.match(told, line)], 1)


def test_it_ends_with_a_run_that_fails(caplog):
    caplog.set_level(logging.INFO, "pipeline")
    with pytest.raises(RuntimeError), progress.told(every=0.01):
        raise RuntimeError
    inc_counter("ReadImages", "images")
    time.sleep(0.05)
    assert not lines(caplog)


@pytest.mark.parametrize("quiet", [False, True])
def test_a_job_tells_of_itself(tmp_path, job, caplog, monkeypatch, quiet):
    def then_waits(*arguments):
        result = run_graph(*arguments)
        if not quiet:  # the last line is told within the run, however slow the teller is
            until(lambda: [line for line in lines(caplog) if last in line], 1)
        return result

    last = "images: 5 read, 4 through the model"
    run_graph = extract_job.run_graph
    monkeypatch.setattr(extract_job, "run_graph", then_waits)
    monkeypatch.setattr(progress, "EVERY", 0.005)
    (tmp_path / "in").mkdir()
    for number in range(4):
        (tmp_path / "in" / f"{number}.jpg").write_bytes(jpeg(40 + number, 30))
    (tmp_path / "in" / "bad.jpg").write_bytes(b"\xff\xd8")
    ran = job(tmp_path / "in", max_failure_rate=1, **({"quiet": True} if quiet else {}))
    assert (ran.code, ran.line["features"], ran.line["failures"]) == (0, 4, 1)
    told = r"images: (\d+) read, (\d+) through the model \(.* a second\), (\d+) failed"
    counts = [tuple(map(int, re.fullmatch(told, line).groups())) for line in lines(caplog)]
    assert counts == sorted(counts)
    if quiet:
        assert not [record for record in caplog.records if record.levelno == logging.INFO]
    else:
        assert counts[-1] == (5, 4, 1)
