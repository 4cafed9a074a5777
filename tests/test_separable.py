"""models/separable.py and its compiled half, held to TensorFlow's own operations."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import logging
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from pathlib import Path

import exports
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from models import kernels, loading
from models.folding import fold
from models.fusing import FUSED, fuse_convolutions
from models.graphs import Graph
from models.kernels import compiled_width, register
from models.runtime import GPUS, tf
from models.separable import fuse_separable

SOURCE = Path(kernels.__file__).parent / "_separable_avx512.c"
CPU = Path("/proc/cpuinfo")
FLAGS = CPU.read_text().split() if CPU.exists() else []
COULD = (
    platform.machine() == "x86_64"
    and {"avx2", "fma"} <= {*FLAGS}
    and shutil.which("gcc") is not None
    and Path(sysconfig.get_paths()["include"], "Python.h").exists()
)
OURS = "ImageSeparableConv2DBy"  # and the floats of a vector
PAIR = "DepthwiseConv2dNative"
could = pytest.mark.skipif(not COULD, reason="no gcc, no Python.h or no AVX2 here")
compiled = pytest.mark.skipif(not compiled_width(), reason="this CPU has no kernels of ours")


@could
def test_they_are_compiled_where_they_can_be():
    assert compiled_width() == (16 if "avx512f" in FLAGS else 8)


@pytest.fixture(scope="module", params=[8, 16])
def vector(request):
    """Floats of the vectors of kernels that TensorFlow knows: AVX-512's by AVX2 on other CPUs."""
    if not COULD:
        pytest.skip("no gcc, no Python.h or no AVX2 here")
    if request.param == 16 and "avx512f" not in FLAGS:
        lowered()
    else:
        assert register(request.param)
    return request.param


@functools.cache  # TensorFlow ends the process where an operation of one name comes again
def lowered() -> None:
    """Make the kernels of AVX-512 known, each vector of theirs taken as two of AVX2's."""
    include = sysconfig.get_paths()["include"]
    flags = ["-O1", "-ffp-contract=fast", "-fPIC", "-shared", "-w", "-DLOWERED", f"-I{include}"]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "_separable.so")
        subprocess.run(["gcc", *flags, SOURCE, "-o", library], check=True)
        spec = importlib.util.spec_from_file_location("_separable", library)
        assert spec is not None
        assert spec.loader is not None
        made = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(made)
    assert made.WIDTH == 16
    made.add_to(str(Path(tf.sysconfig.get_lib(), "libtensorflow_framework.so.2")))


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
    names = (node.op for node in graph.nodes.values())
    return Counter(OURS if name.startswith(OURS) else name for name in names)


