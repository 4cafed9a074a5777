"""DecodeImages: encoded images -> uint8 pixels of the model's size."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import apache_beam as beam
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.windowed_value import WindowedValue

from formats.image import Preprocessing, decode_image
from formats.isolation import DecodeProcesses, Limits, shared_processes
from formats.records import DecodedImage, Failure, ImageError, ImageRecord, digest
from transforms.lookahead import Lookahead, cpu_threads
from transforms.metrics import inc_counter

_AHEAD = 128  # images: what the threads decode while the model runs on a batch or two


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
    def __init__(self, how: Preprocessing, limits: Limits | None):
        self._how = how
        self._limits = limits

    def setup(self) -> None:
        self._open = contextlib.ExitStack()
        self._processes = (
            self._open.enter_context(shared_processes(self._how, self._limits, decode_image))
            if self._limits
            else None
        )

    def teardown(self) -> None:
        self._open.close()

    def start_bundle(self) -> None:
        self._ahead: Lookahead[ImageRecord, DecodedImage | Failure] = Lookahead(
            functools.partial(decode_record, how=self._how, processes=self._processes),
            cpu_threads(),
            _AHEAD,
            weigh=lambda record: len(record.data),
        )

    def process(self, record: ImageRecord) -> Iterator[Any]:
        for item in self._ahead.push(record):
            if isinstance(item, Failure):
                inc_counter("DecodeImages", "failures")
                yield beam.pvalue.TaggedOutput("failures", item)
            else:
                yield item

    def finish_bundle(self) -> Iterator[Any]:
        window = GlobalWindow()
        for item in self._ahead.drain():
            value = WindowedValue(item, window.max_timestamp(), (window,))
            if isinstance(item, Failure):
                inc_counter("DecodeImages", "failures")
                yield beam.pvalue.TaggedOutput("failures", value)
            else:
                yield value


class DecodeImages(beam.PTransform):
    """ImageRecord -> `images` (DecodedImage) and `failures` (Failure), on one thread a core.

    Decoding runs ahead of the model within a bundle. For batch pipelines: all in one window.
    With `limits` it happens in processes of its own, else in this one.
    """

    def __init__(self, how: Preprocessing, limits: Limits | None = None):
        super().__init__()
        self._how = how
        self._limits = limits

    def expand(self, records: beam.PCollection[ImageRecord]) -> Any:
        """A PCollection of ImageRecord -> the two outputs."""
        return records | beam.ParDo(_Decode(self._how, self._limits)).with_outputs(
            "failures", main="images"
        )
