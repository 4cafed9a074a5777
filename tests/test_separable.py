"""models/separable.py and its compiled half, held to TensorFlow's own operations."""

from __future__ import annotations

import dataclasses
import logging
import platform
import shutil
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import exports
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from models import loading, separable
from models.folding import fold
from models.fusing import FUSED, fuse_convolutions
from models.graphs import Graph
from models.runtime import GPUS
from models.separable import WIDTH, fuse_separable

CPU = Path("/proc/cpuinfo")
FLAGS = CPU.read_text().split() if CPU.exists() else []
COULD = (
    platform.machine() == "x86_64"
    and {"avx2", "fma"} <= {*FLAGS}
    and "avx512f" not in FLAGS
    and shutil.which("gcc") is not None
    and Path(sysconfig.get_paths()["include"], "Python.h").exists()
)
OURS = "ImageSeparableConv2D"
PAIR = "DepthwiseConv2dNative"
compiled = pytest.mark.skipif(not WIDTH, reason="this CPU has no kernels of ours")


@pytest.mark.skipif(not COULD, reason="no gcc, no Python.h, no AVX2 or AVX-512 here")
def test_it_is_compiled_where_it_can_be():
    assert WIDTH


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def graph_of(make, channels: int, keep=("y",)) -> Graph:
    """What `make` makes of pictures `x` of any number, height and width known when run."""
    with tf.Graph().as_default() as built:
        x = tf.compat.v1.placeholder(tf.float32, [None, *make.size, channels], "x")
        tf.identity(make(x), name="y")
    return Graph(built.as_graph_def(), keep)


def run(graph: Graph, **given: np.ndarray) -> np.ndarray:
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        tf.graph_util.import_graph_def(graph.to_def(graph.weights), name="")
        return session.run("y:0", {f"{name}:0": value for name, value in given.items()})


def ops(graph: Graph) -> Counter:
    return Counter(node.op for node in graph.nodes.values())


