"""WriteFeatures and WriteFailures: rows -> closed data files; Publish: files -> the commit."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.windowed_value import WindowedValue

from formats import dataset, table
from formats.dataset import Publication
from formats.parts import FAILURES, FEATURES, PartFile, PartWriter
from formats.records import Failure, Features
from formats.timing import Timing
from transforms.metrics import inc_counter

_ROW_GROUP_BYTES = 8 << 20  # held in memory; readers fetch whole groups
_FILE_BYTES = 256 << 20
_FILE_SECONDS = 60  # at most this much work is redone after a kill


class _WriteParts(beam.DoFn):
    """Rows of one kind -> PartFile, one for each file that is closed."""

    def __init__(
        self,
        kind: str,
        output: str,
        run_id: str,
        to_batch: Callable[[list[Any]], pa.RecordBatch],
        weigh: Callable[[Any], int],
        rows_per_file: int | None,
        compression: str,
    ):
        self._kind = kind
        self._output = output
        self._run_id = run_id
        self._to_batch = to_batch
        self._weigh = weigh
        self._file_rows = rows_per_file
        self._compression = compression

    def start_bundle(self) -> None:
        self._rows: list[Any] = []
        self._bytes = 0  # of these rows
        self._writer: PartWriter | None = None
        self._opened = 0.0

    def process(self, row: Any) -> Iterator[PartFile]:
        if not self._rows and self._writer is None:
            self._opened = time.monotonic()
        self._rows.append(row)
        self._bytes += self._weigh(row)
        written = self._writer.rows if self._writer else 0
        full = self._file_rows is not None and written + len(self._rows) >= self._file_rows
        late = time.monotonic() - self._opened > _FILE_SECONDS
        if full or late or self._bytes >= _ROW_GROUP_BYTES:
            self._flush()
        if full or late or (self._writer and self._writer.bytes >= _FILE_BYTES):
            yield self._close()

    def finish_bundle(self) -> Iterator[WindowedValue]:
        self._flush()
        if self._writer is not None:
            window = GlobalWindow()
            yield WindowedValue(self._close(), window.max_timestamp(), (window,))

    def teardown(self) -> None:
        if getattr(self, "_writer", None) is not None:
            self._writer.abort()  # type: ignore[union-attr]

    def _flush(self) -> None:
        if not self._rows:
            return
        batch = self._to_batch(self._rows)
        if self._writer is None:
            # A name of its own, so that no killed or concurrent run can collide with it.
            name = f"part-{self._run_id}-{uuid.uuid4().hex[:12]}"
            self._writer = PartWriter(
                self._output, self._kind, name, batch.schema, self._compression
            )
        self._writer.write(batch)
        self._rows, self._bytes = [], 0

    def _close(self) -> PartFile:
        assert self._writer is not None
        part, self._writer = self._writer.close(), None
        inc_counter("Write", f"{self._kind}_rows", part.rows)
        inc_counter("Write", f"{self._kind}_bytes", part.bytes)
        return part


def _row_maker(spec: table.TableSpec) -> Callable[[list[Any]], pa.RecordBatch]:
    schema = spec.schema()
    return lambda rows: table.features_table(rows, spec, schema)


def _size(value: Any) -> int:
    """About how many bytes a carried value takes."""
    if isinstance(value, list):
        return sum(map(_size, value))
    return len(value) if isinstance(value, str | bytes) else 8


class WriteFeatures(beam.PTransform):
    """Features -> PartFile. Vectors are written where they were computed, and cross no shuffle."""

    def __init__(
        self,
        output: str,
        run_id: str,
        spec: table.TableSpec,
        compression: str = "zstd",
        rows_per_file: int | None = None,
    ):
        super().__init__()
        fixed = 300 + 30 * spec.top_k
        self._write = _WriteParts(
            FEATURES,
            output,
            run_id,
            _row_maker(spec),
            lambda row: (
                fixed
                + sum(vector.nbytes for vector in row.vectors.values())  # logits for top_k too
                + sum(map(_size, row.ref.columns.values()))
            ),
            rows_per_file,
            compression,
        )

    def expand(self, rows: beam.PCollection[Features]) -> beam.PCollection[PartFile]:
        """A PCollection of Features -> the files that hold them."""
        return rows | beam.ParDo(self._write)


class WriteFailures(beam.PTransform):
    """Failure -> PartFile."""

    def __init__(
        self,
        output: str,
        run_id: str,
        metadata: Mapping[str, str],
        compression: str = "zstd",
        rows_per_file: int | None = None,
    ):
        super().__init__()
        schema = table.failure_schema(metadata)
        self._write = _WriteParts(
            FAILURES,
            output,
            run_id,
            lambda rows: table.failures_table(rows, schema),
            lambda row: 1000,
            rows_per_file,
            compression,
        )

    def expand(self, rows: beam.PCollection[Failure]) -> beam.PCollection[PartFile]:
        """A PCollection of Failure -> the files that hold them."""
        return rows | beam.ParDo(self._write)


FAILED = "failed/"  # before stage/error_class in the counters' names


class _CountRows(beam.DoFn):
    """Counts rows, those of features made as they would be written, and drops them."""

    _ROWS = 256  # made at once

    def __init__(self, to_batch: Callable[[list[Any]], pa.RecordBatch] | None):
        self._to_batch = to_batch

    def start_bundle(self) -> None:
        self._rows: list[Any] = []

    def process(self, row: Any) -> None:
        if isinstance(row, Failure):
            inc_counter("Count", f"{FAILED}{row.stage}/{row.error_class}")
        elif self._to_batch is None:
            inc_counter("Count", "passed")
        else:
            self._rows.append(row)
            if len(self._rows) == self._ROWS:
                self._make()

    def finish_bundle(self) -> None:
        self._make()

    def _make(self) -> None:
        if self._to_batch is not None and self._rows:
            inc_counter("Count", "features", self._to_batch(self._rows).num_rows)
            self._rows = []


class CountRows(beam.PTransform):
    """Rows -> Beam counters and nothing else.

    `features` of Features, made into rows by `spec`; without it `passed` of anything, and
    `failed/STAGE/CLASS` of Failure.
    """

    def __init__(self, spec: table.TableSpec | None = None):
        super().__init__()
        self._count = _CountRows(_row_maker(spec) if spec else None)

    def expand(self, rows: beam.PCollection[Any]) -> beam.PCollection[Any]:
        """A PCollection of anything -> an empty one."""
        return rows | beam.ParDo(self._count)


def _publish(
    run: Publication,
    parts: Iterable[PartFile],
    skipped: Iterable[int],
    timings: Iterable[Timing],
    started: float,
) -> dict[str, Any]:
    def timing() -> dict[str, Any]:
        now = time.time()
        times = {"started": started, "finished": now, "seconds": round(now - started, 3)}
        return {**times, **Timing.total(timings).described()}

    return dataset.publish(run, parts, sum(skipped), timing)


class Publish(beam.PTransform):
    """The graph's last step: all files of a run -> the verdict, once. See `dataset.publish`.

    `skipped` holds counts of images that were there already, `timings` what the steps took;
    `started` is seconds since the epoch.
    """

    def __init__(
        self,
        run: Publication,
        skipped: beam.PCollection[int],
        timings: beam.PCollection[Timing],
        started: float,
    ):
        super().__init__()
        self._run = run
        self._skipped = skipped
        self._timings = timings
        self._started = started

    def expand(self, parts: beam.PCollection[PartFile]) -> beam.PCollection[dict[str, Any]]:
        """A PCollection of PartFile -> one verdict."""
        return (
            parts.pipeline
            | beam.Create([self._run])
            | beam.Map(
                _publish,
                beam.pvalue.AsIter(parts),
                beam.pvalue.AsIter(self._skipped),
                beam.pvalue.AsIter(
                    self._timings | "AddTimings" >> beam.CombineGlobally(Timing.total)
                ),
                self._started,
            )
        )
