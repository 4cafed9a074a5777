"""A model directory -> one graph without variables, and what was found by looking at it.

Format by the files, outputs by the signatures, image size by the input's shape, the range of pixel
values by the first operations on them. What cannot be found is asked for by flag, in one line.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from models.graphs import Graph, node_name
from models.handles import HUB_V1, model_format
from models.runtime import inline_variables, saved_model_pb2, tf
from models.safety import check_model
from storage import temporaries
from storage.errors import RequestError

EMBEDDING, LOGITS = "embedding", "logits"
HUB_V1_SIGNATURES = {EMBEDDING: "image_feature_vector", LOGITS: "image_classification"}
_NOTHING = "_generic_user_object"  # an object of a SavedModel that does nothing itself
_GRADIENT = "_gradient_op_type"  # names an operation's own gradient
# Of the hub's signatures, as outputs are called too.
_ALIASES = {
    "feature_vector": EMBEDDING,
    "image_feature_vector": EMBEDDING,
    "image_classification": LOGITS,
}
_SUMS = {"Add", "AddV2"}
_LINEAR_TAIL = {"Identity", "BiasAdd", "StopGradient", "Squeeze", "Reshape", "Cast", *_SUMS}
_SIZES = {"Shape", "Size"}
_LARGEST_SIZE = 1 << 16  # pixels a side; more is damage
_MAPS = {"Mul", "RealDiv", "Sub", "Add", "AddV2"}

log = logging.getLogger("pipeline")


class ModelError(RequestError):
    """The model cannot be used as asked."""


@dataclass(frozen=True, slots=True)
class Hints:
    """What the user says of a model that does not tell: its input's side in pixels, its range."""

    image_size: int | None = None
    value_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Frozen:
    """A graph without variables, large weights beside it.

    `inputs` all take the same float32 [N, S, S, 3] within `value_range`, S = `image_size`.
    `outputs`: "embedding" and "logits", those that there are, to the tensor's name; its shape is
    [N, width] or [N, 1, 1, width].
    """

    graph: Graph
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
        if kind == HUB_V1:
            loaded = _load_graph(directory, proto)
        else:
            loaded = _load_signatures(directory, proto)
        find = _hub_v1_function if kind == HUB_V1 else _saved_model_function
        function, tensors, signatures = find(directory, loaded, proto)
        graph = _without_variables(function)
    except RequestError:
        raise
    except Exception as error:  # TensorFlow's loader raises what its parsers happen to raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(f"--model {directory}: cannot be loaded ({reason})") from error
    inputs = _given(function)
    shape = inputs[0].shape.as_list() if inputs[0].shape.rank == 4 else [None]
    size = _image_size(directory, shape, hints, _attached_size(proto) if kind == HUB_V1 else None)
    try:
        image, found = _at_size(graph, inputs, function.outputs, size)
    except ValueError as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"--model {directory}: takes no pictures of {size} x {size} in float32 ({reason})"
        ) from error
    if len(tensors) != len(found):
        raise ModelError(
            f"--model {directory}: its outputs are no plain mapping of names to tensors, so "
            "which is which cannot be told; export it with a signature serving_default"
        )
    named = dict(zip(tensors, found, strict=True))
    for tensor, known in zip(found, function.outputs, strict=True):
        _keep_width(tensor, known.shape)
    outputs = dict(named)
    if set(named) != {EMBEDDING, LOGITS}:
        outputs = _roles(directory, named)
    elif (logits := _activation_input(named[LOGITS])) is not None:
        outputs[LOGITS] = logits
    _warn_of_training(directory, outputs.values())
    for role, tensor in outputs.items():
        if not _is_vector(tensor):
            raise ModelError(f"--model {directory}: its {role} is no vector, but {tensor.shape}")
        if tensor.shape[0] is not None:
            raise ModelError(
                f"--model {directory}: was made for batches of exactly {tensor.shape[0]} pictures, "
                "and the last batch of a run holds what is left; export it for any batch size"
            )
    return Frozen(
        graph,
        tuple(t.name for t in inputs),
        {role: t.name for role, t in outputs.items()},
        {role: int(t.shape[-1]) for role, t in outputs.items()},
        kind,
        size,
        _value_range(directory, image, hints, kind),
        signatures,
    )


def _given(function: Any) -> list[tf.Tensor]:
    """What a caller of `function` gives; variables and constants that it holds come behind."""
    return list(function.inputs[: len(function.inputs) - len(function.captured_inputs)])


