"""Folding changes the number of operations, not what is computed."""

from collections import Counter

import exports
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from models import networks
from models.catalog import ONE_CELL
from models.folding import fold
from models.fusing import (
    can_fuse,
    fuse_convolutions,
    multiply_by_picture,
    take_larger_by_bits,
    take_odd_pixels,
    to_bfloat16,
)
from models.graphs import Graph
from models.graphs import kind as graph_kind
from models.runtime import BFLOAT16_KERNELS

SIDE, CHANNELS = 7, 4
X = np.random.default_rng(0).normal(size=(2, SIDE, SIDE, CHANNELS)).astype(np.float32)
FUSED = "_MklNativeFusedConv2D"


class Net:
    """Builds layers with random weights on the current graph."""

    def __init__(self, seed: int = 0):
        self.random = np.random.default_rng(seed)

    def conv(self, x: tf.Tensor, width: int = CHANNELS, name: str | None = None) -> tf.Tensor:
        kernel = self.random.normal(size=(3, 3, int(x.shape[-1]), width)).astype(np.float32)
        return tf.nn.conv2d(x, kernel, 1, "SAME", name=name)

    def norm(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
        width = int(x.shape[-1])
        gamma, variance = self.random.uniform(0.5, 2, (2, width)).astype(np.float32)
        beta, mean = self.random.normal(size=(2, width)).astype(np.float32)
        return tf.compat.v1.nn.fused_batch_norm(
            x, gamma, beta, mean, variance, epsilon=1e-3, is_training=training
        )[0]

    def cell(self, x: tf.Tensor) -> tf.Tensor:
        return self.norm(self.conv(tf.nn.relu(x)))


def build(make) -> tf.compat.v1.GraphDef:
    with tf.Graph().as_default() as graph:
        x = tf.compat.v1.placeholder(tf.float32, [None, SIDE, SIDE, CHANNELS], "x")
        tf.identity(make(Net(), x), name="y")
    return graph.as_graph_def()


def run(graph: Graph) -> np.ndarray:
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        tf.graph_util.import_graph_def(graph.to_def(graph.weights), name="")
        return session.run("y:0", {"x:0": X})


def ops(graph: Graph) -> Counter:
    return Counter(node.op for node in graph.nodes.values())


def close(got: np.ndarray, wanted: np.ndarray, error: float = 1e-5) -> bool:
    return bool(np.abs(got - wanted).max() <= error * np.abs(wanted).max())


def block(net: Net, x: tf.Tensor, endpoint: bool = False) -> tf.Tensor:
    a, b = net.cell(x), net.cell(net.cell(x))
    concat = tf.concat([a, b, tf.nn.relu(x)], 3)
    if endpoint:
        tf.identity(concat)
    return tf.nn.relu(concat)


def pools(x: tf.Tensor, *sides: int) -> tf.Tensor:
    """The sum of average pools of `x`, and a maximum pool of the first size."""
    each = [tf.nn.avg_pool2d(x, side, 1, "SAME") for side in sides]
    return tf.add_n(each) + tf.nn.max_pool2d(x, sides[0], 1, "SAME")


def doubled(x: tf.Tensor) -> tf.Tensor:
    """Twice the average of a tensor, as NASNet has it."""
    return tf.nn.avg_pool2d(x, 3, 1, "SAME") + tf.nn.avg_pool2d(x, 3, 1, "SAME")


def named(x: tf.Tensor) -> tf.Tensor:
    """`x` behind nodes called as folding calls its own."""
    for name in ("conv", "kernel", "bias"):
        x = tf.abs(x, name=f"c/{name}")
    return x


FOLDED = {
    "a batch norm": (lambda net, x: net.norm(net.conv(x)), {"FusedBatchNormV3": 0, "BiasAdd": 1}),
    "one behind a concatenation": (
        lambda net, x: net.norm(tf.concat([net.conv(x, 3), net.conv(x, 5)], 3)),
        {"FusedBatchNormV3": 0, "BiasAdd": 2},
    ),
    "one whose convolution's parts have the names of ours": (
        lambda net, x: net.norm(net.conv(x, name="c")) + named(x),
        {"FusedBatchNormV3": 0, "BiasAdd": 1},
    ),
    "a ReLU of a concatenation": (block, {"FusedBatchNormV3": 0, "ConcatV2": 1, "Relu": 5}),
    "one of which an endpoint reads too, that nobody wants": (
        lambda net, x: block(net, x, endpoint=True),
        {"FusedBatchNormV3": 0, "ConcatV2": 1, "Relu": 5},
    ),
    "a pool that is there twice": (
        lambda net, x: pools(x, 3, 3),
        {"AvgPool": 1, "MaxPool": 1},
    ),
    "a stride that a pool of single pixels makes": (
        lambda net, x: (
            single(net, tf.nn.avg_pool2d(x, 1, 2, "VALID"), stride=1)
            + single(net, tf.nn.max_pool2d(x, 1, 2, "SAME"), stride=1, padding="VALID")
        ),
        {"AvgPool": 0, "MaxPool": 0},
    ),
    "one that others read too": (
        lambda net, x: (lambda p: single(net, p, stride=1) + p[..., :3])(
            tf.nn.avg_pool2d(x, 1, 2, "VALID")
        ),
        {"AvgPool": 1},
    ),
    "one before a convolution of three by three, and of a stride": (
        lambda net, x: (
            single(net, tf.nn.avg_pool2d(x, 1, 2, "VALID"), stride=1, size=3)
            + single(net, tf.nn.avg_pool2d(x, 1, 1, "VALID"), stride=2)
        ),
        {"AvgPool": 2},
    ),
    "pools of two sizes": (lambda net, x: pools(x, 3, 2), {"AvgPool": 2, "MaxPool": 1}),
    "twice a pool, read by convolutions": (
        lambda net, x: net.conv(doubled(x)) + net.conv(tf.nn.relu(doubled(x))),
        {"AddV2": 1, "AvgPool": 1},
    ),
    "twice a pool beside others, through a ReLU": (
        lambda net, x: net.conv(tf.nn.relu(tf.concat([x, doubled(x), net.conv(x)], 3))),
        {"AddV2": 0},
    ),
    "twice a pool, in two concatenations and two places of one": (
        lambda net, x: (
            lambda twice: net.conv(
                tf.concat([twice, x, tf.concat([x, tf.nn.max_pool2d(twice, 3, 1, "SAME")], 3)], 3)
            )
        )(doubled(x)),
        {"AddV2": 0},
    ),
    "twice a pool, through what cuts and pads": (
        lambda net, x: net.conv(
            tf.pad(tf.concat([x, doubled(x)], 3), [[0, 0], [0, 1], [0, 1], [0, 0]])[:, 1:, 1:, :]
        ),
        {"AddV2": 0},
    ),
    "twice a pool, through a slice of everything": (
        lambda net, x: net.conv(tf.strided_slice(doubled(x), np.zeros(0, int), [], [])),
        {"AddV2": 0},
    ),
    "pools of two tensors": (
        lambda net, x: pools(x, 3, 3) + pools(tf.abs(x), 3),
        {"AvgPool": 2, "MaxPool": 2},
    ),
}
LEFT = {
    "a convolution that is read twice": lambda net, x: (
        lambda made: net.norm(made) + tf.nn.relu(made)
    )(net.conv(x)),
    "a batch norm in training": lambda net, x: net.norm(net.conv(x), training=True),
    "a batch norm of no convolution": lambda net, x: net.norm(tf.nn.relu(x)),
    "a concatenation of another axis": lambda net, x: net.norm(
        tf.concat([net.conv(x), net.conv(x)], 1)
    ),
    "a concatenation of which one part is no convolution": lambda net, x: net.norm(
        tf.concat([net.conv(x), x], 3)
    ),
}


TWICE_LEFT = {
    "the result": lambda net, x: doubled(x),
    "read by a mean too": lambda net, x: (
        lambda twice: net.conv(twice) + tf.reduce_mean(tf.nn.relu(twice))
    )(doubled(x)),
    "joined along another axis": lambda net, x: net.conv(tf.concat([doubled(x), x], 1)),
    "of which channels are cut": lambda net, x: net.conv(doubled(x)[:, :, :, 1:]),
    "of which channels are turned": lambda net, x: net.conv(doubled(x)[:, :, :, ::-1]),
    "of which columns become channels": lambda net, x: net.conv(
        doubled(x)[:, tf.newaxis, :, :CHANNELS, 0]
    ),
    "behind others, by groups": lambda net, x: tf.nn.conv2d(
        tf.concat([x, doubled(x)], 3), net.random.normal(size=(1, 1, 4, 4)).astype("f"), 1, "SAME"
    ),
    "before others, by groups": lambda net, x: tf.nn.conv2d(
        tf.concat([doubled(x), x], 3), net.random.normal(size=(1, 1, 4, 4)).astype("f"), 1, "SAME"
    ),
    "a pool over channels": lambda net, x: net.conv(
        tf.concat([tf.nn.max_pool2d(doubled(x), [1, 1, 1, 2], [1, 1, 1, 2], "SAME"), x], 3)
    ),
    "of 16 bits": lambda net, x: tf.cast(
        tf.nn.conv2d(doubled(tf.cast(x, tf.float16)), np.ones((1, 1, 4, 4), "e"), 1, "SAME"),
        tf.float32,
    ),
    "padded by channels": lambda net, x: net.conv(tf.pad(doubled(x), [[0, 0]] * 3 + [[1, 0]])),
    "a kernel that is no constant": lambda net, x: tf.nn.conv2d(
        doubled(x), tf.reshape(x[0, :4, :4], [1, 1, 8, 8])[:, :, :4], 1, "SAME"
    ),
    "another function": lambda net, x: net.conv(tf.exp(doubled(x))),
    "a bounded ReLU": lambda net, x: net.conv(tf.nn.relu6(doubled(x))),
}


WAITING = {
    "a convolution": "Conv2D",
    "a batch norm": "FusedBatchNormV3",
    "a concatenation": "ConcatV2",
    "a ReLU": "Relu",
}


def open_rank(x: tf.Tensor) -> tf.Tensor:
    return tf.compat.v1.placeholder_with_default(x, None)


@pytest.mark.parametrize("name", FOLDED)
def test_folding_computes_the_same_in_fewer_operations(name):
    make, counts = FOLDED[name]
    graph = Graph(build(make), ["y"])
    wanted = run(graph)
    fold(graph)
    assert {op: ops(graph)[op] for op in counts} == counts
    assert close(run(graph), wanted)


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_be_folded_is_left(name):
    graph = Graph(build(LEFT[name]), ["y"])
    wanted = run(graph)
    fold(graph)
    assert ops(graph)["FusedBatchNormV3"] == 1
    assert close(run(graph), wanted)


@pytest.mark.parametrize("name", TWICE_LEFT)
def test_twice_what_others_read_too_is_left(name):
    graph = Graph(build(lambda net, x: tf.identity(TWICE_LEFT[name](net, x))), ["y"])
    wanted = run(graph)
    before = ops(graph)["AddV2"]
    fold(graph)
    assert ops(graph)["AddV2"] == before >= 1
    assert close(run(graph), wanted)


def test_twice_a_tensor_is_left_where_what_reads_it_is_wanted():
    def make(net: Net, x: tf.Tensor) -> tf.Tensor:
        return net.conv(tf.nn.relu(doubled(x), name="wanted"))

    graph = Graph(build(make), ["y", "wanted"])
    fold(graph)
    assert ops(graph)["AddV2"] == 1


def test_doubled_kernels_give_the_same_bits():
    graph = Graph(build(FOLDED["twice a pool beside others, through a ReLU"][0]), ["y"])
    wanted = run(graph)
    fold(graph)
    assert np.array_equal(run(graph), wanted)


FUSIONS = {
    "bias": (lambda net, x: tf.nn.bias_add(net.conv(x), np.ones(CHANNELS, np.float32)), 1),
    "bias and ReLU": (lambda net, x: tf.nn.relu(net.norm(net.conv(x))), 1),
    "bias, addition": (lambda net, x: net.norm(net.conv(x)) + x, 1),
    "bias, addition, ReLU": (lambda net, x: tf.nn.relu(x + net.norm(net.conv(x))), 1),
    "an addition that spreads": (
        lambda net, x: net.norm(net.conv(x)) + np.ones(CHANNELS, np.float32),
        1,
    ),
    "two that are added": (
        lambda net, x: tf.nn.relu(net.norm(net.conv(x)) + net.norm(net.conv(x))),
        2,
    ),
    "a bias read twice": (
        lambda net, x: (lambda made: tf.nn.relu(made) + tf.sigmoid(made))(net.norm(net.conv(x))),
        1,
    ),
}


@pytest.mark.skipif(not can_fuse(), reason="this TensorFlow has no oneDNN")
@pytest.mark.parametrize("name", FUSIONS)
def test_fusing_computes_the_same(name):
    make, count = FUSIONS[name]
    graph = Graph(build(make), ["y"])
    wanted = run(graph)
    fold(graph)
    fuse_convolutions(graph, graph.shapes())
    assert ops(graph)[FUSED] == count
    assert ops(graph)["Conv2D"] == 0
    assert close(run(graph), wanted)


def odd_pixels(net: Net, x: tf.Tensor, side: int, then) -> tf.Tensor:
    """Of a picture of `side`, padded at its ends and cut at its beginnings, what `then` makes."""
    x = tf.image.resize(x, [side, side])
    return then(net, tf.pad(x, [[0, 0], [0, 1], [0, 1], [0, 0]])[:, 1:, 1:, :])


def single(net: Net, x: tf.Tensor, stride: int = 2, size: int = 1, padding: str = "SAME"):
    kernel = net.random.normal(size=(size, size, CHANNELS, 3)).astype(np.float32)
    return tf.nn.conv2d(x, kernel, stride, padding)


def odd_pixels_taken(make) -> int:
    """How often the odd pixels of a graph are taken at once; its values stay as they are."""
    graph = Graph(build(make), ["y"])
    wanted = run(graph)
    before = ops(graph)
    take_odd_pixels(graph)
    assert close(run(graph), wanted)
    taken = ops(graph)["DepthwiseConv2dNative"] - before["DepthwiseConv2dNative"]
    assert before["StridedSlice"] - ops(graph)["StridedSlice"] == taken
    assert before["Pad"] - ops(graph)["Pad"] == taken
    return taken


ODD_PIXELS = {
    # side, what reads the odd pixels, how often they are taken
    "of an even side": (8, single, 1),
    "of an even side, valid": (8, lambda net, x: single(net, x, padding="VALID"), 1),
    "of an odd side": (7, single, 1),
    "of an odd side, valid": (7, lambda net, x: single(net, x, padding="VALID"), 1),
    "of one pixel": (1, single, 1),
    "read twice": (8, lambda net, x: single(net, x) + single(net, x), 1),
    "every pixel": (8, lambda net, x: single(net, x, stride=1), 0),
    "three by three": (8, lambda net, x: single(net, x, size=3), 0),
    "also by another": (8, lambda net, x: single(net, x) + tf.reduce_mean(x), 0),
    "also as they are": (8, lambda net, x: single(net, x) + x[:, ::2, ::2, :3], 0),
}


@pytest.mark.parametrize("name", ODD_PIXELS)
def test_odd_pixels_are_taken_at_once(name):
    side, then, times = ODD_PIXELS[name]
    assert odd_pixels_taken(lambda net, x: odd_pixels(net, x, side, then)) == times


def test_odd_pixels_of_a_pool_as_slim_takes_them():
    def reduced(net: Net, x: tf.Tensor) -> tf.Tensor:
        return single(net, tf.nn.avg_pool2d(x, 1, 2, "VALID"), stride=1)

    graph = Graph(build(lambda net, x: odd_pixels(net, x, 8, reduced)), ["y"])
    wanted = run(graph)
    fold(graph)
    take_odd_pixels(graph)
    assert close(run(graph), wanted)
    assert (ops(graph)["AvgPool"], ops(graph)["StridedSlice"]) == (0, 0)
    assert ops(graph)["DepthwiseConv2dNative"] == 1


def slims_reduction(layers, x: tf.Tensor, filters: int, scope: str) -> tf.Tensor:
    """A factorized reduction as TF-Slim writes it: pools of single pixels, where ours strides."""
    odd = tf.pad(x, [[0, 0], [0, 1], [0, 1], [0, 0]])[:, 1:, 1:, :]
    even, odd = (tf.nn.avg_pool2d(net, 1, 2, "VALID") for net in (x, odd))
    half = filters // 2
    paths = [
        layers.conv(even, half, f"{scope}/path1_conv"),
        layers.conv(odd, filters - half, f"{scope}/path2_conv"),
    ]
    return layers.batch_norm(tf.concat(paths, 3), f"{scope}/final_path_bn")


def test_a_network_as_slim_writes_it_becomes_the_operations_of_ours(monkeypatch):
    def folded() -> tuple[Counter, Counter, np.ndarray]:
        with tf.Graph().as_default() as built:
            x = tf.compat.v1.placeholder(tf.float32, networks.image_shape(ONE_CELL), "x")
            weights = exports.values()
            made = networks.build(
                ONE_CELL, "classification", lambda name, shape: tf.constant(weights[name]), x
            )
            tf.identity(made.end_points["Logits"], name="y")
        graph = Graph(built.as_graph_def(), ["y"])
        before = ops(graph)
        fold(graph)
        take_odd_pixels(graph)
        with tf.Graph().as_default(), tf.compat.v1.Session() as session:
            tf.graph_util.import_graph_def(graph.to_def(graph.weights), name="")
            return before, ops(graph), session.run("y:0", {"x:0": exports.pictures()})

    _, ours, wanted = folded()
    monkeypatch.setattr(networks._Layers, "factorized_reduction", slims_reduction)
    before, slims, got = folded()
    assert before["AvgPool"] > slims["AvgPool"]
    assert {op: n for op, n in slims.items() if op != "Const"} == {
        op: n for op, n in ours.items() if op != "Const"
    }
    assert np.array_equal(got, wanted)


def test_odd_pixels_of_unknown_sides():
    def make(net: Net, x: tf.Tensor) -> tf.Tensor:
        return single(net, tf.pad(open_rank(x), [[0, 0], [0, 1], [0, 1], [0, 0]])[:, 1:, 1:, :])

    assert odd_pixels_taken(make) == 1


CUTS = {
    "another end": lambda x: x[:, 1:8, 1:8, :],
    "another begin": lambda x: x[:, 2:, 2:, :],
    "steps": lambda x: x[:, 1::2, 1::2, :],
    "channels": lambda x: x[:, 1:, 1:, 1:],
    "nothing": lambda x: x[:, 0:, 0:, :],
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize(
    "paddings", [[[0, 0], [0, 1], [0, 1], [0, 0]], [[0, 0], [1, 0], [1, 0], [0, 0]]]
)
def test_other_pads_and_slices_stay(cut, paddings):
    def make(net: Net, x: tf.Tensor) -> tf.Tensor:
        x = cut(tf.pad(tf.image.resize(x, [8, 8]), paddings))
        kernel = net.random.normal(size=(1, 1, int(x.shape[-1]), 3)).astype(np.float32)
        return tf.nn.conv2d(x, kernel, 2, "SAME")

    assert odd_pixels_taken(make) == 0


PRODUCTS = {
    "a constant": (lambda net, x: tf.matmul(x[:, 0, 0], net.random.normal(size=(4, 5))), 1),
    "a constant that is turned": (
        lambda net, x: tf.matmul(x[:, 0, 0], net.random.normal(size=(5, 4)), transpose_b=True),
        1,
    ),
    "rows that are turned": (
        lambda net, x: tf.matmul(x[0, 0], net.random.normal(size=(7, 5)), transpose_a=True),
        0,
    ),
    "one number a picture": (
        lambda net, x: tf.matmul(
            tf.reshape(tf.norm(x[:, 0, 0], axis=1), [-1, 1]), net.random.normal(size=(1, 5))
        ),
        1,
    ),
    "what is no constant": (lambda net, x: tf.matmul(x[:, 0, 0], x[0, 0], transpose_b=True), 0),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_by_picture_are_the_same(name):
    make, count = PRODUCTS[name]
    graph = Graph(build(lambda net, x: make(net, tf.cast(x, tf.float64))), ["y"])
    wanted = run(graph)
    multiply_by_picture(graph)
    assert ops(graph)["BatchMatMulV2"] == count
    assert ops(graph)["MatMul"] == 1 - count
    assert close(run(graph), wanted)


def tokens(net: Net, x: tf.Tensor) -> tf.Tensor:
    """A dense layer on each place of a picture, as Keras makes it."""
    kernel = net.random.normal(size=(CHANNELS, 64)).astype(np.float32)
    return tf.tensordot(tf.reshape(x, [-1, SIDE * SIDE, CHANNELS]), kernel, 1)


def test_all_places_of_a_picture_are_one_product():
    graph = Graph(build(tokens), ["y"])
    fold(graph)
    wanted = run(graph)
    multiply_by_picture(graph)
    (product,) = (node for node in graph.nodes.values() if node.op == "BatchMatMulV2")
    (sizes,) = (graph.constant(graph.producer(product.input[0]).input[1]),)
    assert list(sizes) == [-1, SIDE * SIDE, CHANNELS]
    assert close(run(graph), wanted)


@pytest.mark.skipif(not can_fuse(), reason="this TensorFlow has no oneDNN")
@pytest.mark.parametrize(
    "make",
    [
        lambda net, x: net.norm(net.conv(x)) + open_rank(x),
        lambda net, x: net.norm(net.conv(x)) + tf.split(tf.concat([x, x], 3), 2, 3)[1],
        lambda net, x: net.norm(net.conv(x)) + tf.unique_with_counts([1.0, 1.0, 2.0])[0][:1],
    ],
    ids=["of unknown rank", "a second output", "of unknown size"],
)
def test_an_addition_of_something_else(make):
    graph = Graph(build(make), ["y"])
    wanted = run(graph)
    fold(graph)
    fuse_convolutions(graph, graph.shapes())
    assert close(run(graph), wanted)


@pytest.mark.parametrize("op", WAITING.values(), ids=WAITING)
def test_what_waits_goes_on_waiting(op):
    built = build(lambda net, x: block(net, tf.raw_ops.Identity(input=x, name="before")))
    built.node.add(op="Assert", name="check", input=["yes", "told"]).attr["T"].list.type.append(7)
    for name, value in (("yes", True), ("told", "no")):
        with tf.Graph().as_default() as graph:
            tf.constant(value, name=name)
        built.node.add().CopyFrom(graph.as_graph_def().node[0])
    for node in built.node:
        if node.op == op:
            node.input.append("^check")
    graph = Graph(built, ["y"])
    wanted = run(graph)
    fold(graph)
    if can_fuse():
        fuse_convolutions(graph, graph.shapes())
    assert "check" in graph.nodes
    assert close(run(graph), wanted)


def test_nothing_waits_for_what_only_computes():
    """As in a call that was inlined: all that goes into it waits for all else that does."""
    graph = build(lambda net, x: block(net, tf.raw_ops.Identity(input=x, name="before")))
    names = [node.name for node in graph.node if node.op == "Const"]
    for node in graph.node:
        node.input[:] = [f"in/{name}" if name in names else name for name in node.input]
    graph.node.add(op="NoOp", name="call", input=["^before", *(f"^{name}" for name in names)])
    for name in names:
        given = graph.node.add(op="Identity", name=f"in/{name}", input=[name, "^call"])
        given.attr["T"].CopyFrom(next(n for n in graph.node if n.name == name).attr["dtype"])
    waiting, plain = Graph(graph, ["y"]), Graph(build(lambda net, x: block(net, x)), ["y"])
    wanted = run(waiting)
    fold(waiting)
    fold(plain)
    assert ops(waiting) == ops(plain)
    assert close(run(waiting), wanted)


ROUGH = {
    "parts of a split": lambda net, x: tf.add_n(
        [net.conv(part) for part in tf.split(tf.concat([x, 2.0 * x], 3), 2, 3)]
    ),
    "a slice and a border that shapes tell": lambda net, x: net.conv(
        tf.pad(x[:, : tf.shape(x)[1] - 1], [[0, 0], [tf.shape(x)[1] // 3, 0], [1, 0], [0, 0]])
    ),
}


def test_the_dense_layer_and_its_bias_stay_in_float32():
    """A logit of 10 has a step of 0.06 in bfloat16, and classes would share one."""

    def make(net: Net, x: tf.Tensor) -> tf.Tensor:
        features = tf.nn.relu(tf.nn.bias_add(net.conv(x - 0.5), np.ones(CHANNELS, np.float32)))
        pooled = tf.reduce_mean(features, [1, 2])
        kernel = net.random.normal(size=(CHANNELS, 5)).astype(np.float32)
        bias = np.full(5, 10.03, np.float32)
        return tf.nn.relu(tf.identity(tf.nn.bias_add(pooled @ kernel, bias)))

    graph = Graph(build(make), ["y"])
    to_bfloat16(graph)
    layers = [n for n in graph.nodes.values() if graph_kind(n) == tf.bfloat16.as_datatype_enum]
    assert Counter(node.op for node in layers) == {"Conv2D": 1, "BiasAdd": 1, "Relu": 1}


def test_a_convolved_head_and_the_vector_that_it_reads_stay_in_float32():
    def make(net: Net, x: tf.Tensor) -> tf.Tensor:
        features = tf.nn.relu(tf.nn.bias_add(net.conv(x - 0.5), np.ones(CHANNELS, np.float32)))
        pooled = tf.nn.avg_pool2d(features, SIDE, 1, "VALID")
        kernel = net.random.normal(size=(1, 1, CHANNELS, 5)).astype(np.float32)
        logits = tf.nn.conv2d(pooled, kernel, 1, "SAME")
        return tf.squeeze(tf.nn.bias_add(logits, np.full(5, 10.03, np.float32)), [1, 2])

    graph = Graph(build(make), ["y"])
    to_bfloat16(graph)
    layers = [n for n in graph.nodes.values() if graph_kind(n) == tf.bfloat16.as_datatype_enum]
    assert Counter(node.op for node in layers) == {"Conv2D": 1, "BiasAdd": 1, "Relu": 1}


@pytest.mark.skipif(not BFLOAT16_KERNELS, reason="this CPU has no bfloat16")
@pytest.mark.parametrize("name", ROUGH)
def test_bfloat16_is_near(name):
    graph = Graph(build(ROUGH[name]), ["y"])
    wanted = run(graph)
    to_bfloat16(graph)
    assert close(run(graph), wanted, 0.02)


def bfloat16_values() -> np.ndarray:
    """Every value of bfloat16 in float32, but for NaNs with a sign."""
    bits = np.arange(1 << 16, dtype=np.uint32) << 16
    values = bits.view(np.float32)
    return values[~(np.isnan(values) & (bits >> 31 == 1))]


def test_relu_by_bits_is_relu_of_every_value():
    values = bfloat16_values()
    with tf.Graph().as_default() as built:
        x = tf.compat.v1.placeholder(tf.float32, [None], "x")
        tf.identity(tf.cast(tf.nn.relu(tf.cast(x, tf.bfloat16)), tf.float32), name="y")
    graph = Graph(built.as_graph_def(), ["y"])
    take_larger_by_bits(graph)
    assert ops(graph)["Bitcast"] == 2
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        tf.graph_util.import_graph_def(graph.to_def(), name="")
        got = session.run("y:0", {"x:0": values})
    assert np.array_equal(got, np.maximum(values, 0), equal_nan=True)


def test_a_relu_of_another_type_is_left():
    graph = Graph(build(lambda net, x: tf.nn.relu(x)), ["y"])
    take_larger_by_bits(graph)
    assert ops(graph)["Bitcast"] == 0


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 1000),
    steps=st.lists(st.sampled_from(["cell", "add", "twice", "concat", "pool", "relu"]), max_size=8),
    rough=st.booleans(),
)
def test_any_network_computes_the_same_after_all_of_it(seed, steps, rough):
    with tf.Graph().as_default() as built:
        net = Net(seed)
        x = tf.compat.v1.placeholder(tf.float32, [None, SIDE, SIDE, CHANNELS], "x")
        made = [x]
        for step in steps:
            a, b = (made[int(net.random.integers(len(made)))] for _ in range(2))
            if step == "cell":
                made.append(net.cell(a))
            elif step == "add":
                made.append(net.cell(a) + net.cell(b))
            elif step == "concat":
                made.append(net.cell(tf.nn.relu(tf.concat([net.cell(a), b], 3))))
            elif step == "twice":
                made.append(net.cell(tf.concat([doubled(a), b], 3)))
            elif step == "pool":
                made.append(tf.nn.avg_pool2d(a, 3, 1, "SAME"))
            else:
                made.append(tf.nn.relu(a))
        tf.identity(made[-1], name="y")
    graph = Graph(built.as_graph_def(), ["y"])
    wanted = run(graph)
    fold(graph)
    if rough:
        to_bfloat16(graph)
    if can_fuse() and (BFLOAT16_KERNELS or not rough):
        fuse_convolutions(graph, graph.shapes())
    if rough:
        take_larger_by_bits(graph)
    assert close(run(graph), wanted, 0.15 if rough else 1e-4)
