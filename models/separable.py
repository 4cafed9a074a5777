"""Separable convolutions as one operation each: that of kernels of ours.

NASNet and PNASNet are made of them (Chollet, "Xception", CVPR 2017): a depthwise convolution and
one of 1 x 1, which oneDNN runs one after the other, through memory. `_separable.c` runs them band
by band in the cache, with the concatenation and ReLU before and bias, addition and ReLU behind, and
such a network's other convolutions of 1 x 1 too. `kernels.py` tells where.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from models.fusing import FUSED
from models.graphs import Graph, Shapes, kind, node_name, waits
from models.runtime import tf

_OPERATION = "ImageSeparableConv2DBy{}"  # as the compiled half calls it, by its WIDTH
LAYOUT = 3  # of inputs and weights as the compiled half takes them
_FLOAT = tf.float32.as_datatype_enum
_FUSED_OPS = [[b"BiasAdd", *more] for more in ([], [b"Relu"], [b"Add"], [b"Add", b"Relu"])]
_SIDES = (3, 5, 7)  # of depthwise kernels that it has
_LAST = np.array([[0, 0], [0, 1]])[:, :, np.newaxis]  # of 2 x 2 taps
_NARROWEST = 7  # pixels of a result's line that it takes at once
_MOST_PICTURES = 16  # side by side, channels behind channels
_FEWEST = 8  # channels: of fewer most of a vector would be empty
_DEEPEST = 1280  # channels by 1 x 1: of more oneDNN adds up parts by AVX-512, to other bits
# Above these oneDNN is as fast: bytes of a padded line, and of the weights of 1 x 1.
_WIDEST_LINE = 32 << 10
_HEAVIEST = 2 << 20


def has_separable(graph: Graph, shapes: Shapes) -> bool:
    """Whether `fuse_separable` would find any pair."""
    return any(before is not None for _, before in _pairs(graph, shapes))


def fuse_separable(graph: Graph, shapes: Shapes, width: int) -> None:
    """Make each depthwise convolution and the fused one of 1 x 1 behind it one operation.

    Where there are any, so is each other fused one of 1 x 1 that they take. A ReLU that only such
    pairs read is taken in (of NaN it is 0 then, as in fused ones; not before a slice), and a
    concatenation of channels that only these convolutions read. In float32, where nothing else
    reads what lies between.
    `shapes` are those before `fuse_convolutions`; `width`: floats of a vector of the kernels, 8 or
    16.
    """
    found = list(_pairs(graph, shapes))
    pairs = {node.name for node, depthwise in found if depthwise is not None}
    if not pairs:
        return
    for node, depthwise in found:
        _replace(graph, node, depthwise, width)
    _take_relus(graph, {name for name in pairs if graph.nodes[name].attr["side"].i})
    graph.prune()  # of those ReLUs: they read concatenations
    _take_concatenations(graph, {node.name for node, _ in found})
    graph.prune()


def _pairs(graph: Graph, shapes: Shapes) -> Iterator[tuple[Any, Any]]:
    """Each convolution of 1 x 1 that our kernels take, and the depthwise one before it, or None."""
    readers = graph.readers()
    for node in graph.nodes.values():
        if _is_pointwise(graph, node, shapes):
            before = graph.producer(node.input[0])
            alone = len(readers[before.name]) == 1 and before.name not in graph.keep
            taken = alone and _stride(node) == 1 and _is_depthwise(graph, before, shapes)
            yield node, before if taken else None


def _take_relus(graph: Graph, pairs: set[str]) -> None:
    """Take in the ReLUs that only the pictures of `pairs` go through."""
    readers = graph.readers()
    for relu in [node for node in graph.nodes.values() if node.op == "Relu"]:
        reading = readers[relu.name]
        if waits(relu) or relu.name in graph.keep or not pairs.issuperset(r.name for r in reading):
            continue
        if any(relu.name in map(node_name, reader.input[1:]) for reader in reading):
            continue
        for reader in reading:
            reader.input[0] = relu.input[0]
            reader.attr["relu_before"].b = True


def _take_concatenations(graph: Graph, ours: set[str]) -> None:
    """Let `ours` read what a concatenation that only they read is made of."""
    readers = graph.readers()
    for joined in [node for node in graph.nodes.values() if node.op == "ConcatV2"]:
        reading = readers[joined.name]
        if waits(joined) or joined.name in graph.keep:
            continue
        if not ours.issuperset(reader.name for reader in reading):
            continue
        *parts, axis = joined.input
        place = graph.constant(axis)
        if place is None or int(place) not in (3, -1) or len(parts) > _MOST_PICTURES:
            continue
        if any(joined.name in map(node_name, reader.input[1:]) for reader in reading):
            continue
        for reader in reading:
            reader.input[:] = [*parts, *reader.input[1:]]
            reader.attr["picture_count"].i = len(parts)


def _is_pointwise(graph: Graph, node: Any, shapes: Shapes) -> bool:
    """Whether it is a fused convolution of 1 x 1 that our kernels take."""
    if node.op != FUSED or kind(node) != _FLOAT:
        return False
    weights = graph.constant(node.input[1])
    channels = (shapes.get(node.input[0]) or [None])[-1]
    return (
        weights is not None
        and weights.shape[:3] == (1, 1, channels)  # fewer than there are would be of groups
        and weights.shape[2] <= _DEEPEST
        and weights.nbytes <= _HEAVIEST
        and graph.constant(node.input[2]) is not None
        and node.attr["padding"].s in (b"SAME", b"VALID")
        and list(node.attr["fused_ops"].list.s) in _FUSED_OPS
        and _stride(node) in (1, 2)
        and _is_plain(node)
    )


def _is_depthwise(graph: Graph, node: Any, shapes: Shapes) -> bool:
    """Whether it is a depthwise convolution that our kernels take."""
    if node.op != "DepthwiseConv2dNative" or kind(node) != _FLOAT:
        return False
    taps = graph.constant(node.input[1])
    width = (shapes.get(node.name) or [None] * 4)[2]
    if taps is None or width is None:
        return False
    rows, side, channels, multiplier = taps.shape
    if multiplier != 1 or node.attr["padding"].s != b"SAME" or not _is_plain(node):
        return False
    stride = _stride(node)
    return _is_odd_slice(taps, stride) or (
        rows == side
        and side in _SIDES
        and stride in (1, 2)
        and width >= _NARROWEST
        and channels >= _FEWEST
        and (width * stride + side) * channels * 4 <= _WIDEST_LINE
    )


def _is_odd_slice(taps: np.ndarray, stride: int) -> bool:
    """Whether `taps`, every second pixel, take of each 2 x 2 pixels the last, as it is."""
    return stride == 2 and taps.shape[:2] == (2, 2) and bool((taps[:, :, :, 0] == _LAST).all())


def _stride(node: Any) -> int:
    """The stride of a convolution, 0 where it differs by direction."""
    batch, down, right, channels = node.attr["strides"].list.i
    return int(down) if down == right and batch == channels == 1 else 0


def _is_plain(node: Any) -> bool:
    """Whether it has no dilation, and pictures in NHWC."""
    dilations = list(node.attr["dilations"].list.i) if "dilations" in node.attr else []
    layout = node.attr["data_format"].s if "data_format" in node.attr else b"NHWC"
    return dilations in ([], [1, 1, 1, 1]) and layout == b"NHWC" and not waits(node)


def _replace(graph: Graph, node: Any, depthwise: Any, width: int) -> None:
    """Put the operation in the place of `node`, and of `depthwise` before it, if not None."""
    weights = graph.constant(node.input[1])
    bias = graph.constant(node.input[2])
    assert weights is not None
    assert bias is not None
    channels, columns = weights.shape[2:]
    held = -(-channels // width) * width
    taps = np.zeros((0, held), np.float32)
    side, stride, offset = 0, _stride(node), 0
    if depthwise is not None:
        filters = graph.constant(depthwise.input[1])
        assert filters is not None
        stride = _stride(depthwise)
        if _is_odd_slice(filters, stride):
            offset = 1
        else:
            side = filters.shape[0]
            flat = filters.reshape(side * side, channels)
            taps = np.pad(flat, ((0, 0), (0, held - channels)))
        del graph.nodes[depthwise.name]
    source = node.input[0] if depthwise is None else depthwise.input[0]
    fused = list(node.attr["fused_ops"].list.s)
    del graph.nodes[node.name]
    made = graph.add(
        _OPERATION.format(width),
        node.name,
        [
            source,
            graph.add_constant(f"{node.name}/taps", taps),
            graph.add_constant(f"{node.name}/panels", _panels(weights[0, 0], width)),
            graph.add_constant(f"{node.name}/bias", np.pad(bias, (0, -columns % width))),
            *node.input[3:],
        ],
    )
    for attribute, value in (
        ("picture_count", 1),
        ("addend_count", len(node.input) - 3),
        ("side", side),
        ("stride", stride),
        ("offset", offset),
        ("columns", columns),
    ):
        made.attr[attribute].i = value
    made.attr["relu_before"].b = False
    made.attr["relu"].b = b"Relu" in fused


def _panels(weights: np.ndarray, width: int) -> np.ndarray:
    """`weights` [channels, columns] as the compiled half takes them, panel by panel.

    The last begins early where the columns are no multiple of a vector; one alone ends with zeros.
    """
    columns = weights.shape[1]
    left, first, taken = -(-columns // width), 0, []
    if left <= 3:
        return np.pad(weights, ((0, 0), (0, left * width - columns))).ravel()
    while left:
        vectors = 2 if left in (2, 4) else 3
        left -= vectors
        if not left:
            first = columns - vectors * width
        taken.append(weights[:, first : first + vectors * width].ravel())
        first += vectors * width
    return np.concatenate(taken)