def _without_variables(function: Any) -> Graph:
    """The graph of `function` with all calls inlined, and the values of its variables.

    Large ones stay out of TensorFlow's converter, which would copy them a dozen times.
    """
    variables = {id(variable.handle): variable for variable in function.graph.variables}
    large = {
        placeholder.op.name: variables[id(handle)]
        for handle, placeholder in function.graph.captures
        if id(handle) in variables and variables[id(handle)].dtype.is_floating
    }
    graph_def = inline_variables(function, leave=large)
    nodes = {node.name: node for node in graph_def.node}

    def source(tensor: str) -> str:
        while nodes[node_name(tensor)].op == "Identity":
            tensor = nodes[node_name(tensor)].input[0]
        return node_name(tensor)

    readers = [node for node in graph_def.node if any(source(read) in large for read in node.input)]
    if any(node.op not in ("ReadVariableOp", "Identity") for node in readers):
        return Graph(inline_variables(function))
    for node in readers:
        kind = large[source(node.input[0])].dtype.as_datatype_enum
        node.op = "Identity"
        node.attr.clear()
        node.attr["T"].type = kind
    for name in large:
        nodes[name].op = "NoOp"
        nodes[name].attr.clear()
    graph = Graph(graph_def)
    for name, variable in large.items():
        del graph.nodes[name]
        graph.add_constant(name, variable.numpy())
    return graph


def _at_size(
    graph: Graph, inputs: Sequence[tf.Tensor], outputs: Sequence[tf.Tensor], size: int
) -> tuple[tf.Tensor, list[tf.Tensor]]:
    """The first of the tensors `inputs` of `graph`, and `outputs`, for pictures of `size`."""
    with tf.Graph().as_default():
        with tf.name_scope("at_size"):
            images = {
                t.name: tf.compat.v1.placeholder(tf.float32, [None, size, size, 3]) for t in inputs
            }
        found = tf.graph_util.import_graph_def(
            graph.to_def(), input_map=images, return_elements=[t.name for t in outputs], name=""
        )
    return images[inputs[0].name], found


def read_proto(directory: str) -> Any:
    """The SavedModel message of a model directory. Raises ModelError."""
    try:
        with open(os.path.join(directory, "saved_model.pb"), "rb") as stream:
            return saved_model_pb2.SavedModel.FromString(stream.read())
    except (OSError, DecodeError) as error:
        raise ModelError(f"--model {directory}: cannot be loaded ({error})") from None


# --- TF2 ---------------------------------------------------------------------------------------


def _load_signatures(directory: str, proto: Any) -> Any:
    """The SavedModel `proto` of `directory`, for its signatures only; changes `proto`.

    A reusable one holds up to eight traces of the network and 361 losses besides, and TensorFlow's
    loader would build them all. Left whole where there are none of them, and where no signature
    tells what to run. Of several graphs the one for serving; ModelError where none is for it alone.
    """
    several = len(proto.meta_graphs) > 1
    if several:  # of an estimator, for serving, training and TPUs
        told = [sorted(meta.meta_info_def.tags) for meta in proto.meta_graphs]
        if told.count(["serve"]) != 1:
            raise ModelError(
                f"--model {directory}: its graphs are for {told}, and the one to run is that which "
                "is for ['serve'] alone"
            )
        serving = proto.meta_graphs.pop(told.index(["serve"]))
        del proto.meta_graphs[:]
        proto.meta_graphs.append(serving)
    dropped = _drop_uncalled(proto.meta_graphs[0])
    if dropped or several:
        return _load_as(proto, directory)
    return tf.saved_model.load(directory)


def _load_as(proto: Any, directory: str, tags: Sequence[str] | None = None) -> Any:
    """What TensorFlow loads from `directory` where `proto` stands for its saved_model.pb."""
    with temporaries.scratch() as folder:
        for name in os.listdir(directory):
            if name != "saved_model.pb":
                (folder / name).symlink_to(os.path.join(os.path.abspath(directory), name))
        (folder / "saved_model.pb").write_bytes(proto.SerializeToString())
        try:
            return tf.saved_model.load(str(folder), tags)
        except Exception as error:
            raise OSError(str(error).replace(str(folder), directory)) from error


