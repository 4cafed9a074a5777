"""Small exported models for the tests, each made once a process and removed at its end."""

from __future__ import annotations

import functools
import os
import tempfile

import numpy as np
from reference_weights import images, weight

from models.catalog import NETWORKS, ONE_CELL, Head, ModelFormat, NetworkSpec
from models.checkpoint import Values
from models.export import export_hub_v1, export_saved_model
from models.networks import variable_shapes

EXPORTERS = {"saved_model": export_saved_model, "hub_v1": export_hub_v1}

_folder = tempfile.TemporaryDirectory(prefix="exports-")


def spec_of(network: str) -> NetworkSpec:
    """The network of that name, the tests' "one_cell" too."""
    return ONE_CELL if network == ONE_CELL.name else NETWORKS[network]


@functools.cache
def values(network: str = ONE_CELL.name, head: Head = "classification") -> Values:
    """The reference weights of a network: do not change them in place."""
    shapes = variable_shapes(spec_of(network), head)
    return {name: weight(name, shape) for name, shape in shapes.items()}


@functools.cache
def exported(format: ModelFormat, head: Head, network: str = ONE_CELL.name) -> str:
    """The directory of a network with the reference weights: do not write to it."""
    directory = os.path.join(_folder.name, f"{network}-{head}-{format}")
    EXPORTERS[format](spec_of(network), values(network, head), head, directory)
    return directory


def pictures(network: str = ONE_CELL.name) -> np.ndarray:
    """Four pictures of the network's size, float32 [4, S, S, 3] in [0, 1]."""
    return images(spec_of(network).image_size)
