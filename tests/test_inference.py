"""infer_batch and ExtractFeatures: fixed batches, and what one bad picture or model costs."""

from __future__ import annotations

import dataclasses
import gc
import os
import pickle
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.ml.inference.base import ModelHandler
from beams import pipe

from formats.records import DecodedImage, Failure, Features, ImageRef
from formats.timing import Timing
from models.loading import LoadSpec, OutOfMemory
from storage.errors import RunError
from transforms import inference
from transforms.inference import (
    Call,
    ExtractFeatures,
    FrozenModelHandler,
    _HandOn,
    infer_batch,
    run_padded,
)
from transforms.lookahead import model_threads
from transforms.metrics import totals
from transforms.reuse import Known, known_in

SIDE = 4
POISON = 66
NAN = 77


class Model:
    """Stands for a loaded model: a picture's mean and its double; what it is asked is kept."""

    def __init__(self, memory=1000, broken=None):
        self.info = SimpleNamespace(image_size=SIDE)
        self.memory = memory
        self.broken = broken
        self.sizes = []

    def __call__(self, pixels):
        assert pixels.dtype == np.uint8
        assert pixels.shape[1:] == (SIDE, SIDE, 3)
        self.sizes.append(len(pixels))
        if len(pixels) > self.memory:
            raise OutOfMemory(f"no memory for {len(pixels)}")
        if self.broken:
            raise self.broken
        if (pixels[:, 0, 0, 0] == POISON).any():
            raise ValueError("a shape\nthat the graph refuses")
        mean = pixels[:, 0, 0, :1].astype(np.float32)
        mean[mean == NAN] = np.nan
        return {"embedding": mean, "logits": np.concatenate([mean, 2 * mean], axis=1)}


def image(value, key=None, shape=(SIDE, SIDE, 3), dtype=np.uint8):
    pixels = np.full(shape, value, dtype)
    ref = ImageRef(key or f"k{value}", "/d/a", value, "cat", {"w": value})
    return DecodedImage(ref, f"{value:064x}", 100 + value, 7, 8, pixels)


def run(values, size=4, **options):
    model = Model(**options)
    results, after = infer_batch([image(v) for v in values], model, size)
    assert len(results) == len(values)
    for value, result in zip(values, results, strict=True):
        at = result if isinstance(result, Failure) else result.ref
        assert (at.key, at.record_index) == (f"k{value}", value), "the order is kept"
        if isinstance(result, Features):
            assert result.vectors["embedding"].tolist() == [value]
            assert result.vectors["logits"].tolist() == [value, 2 * value]
    return results, after, model.sizes


def failed(results):
    return [r.record_index for r in results if isinstance(r, Failure)]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_call_has_the_same_shape(count):
    results, after, sizes = run(range(count))
    assert failed(results) == []
    assert (sizes, after) == ([4], 4)


def test_more_images_than_a_batch_are_split():
    results, after, sizes = run(range(10))
    assert failed(results) == []
    assert (sizes, after) == ([4, 4, 4], 4)


def test_nothing_asks_nothing_of_the_model():
    assert run([]) == ([], 4, [])


def test_features_carry_all_that_is_known_of_the_image():
    (result,), _, _ = run([5])
    assert result.ref == ImageRef("k5", "/d/a", 5, "cat", {"w": 5})
    assert (result.sha256, result.width, result.height) == (f"{5:064x}", 7, 8)


def test_pythons_own_lack_of_memory_halves_the_batch_too(monkeypatch):
    aligned, most = inference._aligned, 2 * image(0).pixels.size

    def scarce(size):
        if size > most:
            raise MemoryError("unable to allocate")
        return aligned(size)

    monkeypatch.setattr(inference, "_aligned", scarce)
    results, after, sizes = run(range(4))
    assert (failed(results), after, sizes) == ([], 2, [2, 2])


def test_padding_is_zeros_and_is_cut_off():
    seen = []
    model = SimpleNamespace(info=None)

    def call(pixels):
        seen.append(pixels.copy())
        return {"embedding": pixels[:, 0, 0, :1].astype(np.float32)}

    vectors = run_padded(call, [image(9).pixels, image(8).pixels], 4)
    assert vectors["embedding"].tolist() == [[9], [8]]
    assert [int(p.max()) for p in seen[0]] == [9, 8, 0, 0]
    assert model.info is None


