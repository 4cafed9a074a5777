"""Pipes lists through transforms on Beam's FnApiRunner."""

from __future__ import annotations

from typing import Any
from unittest import mock

import apache_beam as beam
from apache_beam.runners import runner

from pipeline.preflight import DIRECT_RUNNER


def pipe(values: list[Any], transform: beam.PTransform) -> Any:
    """`values | transform`, which by itself would first try Prism, a binary that Beam downloads."""
    with mock.patch.dict(runner._RUNNER_MAP, directrunner=DIRECT_RUNNER):
        return values | transform
