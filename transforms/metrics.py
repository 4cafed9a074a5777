"""Beam metrics with one convention: the namespace is the transform's name."""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Sequence

import apache_beam as beam

from formats.timing import Timing

_totals: Counter[tuple[str, str]] = Counter()
_totalling = threading.Lock()


def totals() -> Counter[tuple[str, str]]:
    """What this process has counted so far, by transform and name; Beam tells it after a run."""
    with _totalling:
        return Counter(_totals)


@functools.cache  # making one costs more than all else in counting
def _counter(transform: str, name: str) -> beam.metrics.metric.Metrics.DelegatingCounter:
    return beam.metrics.Metrics.counter(transform, name)


def inc_counter(transform: str, name: str, by: int = 1) -> None:
    """Add `by` to the counter `name` of `transform`."""
    _counter(transform, name).inc(by)
    with _totalling:
        _totals[transform, name] += by


@functools.cache
def _distribution(transform: str, name: str) -> beam.metrics.metric.Metrics.DelegatingDistribution:
    return beam.metrics.Metrics.distribution(transform, name)


def count_decoding(timing: Timing, seconds: Sequence[float]) -> None:
    """Add what decoding some images took, `seconds` each, to the metrics of DecodeImages.

    The counters `decode_ms_up_to_N` for each power of two are a histogram, because Beam's
    distributions (`decode_ms` is one) know no quantiles.
    """
    for each in seconds:
        _distribution("DecodeImages", "decode_ms").update(round(1000 * each))
    counts = {
        "images": timing.images,
        "bytes": timing.bytes,
        "read_ms": round(1000 * timing.read),
        "wait_ms": round(1000 * timing.wait),
        **{f"decode_ms_up_to_{ms}": count for ms, count in timing.up_to().items()},
    }
    for name, count in counts.items():
        inc_counter("DecodeImages", name, count)


def count_inference(timing: Timing) -> None:
    """Add what a call's batches took beyond the calls before to the metrics of ExtractFeatures."""
    _distribution("ExtractFeatures", "inference_ms").update(round(1000 * timing.inference))
    counts = {
        "batches": timing.batches,
        "batch_filled": timing.filled,
        "batch_slots": timing.slots,
        "reused": timing.reused,
    }
    for name, count in counts.items():
        inc_counter("ExtractFeatures", name, count)
