"""DecodeImages: pixels or a failure for each image, in order, on threads that work ahead."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import time
from types import SimpleNamespace

import apache_beam as beam
import numpy as np
import pictures
import pytest
from apache_beam.metrics import MetricsFilter
from beams import pipe

from formats.image import Preprocessing, decode_image
from formats.isolation import Limits
from formats.records import DecodedImage, Failure, ImageRecord, ImageRef
from formats.timing import Timing
from pipeline.preflight import DIRECT_RUNNER
from transforms import decode
from transforms.decode import DecodeImages, decode_record
from transforms.lookahead import cpu_threads, model_busy

HOW = Preprocessing(16)


def record(key, data):
    return ImageRecord(ImageRef(key, "/d/a", 3, "cat", {"w": 1}), data)


def run(records, how=HOW):
    out = pipe(records, DecodeImages(how))
    return list(out.images), list(out.failures)


def test_a_picture_becomes_pixels_with_all_that_is_known_of_it():
    data = pictures.jpeg(40, 28)
    image = decode_record(record("k", data), HOW)
    assert isinstance(image, DecodedImage)
    assert (image.pixels.shape, image.pixels.dtype) == ((16, 16, 3), np.uint8)
    assert (image.width, image.height, image.bytes) == (40, 28, len(data))
    assert image.sha256 == hashlib.sha256(data).hexdigest()
    assert image.ref == ImageRef("k", "/d/a", 3, "cat", {"w": 1})


def test_width_and_height_are_those_of_the_upright_picture():
    image = decode_record(record("k", pictures.oriented(6)), HOW)
    assert (image.width, image.height) == (28, 40)


@pytest.mark.parametrize(
    ("data", "how", "error_class"),
    [
        (b"", HOW, "EmptyImage"),
        (b"what is this", HOW, "UnsupportedFormat"),
        (pictures.truncated(pictures.jpeg()), HOW, "CorruptImage"),
        (pictures.jpeg(40, 28), dataclasses.replace(HOW, max_pixels=40 * 28 - 1), "TooManyPixels"),
        (pictures.jpeg(), dataclasses.replace(HOW, formats=("png",)), "UnsupportedFormat"),
    ],
)
def test_a_picture_that_cannot_be_used_is_a_failure_with_its_digest(data, how, error_class):
    failure = decode_record(record("k", data), how)
    assert isinstance(failure, Failure)
    assert (failure.stage, failure.error_class) == ("decode", error_class)
    assert (failure.key, failure.source, failure.record_index) == ("k", "/d/a", 3)
    assert (failure.sha256, failure.bytes) == (hashlib.sha256(data).hexdigest(), len(data))
    assert "\n" not in failure.message
    assert len(failure.message) < 500


def test_what_waits_to_be_decoded_is_bounded_by_bytes():
    step = decode._Decode(HOW, None)
    step.setup()
    step.start_bundle()
    for n in range(4):
        list(step.process(record(str(n), bytes(40 << 20))))
        assert len(step._ahead._pending) == 1  # two are more than 64 MiB
    assert len(list(step.finish_bundle())) == 2  # the last failure, and the timing
    step.teardown()


def test_every_kind_of_picture_goes_through_the_transform():
    good = pictures.good()
    images, failures = run([record(name, data) for name, data in good.items()])
    assert failures == []
    assert sorted(image.ref.key for image in images) == sorted(good)
    for image in images:
        alone = decode_record(record("k", good[image.ref.key]), HOW)
        np.testing.assert_array_equal(image.pixels, alone.pixels)


@pytest.mark.parametrize("ahead", [0, 1, 3, 1000])
def test_each_image_ends_in_one_output_however_far_the_threads_are_ahead(monkeypatch, ahead):
    monkeypatch.setattr(decode, "_AHEAD", ahead)
    data = pictures.jpeg(24, 24)
    records = [record(f"{n:02}", b"bad" if n % 3 == 0 else data) for n in range(30)]
    images, failures = run(records)
    assert [i.ref.key for i in images] == [f"{n:02}" for n in range(30) if n % 3]
    assert [f.key for f in failures] == [f"{n:02}" for n in range(0, 30, 3)]


def test_nothing_in_nothing_out():
    assert run([]) == ([], [])


def test_an_error_of_the_decoder_itself_is_not_swallowed(monkeypatch):
    def broken(data, how):
        raise AttributeError("a bug")

    monkeypatch.setattr(decode, "decode_image", broken)
    with pytest.raises(Exception, match="a bug"):
        run([record("k", b"x")])


def test_a_bundle_that_failed_leaves_no_process_behind():
    limits = Limits(30, 2 << 30)
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(3):
        step = decode._Decode(Preprocessing(8), limits)
        step.setup()
        step.start_bundle()
        for n in range(40):
            list(step.process(record(str(n), pictures.jpeg(24, 24))))
        step.teardown()  # without the end of the bundle
    cpu_threads().submit(int).result()
    assert set(os.listdir("/proc/self/fd")) <= before


# ---------------------------------------------------------------- what it took


def counters(result):
    found = result.metrics().query(MetricsFilter().with_namespace("DecodeImages"))["counters"]
    return {counter.key.metric.name: counter.result for counter in found}


@pytest.mark.parametrize("count", [0, 1, 255, 256, 700])
def test_every_image_is_timed_once_refused_ones_too(count):
    data = pictures.jpeg(24, 24)
    records = [record(str(n), b"bad" if n % 7 == 0 else data) for n in range(count)]
    out = pipe(records, DecodeImages(HOW))
    timing = Timing.total(out.timings)
    assert sum(timing.decoded.values()) == timing.images == count
    assert timing.bytes == sum(len(one.data) for one in records)
    assert timing.batches == 0
    assert timing.carry >= timing.read + timing.wait >= 0


def test_beams_counters_tell_the_same():
    with beam.Pipeline(DIRECT_RUNNER) as pipeline:
        data = pictures.jpeg(24, 24)
        records = [record(str(n), data) for n in range(300)]
        _ = pipeline | beam.Create(records) | DecodeImages(HOW)
    told = counters(pipeline.result)
    assert told["images"] == 300
    assert told["bytes"] == 300 * len(data)
    assert sum(n for name, n in told.items() if name.startswith("decode_ms_up_to_")) == 300
    assert {"wait_ms", "read_ms"} <= set(told)
    (decoding,) = pipeline.result.metrics().query(MetricsFilter().with_name("decode_ms"))[
        "distributions"
    ]
    assert decoding.result.count == 300


def test_waiting_for_a_picture_is_told(monkeypatch):
    clock = SimpleNamespace(idle=itertools.count().__next__)  # a second at each look
    monkeypatch.setattr(decode, "model_busy", lambda: clock)
    timing = timing_of_one()
    assert (timing.read, timing.wait) == (2, 1)  # before it and at the end; for it


def timing_of_one():
    """What decoding one picture took, by steps that are called here."""
    step = decode._Decode(HOW, None)
    step.setup()
    step.start_bundle()
    assert list(step.process(record("k", pictures.jpeg(24, 24)))) == []
    *_, timing = step.finish_bundle()
    step.teardown()
    return timing.value.value


def test_no_wait_is_told_while_the_model_runs(monkeypatch):
    def slowly(data, how):
        time.sleep(0.2)
        return decode_image(data, how)

    monkeypatch.setattr(decode, "decode_image", slowly)
    model_busy().begin()
    timing = timing_of_one()
    model_busy().end()
    assert timing.carry >= timing.decode >= 0.2
    assert timing.wait == pytest.approx(0, abs=1e-6) == timing.read


@pytest.mark.parametrize(("at_once", "most"), [(1, 128), (128, 128), (512, 1024)])
def test_as_many_are_decoded_ahead_as_the_next_call_takes(at_once, most):
    _, _, ahead = DecodeImages(HOW, None, at_once)._step
    assert ahead == most