class Layer:
    """A separable convolution of random weights, as networks write it; `size` of its pictures."""

    def __init__(self, size, channels, columns, side=3, stride=1, relu=(True, True), add=False):
        self.size, self.side, self.stride, self.relu, self.add = size, side, stride, relu, add
        self.taps = normal(1, side, side, channels, 1)
        self.weights = normal(2, 1, 1, channels, columns)
        self.bias = normal(3, columns)

    def __call__(self, x):
        before, after = self.relu
        x = tf.nn.relu(x) if before else x
        if self.side:
            x = tf.nn.depthwise_conv2d(x, self.taps, [1, self.stride, self.stride, 1], "SAME")
        x = tf.nn.bias_add(tf.nn.conv2d(x, self.weights, 1, "SAME"), self.bias)
        if self.add:
            shape = [None, *(-(-side // self.stride) for side in self.size), len(self.bias)]
            x = x + tf.compat.v1.placeholder(tf.float32, shape, "addend")
        return tf.nn.relu(x) if after else x


def fused(graph: Graph) -> Graph:
    fold(graph)
    fuse_convolutions(graph)
    fuse_separable(graph)
    return graph


@compiled
@settings(deadline=None, max_examples=100)
@given(
    kernel=st.sampled_from([(0, 1), (3, 1), (5, 1), (7, 1), (2, 2), (3, 2), (5, 2), (7, 2)]),
    height=st.integers(1, 30),
    width=st.integers(13, 40),
    channels=st.integers(8, 70),
    columns=st.integers(1, 70),
    relu=st.tuples(st.booleans(), st.booleans()),
    add=st.booleans(),
    batch=st.integers(1, 9),
)
def test_every_layer_is_tensorflows(kernel, height, width, channels, columns, relu, add, batch):
    side, stride = kernel
    layer = Layer((height, width), channels, columns, side, stride, relu, add)
    before = Layer((height, width), channels, channels, relu=(False, False))

    def make(x):  # one of 1 x 1 alone behind a pair, without which it would be left
        return layer(x if side else before(x))

    make.size = layer.size
    pixels = {"x": normal(4, batch, height, width, channels)}
    if add:
        pixels["addend"] = normal(5, batch, -(-height // stride), -(-width // stride), columns)
    wanted = run(graph_of(make, channels), **pixels)
    graph = fused(graph_of(make, channels))
    assert ops(graph)[OURS] == (1 if side else 2)
    assert not {PAIR, FUSED, "Conv2D", "BiasAdd", "AddV2", "Relu"} & ops(graph).keys()
    found = run(graph, **pixels)
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()
    last = run(graph, **{name: value[-1:] for name, value in pixels.items()})
    assert np.array_equal(last[0], found[-1])  # whatever its place, whatever is beside it


@compiled
@pytest.mark.parametrize("side", [3, 7])
@pytest.mark.parametrize("stride", [1, 2])
def test_pictures_of_more_than_a_band(side, stride):
    """A line of theirs is a part of 256 KiB, and the lines around it are read for two bands."""
    layer = Layer((45, 100), 72, 24, side, stride)
    pixels = normal(4, 3, 45, 100, 72)
    wanted = run(graph_of(layer, 72), x=pixels)
    graph = fused(graph_of(layer, 72))
    assert ops(graph)[OURS] == 1
    assert np.abs(run(graph, x=pixels) - wanted).max() <= 1e-5 * np.abs(wanted).max()


@compiled
def test_none_and_what_is_no_number():
    layer = Layer((8, 8), 8, 9)
    graph = fused(graph_of(layer, 8))
    assert run(graph, x=normal(4, 0, 8, 8, 8)).shape == (0, 8, 8, 9)
    pixels = normal(4, 2, 8, 8, 8)
    pixels[0, 3, 3, 3] = np.nan
    pixels[0, 4, 4, 4] = np.inf
    found = run(graph, x=pixels)
    assert not np.isfinite(found[0]).all()
    assert np.array_equal(found[1], run(graph, x=pixels[1:])[0])


def two_readers(layer):
    def make(x):
        between = tf.nn.depthwise_conv2d(x, layer.taps, [1, 1, 1, 1], "SAME")
        conv = tf.nn.conv2d(between, layer.weights, 1, "SAME")
        return tf.nn.bias_add(conv, layer.bias) + tf.reduce_sum(between, 3, keepdims=True)

    return make


def depthwise_by(layer, **given):
    def make(x):
        how = {"strides": [1, 1, 1, 1], "padding": "SAME", **given}
        taps = how.pop("taps", layer.taps)
        between = tf.nn.depthwise_conv2d(x, taps, **how)
        return tf.nn.relu(
            tf.nn.bias_add(tf.nn.conv2d(between, layer.weights, 1, "SAME"), layer.bias)
        )

    return make


def strided(layer):
    def make(x):
        weights = normal(6, 1, 1, 8, 8)
        return tf.nn.bias_add(tf.nn.conv2d(layer(x), weights, 2, "SAME"), layer.bias)

    return make


def convolved(layer, weights, padding="SAME", after=lambda x: x):
    """Separable, and then by `weights` of 1 x 1 and a bias."""

    def make(x):
        bias = normal(5, weights.shape[3])
        return after(tf.nn.bias_add(tf.nn.conv2d(layer(x), weights, 1, padding), bias))

    return make


NARROW, WIDE = Layer((9, 6), 16, 8), Layer((4, 300), 32, 8)
PLAIN, FEW = Layer((9, 9), 16, 8), Layer((9, 9), 4, 8)
WIDENED = Layer((7, 7), 16, 1024)
# By name: what is made, its channels, and how much of it is ours in the end.
LEFT_ALONE = {
    "no pair": (Layer((9, 9), 16, 8, side=0), 16, {FUSED: 1}),
    "lines of six pixels": (NARROW, 16, {FUSED: 1, PAIR: 1}),
    "lines of 38 KB": (WIDE, 32, {FUSED: 1, PAIR: 1}),
    "fewer channels than a vector": (FEW, 4, {FUSED: 1, PAIR: 1}),
    "4 MB of weights": (convolved(WIDENED, normal(6, 1, 1, 1024, 1024)), 16, {OURS: 1, FUSED: 1}),
    "groups": (convolved(PLAIN, normal(6, 1, 1, 4, 8)), 16, {OURS: 1, FUSED: 1}),
    "padding of 1 x 1": (
        convolved(PLAIN, normal(6, 1, 1, 8, 8), [[0, 0], [1, 1], [1, 1], [0, 0]]),
        16,
        {OURS: 1, FUSED: 1},
    ),
    "another activation": (
        convolved(PLAIN, normal(6, 1, 1, 8, 8), after=tf.nn.relu6),
        16,
        {OURS: 2, "Relu6": 1},
    ),
    "what two read": (two_readers(PLAIN), 16, {FUSED: 1, PAIR: 1}),
    "no padding": (depthwise_by(PLAIN, padding="VALID"), 16, {FUSED: 1, PAIR: 1}),
    "dilated": (depthwise_by(PLAIN, dilations=[2, 2]), 16, {FUSED: 1, PAIR: 1}),
    "four by four": (depthwise_by(PLAIN, taps=normal(1, 4, 4, 16, 1)), 16, {FUSED: 1, PAIR: 1}),
    "one by three": (depthwise_by(PLAIN, taps=normal(1, 1, 3, 16, 1)), 16, {FUSED: 1, PAIR: 1}),
    "two of each": (depthwise_by(PLAIN, taps=normal(1, 3, 3, 8, 2)), 8, {FUSED: 1, PAIR: 1}),
    "every other pixel": (strided(PLAIN), 16, {OURS: 1, FUSED: 1}),
}


@compiled
@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_is_left_to_onednn(name):
    make, channels, counted = LEFT_ALONE[name]
    make.size = getattr(make, "size", (9, 9))
    pixels = normal(4, 2, *make.size, channels)
    wanted = run(graph_of(make, channels), x=pixels)
    graph = fused(graph_of(make, channels))
    assert {op: ops(graph)[op] for op in counted} == counted
    assert np.abs(run(graph, x=pixels) - wanted).max() <= 1e-5 * np.abs(wanted).max()


@compiled
def test_a_relu_that_others_read_stays():
    layer = Layer((9, 9), 16, 16, relu=(False, False))

    def make(x):
        positive = tf.nn.relu(x)
        return layer(positive) + positive

    make.size = (9, 9)
    pixels = normal(4, 2, 9, 9, 16)
    wanted = run(graph_of(make, 16), x=pixels)
    graph = fused(graph_of(make, 16))
    assert ops(graph)[OURS] == ops(graph)["Relu"] == 1  # it is what is added, too
    assert np.abs(run(graph, x=pixels) - wanted).max() <= 1e-5 * np.abs(wanted).max()


@compiled
@pytest.mark.parametrize(
    ("given", "shape"),
    [
        ("x", (2, 9, 9, 24)),
        ("x", (2, 9, 6, 16)),
        ("x", (9, 9, 16)),
        ("addend", (2, 9, 8, 8)),
        ("addend", (1, 9, 9, 8)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(given, shape):
    layer = Layer((9, 9), 16, 8, add=True)
    graph = fused(graph_of(layer, 16))
    assert ops(graph)[OURS] == 1
    for node in graph.nodes.values():
        if node.op == "Placeholder" and node.name in ("x", "addend"):
            node.attr["shape"].shape.unknown_rank = True
            del node.attr["shape"].shape.dim[:]
    pixels = {"x": normal(4, 2, 9, 9, 16), "addend": normal(5, 2, 9, 9, 8)}
    run(graph, **pixels)
    with pytest.raises(tf.errors.InvalidArgumentError, match="do not fit together"):
        run(graph, **{**pixels, given: normal(6, *shape)})


@compiled
@pytest.mark.skipif(bool(GPUS), reason="a GPU computes here")
def test_a_network_is_made_of_them(monkeypatch):
    spec = loading.LoadSpec(exports.exported("saved_model", "classification"))
    info, graph = loading._assembled(spec)
    loading._for_device(graph, bfloat16=False)
    assert ops(graph)[OURS] > 10
    found = loading.load(spec)
    monkeypatch.setattr(separable, "WIDTH", 0)
    onednn = loading.load(dataclasses.replace(spec, copies=3))  # which is another one
    pixels = np.random.default_rng(0).integers(0, 256, (3, info.image_size, info.image_size, 3))
    vectors, wanted = (model(pixels.astype(np.uint8)) for model in (found, onednn))
    for name, width in info.outputs.items():
        assert vectors[name].shape == (3, width)
        assert np.abs(vectors[name] - wanted[name]).max() <= 1e-6 * np.abs(wanted[name]).max()


@compiled
def test_what_is_kept_stays():
    with tf.Graph().as_default() as built:
        x = tf.compat.v1.placeholder(tf.float32, [None, 9, 9, 16], "x")
        tf.identity(Layer((9, 9), 16, 8)(Layer((9, 9), 16, 16)(x)), name="y")
    names = {node.op: node.name for node in reversed(built.as_graph_def().node)}
    for op in (PAIR, "Relu"):
        graph = fused(Graph(built.as_graph_def(), ["y", names[op]]))
        assert graph.nodes[names[op]].op == op


@compiled
def test_a_half_of_another_version_is_not_used(monkeypatch, caplog):
    monkeypatch.setattr(separable, "_LAYOUT", 0)
    with caplog.at_level(logging.INFO, "pipeline"):
        assert separable._load() == 0
    assert "install the project again" in caplog.text


def test_without_the_compiled_half_onednn_computes(monkeypatch, caplog):
    monkeypatch.setattr(separable, "AVX512", False)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setitem(sys.modules, "models._separable", None)  # as Python marks what is missing
    with caplog.at_level(logging.INFO, "pipeline"):
        assert separable._load() == 0
    assert "oneDNN computes separable convolutions, in some more time (" in caplog.text
    monkeypatch.setattr(separable, "WIDTH", 0)
    graph = fused(graph_of(Layer((9, 9), 16, 8), 16))
    assert (ops(graph)[PAIR], ops(graph)[OURS]) == (1, 0)


@pytest.mark.parametrize(("avx512", "machine"), [(True, "x86_64"), (False, "aarch64")])
def test_other_cpus_are_left_to_onednn(monkeypatch, caplog, avx512, machine):
    monkeypatch.setattr(separable, "AVX512", avx512)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    with caplog.at_level(logging.INFO, "pipeline"):
        assert separable._load() == 0
    assert not caplog.text


@compiled
def test_the_layers_are_known_to_tensorflow_once():
    assert separable._load() == separable._load() == WIDTH
