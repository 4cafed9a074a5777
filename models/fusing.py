"""Operations as CPUs want them (fused for oneDNN, products apart), and bfloat16 arithmetic.

TensorFlow's own remapper fuses convolution, bias, addition and ReLU too, but gives up on these
networks as a whole ("fanout exist for missing node"), and its mixed precision knows no fused
operation. Both are written out here, so that they hold for float32 and bfloat16 alike.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from models.folding import reads_single_pixels
from models.graphs import Graph, Shapes, kind, node_name, waits
from models.runtime import BFLOAT16_KERNELS, op_def_registry, tf

# The layers of convolutional networks; everything else stays in float32 behind a cast.
_CONVOLUTIONS = {"Conv2D", "DepthwiseConv2dNative"}
_BFLOAT16_OPS = {
    *_CONVOLUTIONS,
    *("BiasAdd", "Relu", "Relu6", "Add", "AddV2"),
    *("AvgPool", "MaxPool", "ConcatV2", "Pad", "PadV2", "StridedSlice", "Identity"),
}
FUSED = "_MklNativeFusedConv2D"
_FLOAT = tf.float32.as_datatype_enum
_BFLOAT16 = tf.bfloat16.as_datatype_enum
_INT16 = tf.int16.as_datatype_enum
_FUSIBLE = {_FLOAT, _BFLOAT16} if BFLOAT16_KERNELS else {_FLOAT}  # what oneDNN's kernel takes here


def can_fuse() -> bool:
    """Whether this TensorFlow has oneDNN's fused convolution."""
    return op_def_registry.get(FUSED) is not None


def to_bfloat16(graph: Graph) -> None:
    """Put the layers of convolutional networks, and their weights, in bfloat16.

    What comes before them (the scaling of pixels) and after (the mean over places, the dense layer
    with its bias) stays in float32; kept nodes keep their type.
    """
    layers = _layers(graph)
    for node in list(graph.nodes.values()):
        layer = node.name in layers
        for at, tensor in enumerate(node.input):
            if tensor.startswith("^"):
                continue
            made_by = graph.producer(tensor)
            if not layer:
                if made_by.name in layers:
                    node.input[at] = _cast(graph, tensor, to_bfloat16=False)
            elif made_by.name not in layers and _is_float(node, at):
                constant = _bfloat16_constant(graph, made_by)
                node.input[at] = constant or _cast(graph, tensor, to_bfloat16=True)
    for name in layers:
        graph.nodes[name].attr["T"].type = _BFLOAT16
    graph.prune()


def _layers(graph: Graph) -> set[str]:
    """The convolutions, and what reads them or what so follows without leaving such operations.

    What is a vector for each picture already, such as a head's convolution of 1 x 1, is none.
    """
    readers = graph.readers()
    shapes = graph.shapes()
    layers: set[str] = set()
    waiting = [node for node in graph.nodes.values() if node.op in _CONVOLUTIONS]
    while waiting:
        node = waiting.pop()
        if node.name in layers or node.name in graph.keep or kind(node) != _FLOAT:
            continue
        if (shapes.get(node.name) or [])[1:3] == [1, 1]:
            continue
        layers.add(node.name)
        waiting += [reader for reader in readers[node.name] if reader.op in _BFLOAT16_OPS]
    return layers


def _is_float(node: Any, at: int) -> bool:
    """Whether input `at` of a layer is one of its tensors, not an axis, a shape or an index."""
    if node.op == "ConcatV2":
        return at < int(node.attr["N"].i)
    indexed = node.op in ("Pad", "PadV2", "StridedSlice")
    return not indexed or at == 0 or (node.op, at) == ("PadV2", 2)


def _bfloat16_constant(graph: Graph, node: Any) -> str | None:
    """The name of the constant `node` in bfloat16, None where it is none."""
    name = f"{node.name}/bfloat16"
    if name not in graph.nodes:
        is_constant = node.op == "Const" or node.name in graph.weights
        value = graph.constant(node.name) if is_constant else None
        if value is None:
            return None
        graph.add_constant(name, value.astype(tf.bfloat16.as_numpy_dtype))
    return name


def _cast(graph: Graph, tensor: str, to_bfloat16: bool) -> str:
    name = f"{tensor.replace(':', '/')}/{'to_bfloat16' if to_bfloat16 else 'to_float'}"
    if name not in graph.nodes:
        cast = graph.add("Cast", name, [tensor])
        cast.attr["SrcT"].type = _FLOAT if to_bfloat16 else _BFLOAT16
        cast.attr["DstT"].type = _BFLOAT16 if to_bfloat16 else _FLOAT
    return name


