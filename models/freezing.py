"""A model directory -> one graph without variables, and what was found by looking at it.

Format by the files, outputs by the signatures, image size by the input's shape, the range of pixel
values by the first operations on them. What cannot be found is asked for by flag, in one line.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.handles import HUB_V1, model_format
from models.runtime import convert_variables_to_constants_v2, saved_model_pb2, tf
from models.safety import check_model
from storage.errors import RequestError

EMBEDDING, LOGITS = "embedding", "logits"
HUB_V1_SIGNATURES = {EMBEDDING: "image_feature_vector", LOGITS: "image_classification"}
_LINEAR_TAIL = {"Identity", "BiasAdd", "Add", "AddV2", "StopGradient", "Squeeze", "Reshape"}
_MAPS = {"Mul", "RealDiv", "Sub", "Add", "AddV2"}


class ModelError(RequestError):
    """The model cannot be used as asked."""


@dataclass(frozen=True, slots=True)
class Hints:
    """What the user says of a model that does not tell: its input's side in pixels, its range."""

    image_size: int | None = None
    value_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Frozen:
    """A graph without variables.

    `inputs` all take the same float32 [N, S, S, 3] within `value_range`, S = `image_size`.
    `outputs`: "embedding" and "logits", those that there are, to the tensor's name; its shape is
    [N, width] or [N, 1, 1, width].
    """

    graph: Any
    inputs: tuple[str, ...]
    outputs: Mapping[str, str]
    widths: Mapping[str, int]
    format: str
    image_size: int
    value_range: tuple[float, float]
    signatures: tuple[str, ...]


def freeze(directory: str, hints: Hints, allow_unsafe_ops: bool = False) -> Frozen:
    """The inference graph of the TF1 hub.Module or TF2 SavedModel at `directory`.

    Raises ModelError where it cannot be loaded, is no image model, or does not tell enough; before
    loading, where its graph reaches files or the network and `allow_unsafe_ops` is off.
    """
    kind = model_format(directory)
    try:
        proto = read_proto(directory)
        check_model(directory, proto, allow_unsafe_ops)
        loaded = tf.saved_model.load(directory, tags=[] if kind == HUB_V1 else None)
        find = _hub_v1_function if kind == HUB_V1 else _saved_model_function
        function, tensors, signatures = find(directory, loaded, proto)
        frozen = convert_variables_to_constants_v2(function)
    except RequestError:
        raise
    except Exception as error:  # TensorFlow's loader raises what its parsers happen to raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(f"--model {directory}: cannot be loaded ({reason})") from error
    named = dict(zip(tensors, frozen.outputs, strict=True))
    outputs = named if kind == HUB_V1 else _roles(directory, named)
    shape = frozen.inputs[0].shape.as_list()
    size = _image_size(directory, shape, hints, _attached_size(proto) if kind == HUB_V1 else None)
    return Frozen(
        frozen.graph.as_graph_def(),
        tuple(t.name for t in frozen.inputs),
        {role: t.name for role, t in outputs.items()},
        {role: int(t.shape[-1]) for role, t in outputs.items()},
        kind,
        size,
        _value_range(directory, frozen.inputs[0], hints, kind),
        signatures,
    )


def read_proto(directory: str) -> Any:
    """The SavedModel message of a model directory."""
    with open(os.path.join(directory, "saved_model.pb"), "rb") as stream:
        return saved_model_pb2.SavedModel.FromString(stream.read())


# --- TF2 ---------------------------------------------------------------------------------------


def _saved_model_function(
    directory: str, loaded: Any, proto: Any
) -> tuple[Any, list[str], tuple[str, ...]]:
    """The inference function, the names of its outputs, and all signatures."""
    function = _entry(directory, loaded)
    structured = function.structured_outputs
    if isinstance(structured, Mapping):
        names = sorted(structured)  # the order in which they are flattened
    else:
        names = [f"output_{i}" for i in range(len(function.outputs))]
    return function, names, tuple(sorted(loaded.signatures))


