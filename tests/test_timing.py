"""Where the time went: laws of the sums, the quantiles' error, and what is advised."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats.timing import Timing, advice, bucket

DURATIONS = st.lists(st.floats(0.0002, 500), min_size=1, max_size=200)


def of(seconds):
    return Timing.of_decoding(seconds, 10 * len(seconds), 0.5, 0.25, 2.0)


@given(DURATIONS, st.sampled_from([0.01, 0.5, 0.95, 1.0]))
def test_a_quantile_is_at_most_a_bucket_off(seconds, share):
    exact = 1000 * sorted(seconds)[max(0, math.ceil(share * len(seconds)) - 1)]
    ratio = of(seconds).decode_quantile(share) / exact
    assert 2**-0.25 * 0.999 <= ratio <= 2**0.25 * 1.001


@given(DURATIONS)
def test_every_image_is_in_one_bucket_and_no_bucket_ends_before_it(seconds):
    timing = of(seconds)
    assert sum(timing.decoded.values()) == timing.images == len(seconds)
    assert sum(timing.up_to().values()) == len(seconds)
    for end in timing.up_to():
        within = sum(1000 * s <= float(end) * (1 + 1e-9) for s in seconds)
        counted = sum(n for to, n in timing.up_to().items() if float(to) <= float(end))
        assert abs(within - counted) <= sum(
            math.isclose(1000 * s, float(end), rel_tol=1e-6) for s in seconds
        )


@given(DURATIONS, st.data())
def test_the_sum_is_the_same_however_it_is_made(seconds, data):
    cut = data.draw(st.integers(0, len(seconds)))
    once = Timing.of_decoding(seconds, 30, 3.0, 2.0, 1.0)
    parts = [
        Timing.of_decoding(seconds[cut:], 10, 1.0, 0.5, 1.0),
        Timing.of_decoding(seconds[:cut], 20, 2.0, 1.5, 0.0),
    ]
    for total in (Timing.total(parts), Timing.total([Timing.total(parts[:1]), parts[1]])):
        assert total.decoded == once.decoded
        assert (total.images, total.bytes) == (once.images, once.bytes)
        assert total.decode == pytest.approx(once.decode)
        assert (total.read, total.wait, total.carry) == (3.0, 2.0, 1.0)


def test_batches_add_up_to_their_fill():
    total = Timing.total(
        [
            Timing(batches=2, filled=16, slots=16, inference=1.0),
            Timing(batches=1, filled=2, slots=8, inference=0.5),
        ]
    )
    told = total.described()
    assert (told["batches"], told["batch_fill"], told["inference_ms"]) == (3, 0.75, 1500)


def test_nothing_is_described_too():
    told = Timing.total([]).described()
    assert json.loads(json.dumps(told)) == told
    assert told["images"] == told["decode_ms"]["p95"] == 0
    assert told["batch_fill"] is None
    assert advice(told, {}, 2) is None


@pytest.mark.parametrize(
    ("seconds", "index"),
    [(-1, -12), (0, -12), (1e-9, -12), (0.001, 0), (0.0011, 1), (0.002, 4), (1e9, 80)],
)
def test_buckets_end_at_quarter_powers_of_two_of_a_millisecond(seconds, index):
    assert bucket(seconds) == index


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"wait": 40}, "waited 40% for pictures"),
        ({"wait": 40}, "decoding is the limit: more vCPU"),
        ({"read": 40}, "input is the limit"),
        ({}, "the model is the limit"),
        ({"inference": 20}, "writing is the limit"),
        ({"slots": 400}, "batches were 25% full: a smaller --batch_size"),
        ({"carry": 9, "inference": 5}, "too short a run for advice"),
        (
            {"carry": 90, "inference": 120},
            "the model ran 97% of the time",
        ),  # the last batches are not in it
    ],
)
def test_the_advice_names_the_largest_loss(changes, says):
    given = {"carry": 100, "inference": 92, "read": 2, "wait": 2, "filled": 100, "slots": 100}
    if "wait" in changes or "read" in changes:
        given["inference"] = 55
    timing = Timing(images=9, decoded={4: 9}, **{**given, **changes})
    line = advice(timing.described(), {}, 2)
    assert says in line
    assert "\n" not in line


def test_no_flag_is_advised_that_the_run_had():
    model = Timing(images=9, decoded={4: 9}, carry=100, inference=98).described()
    assert "--precision bfloat16" in advice(model, {"precision": "float32"}, 2)
    assert "bfloat16" not in advice(model, {"precision": "bfloat16"}, 2)
    writing = Timing(images=9, decoded={4: 9}, carry=100, inference=20).described()
    assert "fewer --outputs" in advice(writing, {"precision": "float32"}, 2)
    assert "--outputs" not in advice(writing, {"precision": "float32"}, 1)