def fuse_convolutions(graph: Graph, shapes: Shapes) -> None:
    """Make each convolution, its bias, an addition and a ReLU behind it one operation.

    Only where nothing else reads what lies between. The addition is fused where both sides have
    one shape. `shapes` are `graph.shapes()`; those of what stays keep their names.
    """
    readers = graph.readers()
    for bias in [node for node in graph.nodes.values() if node.op == "BiasAdd"]:
        conv = graph.producer(bias.input[0])
        if conv.op != "Conv2D" or len(readers[conv.name]) != 1 or bias.name in graph.keep:
            continue
        if kind(conv) not in _FUSIBLE or waits(conv) or waits(bias):
            continue
        chain, fused, extra = [conv, bias], [b"BiasAdd"], []
        reader = _only_reader(graph, readers, bias)
        if reader is not None and reader.op in ("Add", "AddV2"):
            others = [name for name in reader.input if node_name(name) != bias.name]
            if len(others) == 1 and _same(shapes, bias.name, others[0]):
                chain.append(reader)
                extra = others
                fused.append(b"Add")
                reader = _only_reader(graph, readers, reader)
        if reader is not None and reader.op == "Relu":
            chain.append(reader)
            fused.append(b"Relu")
        _replace(graph, chain, [*conv.input, bias.input[1], *extra], fused)
    graph.prune()


def take_larger_by_bits(graph: Graph) -> None:
    """Make each ReLU of bfloat16 that is still an operation one of its bits, read as int16.

    Both orders are the same from 0 on, and all that has a sign bit is less than 0. TensorFlow's own
    widens each number to float32 and rounds it back, and takes 4 times as long. A NaN with a sign
    becomes 0, as in fused operations.
    """
    for relu in [node for node in graph.nodes.values() if node.op == "Relu"]:
        if kind(relu) != _BFLOAT16 or waits(relu) or relu.name in graph.keep:
            continue
        del graph.nodes[relu.name]
        bits = _bitcast(graph, f"{relu.name}/bits", relu.input[0], _BFLOAT16, _INT16)
        larger = graph.add("Relu", f"{relu.name}/larger", [bits])
        larger.attr["T"].type = _INT16
        _bitcast(graph, relu.name, larger.name, _INT16, _BFLOAT16)


def _bitcast(graph: Graph, name: str, tensor: str, from_type: int, to_type: int) -> str:
    node = graph.add("Bitcast", name, [tensor])
    node.attr["T"].type = from_type
    node.attr["type"].type = to_type
    return str(node.name)


def take_odd_pixels(graph: Graph) -> None:
    """Make a factorized reduction's odd pixels one depthwise convolution.

    It pads, cuts the first row and column off and reads every other pixel. A kernel of 2 x 2 with a
    single one takes them in one pass, and in any layout: OpenVINO turned pictures around for the
    cut. What reads them has no stride any more.
    """
    readers = graph.readers()
    for cut in [node for node in graph.nodes.values() if node.op == "StridedSlice"]:
        pad = graph.producer(cut.input[0])
        reading = readers[cut.name]
        at_the_end = [[0, 0], [0, 1], [0, 1], [0, 0]]
        if (
            pad.op != "Pad"
            or waits(pad)
            or waits(cut)
            or cut.name in graph.keep
            or not reading
            or not np.array_equal(graph.constant(pad.input[1]), at_the_end)  # type: ignore[arg-type]
            or not _drops_first(graph, cut)
            or not all(reads_single_pixels(graph, reader, cut, 2) for reader in reading)
        ):
            continue
        weights = graph.constant(reading[0].input[1])
        assert weights is not None
        kernel = np.zeros((2, 2, weights.shape[2], 1), weights.dtype)
        kernel[1, 1] = 1
        one = graph.add_constant(f"{cut.name}/odd/one", kernel)
        odd = graph.add("DepthwiseConv2dNative", f"{cut.name}/odd", [pad.input[0], one])
        odd.attr["T"].CopyFrom(cut.attr["T"])
        odd.attr["strides"].list.i.extend([1, 2, 2, 1])
        odd.attr["padding"].s = b"SAME"
        for reader in reading:
            reader.input[0] = odd.name
            reader.attr["strides"].list.i[:] = [1, 1, 1, 1]
    graph.prune()