def _entry(directory: str, loaded: Any) -> Any:
    """A serving signature, or else the object called."""
    signatures = loaded.signatures
    if "serving_default" in signatures or len(signatures) == 1:
        function = signatures.get("serving_default") or next(iter(signatures.values()))
    elif callable(loaded) and loaded.__call__.concrete_functions:
        trace = loaded.__call__.concrete_functions[0]
        shape = next(t.shape for t in trace.inputs if t.dtype != tf.resource)
        function = tf.function(lambda images: loaded(images)).get_concrete_function(
            tf.TensorSpec(shape, tf.float32)
        )
    else:
        told = ", ".join(sorted(signatures)) or "none"
        raise ModelError(
            f"--model {directory}: no signature serving_default, and not callable (signatures: "
            f"{told}); nothing tells how to run it"
        )
    images = [t for t in function.inputs if t.dtype != tf.resource]
    if len(images) != 1 or images[0].dtype != tf.float32 or images[0].shape.rank != 4:
        given = ", ".join(f"{t.dtype.name} {t.shape}" for t in images)
        raise ModelError(
            f"--model {directory}: takes {given}, but an image model takes one batch of pictures, "
            "float32 [N, height, width, 3]"
        )
    return function


def _roles(directory: str, named: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Which tensor is the embedding and which the logits.

    Where names do not tell: what a last dense layer (or 1x1 convolution) makes, before a softmax,
    is logits, and what goes into that layer is the embedding; any other vector is an embedding.
    """
    vectors = {name: t for name, t in named.items() if t.shape.rank == 2 and t.shape[1]}
    if not vectors:
        shapes = ", ".join(f"{name} {t.shape}" for name, t in named.items())
        raise ModelError(f"--model {directory}: no output is one vector an image ({shapes})")
    found = {name: vectors[name] for name in (EMBEDDING, LOGITS) if name in vectors}
    for tensor in vectors.values():
        before_softmax = tensor.op.inputs[0] if tensor.op.type == "Softmax" else tensor
        features = _dense_input(before_softmax)
        if features is None:
            found.setdefault(EMBEDDING, tensor)
        else:
            found.setdefault(LOGITS, before_softmax)
            if EMBEDDING not in vectors:
                found.setdefault(EMBEDDING, features)
    return {name: found[name] for name in (EMBEDDING, LOGITS) if name in found}


def _dense_input(tensor: tf.Tensor) -> tf.Tensor | None:
    """What goes into the dense layer whose result, with its bias, is `tensor`; None if none is."""
    while tensor.op.type in _LINEAR_TAIL:
        tensor = tensor.op.inputs[0]
    if tensor.op.type == "MatMul":
        return tensor.op.inputs[0]
    if tensor.op.type == "Conv2D" and tensor.op.inputs[0].shape[1:3] == [1, 1]:
        return tensor.op.inputs[0]
    return None


# --- TF1 ---------------------------------------------------------------------------------------


def _hub_v1_function(
    directory: str, loaded: Any, proto: Any
) -> tuple[Any, list[str], tuple[str, ...]]:
    """One function over both image signatures, the roles of its outputs, and all signatures."""
    signatures = _inference_meta_graph(directory, proto).signature_def
    chosen = {
        role: signatures[name] for role, name in HUB_V1_SIGNATURES.items() if name in signatures
    }
    if not chosen:
        raise ModelError(
            f"--model {directory}: no image signature; it has {', '.join(sorted(signatures))}"
        )
    feeds = sorted({signature.inputs["images"].name for signature in chosen.values()})
    fetches = [signature.outputs["default"].name for signature in chosen.values()]
    element = loaded.graph.as_graph_element
    function = loaded.prune([element(name) for name in feeds], [element(name) for name in fetches])
    return function, list(chosen), tuple(sorted(signatures))


def _inference_meta_graph(directory: str, proto: Any) -> Any:
    for meta in proto.meta_graphs:
        if not meta.meta_info_def.tags:
            return meta
    raise ModelError(f"--model {directory}: no graph with the empty set of tags, so no inference")


def _attached_size(proto: Any) -> int | None:
    """The expected image size out of the module's attachment `image_module_info`, if it has one."""
    for meta in proto.meta_graphs:
        for value in meta.collection_def["hub_module_attachments"].bytes_list.value:
            attachment = _fields(value)
            if attachment.get(1) == b"image_module_info":
                size = _fields(_fields(attachment[2])[1])
                return size[1] if size[1] == size[2] else None
    return None


def _fields(message: bytes) -> dict[int, Any]:
    """Field number to value of a small protobuf message of varints and bytes."""
    found: dict[int, Any] = {}
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        key = varint()
        value: Any = varint()
        if key & 7 == 2:
            at, value = at + value, message[at : at + value]
        found[key >> 3] = value
    return found


# --- size and range ----------------------------------------------------------------------------


def _image_size(
    directory: str, shape: Sequence[int | None], hints: Hints, attached: int | None
) -> int:
    _, height, width, channels = shape
    if channels not in (3, None) or height != width:
        raise ModelError(
            f"--model {directory}: takes pictures of {list(shape[1:])}; only square RGB ones can "
            "be given"
        )
    if height is not None and hints.image_size not in (None, height):
        raise ModelError(f"--image_size {hints.image_size}: the model takes {height} only")
    size = height or hints.image_size or attached
    if size is None:
        raise ModelError(
            f"--model {directory}: takes pictures of any size, and nothing tells which it was "
            "trained with; give --image_size"
        )
    return size


def _value_range(directory: str, image: tf.Tensor, hints: Hints, kind: str) -> tuple[float, float]:
    """The range of pixel values that the model takes, by what it does to them first.

    Networks work on values of the order of one. What maps [0, 1] there takes [0, 1], what maps
    [0, 255] there takes [0, 255]. TF1 modules keep the hub's convention for images, [0, 1].
    """
    if hints.value_range is not None:
        return hints.value_range
    scale, offset = _first_map(image)
    if (scale, offset) != (1.0, 0.0):
        if 0.5 <= abs(scale) <= 10 and abs(offset) <= 10:
            return 0.0, 1.0
        if 0.5 <= abs(scale) * 255 <= 10 or abs(offset) > 10:
            return 0.0, 255.0
    if kind == HUB_V1:
        return 0.0, 1.0
    raise ModelError(
        f"--model {directory}: nothing tells which range its pixels have; give --value_range 0,1 "
        "or 0,255 or -1,1"
    )


def _first_map(image: tf.Tensor) -> tuple[float, float]:
    """Scale and offset (means over channels) of the multiplications and additions of constants
    that the image goes through before anything else."""
    scale, offset = 1.0, 0.0
    while True:
        consumers = image.consumers()
        if len(consumers) != 1:
            return scale, offset
        (op,) = consumers
        if op.type == "Identity":
            image = op.outputs[0]
            continue
        other = [_constant(t) for t in op.inputs if t is not image]
        if op.type not in _MAPS or len(other) != 1 or other[0] is None:
            return scale, offset
        value = float(np.mean(other[0]))
        if op.type == "Mul":
            scale, offset = scale * value, offset * value
        elif op.type == "RealDiv":
            scale, offset = scale / value, offset / value
        else:
            offset += -value if op.type == "Sub" else value
        image = op.outputs[0]


def _constant(tensor: tf.Tensor) -> np.ndarray | None:
    while tensor.op.type == "Identity":
        tensor = tensor.op.inputs[0]
    if tensor.op.type != "Const":
        return None
    return np.asarray(tf.make_ndarray(tensor.op.get_attr("value")))