class Layer:
    """A separable convolution of random weights, as networks write it; `size` of its pictures."""

    def __init__(self, size, channels, columns, side=3, stride=1, relu=(True, True), add=False):
        self.size, self.side, self.stride, self.relu, self.add = size, side, stride, relu, add
        self.taps = normal(1, side, side, channels, 1)
        if side == 2:  # as folding writes a factorized reduction's odd pixels
            self.taps[:] = np.array([[0, 0], [0, 1]])[:, :, np.newaxis, np.newaxis]
        self.weights = normal(2, 1, 1, channels, columns)
        self.bias = normal(3, columns)

    def __call__(self, x):
        before, after = self.relu
        x = tf.nn.relu(x) if before else x
        if self.side:
            x = tf.nn.depthwise_conv2d(x, self.taps, [1, self.stride, self.stride, 1], "SAME")
        stride = 1 if self.side else self.stride
        x = tf.nn.bias_add(tf.nn.conv2d(x, self.weights, stride, "SAME"), self.bias)
        if self.add:
            shape = [None, *(-(-side // self.stride) for side in self.size), len(self.bias)]
            x = x + tf.compat.v1.placeholder(tf.float32, shape, "addend")
        return tf.nn.relu(x) if after else x


def fused(graph: Graph, vector: int) -> Graph:
    fold(graph)
    shapes = graph.shapes()
    fuse_convolutions(graph, shapes)
    fuse_separable(graph, shapes, vector)
    return graph


@settings(deadline=None, max_examples=100)
@given(
    kernel=st.sampled_from(
        [(0, 1), (3, 1), (5, 1), (7, 1), (0, 2), (2, 2), (3, 2), (5, 2), (7, 2)]
    ),
    height=st.integers(1, 30),
    width=st.integers(13, 40),
    parts=st.lists(st.integers(1, 40), min_size=1, max_size=3).filter(lambda them: sum(them) >= 8),
    columns=st.integers(1, 70),
    relu=st.tuples(st.booleans(), st.booleans()),
    add=st.booleans(),
    batch=st.integers(1, 9),
)
def test_every_layer_is_tensorflows(
    vector, kernel, height, width, parts, columns, relu, add, batch
):
    """Of the results of other layers side by side, `parts` channels each."""
    side, stride = kernel
    size = height, width
    layer = Layer(size, sum(parts), columns, side, stride, relu, add)
    before = [Layer(size, 8, part, relu=(False, False)) for part in parts]

    def make(x):
        return layer(tf.concat([one(x) for one in before], 3) if len(before) > 1 else before[0](x))

    make.size = size
    pixels = {"x": normal(4, batch, height, width, 8)}
    if add:
        pixels["addend"] = normal(5, batch, -(-height // stride), -(-width // stride), columns)
    wanted = run(graph_of(make, 8), **pixels)
    graph = fused(graph_of(make, 8), vector)
    assert ops(graph)[OURS] == len(parts) + 1
    left = {PAIR, FUSED, "Conv2D", "BiasAdd", "AddV2", "Relu", "ConcatV2"}
    assert not left & ops(graph).keys()
    found = run(graph, **pixels)
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()
    last = run(graph, **{name: value[-1:] for name, value in pixels.items()})
    assert np.array_equal(last[0], found[-1])  # whatever its place, whatever is beside it


KERNELS = [(3, 1), (5, 1), (7, 1), (2, 2), (3, 2), (5, 2), (7, 2)]


@settings(deadline=None, max_examples=60)
@given(
    kernel=st.sampled_from(KERNELS),
    height=st.integers(1, 30),
    width=st.integers(13, 30),
    parts=st.lists(st.integers(1, 40), min_size=1, max_size=4).filter(lambda them: sum(them) >= 8),
    batch=st.integers(1, 5),
)
@example(kernel=(5, 1), height=45, width=60, parts=[30, 5, 37], batch=2)  # some lines a band
@example(kernel=(2, 2), height=13, width=13, parts=[9], batch=2)  # zeros beyond both edges
def test_pictures_with_a_relu_and_without(vector, kernel, height, width, parts, batch):
    """A concatenation that layers with a ReLU before them read, and others."""
    side, stride = kernel
    size, channels = (height, width), sum(parts)
    one = Layer(size, channels, 12, side, stride)
    other = Layer(size, channels, 12, 3, stride, relu=(False, False))

    def make(x):
        joined = tf.concat(tf.split(x, parts, 3), 3) if len(parts) > 1 else x
        return one(joined) + other(joined)

    make.size = size
    pixels = normal(4, batch, height, width, channels)
    wanted = run(graph_of(make, channels), x=pixels)
    graph = fused(graph_of(make, channels), vector)
    assert ops(graph)[OURS] == 2
    assert not {PAIR, FUSED, "AddV2"} & ops(graph).keys()
    left = side == 2  # a slice's ReLU stays, and what it reads
    assert ops(graph)["Relu"] == left
    assert ops(graph)["ConcatV2"] == (left and len(parts) > 1)
    assert np.abs(run(graph, x=pixels) - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("side", [0, 2])
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (3, 3), (4, 5), (5, 4), (1, 1200)])
def test_every_second_pixel_of_any_size(vector, side, size):
    """Beside a pair, without which one of 1 x 1 alone would be left; lines of two bands."""
    layer, pair = Layer(size, 200, 9, side, 2, relu=(False, True)), Layer((9, 9), 200, 8)

    def make(x):
        return layer(x) + tf.reduce_sum(pair(tf.zeros([1, 9, 9, 200])))

    make.size = size
    pixels = normal(4, 3, *size, 200)
    wanted = run(graph_of(make, 200), x=pixels)
    graph = fused(graph_of(make, 200), vector)
    assert ops(graph)[OURS] == 2
    assert np.abs(run(graph, x=pixels) - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("side", [3, 7])
@pytest.mark.parametrize("stride", [1, 2])
def test_pictures_of_more_than_a_band(vector, side, stride):
    """A line of theirs is a part of 256 KiB, and the lines around it are read for two bands."""
    layer = Layer((45, 100), 72, 24, side, stride)
    pixels = normal(4, 3, 45, 100, 72)
    wanted = run(graph_of(layer, 72), x=pixels)
    graph = fused(graph_of(layer, 72), vector)
    assert ops(graph)[OURS] == 1
    assert np.abs(run(graph, x=pixels) - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_none_and_what_is_no_number(vector):
    layer = Layer((8, 8), 8, 9)
    graph = fused(graph_of(layer, 8), vector)
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


def strided(layer, strides):
    def make(x):
        weights = normal(6, 1, 1, 8, 8)
        return tf.nn.bias_add(tf.nn.conv2d(layer(x), weights, strides, "SAME"), layer.bias)

    return make


def joined(layer, count, axis=3, also=lambda x: 0.0):
    """A convolution of 1 x 1 of `count` times the layer, and what `also` makes of them."""

    def make(x):
        many = tf.concat([layer(x + place) for place in range(count)], axis)
        weights = normal(6, 1, 1, many.shape[3], 8)
        y = tf.nn.bias_add(tf.nn.conv2d(many, weights, 1, "SAME"), layer.bias)
        return tf.reduce_sum(y, [1, 2]) + tf.reduce_sum(also(many))

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
    "fewer than eight channels": (FEW, 4, {FUSED: 1, PAIR: 1}),
    "4 MB of weights": (convolved(WIDENED, normal(6, 1, 1, 1024, 1024)), 16, {OURS: 1, FUSED: 1}),
    "1281 channels": (
        convolved(Layer((7, 7), 16, 1281), normal(6, 1, 1, 1281, 8)),
        16,
        {OURS: 1, FUSED: 1},
    ),
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
    "two by two": (
        depthwise_by(PLAIN, taps=normal(1, 2, 2, 16, 1), strides=[1, 2, 2, 1]),
        16,
        {FUSED: 1, PAIR: 1},
    ),
    "every third pixel": (strided(PLAIN, 3), 16, {OURS: 1, FUSED: 1}),
    "every other column": (strided(PLAIN, [1, 1, 2, 1]), 16, {OURS: 1, FUSED: 1}),
    "16 pictures side by side": (joined(PLAIN, 16), 16, {OURS: 17, "ConcatV2": 0}),
    "their last axis": (joined(PLAIN, 2, -1), 16, {OURS: 3, "ConcatV2": 0}),
    "17 pictures side by side": (joined(PLAIN, 17), 16, {OURS: 18, "ConcatV2": 1}),
    "one below the other": (joined(PLAIN, 2, 1), 16, {OURS: 3, "ConcatV2": 1}),
    "what others read too": (joined(PLAIN, 2, also=tf.sin), 16, {OURS: 3, "ConcatV2": 1}),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_is_left_to_onednn(vector, name):
    make, channels, counted = LEFT_ALONE[name]
    make.size = getattr(make, "size", (9, 9))
    pixels = normal(4, 2, *make.size, channels)
    wanted = run(graph_of(make, channels), x=pixels)
    graph = fused(graph_of(make, channels), vector)
    assert {op: ops(graph)[op] for op in counted} == counted
    assert np.abs(run(graph, x=pixels) - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_a_concatenation_that_is_added_stays(vector):
    def make(x):
        many = tf.concat([PLAIN(x), PLAIN(x + 1)], 3)
        conv = tf.nn.conv2d(many, normal(6, 1, 1, 16, 16), 1, "SAME")
        return tf.nn.bias_add(conv, normal(7, 16)) + many

    make.size = (9, 9)
    pixels = normal(4, 2, 9, 9, 16)
    wanted = run(graph_of(make, 16), x=pixels)
    graph = fused(graph_of(make, 16), vector)
    assert (ops(graph)[OURS], ops(graph)["ConcatV2"], ops(graph)["AddV2"]) == (3, 1, 1)  # x + 1
    assert np.abs(run(graph, x=pixels) - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_a_relu_that_others_read_stays(vector):
    layer = Layer((9, 9), 16, 16, relu=(False, False))

    def make(x):
        positive = tf.nn.relu(x)
        return layer(positive) + positive

    make.size = (9, 9)
    pixels = normal(4, 2, 9, 9, 16)
    wanted = run(graph_of(make, 16), x=pixels)
    graph = fused(graph_of(make, 16), vector)
    assert ops(graph)[OURS] == ops(graph)["Relu"] == 1  # it is what is added, too
    assert np.abs(run(graph, x=pixels) - wanted).max() <= 1e-5 * np.abs(wanted).max()


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
def test_shapes_that_do_not_fit_are_refused(vector, given, shape):
    layer = Layer((9, 9), 16, 8, add=True)
    graph = fused(graph_of(layer, 16), vector)
    assert ops(graph)[OURS] == 1
    for node in graph.nodes.values():
        if node.op == "Placeholder" and node.name in ("x", "addend"):
            node.attr["shape"].shape.unknown_rank = True
            del node.attr["shape"].shape.dim[:]
    pixels = {"x": normal(4, 2, 9, 9, 16), "addend": normal(5, 2, 9, 9, 8)}
    run(graph, **pixels)
    with pytest.raises(tf.errors.InvalidArgumentError, match="do not fit together"):
        run(graph, **{**pixels, given: normal(6, *shape)})


@pytest.mark.parametrize(
    "changed", [{"relu_before": 1}, {"offset": 2}, {"stride": 3}, {"side": 2}, {"side": 3}]
)
def test_layers_that_there_are_not_are_refused(vector, changed):
    graph = fused(graph_of(Layer((14, 14), 16, 8, 2, 2, relu=(False, True)), 16), vector)
    (layer,) = (node for node in graph.nodes.values() if node.op.startswith(OURS))
    run(graph, x=normal(4, 2, 14, 14, 16))
    for name, value in changed.items():
        if name == "relu_before":
            layer.attr[name].b = bool(value)
        else:
            layer.attr[name].i = value
    with pytest.raises(tf.errors.InvalidArgumentError, match="do not fit together"):
        run(graph, x=normal(4, 2, 14, 14, 16))


@pytest.mark.skipif(bool(GPUS), reason="a GPU computes here")
def test_a_network_is_made_of_them(vector, monkeypatch):
    spec = loading.LoadSpec(exports.exported("saved_model", "classification"))
    monkeypatch.setattr(loading, "chosen_width", lambda: vector)
    info, graph = loading._assembled(spec)
    loading._for_device(graph, bfloat16=False)
    assert ops(graph)[OURS] > 10
    pixels = np.random.default_rng(0).integers(0, 256, (3, info.image_size, info.image_size, 3))
    vectors = []
    for width in (vector, 0):
        monkeypatch.setattr(loading, "_loaded", {})
        monkeypatch.setattr(loading, "chosen_width", lambda width=width: width)
        vectors.append(loading.load(spec)(pixels.astype(np.uint8)))
    ours, onednn = vectors
    for name, width in info.outputs.items():
        assert ours[name].shape == (3, width)
        assert np.abs(ours[name] - onednn[name]).max() <= 1e-6 * np.abs(onednn[name]).max()


def test_what_is_kept_stays(vector):
    with tf.Graph().as_default() as built:
        x = tf.compat.v1.placeholder(tf.float32, [None, 9, 9, 16], "x")
        tf.identity(Layer((9, 9), 16, 8)(Layer((9, 9), 16, 16)(x)), name="y")
    names = {node.op: node.name for node in reversed(built.as_graph_def().node)}
    for op in (PAIR, "Relu"):
        graph = fused(Graph(built.as_graph_def(), ["y", names[op]]), vector)
        assert graph.nodes[names[op]].op == op
    with tf.Graph().as_default() as built:
        x = tf.compat.v1.placeholder(tf.float32, [None, 9, 9, 16], "x")
        tf.identity(PLAIN(tf.concat([PLAIN(x), PLAIN(x)], 3, name="both")), name="y")
    graph = fused(Graph(built.as_graph_def(), ["y", "both"]), vector)
    assert graph.nodes["both"].op == "ConcatV2"
    assert ops(graph)[OURS] == 3


@compiled
def test_the_layers_are_known_to_tensorflow_once():
    assert register(compiled_width())
    assert register(compiled_width())


@compiled
def test_a_half_of_another_version_is_not_used(monkeypatch, caplog):
    monkeypatch.setattr(kernels, "LAYOUT", 0)
    with caplog.at_level(logging.INFO, "pipeline"):
        assert kernels.compiled_width.__wrapped__() == 0
    assert "install the project again" in caplog.text


@pytest.mark.skipif(bool(GPUS), reason="a GPU computes here")
def test_without_kernels_of_ours_onednns_operations_stay(monkeypatch):
    monkeypatch.setattr(loading, "chosen_width", lambda: 0)
    graph = loading._assembled(loading.LoadSpec(exports.exported("saved_model", "classification")))[
        1
    ]
    loading._for_device(graph, bfloat16=False)
    assert ops(graph)[PAIR] > 10
    assert not ops(graph)[OURS]


def test_networks_without_such_layers_are_not_timed(monkeypatch):
    monkeypatch.setattr(loading, "chosen_width", lambda: pytest.fail("it is asked for"))
    graph = graph_of(Layer((9, 9), 16, 8, side=0), 16)
    loading._for_device(graph, bfloat16=False)
    assert not ops(graph)[OURS]


@pytest.mark.parametrize("avx512", [False, True])
def test_without_the_compiled_half_onednn_computes(monkeypatch, caplog, avx512):
    monkeypatch.setattr(kernels, "AVX512", avx512)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    half = "models._separable_avx512" if avx512 else "models._separable"
    monkeypatch.setitem(sys.modules, half, None)  # as Python marks what is missing
    with caplog.at_level(logging.INFO, "pipeline"):
        assert kernels.compiled_width.__wrapped__() == 0
    assert "oneDNN computes separable convolutions: ours are not here (" in caplog.text


@pytest.mark.skipif("avx512f" in FLAGS, reason="a CPU with AVX-512")
@could
def test_a_half_for_other_cpus_is_not_used(monkeypatch, caplog):
    monkeypatch.setattr(kernels, "AVX512", True)
    with caplog.at_level(logging.INFO, "pipeline"):
        assert kernels.compiled_width.__wrapped__() == 0
    assert "this CPU has no avx512f" in caplog.text


def test_machines_without_any_are_told_nothing(monkeypatch, caplog):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with caplog.at_level(logging.INFO, "pipeline"):
        assert kernels.compiled_width.__wrapped__() == 0
    assert not caplog.text


@compiled
@pytest.mark.skipif(bool(GPUS), reason="a GPU computes here")
@pytest.mark.parametrize(("ours", "taken"), [(0.5, True), (0.97, True), (0.99, False), (2, False)])
def test_the_faster_ones_compute(monkeypatch, ours, taken):
    taking = itertools.cycle([1.0, ours, 3.0, 3.0])  # every other time both are held up
    monkeypatch.setattr(kernels, "_seconds", lambda function, pixels: next(taking))
    monkeypatch.setattr(kernels, "_function", lambda graph: lambda pixels: {"y": pixels})
    assert kernels.chosen_width.__wrapped__() == (compiled_width() if taken else 0)


@compiled
@pytest.mark.skipif(bool(GPUS), reason="a GPU computes here")
def test_those_of_other_bits_do_not_compute(monkeypatch, caplog):
    def wrong(graph, shapes, width):
        fuse_separable(graph, shapes, width)
        name = next(name for name in graph.weights if name.endswith("panels"))
        graph.weights[name] = np.nextafter(graph.weights[name], 0)

    monkeypatch.setattr(kernels, "fuse_separable", wrong)
    monkeypatch.setattr(kernels, "_seconds", lambda function, pixels: pytest.fail("they are timed"))
    with caplog.at_level(logging.INFO, "pipeline"):
        assert kernels.chosen_width.__wrapped__() == 0
    assert "from its here" in caplog.text


@compiled
@pytest.mark.skipif(bool(GPUS), reason="a GPU computes here")
def test_those_that_fail_do_not_compute(monkeypatch, caplog):
    def failing(graph, shapes, width):
        fuse_separable(graph, shapes, width)
        next(node for node in graph.nodes.values() if node.op.startswith(OURS)).attr["side"].i = 4

    monkeypatch.setattr(kernels, "fuse_separable", failing)
    assert kernels.chosen_width.__wrapped__() == 0
    assert "ours were not tried (" in caplog.text
