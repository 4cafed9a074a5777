"""Graphs as data: weights beside them, identities bypassed, nothing lost."""

import numpy as np
import pytest
import tensorflow as tf

from models.graphs import Graph

HEAVY = np.arange(600, dtype=np.float32).reshape(20, 30)


def graph_of(build) -> tf.compat.v1.GraphDef:
    with tf.Graph().as_default() as graph:
        build(tf.compat.v1.placeholder(tf.float32, [None, 20], "x"))
    return graph.as_graph_def()


def run(graph_def: tf.compat.v1.GraphDef, name: str, feed: dict[str, np.ndarray]) -> np.ndarray:
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        tf.graph_util.import_graph_def(graph_def, name="")
        return session.run(f"{name}:0", {f"{key}:0": value for key, value in feed.items()})


def product(x: tf.Tensor) -> None:
    kernel = tf.identity(tf.constant(HEAVY, name="kernel"), name="read")
    small = tf.constant(2.0, name="small")
    tf.identity(tf.linalg.matmul(x, kernel) * small, name="y")
    tf.identity(x, name="unread")


X = np.random.default_rng(0).normal(size=(3, 20)).astype(np.float32)


def test_weights_lie_beside_the_graph_and_go_back_into_it():
    original = graph_of(product)
    graph = Graph(original, ["y"])
    assert set(graph.weights) == {"kernel"}
    assert np.array_equal(graph.weights["kernel"], HEAVY)
    assert graph.to_def().ByteSize() < HEAVY.nbytes < graph.to_def(graph.weights).ByteSize()
    wanted = run(original, "y", {"x": X})
    assert np.array_equal(run(graph.to_def(graph.weights), "y", {"x": X}), wanted)
    assert np.array_equal(run(graph.to_def(), "y", {"x": X, **graph.weights}), wanted)
    assert np.array_equal(graph.constant("read:0"), HEAVY)
    assert graph.constant("small") == 2.0
    assert graph.constant("x") is None


def test_text_and_small_constants_stay_in_the_graph():
    graph = Graph(graph_of(lambda x: tf.constant(["word"] * 500, name="words")))
    assert graph.weights == {}
    assert list(graph.constant("words")[:1]) == [b"word"]


def test_what_nothing_kept_needs_is_dropped():
    graph = Graph(graph_of(product), ["y", "unread"])
    assert set(graph.prune().weights) == {"kernel"}
    graph.prune(["unread"])
    assert set(graph.nodes) == {"unread", "x"}
    assert graph.weights == {}


def test_identities_are_bypassed_and_kept_ones_stay():
    def build(x: tf.Tensor) -> None:
        with tf.control_dependencies([tf.identity(tf.constant(HEAVY))]):
            waits = tf.identity(x * 2.0, name="waits")
        tf.identity(tf.identity(waits), name="y")

    graph = Graph(graph_of(build), ["y"])
    graph.bypass_identities()
    graph.prune()
    assert [node.name for node in graph.nodes.values() if node.op == "Identity"] == ["y"]
    assert graph.weights == {}  # waiting for a constant is waiting for nothing
    assert np.array_equal(run(graph.to_def(), "y", {"x": X}), X * 2)


def test_waiting_for_work_is_kept():
    def build(x: tf.Tensor) -> None:
        with tf.control_dependencies([tf.debugging.assert_less(x, 5.0)]):
            tf.identity(tf.identity(x), name="y")

    graph = Graph(graph_of(build), ["y"])
    graph.bypass_identities()
    graph.prune()
    assert np.array_equal(run(graph.to_def(), "y", {"x": X}), X)
    with pytest.raises(tf.errors.InvalidArgumentError):
        run(graph.to_def(), "y", {"x": X + 9})


def test_functions_stay_callable():
    def build(x: tf.Tensor) -> None:
        twice = tf.function(lambda v: v * 2.0)
        tf.identity(twice(x), name="y")

    original = graph_of(build)
    assert original.library.function
    assert np.array_equal(run(Graph(original, ["y"]).to_def(), "y", {"x": X}), X * 2)
