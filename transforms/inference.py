"""ExtractFeatures: pixels -> embeddings and logits, by RunInference with a handler of our own.

Beam's TFModelHandler calls Keras 3's load_model, which refuses every SavedModel directory.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
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
from transforms.lookahead import model_threads
from transforms.metrics import count_inference, inc_counter
from transforms.reuse import known_in

Vectors = Mapping[str, np.ndarray]
_ALIGNMENT = 64  # bytes, of Eigen's tensors
_LARGEST = float(np.finfo(np.float32).max)
_SMALL = 8  # images a batch
_TOGETHER = 128  # images in one call, in as many rounds as it takes


def infer_batch(
    images: Sequence[DecodedImage],
    model: LoadedModel,
    batch_size: int,
    largest: float = float("inf"),
) -> tuple[list[Features | Failure], int]:
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


class FrozenModelHandler(ModelHandler[DecodedImage, Features | Failure | Timing, LoadedModel]):
    """Loads a model of either hub format as one frozen function and runs it on fixed batches.

    `batch_size` images make a batch, and `spec.copies` batches run at once, each on its own thread;
    small batches several times before the threads wait for each other, but once in a bundle's first
    call, whose rows are waited for. `call_sizes`: images in the first call, and in the others.
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
        first = most = batch_size * spec.copies
        if batch_size >= _SMALL:  # less are for large networks, whose rows take long
            most *= max(1, _TOGETHER // most)
        self.call_sizes = first, most
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
    ) -> list[Features | Failure | Timing]:
        """One result an image, in order (see `infer_batch`), and then the Timing of them all."""
        start = time.perf_counter()
        size = self._batch_size
        known = known_in(self._run)
        vectors = {image.sha256: known.get(image.sha256) for image in batch}
        new = {image.sha256: image for image in batch if vectors[image.sha256] is None}
        waiting = list(new.values())
        parts = [waiting[at : at + size] for at in range(0, len(waiting), size)]
        infer = functools.partial(infer_batch, model=model, batch_size=size, largest=self._largest)
        done = list(model_threads(self._spec.copies).map(infer, parts))
        allowed = min((fitted for _, fitted in done), default=size)
        if allowed < size:
            inc_counter("ExtractFeatures", "batch_halvings")
            self._batch_size = allowed
        timing = Timing(
            batches=len(parts),
            filled=len(waiting),
            slots=len(parts) * size,
            inference=time.perf_counter() - start,
            reused=len(batch) - len(waiting),
        )
        count_inference(timing)
        computed = dict(
            zip(new, (result for results, _ in done for result in results), strict=True)
        )
        for sha256, result in computed.items():
            if isinstance(result, Features):
                known.put(sha256, result.vectors)
        return [*(_like(image, vectors, computed) for image in batch), timing]

    def get_num_bytes(self, batch: Sequence[DecodedImage]) -> int:
        """Bytes of pixels. Beam's default pickles the whole batch to learn it."""
        return sum(image.pixels.nbytes for image in batch)

    def get_metrics_namespace(self) -> str:
        """The transform's name, as everywhere here."""
        return "ExtractFeatures"


def _like(
    image: DecodedImage,
    known: Mapping[str, Vectors | None],
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
    assert vectors is not None
    return Features(image.ref, image.sha256, image.width, image.height, vectors)


def _part(result: Features | Failure | Timing) -> Iterator[Any]:
    if isinstance(result, Timing):
        yield beam.pvalue.TaggedOutput("timings", result)
    elif isinstance(result, Failure):
        inc_counter("ExtractFeatures", "failures")
        yield beam.pvalue.TaggedOutput("failures", result)
    else:
        yield result


class _Batch(beam.DoFn):
    """Images -> lists of them, each for one call of the handler; all in one window."""

    def __init__(self, first: int, most: int):
        self._first = first
        self._most = most

    def start_bundle(self) -> None:
        self._size = self._first
        self._waiting: list[DecodedImage] = []

    def process(self, image: DecodedImage) -> Iterator[list[DecodedImage]]:
        self._waiting.append(image)
        if len(self._waiting) == self._size:
            full, self._waiting, self._size = self._waiting, [], self._most
            yield full

    def finish_bundle(self) -> Iterator[Any]:
        if self._waiting:
            window = GlobalWindow()
            yield WindowedValue(self._waiting, window.max_timestamp(), (window,))
        self._waiting = []


class ExtractFeatures(beam.PTransform):
    """DecodedImage -> `features` (Features), `failures` (Failure) and `timings` (Timing)."""

    def __init__(self, handler: FrozenModelHandler):
        super().__init__()
        self._handler = handler

    def expand(self, images: beam.PCollection[DecodedImage]) -> Any:
        """A PCollection of DecodedImage -> the outputs."""
        return (
            images
            | "Batch" >> beam.ParDo(_Batch(*self._handler.call_sizes))
            | "RunInference" >> RunInference(self._handler)
            | "Part" >> beam.FlatMap(_part).with_outputs("failures", "timings", main="features")
        )
