"""Seeded values, and TF-Slim checkpoints in all the shapes in which they are met."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from exports import pictures, values

from models.catalog import ONE_CELL
from models.checkpoint import AVERAGED, CheckpointError, read_checkpoint, seeded, write_checkpoint
from models.networks import build, is_trainable, variable_shapes

SHAPES = variable_shapes(ONE_CELL, "classification")
FEATURE_SHAPES = variable_shapes(ONE_CELL, "feature_vector")
TRAINING_ONLY = {
    "global_step": np.int64(12345),
    "aux_7/aux_logits/proj/weights": np.ones([1, 1, 4, 2], np.float32),
    "aux_7/aux_logits/FC/biases": np.ones([11], np.float32),
}


def plain() -> dict[str, np.ndarray]:
    return dict(values())


def averaged(of=lambda name: True) -> dict[str, np.ndarray]:
    return {name + AVERAGED: value + 1 for name, value in values().items() if of(name)}


def assert_read(got: dict[str, np.ndarray], added: float = 0) -> None:
    assert list(got) == list(SHAPES)
    for name, value in got.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, values()[name] + np.float32(added))


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return str(tmp_path / "slim" / "model.ckpt")


# Seeds


def test_seeded_values_depend_on_name_shape_and_seed_alone():
    whole = seeded(SHAPES, 5)
    assert {name: value.shape for name, value in whole.items()} == SHAPES
    assert {value.dtype for value in whole.values()} == {np.dtype(np.float32)}
    for name in reversed(FEATURE_SHAPES):
        np.testing.assert_array_equal(seeded({name: SHAPES[name]}, 5)[name], whole[name])


def test_another_seed_gives_other_values():
    first, second = seeded(SHAPES, 0), seeded(SHAPES, 1)
    assert [name for name in SHAPES if np.array_equal(first[name], second[name])] == []


def test_seeded_values_stay_what_they_were():
    kernel = seeded({"conv0/weights": (3, 3, 3, 32)}, 0)["conv0/weights"]
    np.testing.assert_allclose(
        kernel.ravel()[:3], [0.25837842, 0.010455801, 0.030029474], rtol=1e-6
    )


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_seeded_networks_are_sane_and_tell_pictures_apart(seed: int):
    drawn = seeded(SHAPES, seed)
    end_points = build(
        ONE_CELL, "classification", lambda name, _: drawn[name], tf.constant(pictures())
    ).end_points
    for name in ("Stem", "Cell_0", "global_pool", "Logits"):
        assert 0.1 < np.std(end_points[name]) < 10, name
    features = end_points["global_pool"].numpy()
    assert (
        np.abs(features[:, None] - features[None]).max(axis=2)[~np.eye(4, dtype=bool)].min() > 0.1
    )


# Checkpoints


def test_plain_names(prefix: str):
    write_checkpoint(prefix, plain() | TRAINING_ONLY)
    assert_read(read_checkpoint(prefix, SHAPES))


def test_what_slims_saver_writes(prefix: str):
    v1 = tf.compat.v1
    Path(prefix).parent.mkdir()
    with tf.Graph().as_default(), v1.Session() as session:
        for name, value in plain().items():
            v1.get_variable(name, initializer=value)
        v1.train.create_global_step()
        session.run(v1.global_variables_initializer())
        v1.train.Saver().save(session, prefix)
    assert_read(read_checkpoint(prefix, SHAPES))


def test_ema_chooses_where_both_are_there(prefix: str):
    write_checkpoint(prefix, plain() | averaged() | TRAINING_ONLY)
    assert_read(read_checkpoint(prefix, SHAPES))
    assert_read(read_checkpoint(prefix, SHAPES, ema=True), added=1)


def test_averages_alone_are_read_either_way(prefix: str):
    auxiliary = {"aux_7/aux_logits/FC/biases" + AVERAGED: np.ones([11], np.float32)}
    write_checkpoint(prefix, averaged() | auxiliary)
    assert_read(read_checkpoint(prefix, SHAPES), added=1)
    assert_read(read_checkpoint(prefix, SHAPES, ema=True), added=1)


def test_moving_statistics_may_lack_an_average(prefix: str):
    write_checkpoint(prefix, plain() | averaged(is_trainable))
    got = read_checkpoint(prefix, SHAPES, ema=True)
    for name, value in values().items():
        np.testing.assert_array_equal(got[name], value + np.float32(is_trainable(name)))


def test_ema_is_not_silently_ignored(prefix: str):
    write_checkpoint(prefix, plain())
    with pytest.raises(CheckpointError, match=f"conv0/weights{AVERAGED}"):
        read_checkpoint(prefix, SHAPES, ema=True)


def test_a_missing_variable_is_named(prefix: str):
    held = plain()
    del held["cell_0/beginning_bn/beta"]
    write_checkpoint(prefix, held)
    with pytest.raises(CheckpointError, match=r"has no variable cell_0/beginning_bn/beta$"):
        read_checkpoint(prefix, SHAPES)


@pytest.mark.parametrize(
    "name", ["cell_1/1x1/weights", "conv0/weights/RMSProp", "final_layer/FC2/weights"]
)
def test_a_surplus_variable_is_named(prefix: str, name: str):
    write_checkpoint(prefix, plain() | {name: np.zeros([2], np.float32)})
    with pytest.raises(CheckpointError, match=f"network lacks: {name}$"):
        read_checkpoint(prefix, SHAPES)


def test_a_misshapen_variable_is_named(prefix: str):
    write_checkpoint(prefix, plain() | {"final_layer/FC/biases": np.zeros([7], np.float32)})
    with pytest.raises(CheckpointError, match=r"final_layer/FC/biases .* \[7\].* \[11\]$"):
        read_checkpoint(prefix, SHAPES)


@pytest.mark.parametrize("suffix", ["", AVERAGED])
def test_features_need_no_classification_layer(prefix: str, suffix: str):
    write_checkpoint(prefix, {name + suffix: value for name, value in plain().items()})
    got = read_checkpoint(prefix, FEATURE_SHAPES)
    assert list(got) == list(FEATURE_SHAPES)

    write_checkpoint(prefix, {name: plain()[name] for name in FEATURE_SHAPES})
    assert list(read_checkpoint(prefix, FEATURE_SHAPES)) == list(FEATURE_SHAPES)
    with pytest.raises(CheckpointError, match="final_layer/FC/weights"):
        read_checkpoint(prefix, SHAPES)


def test_no_checkpoint_there(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no readable checkpoint") as caught:
        read_checkpoint(str(tmp_path / "model.ckpt"), SHAPES)
    assert "\n" not in str(caught.value)


def test_a_damaged_checkpoint(prefix: str):
    write_checkpoint(prefix, plain())
    data = Path(prefix + ".data-00000-of-00001")
    data.write_bytes(data.read_bytes()[:-1000] + b"\xff" * 1000)
    with pytest.raises(CheckpointError, match="is damaged") as caught:
        read_checkpoint(prefix, SHAPES)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_was_cut(prefix: str):
    write_checkpoint(prefix, plain())
    data = Path(prefix + ".data-00000-of-00001")
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="is damaged"):
        read_checkpoint(prefix, SHAPES)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_refused(prefix: str, value: float):
    values = plain()
    values["conv0/weights"] = values["conv0/weights"].copy()
    values["conv0/weights"][0, 0, 0, 0] = value
    write_checkpoint(prefix, values)
    with pytest.raises(CheckpointError, match=r"conv0/weights in .* holds NaN or infinity"):
        read_checkpoint(prefix, SHAPES)


def test_a_file_that_is_no_checkpoint(tmp_path: Path):
    (tmp_path / "model.ckpt.index").write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError, match="no readable checkpoint"):
        read_checkpoint(str(tmp_path / "model.ckpt"), SHAPES)
