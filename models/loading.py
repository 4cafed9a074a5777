"""A model directory of either hub format as one checked, frozen function: pixels -> vectors.

What a module holds is found by looking: format by its files, outputs by its signatures, the image
size by the input's shape. Embedding and logits come from one forward pass.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from models.handles import HUB_V1, model_format
from models.runtime import GPUS, convert_variables_to_constants_v2, tf
from storage.errors import RequestError

EMBEDDING, LOGITS = "embedding", "logits"


class ModelError(RequestError):
    """The model cannot be used as asked."""


class OutOfMemory(RuntimeError):
    """The device has no memory for a batch of this size."""


@dataclass(frozen=True, slots=True)
class LoadSpec:
    """What to load: a local model `directory`, and the `outputs` to compute (() for all)."""

    directory: str
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a loaded model.

    `image_size`: side of the input in pixels. `outputs`: "embedding" and "logits" to width, those
    that the model has. `fingerprint`: SHA-256 of graph and weights, whatever their path or time.
    """

    format: str
    image_size: int
    outputs: Mapping[str, int]
    signatures: tuple[str, ...]
    fingerprint: str


@dataclass(frozen=True)
class _Frozen:
    """A graph without variables: `inputs` take float32 [N, S, S, 3] in [0, 1], all the same."""

    graph: tf.compat.v1.GraphDef
    inputs: tuple[str, ...]
    outputs: Mapping[str, str]
    shape: tuple[int | None, ...]


class LoadedModel:
    """A function from pixels to vectors, with what is known of it as `info`."""

    def __init__(self, info: ModelInfo, run: Callable[[tf.Tensor], Mapping[str, tf.Tensor]]):
        self.info = info
        self._run = run

    def __call__(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """Vectors by output name, float32 [N, width], of `pixels`, uint8 [N, S, S, 3], N >= 1.

        Raises ValueError for other pixels (TensorFlow would abort the process on a wrong rank),
        OutOfMemory, and whatever the graph raises.
        """
        side = self.info.image_size
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != (side, side, 3):
            raise ValueError(
                f"pixels are {pixels.dtype} {list(pixels.shape)}; the model takes uint8 "
                f"[N, {side}, {side}, 3]"
            )
        if not len(pixels):
            raise ValueError("no pixels: the model takes at least one picture")
        try:
            return {name: out.numpy() for name, out in self._run(tf.constant(pixels)).items()}
        except tf.errors.ResourceExhaustedError as error:
            raise OutOfMemory(str(error)[:300]) from error


_loaded: dict[LoadSpec, LoadedModel] = {}
_loading = threading.Lock()


def load(spec: LoadSpec) -> LoadedModel:
    """The model of `spec`, loaded once a process. Raises ModelError where it cannot be used."""
    with _loading:
        if spec not in _loaded:
            _loaded[spec] = _load(spec)
        return _loaded[spec]


def _load(spec: LoadSpec) -> LoadedModel:
    kind = model_format(spec.directory)
    try:
        frozen, signatures = _freeze(spec.directory, kind)
    except (OSError, tf.errors.OpError, ValueError, KeyError) as error:
        if isinstance(error, RequestError):
            raise
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"--model {spec.directory}: cannot be loaded ({reason})") from error
    side = _image_side(spec.directory, frozen.shape)
    widths = _widths(frozen)
    missing = [name for name in spec.outputs if name not in widths]
    if missing:
        raise ModelError(
            f"--outputs {','.join(missing)}: the model at {spec.directory} has only "
            f"{', '.join(widths)}"
        )
    info = ModelInfo(kind, side, widths, signatures, _fingerprint(frozen))
    wanted = {name: frozen.outputs[name] for name in spec.outputs or tuple(widths)}
    return LoadedModel(info, _uint8_function(replace(frozen, outputs=wanted), side))


def default_batch_size() -> int:
    """Images a batch for this machine: on CPU more than 32 gains nothing, a GPU wants more."""
    return 256 if GPUS else 32


# --- finding and freezing ----------------------------------------------------------------------


