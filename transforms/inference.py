"""ExtractFeatures: pixels -> embeddings and logits, by RunInference with a handler of our own.

Beam's TFModelHandler calls Keras 3's load_model, which refuses every SavedModel directory.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.windowed_value import WindowedValue

from formats.records import DecodedImage, Failure, Features, ImageError
from formats.timing import Timing
from models.loading import LoadedModel, LoadSpec, OutOfMemory, load
from storage.errors import RunError
from transforms.beam_ml import ModelHandler, RunInference
from transforms.lookahead import model_busy, model_threads
from transforms.metrics import count_inference, inc_counter
from transforms.reuse import Known, Running, known_in

Vectors = Mapping[str, np.ndarray]
Results = list[Features | Failure]
_ALIGNMENT = 64  # bytes, of Eigen's tensors
_LARGEST = float(np.finfo(np.float32).max)


def infer_batch(
    images: Sequence[DecodedImage],
    model: LoadedModel,
    batch_size: int,
    largest: float = float("inf"),
) -> tuple[Results, int]:
    """Features or Failure for each of `images`, in order, and the batch size that memory allowed.

    At most `batch_size` images, run padded to it. A batch that fails is bisected, so that one
    poisonous image costs one row; when memory runs out the batch is halved. If every image of a
    batch fails, a probe picture is run, and RunError raised when that fails too.
    """
    size = batch_size
    results: list[Features | Failure | None] = [_misfit(image, model) for image in images]
    fitting = [i for i, result in enumerate(results) if result is None]
    stack = [fitting]
    while stack:
        rows = stack.pop()
        if not rows:
            continue
        if len(rows) > size:
            stack += [rows[size:], rows[:size]]
            continue
        try:
            vectors = run_padded(model, [images[i].pixels for i in rows], size)
        except (OutOfMemory, MemoryError) as error:
            if size == 1:
                raise RunError(
                    f"the device has no memory for a batch of one image ({error})"
                ) from None
            size = (size + 1) // 2
            stack.append(rows)
        except Exception as error:  # whatever the runtime raises is this image's reason
            if len(rows) > 1:
                half = len(rows) // 2
                stack += [rows[half:], rows[:half]]
            else:
                reason = ImageError(type(error).__name__, str(error) or "the model refused it")
                results[rows[0]] = _failure(images[rows[0]], reason)
        else:
            tame = np.logical_and.reduce([_tame(values, largest) for values in vectors.values()])
            for at, row in enumerate(rows):
                of_it = {name: values[at] for name, values in vectors.items()}
                make = _features if tame[at] else _wild
                results[row] = make(images[row], of_it, largest)
    if fitting and all(isinstance(results[i], Failure) for i in fitting):
        _probe(model, size, images[fitting[0]], largest)
    return [result for result in results if result is not None], size


def run_padded(model: LoadedModel, pixels: Sequence[np.ndarray], size: int) -> Vectors:
    """The model's vectors for `pixels`, run as one batch of exactly `size`.

    One shape is one compilation, and gives a picture the same bits in every batch.
    """
    count, shape = len(pixels), pixels[0].shape
    batch = _aligned(size * math.prod(shape)).reshape(size, *shape)
    np.stack(pixels, out=batch[:count])
    batch[count:] = 0
    return {name: rows[:count] for name, rows in model(batch).items()}


def _aligned(size: int) -> np.ndarray:
    """`size` bytes, anything in them, from an address that TensorFlow takes without a copy."""
    room = np.empty(size + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    return room[start : start + size]


def _misfit(image: DecodedImage, model: LoadedModel) -> Failure | None:
    """The Failure of pixels that the model cannot take: a wrong rank would abort the process."""
    expected = (model.info.image_size, model.info.image_size, 3)
    pixels = image.pixels
    if pixels.shape == expected and pixels.dtype == np.uint8:
        return None
    message = f"pixels are {pixels.dtype} {list(pixels.shape)}, the model takes uint8 {expected}"
    return _failure(image, ImageError("WrongPixels", message))


def _tame(values: np.ndarray, largest: float) -> np.ndarray:
    """Which rows of `values` hold no NaN, infinity, nor a value beyond `largest` either way."""
    tame: np.ndarray = np.abs(values).max(-1) <= min(largest, _LARGEST)
    return tame


def _features(image: DecodedImage, vectors: Vectors, _: float) -> Features:
    return Features(image.ref, image.sha256, image.width, image.height, vectors)


def _wild(image: DecodedImage, vectors: Vectors, largest: float) -> Failure:
    beyond = f", or beyond {largest:g}" if largest < _LARGEST else ""
    message = f"the model's {_untamed(vectors, largest)} of this picture is not finite{beyond}"
    return _failure(image, ImageError("NotFinite", message))


def _untamed(vectors: Vectors, largest: float) -> str:
    """The names of what is not tame, "" where all is."""
    names = [name for name, values in vectors.items() if not _tame(values, largest).all()]
    return " and ".join(names)


def _failure(image: DecodedImage, reason: ImageError) -> Failure:
    return Failure.of(image.ref, "infer", reason, image.sha256, image.bytes)


def _probe(model: LoadedModel, size: int, image: DecodedImage, largest: float) -> None:
    """Tell a broken model from a poisonous batch, by a grey picture."""
    side = model.info.image_size
    try:
        grey = np.full((side, side, 3), 127, np.uint8)
        names = _untamed(run_padded(model, [grey], size), largest)
        reason = f"its {names} is not finite" if names else None
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error)[:300]}"
    if reason:
        raise RunError(
            f"the model fails on every image, a plain grey one too ({reason}); first seen on "
            f"{image.ref.key[-300:]}"
        )


class Call:
    """Images on their way through the model; its batches run from when it is made.

    `infer` runs a batch of at most `size` images on one of `lanes`, and tells whether memory made
    it a smaller one. Of equal encoded bytes the vectors are computed once: what is `known`, or on
    its way in another call, is taken from there.
    """

    def __init__(
        self,
        images: Sequence[DecodedImage],
        infer: Callable[[Sequence[DecodedImage]], tuple[Results, bool]],
        lanes: ThreadPoolExecutor,
        size: int,
        known: Known,
    ):
        self._images = images
        self._size = size
        self._found = {image.sha256: known.get(image.sha256) for image in images}
        self._new = {image.sha256: image for image in images if self._found[image.sha256] is None}
        self._parts = []
        self._busy = busy = model_busy()
        self._results: list[Features | Failure | Timing] | None = None
        self._lock = threading.Lock()
        digests = list(self._new)
        for at in range(0, len(digests), size):
            busy.begin()
            batch = digests[at : at + size]
            part = lanes.submit(infer, [self._new[sha256] for sha256 in batch])
            part.add_done_callback(lambda _: busy.end())  # no self, whose pixels it would keep
            known.expect(batch, part)
            self._parts.append(part)

    def results(self) -> list[Features | Failure | Timing]:
        """Waits for it. One result an image, in order, and then the Timing of them all."""
        with self._lock:  # Beam may look at a sample of them, from another thread
            if self._results is None:
                self._results = self._awaited()
            return self._results

    def _awaited(self) -> list[Features | Failure | Timing]:
        parts = [part.result() for part in self._parts]
        if halved := sum(lowered for _, lowered in parts):
            inc_counter("ExtractFeatures", "batch_halvings", halved)
        done = [result for results, _ in parts for result in results]
        computed = dict(zip(self._new, done, strict=True))
        for sha256, found in self._found.items():
            if isinstance(found, tuple):
                elsewhere, at = found
                computed[sha256] = elsewhere.result()[0][at]
        timing = Timing(
            batches=len(self._parts),
            filled=len(done),
            slots=len(self._parts) * self._size,
            inference=self._busy.lap(),
            reused=len(self._images) - len(done),
        )
        count_inference(timing)
        return [*(_like(image, self._found, computed) for image in self._images), timing]


_ROWS = beam.coders.FastPrimitivesCoder()  # as of all rows between steps


class _CallCoder(beam.coders.Coder):
    """For engines that hand a Call to another process: it takes the results there."""

    def encode(self, value: Call | _Done) -> bytes:
        return _ROWS.encode(value.results())  # type: ignore[no-any-return]

    def decode(self, encoded: bytes) -> _Done:
        return _Done(_ROWS.decode(encoded))

    def estimate_size(self, value: Call | _Done) -> int:
        """What Beam asks of some elements, which should not have to wait for it."""
        return 1 << 16


class _Done:
    """A Call that came from another process."""

    def __init__(self, results: list[Features | Failure | Timing]):
        self._results = results

    def results(self) -> list[Features | Failure | Timing]:
        return self._results


beam.coders.registry.register_coder(Call, _CallCoder)


class FrozenModelHandler(ModelHandler[DecodedImage, Call, LoadedModel]):
    """Loads a model of either hub format as one frozen function and runs it on fixed batches.

    `batch_size` images make a batch, and `spec.copies` batches run at once, each on its own thread;
    `call_size` images, for all of these, come in a call, which is handed on before it has ended.
    `dtype`: the type in which vectors will be written; what it cannot hold is a failure. Of equal
    encoded bytes the vectors are computed once, as far as a process remembers them. `fingerprint`:
    the only one that the model may have, None for any.
    """

    def __init__(
        self,
        spec: LoadSpec,
        batch_size: int,
        dtype: str = "float32",
        fingerprint: str | None = None,
        value_range: tuple[float, float] | None = None,
    ):
        super().__init__()
        self.call_size = batch_size * spec.copies
        self._spec = spec
        self._batch_size = batch_size
        self._largest = float(np.finfo(dtype).max)
        self._fingerprint = fingerprint
        self._value_range = value_range
        self._run = uuid.uuid4().hex  # all copies of this handler share what they know

    def should_skip_batching(self) -> bool:
        """Yes: ExtractFeatures hands over whole batches."""
        return True

    def load_model(self) -> LoadedModel:
        """The model; once a process, whoever asks. RunError where it is not the one expected."""
        model = load(self._spec)
        found = model.info.fingerprint
        if self._fingerprint not in (None, found):
            raise RunError(
                f"the model at {self._spec.handle} has the fingerprint {found} here, and the run "
                f"was planned with {self._fingerprint}: its rows would mix two models; prepare it "
                "once (python -m pipeline.models prepare) and give --model that folder"
            )
        if self._value_range not in (None, model.info.value_range):
            raise RunError(
                f"the model at {self._spec.handle} takes pixels of {model.info.value_range} here, "
                f"and the run was planned with {self._value_range}; prepare it once and give "
                "--model that folder"
            )
        return model

    def run_inference(
        self,
        batch: Sequence[DecodedImage],
        model: LoadedModel,
        inference_args: dict[str, Any] | None = None,
    ) -> list[Call]:
        """One Call. While its images are computed, others are decoded and rows written."""
        infer = functools.partial(self._infer, model=model)
        lanes = model_threads(self._spec.copies)
        return [Call(batch, infer, lanes, self._batch_size, known_in(self._run))]

    def _infer(self, images: Sequence[DecodedImage], model: LoadedModel) -> tuple[Results, bool]:
        """`infer_batch` by what memory has allowed so far, and whether it allowed that now."""
        size = self._batch_size
        results, allowed = infer_batch(images, model, size, self._largest)
        if lowered := allowed < size:
            self._batch_size = min(self._batch_size, allowed)
        return results, lowered

    def override_metrics(self, metrics_namespace: str | None = None) -> bool:
        """Yes: Beam's own would take handing a call over for running it."""
        return True

    def get_num_bytes(self, batch: Sequence[DecodedImage]) -> int:
        """Bytes of pixels. Beam's default pickles the whole batch to learn it."""
        return sum(image.pixels.nbytes for image in batch)

    def get_metrics_namespace(self) -> str:
        """The transform's name, as everywhere here."""
        return "ExtractFeatures"