# ---------------------------------------------------------------- one bad picture


@pytest.mark.parametrize("at", range(5))
def test_a_poisonous_picture_costs_one_row(at):
    values = [1, 2, 3, 4]
    values.insert(at, POISON)
    results, after, sizes = run(values, size=5)
    assert failed(results) == [POISON]
    assert set(sizes) == {5}
    assert after == 5
    failure = results[at]
    assert (failure.stage, failure.error_class) == ("infer", "ValueError")
    assert failure.message == "a shape that the graph refuses"
    assert (failure.sha256, failure.bytes) == (f"{POISON:064x}", 100 + POISON)


def test_a_picture_whose_vectors_are_not_finite_costs_one_row():
    results, _, sizes = run([1, NAN, 3])
    assert failed(results) == [NAN]
    assert (results[1].stage, results[1].error_class) == ("infer", "NotFinite")
    assert "embedding and logits of this picture is not finite" in results[1].message
    assert sizes == [4]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((SIDE, SIDE), np.uint8),
        ((SIDE, SIDE, 1), np.uint8),
        ((SIDE, SIDE + 1, 3), np.uint8),
        ((1, SIDE, SIDE, 3), np.uint8),
        ((SIDE, SIDE, 3), np.float32),
    ],
)
def test_pixels_that_do_not_fit_never_reach_the_model(shape, dtype):
    model = Model()
    results, _ = infer_batch([image(1), image(2, None, shape, dtype), image(3)], model, 4)
    assert failed(results) == [2]
    assert results[1].error_class == "WrongPixels"
    assert [type(result) for result in results] == [Features, Failure, Features]


def test_misfits_alone_do_not_make_the_model_suspect():
    model = Model(broken=AssertionError("asked"))
    results, _ = infer_batch([image(2, shape=(1, 1, 3))], model, 4)
    assert (failed(results), model.sizes) == ([2], [])


# ---------------------------------------------------------------- a bad model


@pytest.mark.parametrize("values", [[POISON], [POISON, POISON], [NAN], [NAN, POISON]])
def test_where_every_picture_fails_a_plain_one_absolves_the_model(values):
    results, _, sizes = run(values)
    assert failed(results) == values
    assert set(sizes) == {4}


@pytest.mark.parametrize("count", [1, 4])
def test_a_model_that_fails_on_a_plain_picture_too_ends_the_run(count):
    with pytest.raises(RunError, match="fails on every image, a plain grey one too") as caught:
        run(range(count), broken=RuntimeError("the kernel\nis missing"))
    assert "RuntimeError: the kernel" in str(caught.value)
    assert "first seen on k0" in str(caught.value)