def _freeze(directory: str, kind: str) -> tuple[_Frozen, tuple[str, ...]]:
    if kind == HUB_V1:
        return _freeze_hub_v1(directory)
    loaded = tf.saved_model.load(directory)
    signatures = tuple(sorted(loaded.signatures))
    function = _entry(directory, loaded)
    frozen = convert_variables_to_constants_v2(function)
    tensors = {t.name: t for t in frozen.outputs}
    named = dict(zip(_output_names(function), frozen.outputs, strict=True))
    matrices = {name: t for name, t in named.items() if t.shape.rank == 2}
    if not matrices:
        shapes = ", ".join(f"{name} {t.shape}" for name, t in named.items())
        raise ModelError(f"--model {directory}: no output is a vector an image ({shapes})")
    outputs = _roles(directory, frozen.graph, matrices)
    assert len(tensors) == len(frozen.outputs)
    (image,) = frozen.inputs
    return (
        _Frozen(frozen.graph.as_graph_def(), (image.name,), outputs, tuple(image.shape)),
        signatures,
    )


def _entry(directory: str, loaded: Any) -> Any:
    """The inference function of a TF2 SavedModel: its signature, or the object called."""
    signatures = loaded.signatures
    if "serving_default" in signatures or len(signatures) == 1:
        function = signatures.get("serving_default") or next(iter(signatures.values()))
    elif callable(loaded):
        traces = loaded.__call__.concrete_functions
        shape = next(t for t in traces[0].inputs if t.dtype != tf.resource).shape
        return tf.function(lambda images: loaded(images)).get_concrete_function(
            tf.TensorSpec(shape, tf.float32)
        )
    else:
        raise ModelError(f"--model {directory}: neither a serving signature nor callable")
    images = [t for t in function.inputs if t.dtype != tf.resource]
    if len(images) != 1 or images[0].dtype != tf.float32 or images[0].shape.rank != 4:
        given = ", ".join(f"{t.dtype.name} {t.shape}" for t in images)
        raise ModelError(
            f"--model {directory}: takes {given}, but an image model takes one batch of pictures, "
            "float32 [N, height, width, 3]"
        )
    return function


def _output_names(function: Any) -> list[str]:
    structured = function.structured_outputs
    if isinstance(structured, dict):
        return sorted(structured)  # the order in which a function's outputs are flattened
    return ["default"] if len(function.outputs) == 1 else [t.name for t in function.outputs]


def _roles(directory: str, graph: tf.Graph, matrices: Mapping[str, tf.Tensor]) -> dict[str, str]:
    """Which tensor is the embedding and which the logits.

    Where names do not tell: a matrix that a last dense layer makes is logits, and what goes into
    that layer is the embedding; any other is an embedding.
    """
    found: dict[str, str] = {}
    for name, tensor in matrices.items():
        features = _dense_input(tensor)
        if name in (EMBEDDING, LOGITS):
            found[name] = tensor.name
        elif features is not None:
            found.setdefault(LOGITS, tensor.name)
        else:
            found.setdefault(EMBEDDING, tensor.name)
        if features is not None and EMBEDDING not in matrices:
            found.setdefault(EMBEDDING, features.name)
    return {name: found[name] for name in (EMBEDDING, LOGITS) if name in found}


def _dense_input(tensor: tf.Tensor) -> tf.Tensor | None:
    """What goes into the dense layer (matrix product, then bias) that makes `tensor`, if any."""
    passing = {"Identity", "BiasAdd", "Add", "AddV2", "StopGradient"}
    while tensor.op.type in passing:
        tensor = tensor.op.inputs[0]
    return tensor.op.inputs[0] if tensor.op.type == "MatMul" else None


