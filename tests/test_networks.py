"""The networks are TF-Slim's: variables, multiply-adds, values, and what training changes."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from exports import pictures, spec_of, values

from models.catalog import NASNET_NORMAL, NETWORKS, ONE_CELL, PNASNET, NetworkSpec
from models.networks import (
    Network,
    build,
    drop_path,
    is_kernel,
    is_trainable,
    l2_loss,
    variable_shapes,
)

DATA = Path(__file__).parent / "data"


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def held(network: str = "one_cell") -> tuple[dict[str, tf.Variable], Callable]:
    """Variables with the reference weights, and what gives them to the builder."""
    variables = {
        name: tf.Variable(value, trainable=is_trainable(name), name=name)
        for name, value in values(network).items()
    }
    return variables, lambda name, shape: variables[name]


@pytest.mark.parametrize(
    ("name", "sha256", "trained", "all_parameters", "count", "kernels", "moving"),
    [
        (
            "nasnet_mobile",
            "b3fa930071ee6978b541a60372ea98762bedaf45808e73c1d99cda968392b3d7",
            5_291_035,
            5_327_773,
            1126,
            357,
            384,
        ),
        (
            "nasnet_large",
            "3f76dc3852f7741b0c4ae846e2624da85e8fe26dfde8df60dc205855a39635c6",
            88_757_183,
            88_953_851,
            1546,
            489,
            528,
        ),
        (
            "pnasnet_mobile",
            "95382f882fe334eec7344c911974793f3cd851afa9d727c7a03c9fde09dcc24e",
            5_065_568,
            5_099_232,
            933,
            296,
            318,
        ),
        (
            "pnasnet_large",
            "624767341781718610d1129af5bc34b500a70e9297b47d95b4585073401ecf79",
            86_061_989,
            86_238_977,
            1179,
            374,
            402,
        ),
    ],
)
def test_variables_are_slims_in_slims_order(
    name: str, sha256: str, trained: int, all_parameters: int, count: int, kernels: int, moving: int
):
    shapes = variable_shapes(NETWORKS[name], "classification")
    assert len(shapes) == count
    assert sum(map(math.prod, shapes.values())) == all_parameters
    assert sum(math.prod(s) for n, s in shapes.items() if is_trainable(n)) == trained
    assert sum(map(is_kernel, shapes)) == kernels
    assert sum(not is_trainable(n) for n in shapes) == moving
    listing = "".join(f"{n} {list(s)}\n" for n, s in shapes.items())
    assert hashlib.sha256(listing.encode()).hexdigest() == sha256


@functools.cache
def without_weights(spec: NetworkSpec, training: bool = False) -> tuple[tf.Graph, Network]:
    """The network for one picture, all that goes into it left open."""
    v1 = tf.compat.v1
    with tf.Graph().as_default() as graph:
        network = build(
            spec,
            "classification",
            lambda _, shape: v1.placeholder(tf.float32, shape),
            v1.placeholder(tf.float32, [1, spec.image_size, spec.image_size, 3]),
            training,
        )
    return graph, network


def operations(spec: NetworkSpec, training: bool = False) -> list[tf.Operation]:
    return without_weights(spec, training)[0].get_operations()


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("nasnet_mobile", 563_639_872),
        ("nasnet_large", 23_783_418_690),
        ("pnasnet_mobile", 587_294_280),
        ("pnasnet_large", 24_937_400_112),
    ],
)
def test_multiply_adds_of_an_image(name: str, count: int):
    total = 0
    for operation in operations(NETWORKS[name]):
        if operation.type in ("Conv2D", "DepthwiseConv2dNative", "MatMul"):
            kernel = operation.inputs[1].shape
            per_output = kernel[:2] if operation.type == "DepthwiseConv2dNative" else kernel[:-1]
            total += math.prod(operation.outputs[0].shape) * math.prod(per_output)
    assert total == count


LARGE = {
    "nasnet_large": {
        "Stem": (42, 42, 336),
        **{f"Cell_{i}": (42, 42, 1008) for i in range(6)},
        "Reduction_Cell_0": (21, 21, 1344),
        **{f"Cell_{i}": (21, 21, 2016) for i in range(6, 12)},
        "Reduction_Cell_1": (11, 11, 2688),
        **{f"Cell_{i}": (11, 11, 4032) for i in range(12, 18)},
        "global_pool": (4032,),
    },
    "pnasnet_large": {
        "Stem": (42, 42, 540),
        **{f"Cell_{i}": (42, 42, 1080) for i in range(4)},
        **{f"Cell_{i}": (21, 21, 2160) for i in range(4, 8)},
        **{f"Cell_{i}": (11, 11, 4320) for i in range(8, 12)},
        "global_pool": (4320,),
    },
}


@pytest.mark.parametrize("name", LARGE)
def test_end_points_of_the_large_ones(name: str):
    _, network = without_weights(NETWORKS[name])
    shapes = {key: tuple(value.shape)[1:] for key, value in network.end_points.items()}
    assert shapes == {**LARGE[name], "Logits": (1001,), "Predictions": (1001,)}


@pytest.mark.parametrize("name", ["nasnet_mobile", "pnasnet_mobile"])
def test_values_are_slims(name: str):
    _, variables = held(name)
    run = tf.function(lambda x: build(NETWORKS[name], "classification", variables, x).end_points)
    end_points = {key: value.numpy() for key, value in run(tf.constant(pictures(name))).items()}

    slim = json.loads((DATA / f"{name}_endpoints.json").read_text())
    assert list(slim) == list(end_points)[:-1]
    for key, facts in slim.items():  # in order, so that the first to fail is the first wrong cell
        assert list(end_points[key].shape) == facts["shape"], key
        probe = end_points[key].ravel()[facts["probe_flat_index"]]
        assert np.abs(probe - facts["probe"]).max() / facts["abs_max"] < 1e-5, key

    expected = np.load(DATA / f"{name}_expected.npz")
    assert relative(end_points["global_pool"], expected["features"]) < 2e-6
    assert relative(end_points["Logits"], expected["logits"]) < 2e-6
    np.testing.assert_allclose(end_points["Predictions"].sum(axis=1), 1, rtol=1e-5)


def test_the_heads_share_their_features():
    variables, get = held()
    whole = build(ONE_CELL, "classification", get, pictures_tensor())
    asked = []
    bare = build(
        ONE_CELL,
        "feature_vector",
        lambda name, _: asked.append(name) or variables[name],
        pictures_tensor(),
    )
    assert list(bare.end_points) == ["Stem", "Cell_0", "global_pool"]
    assert [n for n in variables if n not in asked] == [
        "final_layer/FC/weights",
        "final_layer/FC/biases",
    ]
    np.testing.assert_array_equal(whole.end_points["global_pool"], bare.end_points["global_pool"])
    assert whole.end_points["Logits"].shape == (4, 11)


def pictures_tensor() -> tf.Tensor:
    return tf.constant(pictures())


def test_another_image_size_is_refused():
    with pytest.raises(ValueError, match="32"):
        build(ONE_CELL, "classification", held()[1], tf.zeros([1, 31, 32, 3]))


@pytest.mark.parametrize("cell", [NASNET_NORMAL, PNASNET], ids=["nasnet", "pnasnet"])
def test_reductions_in_small_networks_of_either_kind(cell):
    spec = dataclasses.replace(
        ONE_CELL,
        normal=cell,
        reduction=ONE_CELL.reduction if cell is NASNET_NORMAL else None,
        num_cells=3,
        num_reductions=2,
        skip_reduction_layer_input=True,
    )
    end_points = build(
        spec,
        "feature_vector",
        lambda name, shape: tf.ones(shape),
        pictures_tensor(),
    ).end_points
    assert end_points["Cell_0"].shape == (4, 4, 4, 8 * len(cell.outputs))
    assert end_points["Cell_2"].shape == (4, 1, 1, 32 * len(cell.outputs))
    assert end_points["global_pool"].shape == (4, spec.feature_width)


def test_moving_statistics_follow_the_momentum():
    variables, get = held()
    images = pictures_tensor()
    network = build(ONE_CELL, "classification", get, images, True, 0.9)
    updates = {variable.name: value.numpy() for variable, value in network.updates}
    assert sorted(updates) == sorted(f"{n}:0" for n in variables if not is_trainable(n))

    x = tf.nn.conv2d(images * 2 - 1, variables["conv0/weights"], 2, "VALID").numpy()
    for name, batch in (
        ("conv0_bn/moving_mean", x.mean(axis=(0, 1, 2))),
        ("conv0_bn/moving_variance", x.var(axis=(0, 1, 2), ddof=1)),
    ):
        expected = 0.9 * variables[name].numpy() + 0.1 * batch
        np.testing.assert_allclose(updates[f"{name}:0"], expected, rtol=1e-5, atol=1e-6)


def test_building_moves_nothing_by_itself():
    variables, get = held()
    build(ONE_CELL, "classification", get, pictures_tensor(), True)
    for name, value in values().items():
        np.testing.assert_array_equal(variables[name], value)
    assert build(ONE_CELL, "classification", get, pictures_tensor()).updates == []


def test_training_takes_the_statistics_of_the_batch():
    spec = dataclasses.replace(ONE_CELL, drop_path_keep_prob=1.0)

    def features(scale: float) -> np.ndarray:
        variables = held()[0]
        for name, variable in variables.items():
            if not is_trainable(name):
                variable.assign(variable * scale)
        network: Network = build(
            spec, "feature_vector", lambda name, _: variables[name], pictures_tensor(), True
        )
        return network.end_points["global_pool"].numpy()

    np.testing.assert_array_equal(features(1.0), features(3.0))


def test_every_trainable_variable_gets_a_gradient():
    variables, get = held()
    trained = {name: variable for name, variable in variables.items() if variable.trainable}
    with tf.GradientTape() as tape:
        end_points = build(ONE_CELL, "classification", get, pictures_tensor(), True).end_points
        loss = tf.reduce_sum(end_points["Logits"] ** 2)
    gradients = tape.gradient(loss, trained)
    assert [name for name, gradient in gradients.items() if gradient is None] == []


def test_what_is_random_and_where():
    def draws(spec: NetworkSpec, training: bool) -> int:
        return sum(op.type == "RandomUniform" for op in operations(spec, training))

    assert draws(ONE_CELL, training=False) == 0
    # Of a cell's ten branches one is the identity in the two of the stem, two in the normal one.
    assert draws(ONE_CELL, training=True) == 9 + 9 + 8 + 1
    assert draws(spec_of("nasnet_mobile"), training=True) == 1  # dropout alone


def test_drop_path_keeps_the_expectation():
    tf.random.set_seed(7)
    dropped = drop_path(tf.ones([4000, 2, 2, 3]), 0.8).numpy().reshape(4000, -1)
    assert (dropped == dropped[:, :1]).all()
    assert set(np.unique(dropped).round(6)) == {0.0, 1.25}
    assert dropped.mean() == pytest.approx(1, abs=0.03)


def test_l2_loss_is_half_the_decayed_square():
    assert l2_loss(ONE_CELL, tf.Variable([3.0, 4.0])).numpy() == pytest.approx(4e-5 * 25 / 2)
