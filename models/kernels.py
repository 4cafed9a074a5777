"""Which kernels compute separable convolutions in float32 on this CPU: ours, or oneDNN's.

Ours are compiled where the project is installed and a C compiler is there, with AVX2 and with
AVX-512. They are taken where they prove faster and give the same bits, so that no vector depends on
what a process found.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from models.fusing import fuse_convolutions
from models.graphs import Graph
from models.runtime import AVX512, constant, function_of, tf
from models.separable import LAYOUT, fuse_separable

Run = Callable[[tf.Tensor], Mapping[str, tf.Tensor]]
_COMPILED = {8: "models._separable", 16: "models._separable_avx512"}
_PICTURES = (8, 28, 28, 44)
_TURNS = 9
_FASTER = 0.98  # of oneDNN's time, at most: less may be chance

log = logging.getLogger("pipeline")


@functools.cache
def compiled_width() -> int:
    """Floats of a vector of our kernels for this CPU, 0 for none; TensorFlow knows them then."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return 0
    width = 16 if AVX512 else 8
    return width if register(width) else 0


def register(width: int) -> bool:
    """Make our kernels of vectors of `width` floats known to TensorFlow, where they are here."""
    library = os.path.join(tf.sysconfig.get_lib(), "libtensorflow_framework.so.2")
    try:
        compiled = importlib.import_module(_COMPILED[width])
        if getattr(compiled, "LAYOUT", None) != LAYOUT:
            raise ImportError("its compiled half is of another version: install the project again")
        compiled.add_to(library)
    except ImportError as error:
        log.info("oneDNN computes separable convolutions: ours are not here (%s)", error)
        return False
    return True


@functools.cache
def chosen_width() -> int:
    """`compiled_width()` where our kernels are faster on this CPU than oneDNN's, else 0.

    Some layers as nasnet_mobile's are computed both ways, and timed in turn, the least of each
    taken. 0 where a bit of the results differs.
    """
    width = compiled_width()
    if not width:
        return 0
    graph = _layers()
    shapes = graph.shapes()
    fuse_convolutions(graph, shapes)
    random = np.random.default_rng(0)
    pixels = constant(random.normal(size=_PICTURES).astype(np.float32))
    functions = [_function(graph)]
    fuse_separable(graph, shapes, width)
    functions.append(_function(graph))
    try:
        onednn, ours = (function(pixels)["y"].numpy() for function in functions)
    except tf.errors.OpError as error:
        log.warning("oneDNN computes separable convolutions: ours were not tried (%s)", error)
        return 0
    if not np.array_equal(ours, onednn):
        apart = np.abs(ours - onednn).max() / np.abs(onednn).max()
        log.info("oneDNN computes separable convolutions: ours are %.1g from its here", apart)
        return 0
    taken = [[_seconds(function, pixels) for function in functions] for _ in range(_TURNS)]
    onednn, ours = (min(each) for each in zip(*taken, strict=True))
    log.debug("separable convolutions: %.3f of oneDNN's time", ours / onednn)
    return width if ours < _FASTER * onednn else 0


def _layers() -> Graph:
    """Pictures `x` -> `y` by separable convolutions, and one of 1 x 1 of the last two side by side.

    By nodes: to import TensorFlow's functions for layers would nearly double what the trial takes.
    """
    graph = Graph(tf.compat.v1.GraphDef(), ["y"])
    random = np.random.default_rng(0)

    def add(op: str, name: str, *inputs: str, strides: Sequence[int] = ()) -> str:
        node = graph.add(op, name, list(inputs))
        node.attr["T"].type = tf.float32.as_datatype_enum
        if strides:
            node.attr["strides"].list.i.extend(strides)
            node.attr["padding"].s = b"SAME"
        return str(node.name)

    def constant_of(summed: int, *shape: int) -> str:
        values = random.normal(scale=summed**-0.5, size=shape)  # so sums are as large as addends
        return graph.add_constant("constant", values.astype(np.float32))

    x = graph.add("Placeholder", "x", [])
    x.attr["dtype"].type = tf.float32.as_datatype_enum
    x.attr["shape"].shape.CopyFrom(tf.TensorShape(_PICTURES).as_proto())
    last, held = "x", _PICTURES[-1]
    for side, stride, columns in ((5, 1, 44), (7, 2, 88), (3, 1, 88), (5, 2, 176), (5, 1, 176)):
        before, by = last, [1, stride, stride, 1]
        taps = constant_of(side * side, side, side, held, 1)
        weights = constant_of(held, 1, 1, held, columns)
        last = add("Relu", "relu", last)
        last = add("DepthwiseConv2dNative", "depthwise", last, taps, strides=by)
        last = add("Conv2D", "pointwise", last, weights, strides=[1, 1, 1, 1])
        last = add("BiasAdd", "bias", last, constant_of(1, columns))
        if held == columns:
            last = add("AddV2", "addition", last, before)
        held = columns
    axis = graph.add_constant("axis", np.array(3, np.int32))
    last = add("ConcatV2", "joined", last, before, axis)
    graph.nodes[last].attr["N"].i = 2
    graph.nodes[last].attr["Tidx"].type = tf.int32.as_datatype_enum
    last = add("Conv2D", "pointwise", last, constant_of(352, 1, 1, 352, 176), strides=[1, 2, 2, 1])
    last = add("BiasAdd", "bias", last, constant_of(1, 176))
    add("Relu", "y", last)
    return graph


def _function(graph: Graph) -> Run:
    """TensorFlow's function of `graph`, `x` -> `y`."""
    weights = {name: constant(array) for name, array in graph.weights.items()}
    return function_of(graph.to_def(), weights, "x", tf.TensorSpec(_PICTURES), ["y"])  # type: ignore[no-any-return]


def _seconds(function: Run, pixels: tf.Tensor) -> float:
    start = time.perf_counter()
    function(pixels)
    return time.perf_counter() - start
