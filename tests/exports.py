"""Small exported models for the tests, each made once by all processes of a run of the suite."""

from __future__ import annotations

import fcntl
import functools
import os
import tempfile
from typing import TYPE_CHECKING

import numpy as np
from reference_weights import images, weight

from models.catalog import NETWORKS, ONE_CELL, Head, ModelFormat, NetworkSpec

if TYPE_CHECKING:  # TensorFlow, which the process that only hands out tests does without
    from models.checkpoint import Values

_FOLDER = "IMAGE_FEATURES_TEST_EXPORTS"  # pytest-xdist's workers inherit it
if _FOLDER not in os.environ:
    _folder = tempfile.TemporaryDirectory(prefix="exports-")  # removed when this process ends
    os.environ[_FOLDER] = _folder.name


def spec_of(network: str) -> NetworkSpec:
    """The network of that name, the tests' "one_cell" too."""
    return ONE_CELL if network == ONE_CELL.name else NETWORKS[network]


@functools.cache
def values(network: str = ONE_CELL.name, head: Head = "classification") -> Values:
    """The reference weights of a network: do not change them in place."""
    from models.networks import variable_shapes

    shapes = variable_shapes(spec_of(network), head)
    return {name: weight(name, shape) for name, shape in shapes.items()}


@functools.cache
def exported(format: ModelFormat, head: Head, network: str = ONE_CELL.name) -> str:
    """The directory of a network with the reference weights: do not write to it."""
    from models.export import export_hub_v1, export_saved_model

    exporters = {"saved_model": export_saved_model, "hub_v1": export_hub_v1}
    directory = os.path.join(os.environ[_FOLDER], f"{network}-{head}-{format}")
    with open(f"{directory}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.isdir(directory):
            exporters[format](spec_of(network), values(network, head), head, directory)
    return directory


def pictures(network: str = ONE_CELL.name) -> np.ndarray:
    """Four pictures of the network's size, float32 [4, S, S, 3] in [0, 1]."""
    return images(spec_of(network).image_size)