def _drop_uncalled(meta: Any) -> bool:
    """Take out of `meta` what only a caller of the object needs: its `__call__` and its losses.

    False, and nothing changed, where it has neither or no signature to run.
    """
    objects = meta.object_graph_def
    children = {c.local_name: c.node_id for c in objects.nodes[0].children} if objects.nodes else {}
    if "signatures" not in children:
        return False
    signatures = {c.local_name: c.node_id for c in objects.nodes[children["signatures"]].children}
    if not _serving(signatures):
        return False
    at = children.get("regularization_losses")
    losses = objects.nodes[at].children if at else ()
    uncalled = {child.node_id for child in losses} | {children.get("__call__", 0)} - {0}
    uncalled |= {trace.node_id for number in uncalled for trace in objects.nodes[number].children}
    uncalled -= set(signatures.values())
    if not uncalled:
        return False
    called = set()
    for number, node in enumerate(objects.nodes):
        if number in uncalled:
            node.user_object.identifier = _NOTHING
        else:  # what sets up tables and the like is called while loading
            called.add(node.bare_concrete_function.concrete_function_name)
            called.update(node.function.concrete_functions)
    called |= _functions_in(meta.graph_def.node)
    library = meta.graph_def.library
    functions = {function.signature.name: function for function in library.function}
    waiting = list(called)
    while waiting:
        function = functions.get(waiting.pop())
        more = _functions_in(function.node_def) - called if function else set()
        called |= more
        waiting += more
    for node in objects.nodes:
        home = node.captured_tensor.concrete_function
        if home and home not in called:
            node.user_object.identifier = _NOTHING  # what a gradient wanted of a function that goes
    kept = [function for name, function in functions.items() if name in called]
    for function in kept:
        for node in function.node_def:
            if _GRADIENT in node.attr:  # their own functions go
                del node.attr[_GRADIENT]
    gradients = [one for one in library.gradient if {one.function_name, one.gradient_func} < called]
    library.CopyFrom(type(library)(function=kept, gradient=gradients))
    for name in objects.concrete_functions.keys() - called:
        del objects.concrete_functions[name]
    return True


def _functions_in(nodes: Iterable[Any]) -> set[str]:
    """The names of the functions that `nodes` call, which may be by the name as an operation."""
    named = set()
    for node in nodes:
        named.add(node.op)
        for value in node.attr.values():
            if value.HasField("func"):
                named.add(value.func.name)
            named.update(func.name for func in value.list.func)
    return named


def _serving(signatures: Mapping[str, Any]) -> Any:
    """The signature to run: serving_default, or the only one; None where neither is there."""
    only = next(iter(signatures.values())) if len(signatures) == 1 else None
    return signatures.get("serving_default", only)


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
    function = _serving(signatures)
    if function is None and callable(loaded) and loaded.__call__.concrete_functions:
        trace = loaded.__call__.concrete_functions[0]
        shape = _given(trace)[0].shape
        function = tf.function(lambda images: loaded(images)).get_concrete_function(
            tf.TensorSpec(shape, tf.float32)
        )
    if function is None:
        told = ", ".join(sorted(signatures)) or "none"
        raise ModelError(
            f"--model {directory}: no signature serving_default, and not callable (signatures: "
            f"{told}); nothing tells how to run it"
        )
    images = _given(function)
    if len(images) != 1 or images[0].dtype != tf.float32 or images[0].shape.rank != 4:
        given = ", ".join(f"{t.dtype.name} {t.shape}" for t in images)
        raise ModelError(
            f"--model {directory}: takes {given}, but an image model takes one batch of pictures, "
            "float32 [N, height, width, 3]"
        )
    return function