def test_a_model_of_nothing_but_nan_ends_the_run():
    class Wild(Model):
        def __call__(self, pixels):
            return {"embedding": np.full((len(pixels), 1), np.nan, np.float32)}

    with pytest.raises(RunError, match="its embedding is not finite"):
        infer_batch([image(1), image(2)], Wild(), 4)


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("size", "memory", "after", "tried"),
    [
        (8, 8, 8, [8]),
        (8, 4, 4, [8, 4, 4]),
        (8, 3, 2, [8, 4, 2, 2, 2, 2]),
        (7, 4, 4, [7, 4, 4]),
        (8, 1, 1, [8, 4, 2, 1, 1, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_a_batch_that_does_not_fit_in_memory_is_halved(size, memory, after, tried):
    results, now, sizes = run(range(min(size, 8)), size, memory=memory)
    assert failed(results) == []
    assert (now, sizes) == (after, tried)


def test_no_memory_for_one_image_ends_the_run():
    with pytest.raises(RunError, match="no memory for a batch of one image"):
        run(range(4), memory=0)


def test_poison_and_little_memory_together():
    results, after, _ = run([1, POISON, 3, NAN, 5, 6], 8, memory=2)
    assert (failed(results), after) == ([POISON, NAN], 2)


# ---------------------------------------------------------------- the handler and the transform


HANDLER = FrozenModelHandler(LoadSpec("/m"), 8)


def through(handler, images, model):
    """The results of one call."""
    (call,) = handler.run_inference(images, model)
    return call.results()


def test_what_memory_allowed_is_remembered():
    handler, model = FrozenModelHandler(LoadSpec("/m"), 8), Model(memory=3)
    before = totals()
    for first in (0, 4):
        images = [image(v) for v in range(first, first + 4)]
        assert failed(through(handler, images, model)) == []
    assert model.sizes == [8, 4, 2, 2, 2, 2]
    assert (
        totals()["ExtractFeatures", "batch_halvings"] - before["ExtractFeatures", "batch_halvings"]
        == 1
    )


@pytest.mark.parametrize(("batch_size", "copies"), [(8, 1), (8, 3), (256, 2)])
def test_the_handler_asks_for_a_batch_to_each_copy(batch_size, copies):
    handler = FrozenModelHandler(LoadSpec("/m", copies=copies), batch_size)
    for _ in range(2):
        assert handler.call_size == batch_size * copies
        handler = pickle.loads(pickle.dumps(handler))


def test_the_handler_tells_beam_what_a_batch_holds():
    assert HANDLER.get_num_bytes([image(1), image(2)]) == 2 * SIDE * SIDE * 3
    assert HANDLER.get_metrics_namespace() == "ExtractFeatures"


class FakeHandler(FrozenModelHandler):
    """Loads the fake."""

    def load_model(self):
        return Model()


CALLS: list[int] = []  # images in each call of the one below


class CountingHandler(FakeHandler):
    """Tells how many images come at once."""

    def run_inference(self, batch, model, inference_args=None):
        CALLS.append(len(batch))
        return super().run_inference(batch, model, inference_args)


@pytest.mark.parametrize("count", [0, 1, 8, 9, 24, 25])
def test_every_call_but_a_bundles_last_is_whole_and_none_is_empty(count):
    CALLS.clear()
    handler = CountingHandler(LoadSpec("/m", copies=2), 4)
    out = pipe([image(1 + v % 3) for v in range(count)], ExtractFeatures(handler))
    assert len(list(out.features)) == count
    expected = [*[8] * (count // 8), count % 8]
    assert [size for size in expected if size] == CALLS


# ---------------------------------------------------------------- while a call runs


class Gate(Model):
    """Runs on no picture before it is told to."""

    def __init__(self):
        super().__init__()
        self.open = threading.Event()

    def __call__(self, pixels):
        assert self.open.wait(30)
        return super().__call__(pixels)


def test_a_call_is_handed_on_when_the_next_one_runs():
    handler, model, step = FrozenModelHandler(LoadSpec("/m"), 2), Gate(), _HandOn()
    step.start_bundle()
    (first,) = handler.run_inference([image(1), image(2)], model)  # and comes back at once
    assert list(step.process(first)) == []
    (second,) = handler.run_inference([image(3)], model)
    model.open.set()
    *rows, _ = step.process(second)
    assert [row.ref.key for row in rows] == ["k1", "k2"]
    *rows, told = step.finish_bundle()
    assert [row.value.ref.key for row in rows] == ["k3"]
    assert told.tag == "timings"
    assert list(step.finish_bundle()) == []


def test_a_picture_in_two_running_calls_is_computed_once_and_gives_a_row_in_each():
    handler, model = FrozenModelHandler(LoadSpec("/m"), 2), Gate()
    (first,) = handler.run_inference([image(1, "a"), image(POISON, "b")], model)
    again = [image(POISON, "c"), image(1, "d"), image(3, "e")]
    (second,) = handler.run_inference(again, model)
    model.open.set()
    (bad, row, new, told), (other, worse, _) = second.results(), first.results()  # in any order
    assert (other.ref.key, worse.key, bad.key, row.ref.key, new.ref.key) == tuple("abcde")
    assert row.vectors["logits"].tolist() == other.vectors["logits"].tolist() == [1, 2]
    assert (told.filled, told.reused) == (1, 2)
    assert model_threads(1).submit(len, "").result() == 0  # when the lane has gone on
    assert known_in(handler._run)._running == {}  # nothing is waited for any more


def test_a_call_that_failed_is_nobodys_source():
    handler = FrozenModelHandler(LoadSpec("/m"), 2)
    (broken,) = handler.run_inference([image(1)], Model(broken=RuntimeError("no kernel")))
    with pytest.raises(RunError, match="fails on every image"):
        broken.results()
    (row, _) = through(handler, [image(1)], Model())
    assert row.vectors["embedding"].tolist() == [1]


def test_a_sampler_that_looks_at_a_call_too_changes_nothing():
    (call,) = FrozenModelHandler(LoadSpec("/m"), 2).run_inference([image(1)], Model())
    before = totals()
    assert call.results() is call.results()
    assert totals()["ExtractFeatures", "batches"] - before["ExtractFeatures", "batches"] == 1


def test_the_models_time_is_told_once_though_calls_overlap():
    handler, model = FrozenModelHandler(LoadSpec("/m"), 1), Gate()
    begun = time.perf_counter()
    calls = [handler.run_inference([image(v)], model)[0] for v in range(1, 4)]
    time.sleep(0.05)
    model.open.set()
    told = [call.results()[-1].inference for call in calls]
    assert 0.05 <= sum(told) <= time.perf_counter() - begun


def test_pixels_go_with_their_call():
    handler, model = FrozenModelHandler(LoadSpec("/m"), 2), Model()
    images = [image(1), image(2), image(3)]
    watched = [weakref.ref(one.pixels) for one in images]
    gc.disable()  # which would find them in a circle
    try:
        (call,) = handler.run_inference(images, model)
        assert len(call.results()) == 4
        del call, images
        lanes = model_threads(1)
        assert lanes.submit(len, "the last batch is let go").result() == 24
        assert [one() for one in watched] == [None, None, None]
    finally:
        gc.enable()


def test_an_engine_that_hands_calls_to_another_process_hands_on_their_results():
    class Apart(beam.PTransform):
        def expand(self, images):
            run = inference.RunInference(FakeHandler(LoadSpec("/m"), 2)).with_output_types(Call)
            calls = images | run | beam.Reshuffle()
            return calls | beam.ParDo(_HandOn()).with_outputs(
                "failures", "timings", main="features"
            )

    out = pipe([[image(1), image(POISON)], [image(3)]], Apart())
    assert sorted(row.ref.key for row in out.features) == ["k1", "k3"]
    assert [failure.key for failure in out.failures] == [f"k{POISON}"]
    assert Timing.total(out.timings).filled == 3


def test_beam_learns_the_size_of_a_call_without_waiting_for_it():
    model = Gate()
    (call,) = FrozenModelHandler(LoadSpec("/m"), 2).run_inference([image(1)], model)
    coder = beam.coders.registry.get_coder(Call)
    assert coder.get_impl().estimate_size(call) > 0
    model.open.set()
    for _ in range(2):
        again = coder.decode(coder.encode(call))
        assert [row.ref.key for row in again.results()[:-1]] == ["k1"]
        call = again


def test_the_transform_parts_features_from_failures():
    handler = FakeHandler(LoadSpec("/m"), 4)
    assert isinstance(handler, ModelHandler)
    values = [1, 2, POISON, 4, NAN, 6, 7]
    out = pipe([image(v) for v in values], ExtractFeatures(handler))
    features, failures = list(out.features), list(out.failures)
    assert sorted(row.ref.record_index for row in features) == [1, 2, 4, 6, 7]
    assert sorted((f.record_index, f.error_class) for f in failures) == [
        (POISON, "ValueError"),
        (NAN, "NotFinite"),
    ]


@pytest.mark.parametrize(("count", "batches", "slots"), [(4, 1, 4), (9, 3, 12), (1, 1, 4)])
def test_batches_and_what_fills_them_are_told(count, batches, slots):
    out = pipe(
        [image(v + 1) for v in range(count)], ExtractFeatures(FakeHandler(LoadSpec("/m"), 4))
    )
    timing = Timing.total(out.timings)
    assert (timing.batches, timing.filled, timing.slots) == (batches, count, slots)
    assert timing.inference > 0
    assert timing.images == 0


def test_a_broken_model_fails_the_run_with_its_reason():
    class Broken(FakeHandler):
        def load_model(self):
            return Model(broken=RuntimeError("no kernel"))

    with pytest.raises(Exception, match="the model fails on every image"):
        pipe([image(1)], ExtractFeatures(Broken(LoadSpec("/m"), 4)))


def test_a_picture_gets_the_same_vectors_in_whatever_batch():
    results, _, _ = run([3, POISON, 5, 7])
    alone, _, _ = run([7])
    assert dataclasses.asdict(results[3])["sha256"] == alone[0].sha256
    np.testing.assert_array_equal(results[3].vectors["logits"], alone[0].vectors["logits"])


@pytest.mark.parametrize("sign", [1, -1])
def test_what_float16_cannot_hold_is_a_failure_not_an_infinity(sign):
    class Large(Model):
        def __call__(self, pixels):
            return {name: rows * sign * 1000 for name, rows in super().__call__(pixels).items()}

    images = [image(v) for v in (1, 60, 32, 33)]
    largest = float(np.finfo("float16").max)
    results, _ = infer_batch(images, Large(), 4, largest)
    assert failed(results) == [60, 33]  # 2 x 33 x 1000 is beyond 65504
    assert {r.error_class for r in results if isinstance(r, Failure)} == {"NotFinite"}
    *rows, _ = through(FrozenModelHandler(LoadSpec("/m"), 4, "float16"), images, Large())
    assert failed(rows) == [60, 33]


# ---------------------------------------------------------------- pictures that came before


def test_equal_bytes_are_computed_once_and_give_a_row_each():
    handler, model = FrozenModelHandler(LoadSpec("/m"), 4), Model()
    first = through(handler, [image(1, "a"), image(2, "b"), image(1, "c")], model)
    again = through(pickle.loads(pickle.dumps(handler)), [image(2, "d"), image(1, "e")], model)
    assert model.sizes == [4]  # one batch, and none for what is known
    *rows, told = first
    assert [(row.ref.key, row.vectors["embedding"].tolist()) for row in rows] == [
        ("a", [1]), ("b", [2]), ("c", [1]),
    ]  # fmt: skip
    assert (told.filled, told.reused) == (2, 1)
    *rows, told = again
    assert [(row.ref.key, row.vectors["logits"].tolist()) for row in rows] == [
        ("d", [2, 4]), ("e", [1, 2]),
    ]  # fmt: skip
    assert (told.batches, told.filled, told.slots, told.reused) == (0, 0, 0, 2)


def test_each_of_equal_bad_pictures_is_a_failure_of_its_own():
    handler = FrozenModelHandler(LoadSpec("/m"), 4)
    images = [image(POISON, "a"), image(1, "b"), image(POISON, "c")]
    *rows, _ = through(handler, images, Model())
    assert [(row.key, row.stage) for row in rows if isinstance(row, Failure)] == [
        ("a", "infer"), ("c", "infer"),
    ]  # fmt: skip


def test_another_run_knows_nothing_of_the_first():
    model = Model()
    for _ in range(2):  # another model or preprocessing, perhaps
        through(FrozenModelHandler(LoadSpec("/m"), 4), [image(1)], model)
    assert model.sizes == [4, 4]


def test_what_is_known_is_bounded():
    known = Known(max_bytes=10_000)
    batch = np.arange(1000 * 50, dtype=np.float32).reshape(1000, 50)
    for number in range(1000):
        known.put(str(number), {"embedding": batch[number]})
        known.get("0")  # what is asked for stays
        known.put("0", {"embedding": batch[7]})  # and is not put twice
    kept = [n for n in range(1000) if known.get(str(n)) is not None]
    assert kept == [0, *range(987, 1000)]  # of 500 + 200 bytes each
    vectors = known.get("999")
    assert vectors["embedding"].base is None  # no row that holds its batch
    assert vectors["embedding"].tolist() == batch[999].tolist()


def test_pytorch_is_not_imported_with_beam(tmp_path):
    (tmp_path / "torch.py").write_text("")
    program = (
        "import sys, transforms.beam_ml; assert 'torch' not in sys.modules\n"
        "import torch, transforms.inference"
    )
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[1]}"}
    subprocess.run([sys.executable, "-c", program], env=env, cwd=tmp_path, check=True)
