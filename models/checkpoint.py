"""Values for a network's variables: drawn from a seed, or read from a TF-Slim checkpoint.

The published files are TF1 Saver checkpoints with Slim's variable names. They also hold what
serves training alone, the auxiliary head and `global_step`, which is left out here.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Mapping

import numpy as np

from models.networks import is_trainable
from models.runtime import tf

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes by Slim name (no ":0"), as `models.networks.variable_shapes` gives them."""

Values = dict[str, np.ndarray]
"""float32 arrays by Slim name."""

AVERAGED = "/ExponentialMovingAverage"
_TRAINING_ONLY = re.compile(r"aux_\d+/|global_step$")
_HEAD = ("final_layer/FC/weights", "final_layer/FC/biases")


class CheckpointError(ValueError):
    """A checkpoint does not hold the network: one line that names the variable."""


def seeded(shapes: Shapes, seed: int) -> Values:
    """Random weights, each a pure function of its variable's name and shape and of `seed`.

    Activations keep their size through all four networks: features have a standard deviation of
    0.5 to 5, logits of 0.7 to 5. Good for shapes and speed; what such a network says of a
    picture means nothing.
    """
    return {name: _draw(name, shape, seed) for name, shape in shapes.items()}


def _draw(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "big")))
    match name.rpartition("/")[2]:
        case "depthwise_weights":
            value = generator.standard_normal(shape) * math.sqrt(2 / math.prod(shape[:2]))
        case "weights" | "pointwise_weights":
            # Inputs are positive after a ReLU: kernels that sum to zero keep the mean they share,
            # which is the same for every picture, from drowning what differs.
            value = generator.standard_normal(shape) / math.sqrt(math.prod(shape[:-1]))
            value -= value.mean(axis=tuple(range(len(shape) - 1)), keepdims=True)
        case "gamma" | "moving_variance":
            value = generator.uniform(0.5, 1.5, shape)
        case _:
            value = generator.standard_normal(shape) * 0.1
    return value.astype(np.float32)


def read_checkpoint(prefix: str, shapes: Shapes, ema: bool = False) -> Values:
    """The values of `shapes` out of the TF1 checkpoint files `prefix`.*, as float32.

    Where the checkpoint has both, `ema` takes NAME/ExponentialMovingAverage rather than NAME;
    moving statistics, which some trainings do not average, may then be plain. A checkpoint of
    averages alone is read without `ema` too. The classification layer may be surplus, so that a
    feature vector model takes the same file.

    Raises CheckpointError, naming the variable, where one is missing, surplus, of another shape or
    not finite, or where the files cannot be read.
    """
    try:
        reader = tf.train.load_checkpoint(prefix)
        stored = reader.get_variable_to_shape_map()
    except (tf.errors.OpError, ValueError) as error:
        raise CheckpointError(f"no readable checkpoint at {prefix}: {_line(error)}") from error
    sources = {name: _source(name, stored, ema) for name in shapes}
    for name, source in sources.items():
        if source not in stored:
            raise CheckpointError(f"{prefix} has no variable {source}")
        if tuple(stored[source]) != tuple(shapes[name]):
            raise CheckpointError(
                f"{source} in {prefix} has shape {list(stored[source])}, "
                f"the network needs {list(shapes[name])}"
            )
    for stored_name in sorted(stored):
        name = stored_name.removesuffix(AVERAGED)
        if name not in shapes and not _TRAINING_ONLY.match(name) and name not in _HEAD:
            raise CheckpointError(f"{prefix} has a variable that the network lacks: {stored_name}")
    try:
        values = {
            name: np.asarray(reader.get_tensor(source), np.float32)
            for name, source in sources.items()
        }
    except (tf.errors.OpError, ValueError, IndexError) as error:
        raise CheckpointError(f"{prefix} is damaged: {_line(error)}") from error
    for name, value in values.items():
        if not np.isfinite(value).all():
            raise CheckpointError(f"{sources[name]} in {prefix} holds NaN or infinity")
    return values


def _source(name: str, stored: Mapping[str, list[int]], ema: bool) -> str:
    """The name under which `name` is to be read."""
    averaged = name + AVERAGED
    if ema:
        return averaged if is_trainable(name) or averaged in stored else name
    return averaged if name not in stored and averaged in stored else name


def write_checkpoint(prefix: str, values: Mapping[str, np.ndarray]) -> None:
    """Write `values` as a TF1 Saver would: `prefix`.index and `prefix`.data-00000-of-00001."""
    os.makedirs(os.path.dirname(os.path.abspath(prefix)), exist_ok=True)
    tf.raw_ops.SaveV2(
        prefix=prefix,
        tensor_names=list(values),
        shape_and_slices=[""] * len(values),
        tensors=list(values.values()),
    )


def _line(error: Exception) -> str:
    """What `error` says, on one line."""
    return " ".join(str(error).split())
