"""Faults as `benchmarks.faults` makes them, in their quick forms; docs/RELIABILITY.md tells of all.

Each check must hold; that it can fail is shown where it is not plain.
"""

from __future__ import annotations

import signal

import exports
import pytest

from benchmarks.faults import disks, fetches, inputs, kills, repeats, stores
from benchmarks.faults.world import Row, World, call, leftovers, whole, write_files


@pytest.fixture
def world(tmp_path):
    """Two tries of everything, on a small network."""
    return World(tmp_path / "world", 2, model=exports.exported("saved_model", "classification"))


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """A world for faults of whole processes, each tried once, and an undisturbed run in it."""
    model = exports.exported("saved_model", "classification")
    world = World(tmp_path_factory.mktemp("processes"), 1, model=model)
    return world, kills.calm_run(world)


def reached(*rows: Row) -> bool:
    """Whether all figures are reached; skips where the machine does not allow a fault."""
    refused = [row for row in rows if "can be made" in row.figure or "can be mounted" in row.figure]
    assert rows
    assert [row for row in rows if not row.reached and row not in refused] == []
    if refused:
        pytest.skip(refused[0].figure)
    return True


def test_a_figure_that_is_missed_is_seen_beside_a_fault_that_cannot_be_tried():
    refused, missed = Row("a", "no tmpfs can be mounted", False), Row("b", "3 lost", False)
    with pytest.raises(AssertionError, match="3 lost"):
        reached(refused, missed)
    with pytest.raises(pytest.skip.Exception):
        reached(refused, Row("b", "0 lost", True))


def test_the_same_rows_whatever_the_shards_workers_and_order(world):
    assert reached(repeats.same_rows(world))


def test_batches_of_other_sizes(world):
    assert reached(repeats.other_batches(world))


def test_nothing_is_stale_after_an_overwrite(world):
    assert reached(repeats.overwritten(world))


def test_a_full_disk(world):
    calm = disks.Calm(world)
    assert reached(disks.each_write(world, calm))
    assert reached(*disks.small_disks(world, calm))


def test_an_error_that_is_passed_over_is_seen(world):
    calm = disks.Calm(world)
    assert calm.problem(world.fresh("out"), lambda: None) == ""
    del calm.rows[3]  # as if the disturbed run had lost none, and the calm one had
    assert calm.problem(world.fresh("out"), lambda: None) == "complete, but not whole"


def test_damaged_tfrecords(world):
    assert reached(*inputs.damaged_records(world))


def test_flaky_stores(world):
    assert reached(*stores.check(world))


def test_models_that_are_cut_or_altered(world, monkeypatch, tmp_path):
    assert reached(*fetches.check(world))


def test_a_killed_run_is_resumed(processes):
    assert reached(kills.killed(*processes))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_takes_its_temporaries_along(processes, number):
    assert reached(kills.interrupted(*processes, number))


def test_a_leftover_is_seen(world):
    output = world.fresh("out")
    call(input=write_files(world.fresh("in"), 3), model=world.model, output=output)
    assert whole(output)
    assert leftovers(output) == []
    (output / "features" / "part-x.parquet").touch()
    assert leftovers(output) == ["features/part-x.parquet"]
