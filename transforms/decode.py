"""DecodeImages: encoded images -> uint8 pixels of the model's size."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import apache_beam as beam
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.windowed_value import WindowedValue

from formats.image import Preprocessing, decode_image
from formats.isolation import DecodeProcesses, Limits, shared_processes
from formats.records import DecodedImage, Failure, ImageError, ImageRecord, digest
from formats.timing import Timing
from transforms.lookahead import Lookahead, cpu_threads, model_busy
from transforms.metrics import count_decoding, inc_counter

In = TypeVar("In")
Out = TypeVar("Out")

_TOLD = 256  # images to a Timing
_AHEAD = 128  # images: what the threads decode while the model runs on a batch or two
_SOON = 8  # images: ahead of the first, which the model waits for


def decode_record(
    record: ImageRecord, how: Preprocessing, processes: DecodeProcesses | None = None
) -> DecodedImage | Failure:
    """`record` as pixels uint8 [S, S, 3], or the Failure that says why not.

    `processes` that decode by `how` do it, where given; else the calling thread.
    """
    sha256, size = digest(record.data), len(record.data)
    try:
        pixels, width, height = (
            processes.decode(record.data) if processes else decode_image(record.data, how)
        )
    except ImageError as error:
        return Failure.of(record.ref, "decode", error, sha256, size)
    return DecodedImage(record.ref, sha256, size, width, height, pixels)


class _Decode(beam.DoFn):
    def __init__(self, how: Preprocessing, limits: Limits | None, ahead: int = _AHEAD):
        self._how = how
        self._limits = limits
        self._most_ahead = ahead
        self._open = contextlib.ExitStack()

    def setup(self) -> None:
        self._idle = time.perf_counter
        shared = shared_processes(self._how, self._limits, decode_image)
        self._processes = self._open.enter_context(shared)
        self._ahead = self._lookahead()
        # What a bundle that failed has left waiting would start the processes anew.
        self._open.callback(lambda: self._ahead.abandon())

    def teardown(self) -> None:
        self._open.close()

    def _lookahead(self) -> Lookahead[ImageRecord, tuple[DecodedImage | Failure, float]]:
        decode = functools.partial(decode_record, how=self._how, processes=self._processes)
        return Lookahead(
            functools.partial(_timed, decode),
            cpu_threads(),
            self._most_ahead,
            weigh=lambda record: len(record.data),
            start=_SOON,
            clock=self._idle,
        )

    def start_bundle(self) -> None:
        self._idle = model_busy().idle  # while the model runs, nothing is waited for
        self._ahead = self._lookahead()
        self._begin(time.perf_counter())
        self._left = self._idle()

    def _begin(self, now: float) -> None:
        self._begun = now
        self._seconds: list[float] = []  # of each image
        self._bytes = 0
        self._read = self._ahead.waited = 0.0

    def process(self, record: ImageRecord) -> Iterator[Any]:
        self._read += self._idle() - self._left  # what went before is the reader's
        for item in self._ahead.push(record):
            yield self._part(item)
        self._left = self._idle()
        if len(self._seconds) >= _TOLD:
            yield beam.pvalue.TaggedOutput("timings", self._timing())

    def finish_bundle(self) -> Iterator[Any]:
        self._read += self._idle() - self._left
        window = GlobalWindow()
        for item in self._ahead.drain():
            yield self._part(item, lambda v: WindowedValue(v, window.max_timestamp(), (window,)))
        timing = WindowedValue(self._timing(), window.max_timestamp(), (window,))
        yield beam.pvalue.TaggedOutput("timings", timing)

    def _part(
        self, timed: tuple[DecodedImage | Failure, float], wrap: Callable[[Any], Any] = lambda v: v
    ) -> Any:
        item, seconds = timed
        self._seconds.append(seconds)
        self._bytes += item.bytes or 0
        if isinstance(item, Failure):
            inc_counter("DecodeImages", "failures")
            return beam.pvalue.TaggedOutput("failures", wrap(item))
        return wrap(item)

    def _timing(self) -> Timing:
        """That of what came since the last, counted."""
        now = time.perf_counter()
        timing = Timing.of_decoding(
            self._seconds, self._bytes, self._read, self._ahead.waited, now - self._begun
        )
        count_decoding(timing, self._seconds)
        self._begin(now)
        return timing


def _timed(decode: Callable[[In], Out], item: In) -> tuple[Out, float]:
    """What `decode` makes of `item`, and the seconds it took."""
    start = time.perf_counter()
    return decode(item), time.perf_counter() - start


class DecodeImages(beam.PTransform):
    """ImageRecord -> `images` (DecodedImage), `failures` (Failure) and `timings` (Timing).

    One thread a core decodes.

    Decoding runs ahead of the model within a bundle. For batch pipelines: all in one window.
    With `limits` it happens in processes of its own, else in this one. `at_once`: images that the
    next step takes in one call. Where those are many, as for a GPU or many cores, as many more are
    decoded meanwhile (up to 64 MiB of encoded pictures), or each call would wait for them.
    """

    def __init__(self, how: Preprocessing, limits: Limits | None = None, at_once: int = 1):
        super().__init__()
        self._step = how, limits, _AHEAD if at_once <= _AHEAD else 2 * at_once

    def expand(self, records: beam.PCollection[ImageRecord]) -> Any:
        """A PCollection of ImageRecord -> the outputs."""
        return records | beam.ParDo(_Decode(*self._step)).with_outputs(
            "failures", "timings", main="images"
        )
