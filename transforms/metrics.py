"""Beam metrics with one convention: the namespace is the transform's name."""

from __future__ import annotations

import functools

import apache_beam as beam

from formats.timing import Timing


@functools.cache  # making one costs more than all else in counting
def _counter(transform: str, name: str) -> beam.metrics.metric.Metrics.DelegatingCounter:
    return beam.metrics.Metrics.counter(transform, name)


def inc_counter(transform: str, name: str, by: int = 1) -> None:
    """Add `by` to the counter `name` of `transform`."""
    _counter(transform, name).inc(by)


def count_decoding(timing: Timing) -> None:
    """Add what decoding some images took to the counters of DecodeImages.

    `decode_ms_up_to_N` for each power of two is a histogram, because Beam's distributions know no
    quantiles.
    """
    counts = {
        "images": timing.images,
        "bytes": timing.bytes,
        "decode_ms": round(1000 * timing.decode),
        "read_ms": round(1000 * timing.read),
        "wait_ms": round(1000 * timing.wait),
        **{f"decode_ms_up_to_{ms}": count for ms, count in timing.up_to().items()},
    }
    for name, count in counts.items():
        inc_counter("DecodeImages", name, count)


def count_inference(timing: Timing) -> None:
    """Add what some batches took to the counters of ExtractFeatures."""
    counts = {
        "batches": timing.batches,
        "batch_filled": timing.filled,
        "batch_slots": timing.slots,
        "inference_ms": round(1000 * timing.inference),
    }
    for name, count in counts.items():
        inc_counter("ExtractFeatures", name, count)
