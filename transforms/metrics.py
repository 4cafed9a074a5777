"""Beam metrics with one convention: the namespace is the transform's name."""

from __future__ import annotations

import apache_beam as beam


def inc_counter(transform: str, name: str, by: int = 1) -> None:
    """Add `by` to the counter `name` of `transform`."""
    beam.metrics.Metrics.counter(transform, name).inc(by)


def update_distribution(transform: str, name: str, value: int) -> None:
    """Add `value` to the distribution `name` of `transform`; its unit is in its name."""
    beam.metrics.Metrics.distribution(transform, name).update(value)
