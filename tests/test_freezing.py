"""What a model holds is found by looking at it, and asked for where looking does not tell."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from exports import exported
from tensorflow.core.protobuf import meta_graph_pb2, saved_model_pb2

from models import freezing
from models.catalog import FORMATS
from models.checkpoint import write_checkpoint
from models.export import _image_module_info
from models.freezing import Hints, ModelError, freeze
from models.loading import LoadedModel, LoadSpec, load, prepare
from models.runtime import BFLOAT16_KERNELS
from storage import temporaries

SIZE, WIDTH, CLASSES = 6, 4, 5
KERNEL = np.random.default_rng(0).normal(size=(3, WIDTH)).astype(np.float32)
HEAD = np.random.default_rng(1).normal(size=(WIDTH, CLASSES)).astype(np.float32)
PIXELS = np.random.default_rng(2).integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)


def features(images: tf.Tensor) -> tf.Tensor:
    """[N, WIDTH], as a network would make of `images`."""
    return tf.reduce_mean(tf.nn.relu(images), [1, 2]) @ tf.constant(KERNEL) + 0.25


def saved(directory: Path, run, size: int | None = SIZE, **signatures) -> str:
    """A SavedModel whose serving signature is `run`; `signatures` are further ones."""
    module = tf.Module()
    shape = [None, size, size, 3]
    spec = tf.TensorSpec(shape, tf.float32, "images")
    functions = {
        name: tf.function(function, input_signature=[spec], autograph=False)
        for name, function in {"serving_default": run, **signatures}.items()
        if function is not None
    }
    module.functions = functions
    tf.saved_model.save(
        module,
        str(directory),
        {name: function.get_concrete_function() for name, function in functions.items()},
    )
    return str(directory)


def loaded(directory: str, **hints) -> LoadedModel:
    return load(LoadSpec(directory, hints=Hints(**hints)))


def expected(images: np.ndarray) -> np.ndarray:
    return np.maximum(images, 0).mean((1, 2)) @ KERNEL + 0.25


def close(got: np.ndarray, wanted: np.ndarray) -> bool:
    return bool(np.allclose(got, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max()))


# --- the range of values -----------------------------------------------------------------------

MEAN = np.array([123.675, 116.28, 103.53], np.float32)
STD = np.array([58.395, 57.12, 57.375], np.float32)
MAPS = {
    "x*2-1": (lambda x: x * 2.0 - 1.0, 1),
    "(x-0.5)*2": (lambda x: (x - 0.5) * 2.0, 1),
    "x-0.5": (lambda x: x - 0.5, 1),
    "mean and std of [0,1]": (lambda x: (x - MEAN / 255) / (STD / 255), 1),
    "x*255": (lambda x: x * 255.0, 1),
    "x*255-mean": (lambda x: x * 255.0 - MEAN, 1),
    "x/127.5-1": (lambda x: x / 127.5 - 1.0, 255),
    "(x-127.5)/127.5": (lambda x: (x - 127.5) / 127.5, 255),
    "x/255": (lambda x: x / 255.0, 255),
    "x*(1/255)": (lambda x: x * (1 / 255), 255),
    "x/255 behind identities": (lambda x: tf.identity(tf.identity(x) * (1 / 255)), 255),
    "x-mean": (lambda x: x - MEAN, 255),
    "mean and std of [0,255]": (lambda x: (x - MEAN) / STD, 255),
    "-mean+x": (lambda x: -MEAN + x, 255),
    "1-2x": (lambda x: x * -2.0 + 1.0, 1),
    "x/255, and its shape is read": (lambda x: x / 255.0 + 0.0 * tf.cast(tf.size(x), x.dtype), 255),
}


@pytest.mark.parametrize("name", MAPS)
def test_the_range_of_values_is_found(name, tmp_path):
    first, high = MAPS[name]
    model = loaded(saved(tmp_path / "m", lambda x: {"y": features(first(x))}))
    assert model.info.value_range == (0.0, high)
    wanted = expected(np.asarray(first(tf.constant(PIXELS / np.float32(255) * high, tf.float32))))
    assert close(model(PIXELS)["logits"], wanted)


UNTOLD = {
    "nothing": lambda x: x,
    "a convolution": lambda x: tf.nn.conv2d(x, np.ones((1, 1, 3, 3), np.float32), 1, "SAME"),
    "1-x": lambda x: 1.0 - x,
    "two ways": lambda x: x * 2.0 + tf.nn.relu(x),
    "x*40": lambda x: x * 40.0,
    "[-1,1] to [0,255]": lambda x: x * 127.5 + 127.5,
    "[-1,1] to [0,1]": lambda x: x * 0.5 + 0.5,
    "[-1,1] less its mean": lambda x: x - 0.02,
}


@pytest.mark.parametrize("name", UNTOLD)
def test_a_range_of_values_that_nothing_tells_is_asked_for(name, tmp_path):
    directory = saved(tmp_path / "m", lambda x: {"y": features(UNTOLD[name](x))})
    with pytest.raises(ModelError, match="--value_range") as caught:
        loaded(directory)
    assert "\n" not in str(caught.value)
    for low, high in ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)):
        model = loaded(directory, value_range=(low, high))
        images = np.float32(low) + PIXELS / np.float32(255) * np.float32(high - low)
        wanted = expected(np.asarray(UNTOLD[name](tf.constant(images, tf.float32))))
        assert model.info.value_range == (low, high)
        assert close(model(PIXELS)["logits"], wanted)


def test_a_range_that_is_given_goes_before_what_is_found_which_is_told(tmp_path, caplog):
    directory = saved(tmp_path / "m", lambda x: {"y": features(x / 255.0)})
    loaded(directory, value_range=(0.0, 255.0))
    assert caplog.text == ""
    model = loaded(directory, value_range=(-1.0, 1.0))
    assert f"--value_range -1,1: the first operations of {directory} are for 0,255" in caplog.text
    images = PIXELS / np.float32(127.5) - 1
    assert close(model(PIXELS)["logits"], expected(images / 255))


def test_vectors_of_half_precision_are_vectors(tmp_path):
    """As Keras's mixed precision makes them."""

    def run(images):
        half = tf.cast(tf.reduce_mean(tf.nn.relu(images / 255.0), [1, 2]) @ KERNEL, tf.float16)
        logits = tf.matmul(half, tf.constant(HEAD, tf.float16))
        return {"probabilities": tf.nn.softmax(tf.cast(logits, tf.float32))}

    got = loaded(saved(tmp_path / "m", run))(PIXELS)
    wanted = np.maximum(PIXELS / np.float32(255), 0).mean((1, 2)) @ KERNEL
    assert {name: rows.dtype for name, rows in got.items()} == dict.fromkeys(got, np.float32)
    np.testing.assert_allclose(got["embedding"], wanted, atol=2e-3)
    np.testing.assert_allclose(got["logits"], wanted @ HEAD, atol=2e-2)