def _like(
    image: DecodedImage,
    known: Mapping[str, Vectors | Running | None],
    computed: Mapping[str, Features | Failure],
) -> Features | Failure:
    """The result of `image`, which its own bytes or equal ones gave."""
    vectors = known[image.sha256]
    result = computed.get(image.sha256)
    if isinstance(result, Failure):
        ref = image.ref
        return dataclasses.replace(
            result, key=ref.key, source=ref.source, record_index=ref.record_index
        )
    if result is not None:
        vectors = result.vectors
    assert isinstance(vectors, Mapping)
    return Features(image.ref, image.sha256, image.width, image.height, vectors)


class _Batch(beam.DoFn):
    """Images -> lists of `size` of them, each for one call of the handler; all in one window."""

    def __init__(self, size: int):
        self._size = size

    def start_bundle(self) -> None:
        self._waiting: list[DecodedImage] = []

    def process(self, image: DecodedImage) -> Iterator[list[DecodedImage]]:
        self._waiting.append(image)
        if len(self._waiting) == self._size:
            full, self._waiting = self._waiting, []
            yield full

    def finish_bundle(self) -> Iterator[Any]:
        if self._waiting:
            yield _globally(self._waiting)
        self._waiting = []


class _HandOn(beam.DoFn):
    """Calls -> their results, each when the next one runs, so that the model never waits for it."""

    def start_bundle(self) -> None:
        self._running: Call | None = None

    def process(self, call: Call) -> Iterator[Any]:
        ended, self._running = self._running, call
        if ended:
            yield from map(_tagged, ended.results())

    def finish_bundle(self) -> Iterator[Any]:
        if self._running:
            yield from (_tagged(result, _globally) for result in self._running.results())
        self._running = None


def _globally(value: Any) -> Any:
    window = GlobalWindow()
    return WindowedValue(value, window.max_timestamp(), (window,))


def _tagged(result: Features | Failure | Timing, wrap: Callable[[Any], Any] = lambda v: v) -> Any:
    if isinstance(result, Timing):
        return beam.pvalue.TaggedOutput("timings", wrap(result))
    if isinstance(result, Failure):
        inc_counter("ExtractFeatures", "failures")
        return beam.pvalue.TaggedOutput("failures", wrap(result))
    return wrap(result)


class ExtractFeatures(beam.PTransform):
    """DecodedImage -> `features` (Features), `failures` (Failure) and `timings` (Timing)."""

    def __init__(self, handler: FrozenModelHandler):
        super().__init__()
        self._handler = handler

    def expand(self, images: beam.PCollection[DecodedImage]) -> Any:
        """A PCollection of DecodedImage -> the outputs."""
        return (
            images
            | "Batch" >> beam.ParDo(_Batch(self._handler.call_size))
            | "RunInference" >> RunInference(self._handler).with_output_types(Call)
            | "HandOn" >> beam.ParDo(_HandOn()).with_outputs("failures", "timings", main="features")
        )
