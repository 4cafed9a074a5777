"""Beam metrics with one convention: the namespace is the transform's name."""

from __future__ import annotations

import apache_beam as beam


def inc_counter(transform: str, name: str, by: int = 1) -> None:
    """Add `by` to the counter `name` of `transform`."""
    beam.metrics.Metrics.counter(transform, name).inc(by)