def _freeze_hub_v1(directory: str) -> tuple[_Frozen, tuple[str, ...]]:
    loaded = tf.saved_model.load(directory, tags=[])
    signatures = {
        name: definition
        for meta in _saved_model_proto(directory).meta_graphs
        if not meta.meta_info_def.tags
        for name, definition in meta.signature_def.items()
    }
    chosen = {
        role: signatures[name]
        for role, name in ((EMBEDDING, "image_feature_vector"), (LOGITS, "image_classification"))
        if name in signatures
    }
    if not chosen:
        raise ModelError(
            f"--model {directory}: no image signature; it has {', '.join(sorted(signatures))}"
        )
    feeds = sorted({definition.inputs["images"].name for definition in chosen.values()})
    fetches = [definition.outputs["default"].name for definition in chosen.values()]
    graph = loaded.graph
    pruned = loaded.prune(
        [graph.as_graph_element(name) for name in feeds],
        [graph.as_graph_element(name) for name in fetches],
    )
    frozen = convert_variables_to_constants_v2(pruned)
    outputs = {role: t.name for role, t in zip(chosen, frozen.outputs, strict=True)}
    return (
        _Frozen(
            frozen.graph.as_graph_def(),
            tuple(t.name for t in frozen.inputs),
            outputs,
            tuple(frozen.inputs[0].shape),
        ),
        tuple(sorted(signatures)),
    )


def _saved_model_proto(directory: str) -> Any:
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    with open(os.path.join(directory, "saved_model.pb"), "rb") as stream:
        return SavedModel.FromString(stream.read())


def _image_side(directory: str, shape: Sequence[int | None]) -> int:
    _, height, width, channels = shape
    if channels != 3 or height is None or height != width:
        raise ModelError(
            f"--model {directory}: takes pictures of {list(shape[1:])}; only square RGB ones of a "
            "fixed size can be given"
        )
    return height


def _widths(frozen: _Frozen) -> dict[str, int]:
    with tf.Graph().as_default() as graph:
        tensors = tf.graph_util.import_graph_def(
            frozen.graph, return_elements=list(frozen.outputs.values()), name=""
        )
        del graph
    return {
        name: int(tensor.shape[1]) for name, tensor in zip(frozen.outputs, tensors, strict=True)
    }


def _uint8_function(frozen: _Frozen, side: int) -> Callable[[tf.Tensor], Mapping[str, tf.Tensor]]:
    """The graph behind an input of uint8 [N, S, S, 3], scaled to [0, 1] on the device."""

    def run(pixels: tf.Tensor) -> dict[str, tf.Tensor]:
        images = tf.cast(pixels, tf.float32) / 255.0
        tensors = tf.graph_util.import_graph_def(
            frozen.graph,
            input_map=dict.fromkeys(frozen.inputs, images),
            return_elements=list(frozen.outputs.values()),
            name="model",
        )
        return dict(zip(frozen.outputs, tensors, strict=True))

    signature = [tf.TensorSpec([None, side, side, 3], tf.uint8)]
    return tf.compat.v1.wrap_function(run, signature)


# --- fingerprint -------------------------------------------------------------------------------


def _fingerprint(frozen: _Frozen) -> str:
    """SHA-256 over operations, attributes, wiring and constants; names of nodes do not count."""
    nodes = {node.name: node for node in frozen.graph.node}
    digests: dict[str, bytes] = {}
    stack = [_node_name(name) for name in frozen.outputs.values()]
    while stack:
        node = nodes[stack[-1]]
        parents = [_node_name(name) for name in node.input]
        waiting = [name for name in parents if name not in digests]
        if waiting:
            stack += waiting
            continue
        stack.pop()
        if node.name not in digests:
            digests[node.name] = _node_digest(node, digests)
    total = hashlib.sha256()
    for role, name in frozen.outputs.items():
        total.update(f"{role}{_port(name)}".encode() + digests[_node_name(name)])
    return total.hexdigest()


def _node_digest(node: Any, digests: Mapping[str, bytes]) -> bytes:
    hasher = hashlib.sha256(node.op.encode())
    for name in sorted(node.attr):
        if name == "value" and node.op == "Const":
            array = tf.make_ndarray(node.attr[name].tensor)
            hasher.update(f"{array.dtype}{array.shape}".encode())
            text = array.dtype == object
            hasher.update(repr(array.tolist()).encode() if text else array.tobytes())
        elif not name.startswith("_"):
            hasher.update(name.encode() + node.attr[name].SerializeToString(deterministic=True))
    for name in node.input:
        hasher.update(_port(name).encode() + digests[_node_name(name)])
    return hasher.digest()


def _node_name(tensor: str) -> str:
    return tensor.removeprefix("^").partition(":")[0]


def _port(tensor: str) -> str:
    return "^" if tensor.startswith("^") else tensor.partition(":")[2] or "0"
