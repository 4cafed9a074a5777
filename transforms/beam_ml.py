"""Beam's RunInference without PyTorch, which Beam imports wherever it is installed.

It does so for a manager of models that this job does not use; 530 MiB and seconds of every start.
"""

from __future__ import annotations

from storage.imports import without

with without("torch"):
    from apache_beam.ml.inference.base import ModelHandler, RunInference

__all__ = ["ModelHandler", "RunInference"]