def test_of_graphs_for_several_uses_the_one_to_serve_is_run(tmp_path):
    """As a TF1 estimator exports them, for TPUs too."""
    alone = saved(tmp_path / "alone", lambda x: {"y": features(x / 255.0)})
    proto = saved_model_pb2.SavedModel.FromString((tmp_path / "alone/saved_model.pb").read_bytes())

    def several(name: str) -> str:
        directory = shutil.copytree(alone, tmp_path / name)
        (directory / "saved_model.pb").write_bytes(proto.SerializeToString())
        return str(directory)

    training = proto.meta_graphs.add()
    training.CopyFrom(proto.meta_graphs[0])
    training.meta_info_def.tags[:] = ["train"]
    proto.meta_graphs.reverse()
    got = loaded(several("both"))(PIXELS)["logits"]
    np.testing.assert_array_equal(got, loaded(alone)(PIXELS)["logits"])
    proto.meta_graphs[1].meta_info_def.tags[:] = ["serve", "tpu"]
    with pytest.raises(ModelError, match=r"its graphs are for \[\['train'\], \['serve', 'tpu'\]\]"):
        loaded(several("neither"))


# --- the size ----------------------------------------------------------------------------------


def test_a_model_of_any_size_needs_to_be_told(tmp_path):
    directory = saved(tmp_path / "m", lambda x: {"y": features(x * 2.0 - 1.0)}, size=None)
    with pytest.raises(ModelError, match="give --image_size"):
        loaded(directory)
    for size in (SIZE, 9):
        model = loaded(directory, image_size=size)
        assert model.info.image_size == size
        pixels = np.full((1, size, size, 3), 255, np.uint8)
        assert close(model(pixels)["logits"], expected(pixels / 255))


def test_shapes_that_only_a_size_tells(tmp_path):
    """Average pooling leaves the shape open until the size is known; then the head is one."""

    def run(x):
        net = tf.nn.conv2d(x * 2.0 - 1.0, KERNEL[None, None], 1, "SAME")
        net = tf.nn.avg_pool2d(net, SIZE, SIZE, "VALID")
        net = tf.nn.conv2d(net, HEAD[None, None], 1, "SAME")
        return {"probabilities": tf.nn.softmax(net)}

    model = loaded(saved(tmp_path / "m", run, size=None), image_size=SIZE)
    assert dict(model.info.outputs) == {"embedding": WIDTH, "logits": CLASSES}
    wanted = (PIXELS / np.float32(127.5) - 1).mean((1, 2)) @ KERNEL
    got = model(PIXELS)
    assert close(got["embedding"], wanted)
    assert close(got["logits"], wanted @ HEAD)


def test_a_size_that_its_layers_do_not_take(tmp_path):
    def valid(x):
        return {"y": tf.reduce_mean(tf.nn.max_pool2d(x * 2.0 - 1.0, 9, 2, "VALID"), [1, 2])}

    directory = saved(tmp_path / "m", valid, size=None)
    assert loaded(directory, image_size=9).info.image_size == 9
    with pytest.raises(ModelError, match=r"takes no pictures of 8 x 8 in float32 \(Negative dim"):
        loaded(directory, image_size=8)


def test_a_size_that_the_model_does_not_take(tmp_path):
    directory = saved(tmp_path / "m", lambda x: {"y": features(x * 2.0 - 1.0)})
    assert loaded(directory, image_size=SIZE).info.image_size == SIZE
    with pytest.raises(ModelError, match=f"--image_size 9: the model takes {SIZE} only"):
        loaded(directory, image_size=9)


@pytest.mark.parametrize("shape", [[None, 4, 6, 3], [None, 6, 6, 1], [None, 6, 6, 4]])
def test_pictures_that_are_not_square_and_rgb(shape, tmp_path):
    serve = tf.function(
        lambda x: {"y": tf.reduce_mean(x, [1, 2])}, input_signature=[tf.TensorSpec(shape)]
    )
    module = tf.Module()
    module.serve = serve
    tf.saved_model.save(module, str(tmp_path / "m"), {"serving_default": serve})
    with pytest.raises(ModelError, match="only square RGB"):
        loaded(str(tmp_path / "m"))


