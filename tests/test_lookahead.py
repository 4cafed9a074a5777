"""Threads that work ahead: order, bounds, and where an exception comes out."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transforms import lookahead
from transforms.lookahead import Busy, Lookahead, cpu_threads, io_threads, map_ahead, model_busy


@pytest.fixture
def threads():
    with ThreadPoolExecutor(4) as pool:
        yield pool


def test_results_come_in_order_however_long_each_takes(threads):
    gates = [threading.Event() for _ in range(8)]

    def work(n):
        if n + 1 < len(gates):
            gates[n + 1].wait(5)  # each waits for its successor of the same four
        gates[n].set()
        return n * n

    for first in (3, 7):
        gates[first].set()
    assert list(map_ahead(work, range(8), threads, 4)) == [n * n for n in range(8)]


@pytest.mark.parametrize("depth", [0, 1, 3, 100])
def test_at_most_depth_items_are_held(threads, depth):
    ahead = Lookahead(str, threads, depth)
    given = []
    for n in range(10):
        given += ahead.push(n)
        assert len(ahead._pending) == min(n + 1, depth)
        assert len(given) == max(0, n + 1 - depth)
    assert [*given, *ahead.drain()] == [str(n) for n in range(10)]


def test_less_is_held_at_first(threads):
    ahead = Lookahead(str, threads, 8, start=2)
    given, held = [], []
    for n in range(20):
        given += ahead.push(n)
        held.append(len(ahead._pending))
    assert held == [1, 2, 2, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 8, 8, 8]
    assert [*given, *ahead.drain()] == [str(n) for n in range(20)]


@pytest.mark.parametrize(
    ("weights", "held"),
    [
        ([4, 4, 4, 4], [1, 2, 2, 2]),
        ([11, 1, 1, 11], [1, 1, 2, 1]),  # one that is too heavy alone is still worked on
        ([0, 0, 0, 0], [1, 2, 3, 4]),
    ],
)
def test_bytes_bound_what_is_held(threads, weights, held):
    ahead = Lookahead(lambda n: n, threads, 100, weigh=lambda n: n, max_bytes=10)
    counts = []
    for weight in weights:
        list(ahead.push(weight))
        counts.append(len(ahead._pending))
    assert counts == held
    list(ahead.drain())
    assert ahead._bytes == 0


def test_map_ahead_heeds_bytes_too(threads):
    begun = []
    results = map_ahead(begun.append, [40 << 20] * 5, threads, 100, weigh=lambda n: n)
    next(results)
    assert len(begun) <= 2


def test_an_exception_comes_where_its_result_is_due(threads):
    ahead = Lookahead(lambda n: 12 // n, threads, 2)
    assert list(ahead.push(3)) == []
    assert list(ahead.push(0)) == []
    assert list(ahead.push(4)) == [4]
    with pytest.raises(ZeroDivisionError):
        list(ahead.push(6))
    assert list(ahead.drain()) == [3, 2]


def test_drain_leaves_nothing(threads):
    ahead = Lookahead(str, threads, 5)
    list(ahead.push(1))
    assert list(ahead.drain()) == ["1"]
    assert list(ahead.drain()) == []
    assert list(map_ahead(str, [], threads, 3)) == []


def test_what_nobody_wants_is_not_begun_and_ends(threads):
    begun, go = [], threading.Event()

    def work(n):
        begun.append(n)
        go.wait(10)

    ahead = Lookahead(work, threads, 100)
    for n in range(50):
        assert list(ahead.push(n)) == []
    threading.Timer(0.2, go.set).start()
    ahead.abandon()
    assert go.is_set()
    assert len(begun) < 50
    assert list(ahead.drain()) == []


def test_a_process_has_one_pool_of_each_kind():
    assert cpu_threads() is cpu_threads()
    assert io_threads() is io_threads()
    assert cpu_threads() is not io_threads()


def test_what_nobody_waits_for_any_more_is_not_started():
    started, gate = [], threading.Event()

    def work(number):
        started.append(number)
        if number:
            gate.wait(20)
        return number

    with ThreadPoolExecutor(1) as threads:
        results = map_ahead(work, range(10), threads, 5)
        assert next(results) == 0
        results.close()
        gate.set()
    assert started in ([0], [0, 1])


# ---------------------------------------------------------------- how long something was busy


@given(st.lists(st.tuples(st.sampled_from(["begin", "end", "lap"]), st.integers(0, 9))))
def test_time_is_either_busy_or_idle(steps):
    now, works, busy_for, told = 0, 0, 0, 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lookahead.time, "perf_counter", lambda: now)
        busy = Busy()
        for step, seconds in steps:
            if step == "begin":
                busy.begin()
                works += 1
            elif step == "end" and works:
                busy.end()
                works -= 1
            elif step == "lap":
                told += busy.lap()
                assert told == busy_for
            now += seconds
            busy_for += seconds if works else 0
            assert busy.idle() == now - busy_for


def test_each_thread_carries_images_of_its_own():
    with ThreadPoolExecutor(1) as other:
        assert model_busy() is model_busy()
        assert other.submit(model_busy).result() is not model_busy()