def _roles(directory: str, named: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Which tensor is the embedding and which the logits.

    Where names do not tell: what a last dense layer (or 1x1 convolution) makes, and what goes into
    a softmax or into such a layer's sigmoid, is logits, and what goes into that layer, of named
    logits too, is the embedding; any other vector is an embedding. Of a softmax that is called
    logits, logits are what goes into it.
    """
    vectors = {name: tensor for name, tensor in named.items() if _is_vector(tensor)}
    for alias, role in _ALIASES.items():
        if alias in vectors:
            vectors.setdefault(role, vectors.pop(alias))
    if not vectors:
        shapes = ", ".join(f"{name} {t.shape}" for name, t in named.items())
        raise ModelError(f"--model {directory}: no output is one vector an image ({shapes})")
    found = {name: vectors[name] for name in (EMBEDDING, LOGITS) if name in vectors}
    for name, tensor in vectors.items():
        if name == EMBEDDING:  # also where a dense layer made it
            continue
        before = _activation_input(tensor)
        logits = tensor if before is None else before
        features = _dense_input(logits)
        if before is not None and name == LOGITS:
            found[LOGITS] = logits
        elif features is not None or before is not None:
            found.setdefault(LOGITS, logits)
        elif name != LOGITS:
            features = tensor
        if features is not None:
            found.setdefault(EMBEDDING, features)
    return {name: found[name] for name in (EMBEDDING, LOGITS) if name in found}


def _is_vector(tensor: tf.Tensor) -> bool:
    """Whether `tensor` is floating point [N, width] or [N, 1, 1, width]."""
    shape = tensor.shape
    square = shape.rank == 2 or (shape.rank == 4 and shape[1:3] == [1, 1])
    return tensor.dtype.is_floating and square and bool(shape[-1])


def _activation_input(tensor: tf.Tensor) -> tf.Tensor | None:
    """What goes into the softmax, or a dense layer's sigmoid, that `tensor` is, in whatever shape;
    None if it is neither.
    """
    while tensor.op.type in ("Identity", "Reshape", "Squeeze", "Cast"):
        tensor = tensor.op.inputs[0]
    activation = tensor.op.type
    if activation not in ("Softmax", "Sigmoid"):
        return None
    tensor = tensor.op.inputs[0]
    while not _is_vector(tensor) and tensor.op.type in ("Identity", "Reshape"):
        tensor = tensor.op.inputs[0]
    if not _is_vector(tensor) or (activation == "Sigmoid" and _dense_input(tensor) is None):
        return None
    return tensor


def _keep_width(tensor: tf.Tensor, known: tf.TensorShape) -> None:
    """Tell `tensor` its last dimension, that of the shape `known`, where it has none itself."""
    if known.rank and tensor.shape.rank == known.rank and tensor.shape[-1] is None:
        tensor.set_shape([None] * (known.rank - 1) + [known[-1]])


def _warn_of_training(directory: str, outputs: Iterable[tf.Tensor]) -> None:
    """Warn of a batch norm that takes its statistics from the batch, among what `outputs` need."""
    seen: set[str] = set()
    waiting = [tensor.op for tensor in outputs]
    while waiting:
        op = waiting.pop()
        if op.name in seen:
            continue
        seen.add(op.name)
        waiting += [read.op for read in op.inputs]
        if op.type.startswith("FusedBatchNorm") and op.get_attr("is_training"):
            log.warning(
                "--model %s: %s takes its mean and variance from the batch (is_training), so that "
                "a picture's vector depends on the others of its batch; export it for inference",
                directory,
                op.name.removeprefix("at_size/"),
            )
            return


def _dense_input(tensor: tf.Tensor) -> tf.Tensor | None:
    """What goes into the dense layer whose result, with its bias, is `tensor`; None if none is."""
    while tensor.op.type in _LINEAR_TAIL:
        parts = tensor.op.inputs
        if tensor.op.type in _SUMS:
            parts = [part for part in parts if _depends_on_input(part)]
            if len(parts) != 1:
                return None
        tensor = parts[0]
    features = tensor.op.inputs[0] if tensor.op.inputs else tensor
    if tensor.op.type == "MatMul":  # a vector that was flattened may not tell its width
        kernel = tensor.op.inputs[1].shape
        if kernel.rank == 2 and not tensor.op.get_attr("transpose_a"):
            rows = kernel[1 if tensor.op.get_attr("transpose_b") else 0]
            _keep_width(features, tf.TensorShape([None, rows]))
    if tensor.op.type == "MatMul" or (tensor.op.type == "Conv2D" and features.shape[1:3] == [1, 1]):
        return features if _is_vector(features) else None
    return None


# --- TF1 ---------------------------------------------------------------------------------------


def _load_graph(directory: str, proto: Any) -> Any:
    """The module of `proto` in `directory`, without its signatures.

    TensorFlow's loader would build the network anew for each of them, and none of that is used.
    """
    bare = type(proto)()
    bare.CopyFrom(proto)
    for meta in bare.meta_graphs:
        meta.signature_def.clear()
    return _load_as(bare, directory, tags=[])


def _hub_v1_function(
    directory: str, loaded: Any, proto: Any
) -> tuple[Any, list[str], tuple[str, ...]]:
    """One function over the image signatures, the names of its outputs, and all signatures.

    A module that has neither of the hub's common image signatures is looked at by its `default`.
    """
    signatures = _inference_meta_graph(directory, proto).signature_def
    chosen = {
        role: signatures[name] for role, name in HUB_V1_SIGNATURES.items() if name in signatures
    }
    if not chosen and "default" in signatures:
        chosen = {"default": signatures["default"]}
    unfit = [name for name, s in chosen.items() if "images" not in s.inputs or len(s.inputs) != 1]
    unfit += [name for name, s in chosen.items() if "default" not in s.outputs]
    if unfit or not chosen:
        raise ModelError(
            f"--model {directory}: no signature from `images` to `default`, so no image module; it "
            f"has {', '.join(sorted(signatures))}"
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
    """The expected image size out of the module's attachment `image_module_info`.

    None where it has none that can be read.
    """
    for meta in proto.meta_graphs:
        for value in meta.collection_def["hub_module_attachments"].bytes_list.value:
            try:
                attachment = _fields(value)
                if attachment.get(1) == b"image_module_info":
                    size = _fields(_fields(attachment[2])[1])
                    square = size[1] == size[2] and size[1] in range(1, _LARGEST_SIZE)
                    return size[1] if square else None
            except (IndexError, KeyError, TypeError):  # bytes that are no such message
                continue
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
    if len(shape) != 4 or shape[3] not in (3, None) or shape[1] != shape[2]:
        raise ModelError(
            f"--model {directory}: takes pictures of {list(shape[1:])}; only square RGB ones can "
            "be given"
        )
    height = shape[1]
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

    Networks work on values of the order of one, or of pixels less their mean: what maps [0, 1]
    there takes [0, 1], what maps [0, 255] there takes [0, 255]. TF1 modules keep the hub's
    convention for images, [0, 1].
    """
    found = _mapped_range(image)
    if hints.value_range is not None:
        if found not in (None, hints.value_range):
            log.warning(
                "--value_range %g,%g: the first operations of %s are for %g,%g; yours counts",
                *hints.value_range,
                directory,
                *found,
            )
        return hints.value_range
    if found:
        return found
    if kind == HUB_V1:
        return 0.0, 1.0
    raise ModelError(
        f"--model {directory}: nothing tells which range its pixels have; give --value_range 0,1 "
        "or 0,255 or -1,1"
    )


def _mapped_range(image: tf.Tensor) -> tuple[float, float] | None:
    """The range that the image's first operations tell, None where they do not."""
    scale, offset = _first_map(image)
    if (scale, offset) != (1.0, 0.0):
        for narrow, wide in ((0.5, 10.0), (100.0, 600.0)):
            for high in (1.0, 255.0):
                width = abs(scale) * high
                # What maps [0, high] to around zero, or by a factor alone. A model that maps
                # [-1, 1] to [0, 255] first moves zero up.
                moved = offset if scale > 0 else -offset
                around = moved == 0 or -width <= moved <= -0.05 * width
                if narrow <= width <= wide and around:
                    return 0.0, high
    return None


def _first_map(image: tf.Tensor) -> tuple[float, float]:
    """Scale and offset (means over channels) of the multiplications and additions of constants
    that the image goes through before anything else."""
    scale, offset = 1.0, 0.0
    while True:
        consumers = [op for op in image.consumers() if op.type not in _SIZES]
        if len(consumers) != 1:
            return scale, offset
        (op,) = consumers
        if op.type == "Identity":
            image = op.outputs[0]
            continue
        other = [_constant(t) for t in op.inputs if t is not image]
        if op.type not in _MAPS or len(other) != 1 or other[0] is None:
            return scale, offset
        if op.type in ("Sub", "RealDiv") and op.inputs[0] is not image:
            return scale, offset
        value = float(np.mean(other[0]))
        if op.type == "Mul":
            scale, offset = scale * value, offset * value
        elif op.type == "RealDiv":
            scale, offset = scale / value, offset / value
        else:
            offset += -value if op.type == "Sub" else value
        image = op.outputs[0]


def _depends_on_input(tensor: tf.Tensor) -> bool:
    """Whether the pictures go into `tensor`; weights are placeholders too, of shapes all known."""
    seen = {tensor.op}
    stack = [tensor.op]
    while stack:
        op = stack.pop()
        if op.type == "Placeholder" and not op.outputs[0].shape.is_fully_defined():
            return True
        new = {t.op for t in op.inputs} - seen
        seen |= new
        stack += new
    return False


def _constant(tensor: tf.Tensor) -> np.ndarray | None:
    while tensor.op.type == "Identity":
        tensor = tensor.op.inputs[0]
    if tensor.op.type != "Const":
        return None
    return np.asarray(tf.make_ndarray(tensor.op.get_attr("value")))