# --- outputs -----------------------------------------------------------------------------------


def trunk(x: tf.Tensor) -> tf.Tensor:
    return tf.reduce_mean(tf.nn.relu(x * 2.0 - 1.0), [1, 2]) @ tf.constant(KERNEL)


def flattened(x: tf.Tensor) -> tf.Tensor:
    """`trunk`, its width not to be told from the graph, as `Flatten` of open sizes has it."""
    return tf.reshape(trunk(x)[:, None, :], [tf.shape(x)[0], -1])


def pooled(x: tf.Tensor) -> tf.Tensor:
    """A vector that no dense layer made."""
    return tf.reduce_mean(tf.nn.relu(x * 2.0 - 1.0), [1, 2]) * tf.constant([1.0, 2.0, 3.0])


def pinned(x: tf.Tensor) -> tf.Tensor:
    """`pooled`, flattened, its width told by `set_shape` alone, which no graph holds."""
    vector = tf.reshape(pooled(x)[:, None, :], [tf.shape(x)[0], -1])
    vector.set_shape([None, 3])
    return vector


def dense(x: tf.Tensor, kernel: np.ndarray = HEAD) -> tf.Tensor:
    return x @ tf.constant(kernel) + tf.range(kernel.shape[1], dtype=tf.float32)


def convolved(x: tf.Tensor, squeeze) -> tf.Tensor:
    """MobileNet's head: a 1x1 convolution on [N, 1, 1, WIDTH]."""
    net = tf.nn.conv2d(tf.nn.relu(x * 2.0 - 1.0), KERNEL[None, None], 1, "SAME")
    net = tf.reduce_mean(net, [1, 2], keepdims=True)
    net = tf.nn.bias_add(tf.nn.conv2d(net, HEAD[None, None], 1, "SAME"), np.arange(5.0, dtype="f"))
    return squeeze(net)


