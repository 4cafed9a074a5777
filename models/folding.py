"""The same function in fewer operations, on any device.

Batch norm goes into the convolution before it: `bn(conv(x, w)) = conv(x, w s) + (beta - mean s)`
with `s = gamma / sqrt(variance + epsilon)`. A ReLU of a concatenation becomes one of each part:
most parts of these networks have their own already, or have it for nothing. A pool of single
pixels, by which TF-Slim's factorized reduction reads one in two, becomes the stride of the
convolution behind it. Equal pools are computed once; NASNet adds the average of a tensor to itself,
and the convolutions that read that twofold take it in their kernels.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from models.graphs import Graph, Shapes, kind, node_name, port, waits
from models.runtime import tf

# Of 16 bits, halves of the least numbers are lost, and whole numbers wrap around.
_EXACT = {tf.float32.as_datatype_enum, tf.float64.as_datatype_enum}
_BATCH_NORMS = ("FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3")


def fold(graph: Graph) -> None:
    """Make the kept nodes of `graph` compute the same in fewer operations.

    Weights are folded in float64 and stored in their own type.
    """
    graph.bypass_identities()
    readers = graph.readers()
    for node in list(graph.nodes.values()):
        if node.op in _BATCH_NORMS and not node.attr["is_training"].b:
            _fold_batch_norm(graph, node, readers)
    graph.bypass_identities()
    graph.prune()  # else what was bypassed would still count as a reader
    _stride_by_convolutions(graph)
    _push_relus(graph)
    _share_pools(graph)
    graph.bypass_identities()
    graph.prune()
    _double_kernels(graph)
    graph.bypass_identities()
    graph.prune()


def _fold_batch_norm(graph: Graph, norm: Any, readers: dict[str, list[Any]]) -> None:
    """Make `norm` an identity, where its parameters are constants and convolutions come before."""
    parameters = [graph.constant(name) for name in norm.input[1:5]]
    convs = _convolutions(graph, norm.input[0], readers)
    statistics_read = any(
        node_name(name) == norm.name and port(name) != "0"
        for reader in readers[norm.name]
        for name in reader.input
    )
    if waits(norm) or statistics_read or not convs or any(p is None for p in parameters):
        return
    gamma, beta, mean, variance = (np.asarray(p, np.float64) for p in parameters)
    scale = gamma / np.sqrt(variance + norm.attr["epsilon"].f)
    bias = beta - mean * scale
    start = 0
    for conv in convs:
        kernel = graph.constant(conv.input[1])
        assert kernel is not None
        stop = start + kernel.shape[-1]
        _scale(graph, conv, kernel, scale[start:stop], bias[start:stop])
        start = stop
    _pass_on(norm, norm.input[0])


def _convolutions(graph: Graph, tensor: str, readers: dict[str, list[Any]]) -> list[Any]:
    """The convolutions whose results, concatenated, are `tensor` and nothing else; or none."""
    node = graph.producer(tensor)
    if len(readers[node.name]) != 1 or node.name in graph.keep or waits(node):
        return []
    if node.op == "ConcatV2":
        parts = [_convolutions(graph, part, readers) for part in node.input[:-1]]
        known = _joins_channels(graph, node) and all(parts)
        return [conv for part in parts for conv in part] if known else []
    return [] if _plain_kernel(graph, node) is None else [node]


def _scale(
    graph: Graph, conv: Any, kernel: np.ndarray, scale: np.ndarray, bias: np.ndarray
) -> None:
    """Scale the kernel of `conv` and put a bias behind it, under the name that it had."""
    name = conv.name
    del graph.nodes[name]
    conv.name = graph.free(f"{name}/conv")
    conv.input[1] = graph.add_constant(f"{name}/kernel", (kernel * scale).astype(kernel.dtype))
    graph.nodes[conv.name] = conv
    offset = graph.add_constant(f"{name}/bias", bias.astype(kernel.dtype))
    graph.add("BiasAdd", name, [conv.name, offset]).attr["T"].CopyFrom(conv.attr["T"])


def _push_relus(graph: Graph) -> None:
    """Put ReLUs before the concatenations that only they read, one for each tensor."""
    readers = graph.readers()
    relus: dict[str, str] = {}

    def relu_of(tensor: str, kind: Any) -> str:
        if tensor not in relus:
            relu = graph.add("Relu", f"{node_name(tensor)}/relu{port(tensor)}", [tensor])
            relu.attr["T"].CopyFrom(kind)
            relus[tensor] = relu.name
        return relus[tensor]

    found = [node for node in graph.nodes.values() if node.op == "Relu" and not waits(node)]
    for relu in found:
        if relu.name not in graph.keep:
            relus.setdefault(relu.input[0], relu.name)
    for relu in found:
        concat = graph.producer(relu.input[0])
        only_relus = all(reader.op == "Relu" for reader in readers[concat.name])
        if concat.op != "ConcatV2" or not only_relus or concat.name in graph.keep or waits(concat):
            continue
        *parts, axis = concat.input
        relu.input[:] = [*(relu_of(part, relu.attr["T"]) for part in parts), axis]
        relu.op = "ConcatV2"
        kind = relu.attr["T"].type
        relu.attr.clear()
        for name in ("T", "N", "Tidx"):
            relu.attr[name].CopyFrom(concat.attr[name])
        assert relu.attr["T"].type == kind
    for relu in found:  # the same ReLU of one tensor is computed once
        first = relus.get(relu.input[0])
        if relu.op == "Relu" and first not in (None, relu.name) and relu.name not in graph.keep:
            _pass_on(relu, first)


def _stride_by_convolutions(graph: Graph) -> None:
    """Let convolutions of single pixels take the stride of a pool of single pixels before them.

    The mean or the largest of one number is that number, so no bit of the result changes.
    """
    readers = graph.readers()
    for pool in [node for node in graph.nodes.values() if node.op in ("AvgPool", "MaxPool")]:
        single = list(pool.attr["ksize"].list.i) == [1, 1, 1, 1]
        plain = _channels_last(pool) and pool.attr["padding"].s in (b"SAME", b"VALID")
        reading = readers[pool.name]
        if not (single and plain and reading) or waits(pool) or pool.name in graph.keep:
            continue
        if all(reads_single_pixels(graph, reader, pool, 1) for reader in reading):
            for conv in reading:
                conv.input[0] = pool.input[0]
                conv.attr["strides"].CopyFrom(pool.attr["strides"])


def reads_single_pixels(graph: Graph, node: Any, source: Any, stride: int) -> bool:
    """Whether `node` is a convolution of 1 x 1 of `source`, of one pixel in `stride` each way."""
    if node.op != "Conv2D" or node_name(node.input[0]) != source.name:
        return False
    kernel = _plain_kernel(graph, node)
    return (
        kernel is not None
        and kernel.shape[:2] == (1, 1)
        and node.attr["padding"].s in (b"SAME", b"VALID")
        and list(node.attr["strides"].list.i) == [1, stride, stride, 1]
    )


def _share_pools(graph: Graph) -> None:
    """Compute equal pools once."""
    first: dict[tuple[str, str, bytes], str] = {}
    for node in graph.nodes.values():
        if node.op in ("AvgPool", "MaxPool") and not waits(node) and node.name not in graph.keep:
            how = type(node)(attr=node.attr).SerializeToString(deterministic=True)
            same = first.setdefault((node.op, node.input[0], how), node.name)
            if same != node.name:
                _pass_on(node, same)


def _double_kernels(graph: Graph) -> None:
    """Put the 2 of a tensor added to itself into the kernels of the convolutions behind it.

    Where only such read it, through what takes twice the input to twice the output. A product with
    2 is exact, so no bit of the result changes.
    """
    doubled = [
        node
        for node in graph.nodes.values()
        if node.op in ("Add", "AddV2")
        and kind(node) in _EXACT
        and node.input[0] == node.input[1]
        and node.name not in graph.keep
        and not waits(node)
    ]
    if not doubled:
        return
    shapes, readers = graph.shapes(), graph.readers()
    for node in doubled:
        width = _channels(shapes, node.name)
        reading = width and _reading(graph, shapes, readers, node, 0)
        if width and reading:
            for conv, start in reading:
                kernel = np.array(graph.constant(conv.input[1]))
                kernel[:, :, start : start + width] *= 2
                conv.input[1] = graph.add_constant(f"{conv.name}/doubled", kernel)
            _pass_on(node, node.input[0])


def _reading(
    graph: Graph,
    shapes: Shapes,
    readers: dict[str, list[Any]],
    node: Any,
    start: int,
) -> list[tuple[Any, int]] | None:
    """The convolutions that read `node`, whose first channel is their `start`-th, each with where
    it reads that; None where something else reads it too.
    """
    found: list[tuple[Any, int]] = []
    for reader in {reader.name: reader for reader in readers[node.name]}.values():
        if waits(reader) or reader.name in graph.keep:
            return None
        kernel = _plain_kernel(graph, reader)
        if kernel is not None:
            if kernel.shape[2] != _channels(shapes, reader.input[0]):
                return None  # of groups, each with channels of its own
            found.append((reader, start))
            continue
        if reader.op == "ConcatV2" and _joins_channels(graph, reader):
            widths = [_channels(shapes, part) or 0 for part in reader.input[:-1]]
            starts = [
                start + sum(widths[:at])
                for at, part in enumerate(reader.input[:-1])
                if node_name(part) == node.name
            ]
            known = all(widths)
        else:
            starts, known = [start], _keeps_channels(graph, shapes, reader)
        for at in starts:
            behind = _reading(graph, shapes, readers, reader, at) if known else None
            if behind is None:
                return None
            found += behind
    return found


def _keeps_channels(graph: Graph, shapes: Shapes, node: Any) -> bool:
    """Whether `node` gives twice as much of twice its first input, each channel in its place."""
    width = _channels(shapes, node.name)
    if width is None or width != _channels(shapes, node.input[0]):
        return False
    if node.op in ("Relu", "AvgPool", "MaxPool"):
        return _channels_last(node)
    if node.op == "StridedSlice":
        steps = graph.constant(node.input[3])
        masks = ("ellipsis_mask", "new_axis_mask", "shrink_axis_mask")
        plain = not any(node.attr[mask].i for mask in masks)
        return steps is not None and bool((steps > 0).all()) and plain
    return bool(node.op == "Pad")


def _channels(shapes: Shapes, tensor: str) -> int | None:
    """How many channels pictures have in `tensor`, None where that is open or they are none."""
    shape = shapes.get(tensor) or []
    return shape[-1] if len(shape) == 4 else None


def _channels_last(node: Any) -> bool:
    return "data_format" not in node.attr or node.attr["data_format"].s in (b"NHWC", b"")


def _joins_channels(graph: Graph, concat: Any) -> bool:
    axis = graph.constant(concat.input[-1])
    return axis is not None and int(axis) in (3, -1)


def _plain_kernel(graph: Graph, node: Any) -> np.ndarray | None:
    """The constant by which `node` is a convolution of channels last, None where it is none."""
    plain = node.op == "Conv2D" and _channels_last(node)
    return graph.constant(node.input[1]) if plain else None


def _pass_on(node: Any, tensor: str) -> None:
    """Make `node` an identity of `tensor`."""
    kind = node.attr["T"].type
    node.op = "Identity"
    node.input[:] = [tensor]
    node.attr.clear()
    node.attr["T"].type = kind
