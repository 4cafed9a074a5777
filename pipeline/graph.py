"""The whole pipeline on one screen: read -> decode -> infer -> write -> publish."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from formats.dataset import Publication
from formats.image import Preprocessing
from formats.inputs import Source
from formats.isolation import Limits
from formats.table import TableSpec
from models.loading import LoadSpec
from storage.secrets import is_secret
from transforms.decode import DecodeImages
from transforms.inference import ExtractFeatures, FrozenModelHandler
from transforms.sink import CountRows, Publish, WriteFailures, WriteFeatures
from transforms.sources import ReadImages, Reading


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that is decided before the graph is built; `started` in seconds since 1970.

    `fingerprint` and `value_range`: the model's, which the manifest tells and every worker holds
    its own against.
    `isolation`: what decoding may take in processes of its own; None: it happens in threads.
    `accelerator`: Beam's resource hint of the steps that run the model, None for none.
    """

    sources: tuple[Source, ...]
    reading: Reading
    limit: int | None
    finished: str | None
    preprocessing: Preprocessing
    isolation: Limits | None
    model: LoadSpec
    fingerprint: str
    value_range: tuple[float, float]
    batch_size: int
    table: TableSpec
    rows_per_file: int | None
    metadata: Mapping[str, str]
    publication: Publication
    started: float
    sink: str = "parquet"
    stop_after: str | None = None
    accelerator: str | None = None


class JobOptions(PipelineOptions):
    """Beam's options, whose display data, which engines show to everybody, holds no credential."""

    def display_data(self) -> dict[str, Any]:
        """What is shown of them."""
        return {name: v for name, v in super().display_data().items() if not is_secret(name)}


def build(pipeline: beam.Pipeline, plan: Plan) -> None:
    """Add the job to `pipeline`. Every image leaves it in one file, of features or of failures.

    With `plan.sink` "null" it is counted instead, after the step `plan.stop_after` or all of them.
    """
    run = plan.publication
    to = (run.output, run.run_id)
    read = (
        pipeline
        | "Sources" >> beam.Create([list(plan.sources)])
        | ReadImages(plan.reading, plan.limit, plan.finished)
    )
    if plan.stop_after == "read":
        return count(read.images, [read.failures])
    handler = FrozenModelHandler(
        plan.model, plan.batch_size, plan.table.dtype, plan.fingerprint, plan.value_range
    )
    decoded = read.images | DecodeImages(plan.preprocessing, plan.isolation, handler.call_size)
    if plan.stop_after == "decode":
        return count(decoded.images, [read.failures, decoded.failures])
    extract: beam.PTransform = ExtractFeatures(handler)
    if plan.accelerator:  # fused with what is around it: no pixels move for it
        extract = extract.with_resource_hints(accelerator=plan.accelerator)
    extracted = decoded.images | extract
    if plan.sink == "null":
        failures = [read.failures, decoded.failures, extracted.failures]
        return count(extracted.features, failures, plan.table)

    features = extracted.features | WriteFeatures(
        *to, plan.table, run.compression, plan.rows_per_file
    )
    failures = (
        (read.failures, decoded.failures, extracted.failures)
        | "AllFailures" >> beam.Flatten()
        | WriteFailures(*to, plan.metadata, run.compression, plan.rows_per_file)
    )
    timings = (read.timings, decoded.timings, extracted.timings) | "AllTimings" >> beam.Flatten()
    _ = (
        (features, failures)
        | "AllFiles" >> beam.Flatten()
        | Publish(run, read.skipped, timings, plan.started)
    )


def count(
    came_through: beam.PCollection,
    failures: Sequence[beam.PCollection],
    table: TableSpec | None = None,
) -> None:
    """Count what came through the last step (as rows, where `table` is given) and the failures."""
    _ = came_through | "CountRows" >> CountRows(table)
    _ = failures | "AllFailures" >> beam.Flatten() | "CountFailures" >> CountRows()