def _drops_first(graph: Graph, cut: Any) -> bool:
    """Whether a slice is `[:, 1:, 1:, :]`."""
    begin, _, steps = (graph.constant(name) for name in cut.input[1:])
    masks = ("begin_mask", "end_mask", "ellipsis_mask", "new_axis_mask", "shrink_axis_mask")
    return (
        begin is not None
        and list(begin[1:3]) == [1, 1]
        and np.array_equal(steps, [1, 1, 1, 1])  # type: ignore[arg-type]
        and [cut.attr[mask].i for mask in masks] == [0b1001, 0b1111, 0, 0, 0]
    )


def multiply_by_picture(graph: Graph) -> None:
    """Make each product of rows with a constant matrix one product a picture.

    Kernels that take rows in blocks give those of the last, smaller block other bits than the rest,
    so that a picture's vector would depend on its place in the batch. A picture is one row, or as
    many as it had before the batch was flattened (a transformer's tokens).
    """
    products = [node for node in graph.nodes.values() if node.op == "MatMul"]
    flattened = [graph.producer(node.input[0]) for node in products]
    shapes = graph.shapes() if any(node.op == "Reshape" for node in flattened) else {}
    for node in products:
        matrix = graph.constant(node.input[1])
        if node.attr["transpose_a"].b or matrix is None or waits(node):
            continue
        turned = node.attr["transpose_b"].b
        rows, columns = reversed(matrix.shape) if turned else matrix.shape
        left, right = node.input
        each = _rows_a_picture(shapes, graph.producer(left), int(rows))
        del graph.nodes[node.name]
        apart = _reshape(graph, f"{node.name}/apart", left, [-1, each, rows], node)
        product = graph.add("BatchMatMulV2", f"{node.name}/product", [apart.name, right])
        product.attr["T"].CopyFrom(node.attr["T"])
        product.attr["adj_y"].b = turned
        _reshape(graph, node.name, product.name, [-1, columns], node)


def _rows_a_picture(shapes: Shapes, source: Any, width: int) -> int:
    """How many rows of `width` each picture has in `source`, one where nothing tells."""
    if source.op != "Reshape":
        return 1
    shape = shapes.get(source.input[0]) or []
    if len(shape) < 2:
        return 1
    batch, *places, last = shape
    known = [place for place in places if place]
    each = batch is None and last == width and len(known) == len(places)
    return math.prod(known) if each else 1


def _reshape(graph: Graph, name: str, tensor: str, shape: list[int], like: Any) -> Any:
    sizes = graph.add_constant(f"{name}/shape", np.array(shape, np.int32))
    node = graph.add("Reshape", name, [tensor, sizes])
    node.attr["T"].CopyFrom(like.attr["T"])
    node.attr["Tshape"].type = tf.int32.as_datatype_enum
    return node


def _same(shapes: Shapes, *tensors: str) -> bool:
    """Whether two tensors are known to have one shape, whatever the size of the batch."""
    one, other = (shapes.get(tensor) for tensor in tensors)
    return one is not None and one == other and None not in one[1:]


def _only_reader(graph: Graph, readers: dict[str, list[Any]], node: Any) -> Any:
    """The one node that reads `node`, unless it waits or has been fused into another meanwhile."""
    found = readers[node.name]
    if len(found) != 1 or node.name in graph.keep:
        return None
    left = graph.nodes.get(found[0].name) is found[0] and not waits(found[0])
    return found[0] if left else None


def _replace(graph: Graph, chain: list[Any], inputs: list[str], fused: list[bytes]) -> None:
    """Put the fused operation in the place of `chain`, a convolution and what follows it."""
    conv = chain[0]
    is_constant = graph.constant(conv.input[1]) is not None  # else the first batch's would stay
    for node in chain:
        del graph.nodes[node.name]
    node = graph.add(FUSED, chain[-1].name, inputs)
    for attribute in (
        "T",
        "strides",
        "padding",
        "explicit_paddings",
        "data_format",
        "dilations",
    ):
        if attribute in conv.attr:
            node.attr[attribute].CopyFrom(conv.attr[attribute])
    node.attr["num_args"].i = len(inputs) - 2
    node.attr["TArgs"].list.type.extend([conv.attr["T"].type] * (len(inputs) - 2))
    node.attr["fused_ops"].list.s.extend(fused)
    node.attr["is_filter_const"].b = is_constant
    node.attr["_kernel"].s = b"MklNameChangeOp"  # how TensorFlow labels its oneDNN kernels