RELU = np.maximum(PIXELS / np.float32(127.5) - 1, 0).mean((1, 2))
TRUNK = RELU @ KERNEL
LOGITS = TRUNK @ HEAD + np.arange(CLASSES)
POOLED = RELU * np.array([1.0, 2.0, 3.0], np.float32)
BOTH = {"embedding": TRUNK, "logits": LOGITS}
OUTPUTS = {
    "a dense head": (lambda x: {"y": dense(trunk(x))}, BOTH),
    "its softmax": (lambda x: {"y": tf.nn.softmax(dense(trunk(x)))}, BOTH),
    "a bias that comes first": (
        lambda x: {"y": tf.range(5.0) + trunk(x) @ tf.constant(HEAD)},
        BOTH,
    ),
    "a convolved head, squeezed": (
        lambda x: {"y": convolved(x, lambda net: tf.squeeze(net, [1, 2]))},
        BOTH,
    ),
    "a convolved head, reshaped": (
        lambda x: {"y": convolved(x, lambda net: tf.reshape(net, [tf.shape(net)[0], CLASSES]))},
        BOTH,
    ),
    "a convolved head, squeezed, and its softmax": (
        lambda x: {"y": tf.nn.softmax(convolved(x, lambda net: tf.squeeze(net, [1, 2])))},
        BOTH,
    ),
    "a convolved head's softmax, squeezed": (
        lambda x: {"y": convolved(x, lambda net: tf.squeeze(tf.nn.softmax(net), [1, 2]))},
        BOTH,
    ),
    "a convolved head, left in four dimensions": (
        lambda x: {"y": convolved(x, lambda net: net)},
        BOTH,
    ),
    "a head on a vector that was flattened": (lambda x: {"y": dense(flattened(x))}, BOTH),
    "such a head called logits": (lambda x: {"logits": dense(flattened(x))}, BOTH),
    "such a head's softmax": (lambda x: {"y": tf.nn.softmax(dense(flattened(x)))}, BOTH),
    "a softmax called logits": (lambda x: {"logits": tf.nn.softmax(dense(trunk(x)))}, BOTH),
    "a softmax called logits beside its vector": (
        lambda x: {"logits": tf.nn.softmax(dense(trunk(x))), "embedding": trunk(x)},
        BOTH,
    ),
    "a sigmoid of a dense layer": (lambda x: {"y": tf.sigmoid(dense(trunk(x)))}, BOTH),
    "a sigmoid of no dense layer": (
        lambda x: {"y": tf.sigmoid(pooled(x))},
        {"embedding": 1 / (1 + np.exp(-POOLED))},
    ),
    "the hub's name of a vector, of a dense layer": (
        lambda x: {"image_feature_vector": dense(trunk(x))},
        {"embedding": LOGITS},
    ),
    "a vector whose width is pinned": (lambda x: {"y": pinned(x)}, {"embedding": POOLED}),
    "a vector": (lambda x: {"y": pooled(x)}, {"embedding": POOLED}),
    "a vector in four dimensions": (
        lambda x: {"y": pooled(x)[:, None, None, :]},
        {"embedding": POOLED},
    ),
    "the sum of two dense layers": (
        lambda x: {"y": trunk(x) + 2.0 * trunk(x)},
        {"embedding": 3 * TRUNK},
    ),
    "names that tell": (
        lambda x: {"embedding": dense(trunk(x)), "logits": pooled(x)},
        {"embedding": LOGITS, "logits": POOLED},
    ),
    "one name that tells": (
        lambda x: {"embedding": pooled(x), "zzz": dense(trunk(x))},
        {"embedding": POOLED, "logits": LOGITS},
    ),
    "two vectors": (
        lambda x: {"a": tf.nn.softmax(dense(trunk(x))), "b": trunk(x), "map": x},
        BOTH,
    ),
    "a head on another vector": (
        lambda x: {"a": pooled(x), "b": dense(trunk(x))},
        {"embedding": POOLED, "logits": LOGITS},
    ),
    "feature_vector, of a dense layer": (
        lambda x: {"feature_vector": dense(trunk(x)), "zzz": tf.nn.softmax(pooled(x))},
        {"embedding": LOGITS, "logits": POOLED},
    ),
    "logits named alone": (lambda x: {"logits": dense(trunk(x))}, BOTH),
    "logits named alone, of no dense layer": (lambda x: {"logits": pooled(x)}, {"logits": POOLED}),
    "an embedding named alone, of a dense layer": (
        lambda x: {"embedding": dense(trunk(x))},
        {"embedding": LOGITS},
    ),
    "an embedding named, of a dense layer, beside logits that are not": (
        lambda x: {"embedding": dense(trunk(x)), "zzz": tf.nn.softmax(pooled(x))},
        {"embedding": LOGITS, "logits": POOLED},
    ),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_are_told_apart(name, tmp_path):
    run, wanted = OUTPUTS[name]
    model = loaded(saved(tmp_path / "m", run), value_range=(0.0, 1.0))
    got = model(PIXELS)
    assert dict(model.info.outputs) == {role: v.shape[1] for role, v in wanted.items()}
    assert list(got) == list(wanted)
    for role, vectors in wanted.items():
        assert close(got[role], vectors)


@pytest.mark.parametrize(
    "run",
    [lambda x: {"map": x * 2.0}, lambda x: {"number": tf.reduce_mean(x * 2.0, [1, 2, 3])}],
    ids=["a map", "a number"],
)
def test_no_vector_at_all(run, tmp_path):
    with pytest.raises(ModelError, match="no output is one vector"):
        loaded(saved(tmp_path / "m", run))


def test_a_batch_norm_of_the_batch_is_warned_of(tmp_path, caplog):
    def run(x):
        ones = tf.ones(3)
        return {"y": pooled(tf.compat.v1.nn.fused_batch_norm(x, ones, ones, is_training=True)[0])}

    with caplog.at_level("WARNING", logger="pipeline"):
        loaded(saved(tmp_path / "m", run), value_range=(0.0, 1.0))
    assert "FusedBatchNormV3 takes its mean and variance from the batch" in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING", logger="pipeline"):
        loaded(saved(tmp_path / "n", lambda x: {"y": pooled(x)}), value_range=(0.0, 1.0))
    assert "from the batch" not in caplog.text


def test_a_mask_of_minus_infinity_is_no_wild_weight(tmp_path):
    mask = np.where(np.tri(32), 0, -np.inf).astype(np.float32)  # large enough for a weight

    def run(x):
        scores = tf.reduce_mean(x) + tf.constant(mask)
        return {"y": pooled(x) * tf.reduce_sum(tf.nn.softmax(scores)) / 32.0}

    model = loaded(saved(tmp_path / "m", run), value_range=(0.0, 1.0))
    assert np.isfinite(model(PIXELS)["embedding"]).all()
    mask[0, 0] = np.nan
    with pytest.raises(ModelError, match="NaN or infinity"):
        loaded(saved(tmp_path / "n", run), value_range=(0.0, 1.0))


def test_a_serving_signature_among_others(tmp_path):
    directory = saved(
        tmp_path / "m", lambda x: {"y": dense(trunk(x))}, other=lambda x: {"y": pooled(x)}
    )
    model = loaded(directory)
    assert model.info.signatures == ("other", "serving_default")
    assert set(model.info.outputs) == {"embedding", "logits"}


def test_the_only_signature_may_have_any_name(tmp_path):
    directory = saved(tmp_path / "m", None, mine=lambda x: {"y": pooled(x * 1.0)})
    assert dict(loaded(directory).info.outputs) == {"embedding": 3}


def test_several_signatures_and_none_serves(tmp_path):
    several = {"a": lambda x: {"y": pooled(x)}, "b": lambda x: {"y": trunk(x)}}
    with pytest.raises(ModelError, match=r"no signature serving_default.*signatures: a, b"):
        loaded(saved(tmp_path / "m", None, **several))


def test_an_object_that_is_called(tmp_path):
    class Callable(tf.Module):
        def __init__(self):
            super().__init__()
            self.head = tf.Variable(HEAD)

        @tf.function
        def __call__(self, x, training=False):
            return trunk(x) @ self.head + (100.0 if training else tf.range(5.0))

    module = Callable()
    for training in (True, False):
        module.__call__.get_concrete_function(tf.TensorSpec([None, SIZE, SIZE, 3]), training)
    tf.saved_model.save(module, str(tmp_path / "m"))
    model = loaded(str(tmp_path / "m"))
    assert model.info.signatures == ()
    got = model(PIXELS)
    assert close(got["logits"], LOGITS)
    assert close(got["embedding"], TRUNK)


def test_constants_made_outside_of_the_function(tmp_path):
    """As of a module's level, and of Keras's Normalization."""
    head, terms = tf.constant(HEAD), tf.constant(np.arange(5.0, dtype="f"))
    model = loaded(saved(tmp_path / "m", lambda x: {"y": trunk(x) @ head + terms}))
    got = model(PIXELS)
    assert close(got["logits"], LOGITS)
    assert close(got["embedding"], TRUNK)


def test_names_of_classes_looked_up_beside_the_logits(tmp_path):
    module = tf.Module()
    numbers, names = tf.range(5, dtype=tf.int64), tf.constant(list("abcde"))
    filled = tf.lookup.KeyValueTensorInitializer(numbers, names)
    module.table = tf.lookup.StaticHashTable(filled, "none")

    @tf.function(input_signature=[tf.TensorSpec([None, SIZE, SIZE, 3], tf.float32)])
    def serve(images):
        logits = dense(trunk(images))
        best = module.table.lookup(tf.argmax(logits, 1))
        with tf.control_dependencies([best]):
            return {"logits": tf.identity(logits), "names": best}

    module.serve = serve
    tf.saved_model.save(module, str(tmp_path / "m"), {"serving_default": serve})
    got = loaded(str(tmp_path / "m"))(PIXELS)
    assert close(got["logits"], LOGITS)
    assert close(got["embedding"], TRUNK)


@pytest.mark.parametrize("kind", [tf.float16, tf.bfloat16, tf.float64], ids=lambda k: k.name)
def test_convolutions_of_other_arithmetic(kind, tmp_path):
    """As Keras's mixed precision makes them; oneDNN's fused ones take float32 alone everywhere.

    Where they take bfloat16 they round once, and not after each operation. Of float16 a CPU with
    instructions for it computes a graph's convolution by oneDNN and this eager one by Eigen, which
    sum in other orders: some numbers differ by one step.
    """
    rng = np.random.default_rng(4)
    kernel, bias = rng.normal(size=(3, 3, 3, 64)), rng.normal(size=64)

    def run(x, arithmetic=kind):
        given = (tf.cast(value, kind) for value in (x * 2.0 - 1.0, kernel, bias))
        pixels, weights, offset = (tf.cast(value, arithmetic) for value in given)
        net = tf.nn.conv2d(pixels, weights, 1, "SAME")
        net = tf.nn.relu(tf.nn.bias_add(net, offset))
        return {"y": tf.reduce_mean(tf.cast(tf.cast(net, kind), tf.float32), [1, 2])}

    directory = saved(tmp_path / "m", run)
    once = kind == tf.bfloat16 and BFLOAT16_KERNELS
    images = tf.constant(PIXELS / np.float32(255))
    wanted = run(images, tf.float32 if once else kind)["y"].numpy()
    prepare(LoadSpec(directory), str(tmp_path / "p"))
    error = 1e-3 if kind == tf.float16 else 1e-5
    for found in (directory, str(tmp_path / "p")):
        assert np.allclose(loaded(found)(PIXELS)["embedding"], wanted, rtol=error, atol=error)


def with_variables(directory: Path, run, *values) -> str:
    """A SavedModel whose serving signature is `run`, of the images and a variable for each."""
    module, spec = tf.Module(), tf.TensorSpec([None, SIZE, SIZE, 3], tf.float32, "images")
    module.weights = [tf.Variable(value) for value in values]
    module.run = tf.function(lambda x: run(x, *module.weights), input_signature=[spec])
    tf.saved_model.save(module, str(directory), {"serving_default": module.run})
    return str(directory)


@pytest.mark.parametrize("last", [tf.identity, tf.nn.softmax], ids=["logits", "their softmax"])
def test_a_bias_as_large_as_weights_is(last, tmp_path):
    """Large variables stand beside the graph, as placeholders in it."""
    kernel, bias = HEAD.repeat(100, 1), np.arange(500, dtype=np.float32)
    directory = with_variables(
        tmp_path, lambda x, w, b: {"y": last(trunk(x) @ w + b)}, kernel, bias
    )
    got = loaded(directory)(PIXELS)
    assert close(got["logits"], TRUNK @ kernel + bias)
    assert close(got["embedding"], TRUNK)


def test_variables_in_bfloat16_are_prepared(tmp_path):
    def run(x, weights):
        return {"y": tf.cast(tf.cast(trunk(x), tf.bfloat16) @ weights, tf.float32)}

    values = tf.cast(HEAD.repeat(300, 1), tf.bfloat16)
    directory = with_variables(tmp_path / "m", run, values)
    prepare(LoadSpec(directory), str(tmp_path / "p"))
    wanted, got = loaded(directory)(PIXELS), loaded(str(tmp_path / "p"))(PIXELS)
    assert list(got) == list(wanted)
    assert all(np.array_equal(got[name], wanted[name]) for name in wanted)


# --- TF1 modules -------------------------------------------------------------------------------


BOTH = {
    "image_feature_vector": "image_feature_vector",
    "image_classification": "image_classification",
}


def save_module(
    directory: Path,
    size: int | None = SIZE,
    attached: int | bytes | None = None,
    apart: bool = False,
    names: dict[str, str] = BOTH,
) -> str:
    """A hub.Module with both image signatures, on one placeholder or each on its own.

    `names`: its signatures, to which of the two each is.
    """
    v1 = tf.compat.v1
    shape = [None, size, size, 3]
    with tf.Graph().as_default() as graph:
        first = v1.placeholder(tf.float32, shape, "first")
        second = v1.placeholder(tf.float32, shape, "second") if apart else first
        head = v1.get_variable("head", HEAD.shape, use_resource=True)
        vectors = {
            "image_feature_vector": (first, trunk(first)),
            "image_classification": (second, trunk(second) @ head + tf.range(5.0)),
        }
        meta = v1.train.export_meta_graph(graph=graph, clear_devices=True)
    meta.ClearField("saver_def")
    del meta.meta_info_def.tags[:]
    for name, of in names.items():
        images, output = vectors[of]
        meta.signature_def[name].CopyFrom(
            meta_graph_pb2.SignatureDef(
                inputs={"images": tensor_info(images)}, outputs={"default": tensor_info(output)}
            )
        )
    if attached:
        meta.collection_def["hub_module_attachments"].bytes_list.value.append(
            attached if isinstance(attached, bytes) else _image_module_info(attached)
        )
    saved_model = saved_model_pb2.SavedModel(saved_model_schema_version=1, meta_graphs=[meta])
    write_checkpoint(str(directory / "variables" / "variables"), {"head": HEAD})
    (directory / "saved_model.pb").write_bytes(saved_model.SerializeToString())
    (directory / "tfhub_module.pb").write_bytes(b"\x08\x03")
    return str(directory)


def tensor_info(tensor: tf.Tensor) -> meta_graph_pb2.TensorInfo:
    return meta_graph_pb2.TensorInfo(
        name=tensor.name,
        dtype=tensor.dtype.as_datatype_enum,
        tensor_shape=tensor.shape.as_proto(),
    )


@pytest.mark.parametrize("apart", [False, True], ids=["one placeholder", "two"])
@pytest.mark.parametrize(("size", "attached"), [(SIZE, None), (None, SIZE), (SIZE, SIZE)])
def test_a_module_of_both_signatures(size, attached, apart, tmp_path):
    model = loaded(save_module(tmp_path / "m", size, attached, apart))
    assert (model.info.format, model.info.image_size) == ("hub_v1", SIZE)
    assert model.info.signatures == ("image_classification", "image_feature_vector")
    got = model(PIXELS)
    assert close(got["embedding"], TRUNK)
    assert close(got["logits"], LOGITS)


def test_a_module_of_any_size_that_tells_none(tmp_path):
    directory = save_module(tmp_path / "m", None, None, False)
    with pytest.raises(ModelError, match="give --image_size"):
        loaded(directory)
    assert close(loaded(directory, image_size=SIZE)(PIXELS)["logits"], LOGITS)


def test_the_size_that_is_given_counts_before_the_attached_one(tmp_path):
    directory = save_module(tmp_path / "m", None, SIZE)
    assert loaded(directory, image_size=SIZE + 1).info.image_size == SIZE + 1


@pytest.mark.parametrize(
    "attached",
    [
        b"\xff",
        b"\x0a\x11image_module_info",
        b"\x0a\x11image_module_info\x12\x00",
        b"\x0a\x11image_module_info\x10\x07",
        b"\x0a\x11image_module_info\x12\x04\x0a\x02\x08\x06",
        _image_module_info(1 << 40),
    ],
    ids=["cut", "no value", "an empty value", "a number", "no width", "beyond all size"],
)
def test_an_attachment_that_cannot_be_read_is_none(attached, tmp_path):
    directory = save_module(tmp_path / "m", None, attached)
    with pytest.raises(ModelError, match="give --image_size"):
        loaded(directory)


def test_a_module_of_the_default_signature_alone(tmp_path):
    model = loaded(save_module(tmp_path / "m", names={"default": "image_classification"}))
    assert model.info.signatures == ("default",)
    got = model(PIXELS)
    assert close(got["embedding"], TRUNK)
    assert close(got["logits"], LOGITS)


def test_a_module_of_classification_alone(tmp_path):
    names = {"image_classification": "image_classification"}
    got = loaded(save_module(tmp_path / "m", names=names))(PIXELS)
    assert list(got) == ["embedding", "logits"]
    assert close(got["embedding"], TRUNK)
    assert close(got["logits"], LOGITS)


def test_a_module_of_features_alone(tmp_path):
    """Its last layer is dense, and its vectors are the embedding all the same."""
    names = {"image_feature_vector": "image_feature_vector"}
    got = loaded(save_module(tmp_path / "m", names=names))(PIXELS)
    assert list(got) == ["embedding"]
    assert close(got["embedding"], TRUNK)


def test_a_module_without_image_signatures(tmp_path):
    directory = save_module(tmp_path / "m", names={"tokens": "image_classification"})
    with pytest.raises(ModelError, match="no image module; it has tokens"):
        loaded(directory)


# --- graphs that are no plain chains -----------------------------------------------------------


def test_a_model_for_batches_of_one_size_is_refused(tmp_path):
    module = tf.Module()
    spec = tf.TensorSpec([4, SIZE, SIZE, 3], tf.float32, "images")
    module.serve = tf.function(
        lambda x: {"y": tf.reshape(features(x * 2.0 - 1.0), [4, WIDTH])}, input_signature=[spec]
    )
    tf.saved_model.save(module, str(tmp_path / "m"), {"serving_default": module.serve})
    with pytest.raises(ModelError, match="batches of exactly 4 pictures"):
        loaded(str(tmp_path / "m"))


def looped(x: tf.Tensor) -> tf.Tensor:
    """Three times through a loop, on pictures in [0, 1]."""
    x = x * 2.0 - 1.0
    return tf.while_loop(lambda i, _: i < 3, lambda i, y: (i + 1, y * 0.5), (0, x))[1]


def mapped(x: tf.Tensor) -> tf.Tensor:
    """A function called for each picture, which nothing inlines."""
    return tf.map_fn(lambda picture: picture * 2.0 - 1.0, x)


def branched(x: tf.Tensor) -> tf.Tensor:
    """One of two branches, by what the pictures hold."""
    x = x * 2.0 - 1.0
    return tf.cond(tf.reduce_mean(x) > -2.0, lambda: x * 3.0, lambda: x - 9.0)


MATRIX = np.random.default_rng(3).normal(0, 0.1, (3 * SIZE**2, 3 * SIZE**2)).astype(np.float32)
FILTER = np.random.default_rng(4).normal(0, 0.3, (3, 3, 3, 3)).astype(np.float32)


def multiplied(x: tf.Tensor) -> tf.Tensor:
    """A loop that holds a large constant."""
    flat = tf.reshape(x, [-1, len(MATRIX)])
    step = lambda i, y: (i + 1, tf.nn.relu(y @ tf.constant(MATRIX)))  # noqa: E731
    return tf.reshape(tf.while_loop(lambda i, _: i < 3, step, (0, flat))[1], tf.shape(x))


def layered(x: tf.Tensor) -> tf.Tensor:
    """A loop of layers that would be folded and fused outside of one."""

    def layer(y: tf.Tensor) -> tf.Tensor:
        y = tf.nn.conv2d(y, tf.constant(FILTER), 1, "SAME")
        ones = tf.constant([1.0, 2.0, 3.0])
        y = tf.compat.v1.nn.fused_batch_norm(y, ones, ones, ones, ones, is_training=False)[0]
        return tf.nn.relu(tf.nn.bias_add(tf.nn.conv2d(y, tf.constant(FILTER), 1, "SAME"), ones))

    return tf.while_loop(lambda i, _: i < 2, lambda i, y: (i + 1, layer(y)), (0, x))[1]


def chosen(x: tf.Tensor) -> tf.Tensor:
    """A branch, not taken, that is a large constant."""
    never = np.random.default_rng(5).normal(size=(2, SIZE, SIZE, 3)).astype(np.float32)
    return tf.cond(tf.reduce_mean(x) > 2.0, lambda: tf.constant(never), lambda: x)


@tf.function(experimental_attributes={"_noinline": True})
def apart(x: tf.Tensor) -> tf.Tensor:
    return tf.nn.conv2d(x * 2.0 - 1.0, tf.constant(FILTER), 1, "SAME")


def called(x: tf.Tensor) -> tf.Tensor:
    """A function that must not be inlined."""
    return apart(x)


def test_what_is_not_inlined_stays_a_function(tmp_path):
    directory = saved(tmp_path / "m", lambda x: {"embedding": features(called(x))})
    assert freeze(directory, Hints(None, (0.0, 1.0))).graph.library.function


@pytest.mark.parametrize("through", [looped, mapped, branched, multiplied, layered, chosen, called])
def test_control_flow_is_kept(through, tmp_path):
    directory = saved(tmp_path / "m", lambda x: {"embedding": features(through(x))})
    wanted = expected(np.asarray(through(tf.constant(PIXELS / np.float32(255), tf.float32))))
    model = loaded(directory, value_range=(0.0, 1.0))
    assert close(model(PIXELS)["embedding"], wanted)
    again = load(LoadSpec(directory, hints=Hints(None, (0.0, 1.0)), copies=2))
    assert again.info.fingerprint == model.info.fingerprint
    prepare(LoadSpec(directory, hints=Hints(None, (0.0, 1.0))), str(tmp_path / "prepared"))
    assert close(loaded(str(tmp_path / "prepared"))(PIXELS)["embedding"], wanted)
    rough = load(LoadSpec(directory, hints=Hints(None, (0.0, 1.0)), precision="bfloat16"))
    assert np.abs(rough(PIXELS)["embedding"] - wanted).max() < 0.05 * np.abs(wanted).max()


def test_the_fingerprint_tells_what_a_called_function_does(tmp_path):
    def mapping(scale: float):
        return lambda x: {"embedding": features(tf.map_fn(lambda p: p * scale - 1.0, x))}

    found = [
        loaded(saved(tmp_path / str(i), mapping(scale)), value_range=(0.0, 1.0)).info.fingerprint
        for i, scale in enumerate([2.0, 2.0, 3.0])
    ]
    assert found[0] == found[1]
    assert found[0] != found[2]


@pytest.mark.parametrize("format", FORMATS)
def test_an_interrupted_run_takes_along_what_a_model_is_loaded_from(format, monkeypatch):
    seen = []

    def load(folder, tags):
        seen.append(os.path.exists(folder))
        temporaries.abandon_all()
        seen.append(os.path.exists(folder))
        raise OSError("interrupted")

    monkeypatch.setattr(tf.saved_model, "load", load)
    with pytest.raises(ModelError, match="interrupted"):
        freeze(exported(format, "classification"), Hints())
    assert seen == [True, False]


def test_calls_within_calls_cost_no_operation(tmp_path):
    """Others' reusable models call the network three functions deep."""
    directory = exported("saved_model", "classification")
    again = tf.Module()
    again.model = tf.saved_model.load(directory)
    serve = again.model.signatures["serving_default"]
    again.serve = tf.function(
        lambda inputs: dict(serve(inputs)),
        input_signature=[tf.TensorSpec([None, 32, 32, 3], name="inputs")],
        autograph=False,
    )
    tf.saved_model.save(again, str(tmp_path / "m"), {"serving_default": again.serve})
    counts = []
    for number, origin in enumerate((directory, str(tmp_path / "m"))):
        prepared = tmp_path / f"prepared{number}"
        prepare(LoadSpec(origin), str(prepared))
        graph = tf.compat.v1.GraphDef.FromString((prepared / "graph.pb").read_bytes())
        counts.append(Counter(node.op for node in graph.node))
    assert counts[0] == counts[1]
    assert "FusedBatchNormV3" not in counts[0]


def test_a_modules_signatures_are_told_and_not_built(monkeypatch):
    directory = exported("hub_v1", "classification")
    built = []
    real = tf.saved_model.load

    def load(*given):
        built.append(real(*given))
        return built[-1]

    monkeypatch.setattr(tf.saved_model, "load", load)
    frozen = freeze(directory, Hints())
    assert dict(built[0].signatures) == {}
    assert {"default", "image_classification", "image_feature_vector"} <= set(frozen.signatures)


def test_only_what_the_signature_calls_is_built(monkeypatch):
    directory = exported("saved_model", "classification")
    whole = freezing.read_proto(directory).meta_graphs[0].graph_def.library.function
    built = []
    real = tf.saved_model.load

    def load(folder, *rest):
        built.extend(freezing.read_proto(folder).meta_graphs[0].graph_def.library.function)
        return real(folder, *rest)

    monkeypatch.setattr(tf.saved_model, "load", load)
    freeze(directory, Hints())
    assert 0 < len(built) < len(whole) / 4

    def networks(functions) -> int:
        return sum(any(node.op == "Conv2D" for node in one.node_def) for one in functions)

    assert networks(whole) == 2  # one of them for training
    assert networks(built) == 1


def test_a_kernel_that_the_pictures_make_is_made_of_each_batch(tmp_path):
    """oneDNN keeps a constant kernel in its own layout from the first call on."""
    bias = np.random.default_rng(5).normal(size=64).astype(np.float32)
    wide = np.random.default_rng(6).normal(size=(1, 1, 1, 64)).astype(np.float32)

    def run(x):
        x = x * 2.0 - 1.0
        kernel = tf.reshape(tf.reduce_mean(x, [0, 1, 2]), [1, 1, 3, 1]) * wide
        net = tf.nn.bias_add(tf.nn.conv2d(x, kernel, 1, "SAME"), bias)
        return {"y": tf.reduce_mean(tf.nn.relu(net), [1, 2])}

    model = loaded(saved(tmp_path / "m", run))
    for pixels in (PIXELS, 255 - PIXELS, PIXELS // 2):
        wanted = run(tf.constant(pixels / np.float32(255), tf.float32))["y"].numpy()
        assert close(model(pixels)["embedding"], wanted)


class Silu(tf.Module):
    """As a reusable model with a gradient of its own: one trace to infer by and one to train by."""

    def __init__(self):
        self.weight = tf.Variable(HEAD)

    @tf.function
    def __call__(self, images, training=False):
        net = tf.nn.silu(features(images * 2.0 - 1.0))
        return tf.nn.silu(net @ self.weight) if training else net @ self.weight


def test_a_model_with_gradients_of_its_own_is_loaded_without_them(tmp_path, capfd):
    module = Silu()
    spec = tf.TensorSpec([None, SIZE, SIZE, 3], tf.float32)
    for training in (False, True):
        module.__call__.get_concrete_function(spec, training)
    serve = tf.function(lambda images: {"y": module(images, False)}, input_signature=[spec])
    module.serve = serve
    tf.saved_model.save(module, str(tmp_path / "m"), {"serving_default": serve})
    model = loaded(str(tmp_path / "m"))
    wanted = module(tf.constant(PIXELS / np.float32(255), tf.float32)).numpy()
    assert close(model(PIXELS)["logits"], wanted)
    assert "gradients" not in capfd.readouterr().err


def defun(name: str, scale: float):
    """A function of TensorFlow 1, which is called by its name as an operation."""
    from tensorflow.python.framework import function

    @function.Defun(tf.float32, func_name=name, noinline=True)
    def swish(x):
        return x * tf.sigmoid(x) * scale

    return swish


def test_functions_that_are_called_as_operations_are_there_and_told_apart(tmp_path):
    class Model(tf.Module):
        def __init__(self, swish):
            self.swish = swish

        @tf.function
        def __call__(self, images):
            return features(images)

    def make(folder, name, scale):
        module = Model(defun(name, scale))
        spec = tf.TensorSpec([None, SIZE, SIZE, 3], tf.float32)
        module.__call__.get_concrete_function(spec)  # not called by the signature, so left out

        def serve(images):
            net = module.swish(features(images * 2.0 - 1.0))
            return {"y": tf.ensure_shape(net, [None, WIDTH])}

        module.serve = tf.function(serve, input_signature=[spec])
        tf.saved_model.save(module, str(folder), {"serving_default": module.serve})
        return loaded(str(folder))

    models = [
        make(tmp_path / str(n), name, scale)
        for n, (name, scale) in enumerate([("one", 1.0), ("two", 1.0), ("three", 2.0)])
    ]
    scaled = expected(PIXELS / np.float32(255) * 2 - 1)
    assert close(models[0](PIXELS)["embedding"], scaled / (1 + np.exp(-scaled)))
    found = [model.info.fingerprint for model in models]
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_outputs_in_several_levels_are_refused(tmp_path):
    class Model(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None, SIZE, SIZE, 3], tf.float32)])
        def __call__(self, images):
            net = features(images * 2.0 - 1.0)
            return {"a": {"b": net, "c": net}, "d": net}

    tf.saved_model.save(Model(), str(tmp_path / "m"))
    with pytest.raises(ModelError, match="no plain mapping of names to tensors"):
        loaded(str(tmp_path / "m"))
