"""What is exported is what TF Hub published: both formats, loaded as a user would."""

from __future__ import annotations

import dataclasses
import functools
import http.server
import os
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_hub as hub
import tf_keras
from exports import exported, pictures, values
from tensorflow.core.protobuf import saved_model_pb2

from models.catalog import HEADS, NETWORKS, ONE_CELL, Head
from models.checkpoint import seeded
from models.export import export_hub_v1, export_saved_model, write_archive
from models.loading import LoadSpec, load
from models.networks import build, is_kernel, is_trainable, variable_shapes

EXPORTERS = [export_saved_model, export_hub_v1]
END_POINTS = {
    "feature_vector": ["Cell_0", "Stem", "default", "global_pool"],
    "classification": ["Cell_0", "Logits", "Predictions", "Stem", "default", "global_pool"],
}
WIDTHS = {"feature_vector": 48, "classification": 11}


@functools.cache
def built() -> dict[str, np.ndarray]:
    """The end points of the network itself, without any export."""
    held = values()
    network = build(ONE_CELL, "classification", lambda name, _: held[name], tf.constant(pictures()))
    return {name: value.numpy() for name, value in network.end_points.items()}


def default_of(head: Head) -> np.ndarray:
    return built()["Logits" if head == "classification" else "global_pool"]


def assert_close(got: tf.Tensor, expected: np.ndarray) -> None:
    assert got.dtype == tf.float32
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() / np.abs(expected).max() < 2e-6


def moving(model) -> dict[str, np.ndarray]:
    return {v.name: v.numpy() for v in model.variables if not is_trainable(v.name[:-2])}


# TF2: the reusable SavedModel


@pytest.mark.parametrize("head", HEADS)
def test_the_reusable_interface(head: Head):
    model = hub.load(exported("saved_model", head))
    shapes = variable_shapes(ONE_CELL, head)
    assert [(v.name, tuple(v.shape)) for v in model.variables] == [
        (f"{name}:0", shape) for name, shape in shapes.items()
    ]
    assert [v.name[:-2] for v in model.trainable_variables] == list(filter(is_trainable, shapes))
    assert {v.trainable for v in model.trainable_variables} == {True}

    images = tf.constant(pictures())
    assert_close(model(images), default_of(head))
    assert_close(model(images, training=False, batch_norm_momentum=0.5), default_of(head))
    end_points = model(images, return_endpoints=True)
    assert sorted(end_points) == END_POINTS[head]
    for name, value in end_points.items():
        assert_close(value, default_of(head) if name == "default" else built()[name])
    assert model(images[:1]).shape == (1, WIDTHS[head])


@pytest.mark.parametrize("head", HEADS)
def test_serving_default(head: Head):
    serve = hub.load(exported("saved_model", head)).signatures["serving_default"]
    _, arguments = serve.structured_input_signature
    assert {name: spec.shape.as_list() for name, spec in arguments.items()} == {
        "inputs": [None, 32, 32, 3]
    }
    assert {name: spec.shape.as_list() for name, spec in serve.structured_outputs.items()} == {
        "default": [None, WIDTHS[head]]
    }
    assert_close(serve(inputs=tf.constant(pictures()))["default"], default_of(head))


def test_every_combination_is_traced():
    model = hub.load(exported("saved_model", "classification"))
    images = tf.constant(pictures())
    for training in (False, True):
        for return_endpoints in (False, True):
            for momentum in (0.99, 0.5, tf.constant(0.7)):
                got = model(images, training, return_endpoints, momentum)
                assert isinstance(got, dict) == return_endpoints


@pytest.mark.parametrize(
    "images", [np.zeros([1, 33, 32, 3], np.float32), np.zeros([1, 32, 32, 3], np.uint8)]
)
def test_another_size_or_dtype_is_refused(images: np.ndarray):
    model = hub.load(exported("saved_model", "feature_vector"))
    with pytest.raises((ValueError, TypeError)):
        model(tf.constant(images))


def test_regularization_losses():
    model = hub.load(exported("saved_model", "feature_vector"))
    losses = model.regularization_losses
    kernels = [v for name, v in values().items() if is_kernel(name) and "FC" not in name]
    assert len(losses) == len(kernels)
    for loss, kernel in zip(losses, kernels, strict=True):
        expected = ONE_CELL.weight_decay * np.sum(kernel.astype(np.float64) ** 2) / 2
        assert loss().numpy() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "momentum"), [({}, 0.99), ({"batch_norm_momentum": 0.7}, 0.7)]
)
def test_training_moves_the_statistics_by_the_momentum(arguments: dict, momentum: float):
    model = hub.load(exported("saved_model", "feature_vector"))
    images = tf.constant(pictures())
    before = moving(model)
    model(images, **arguments)
    for name, value in moving(model).items():
        np.testing.assert_array_equal(value, before[name])

    model(images, training=True, **arguments)
    kernel = values()["conv0/weights"]
    batch = tf.nn.conv2d(images * 2 - 1, kernel, 2, "VALID").numpy()
    after = moving(model)
    for name, statistic in (
        ("conv0_bn/moving_mean:0", batch.mean(axis=(0, 1, 2))),
        ("conv0_bn/moving_variance:0", batch.var(axis=(0, 1, 2), ddof=1)),
    ):
        expected = momentum * before[name] + (1 - momentum) * statistic
        np.testing.assert_allclose(after[name], expected, rtol=1e-5, atol=1e-6)
    assert [name for name, value in after.items() if np.array_equal(value, before[name])] == []


def test_a_persistent_tape():
    model = hub.load(exported("saved_model", "feature_vector"))
    images = tf.constant(pictures())
    model(images, training=True)  # a first call under the tape works too, and takes 15 s
    with tf.GradientTape(persistent=True) as tape:
        loss = tf.reduce_sum(model(images, training=True) ** 2)
    for _ in range(2):
        gradients = tape.gradient(loss, model.trainable_variables)
        assert all(gradient is not None for gradient in gradients)
        assert all(np.isfinite(gradient).all() for gradient in gradients)


# The documentation's own lines. There tf.keras was Keras 2, which tf_keras is today.


@pytest.fixture
def keras2(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tf, "keras", tf_keras)


@pytest.mark.usefixtures("keras2")
def test_documented_classification():
    m = tf.keras.Sequential([hub.KerasLayer(exported("saved_model", "classification"))])
    m.build([None, 32, 32, 3])  # Batch input shape.
    assert m.output_shape == (None, 11)
    assert_close(m(tf.constant(pictures())), built()["Logits"])
    np.testing.assert_allclose(m.predict(pictures(), verbose=0), built()["Logits"], rtol=1e-4)


@pytest.mark.usefixtures("keras2")
def test_documented_feature_vector():
    num_classes = 5
    m = tf.keras.Sequential(
        [
            hub.KerasLayer(
                exported("saved_model", "feature_vector"), trainable=False
            ),  # Can be True, see below.
            tf.keras.layers.Dense(num_classes, activation="softmax"),
        ]
    )
    m.build([None, 32, 32, 3])  # Batch input shape.
    assert len(m.trainable_weights) == 2
    assert m(tf.constant(pictures())).shape == (4, num_classes)


@pytest.mark.usefixtures("keras2")
def test_a_persistent_tape_around_documented_fine_tuning():
    layer = hub.KerasLayer(
        exported("saved_model", "classification"),
        trainable=True,
        arguments=dict(batch_norm_momentum=0.997),  # noqa: C408
    )
    images = tf.constant(pictures())
    layer(images, training=True)  # as above
    before = {weight.name: weight.numpy() for weight in layer.non_trainable_weights}
    with tf.GradientTape(persistent=True) as tape:
        logits = layer(images, training=True)
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits([0, 1, 2, 3], logits))
    for _ in range(2):
        gradients = tape.gradient(loss, layer.trainable_weights)
        assert all(np.isfinite(gradient).all() for gradient in gradients)
    kernel = values()["conv0/weights"]
    mean = tf.nn.conv2d(images * 2 - 1, kernel, 2, "VALID").numpy().mean(axis=(0, 1, 2))
    (moved,) = [w for w in layer.non_trainable_weights if w.name == "conv0_bn/moving_mean:0"]
    expected = 0.997 * before[moved.name] + 0.003 * mean
    np.testing.assert_allclose(moved, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("keras2")
def test_documented_fine_tuning():
    tf.keras.utils.set_random_seed(0)
    layer = hub.KerasLayer(
        exported("saved_model", "feature_vector"),
        trainable=True,
        arguments=dict(batch_norm_momentum=0.997),  # noqa: C408
    )
    m = tf.keras.Sequential([layer, tf.keras.layers.Dense(3)])
    m.build([None, 32, 32, 3])
    shapes = variable_shapes(ONE_CELL, "feature_vector")
    assert len(layer.trainable_weights) == sum(map(is_trainable, shapes))
    assert len(layer.non_trainable_weights) == sum(not is_trainable(name) for name in shapes)
    assert len(layer.losses) == sum(map(is_kernel, shapes))

    # steps so long that none is lost in a weight's rounding
    m.compile(optimizer=tf.keras.optimizers.SGD(1.0), loss="mse")
    before = [weight.numpy() for weight in layer.weights]
    # one step of 16 pictures: drop path may leave a branch out for all of 4
    m.fit(np.tile(pictures(), [4, 1, 1, 1]), np.zeros([16, 3], np.float32), epochs=1, verbose=0)
    same = [
        w.name for w, old in zip(layer.weights, before, strict=True) if (w == old).numpy().all()
    ]
    assert same == []


NASNET_MOBILE = {
    # head: width, weights that train, that do not, losses
    "classification": (1001, 742, 384, 357),
    "feature_vector": (1056, 740, 384, 356),
}


@pytest.mark.engines  # none of them, but a minute
@pytest.mark.usefixtures("keras2")
@pytest.mark.parametrize("head", HEADS)
def test_documented_calls_on_nasnet_mobile(head: Head):
    width, trained, fixed, losses = NASNET_MOBILE[head]
    m = tf.keras.Sequential(
        [
            hub.KerasLayer(  # loaded once for both: it takes many seconds
                exported("saved_model", head, "nasnet_mobile"),
                trainable=True,
                arguments=dict(batch_norm_momentum=0.997),  # noqa: C408
            )
        ]
    )
    (layer,) = m.layers
    m.build([None, 224, 224, 3])  # Batch input shape.
    assert m.output_shape == (None, width)
    assert len(layer.trainable_weights) == trained
    assert len(layer.non_trainable_weights) == fixed
    assert len(layer.losses) == losses


@pytest.mark.engines  # none of them, but minutes
@pytest.mark.usefixtures("keras2")
@pytest.mark.parametrize(
    ("network", "head", "output", "width"),
    [
        ("nasnet_large", "classification", "logits", 1001),
        ("pnasnet_large", "feature_vector", "embedding", 4320),
    ],
)
def test_documented_calls_on_large_networks(tmp_path, network, head, output, width):
    spec, directory = NETWORKS[network], str(tmp_path / "model")
    export_saved_model(spec, seeded(variable_shapes(spec, head), 0), head, directory)
    m = tf.keras.Sequential([hub.KerasLayer(directory)])
    m.build([None, 331, 331, 3])  # Batch input shape.
    assert m.output_shape == (None, width)
    pixels = np.random.default_rng(0).integers(0, 255, (1, 331, 331, 3), np.uint8)
    wanted = m(pixels / np.float32(255)).numpy()
    got = load(LoadSpec(directory))(pixels)[output]
    assert np.abs(got - wanted).max() < 1e-5 * np.abs(wanted).max()


# TF1: the hub.Module directory


def meta_graphs(head: Head) -> dict[frozenset[str], object]:
    saved = saved_model_pb2.SavedModel()
    saved.ParseFromString(Path(exported("hub_v1", head), "saved_model.pb").read_bytes())
    return {frozenset(graph.meta_info_def.tags): graph for graph in saved.meta_graphs}


@pytest.mark.parametrize("head", HEADS)
def test_the_module_directory(head: Head):
    directory = Path(exported("hub_v1", head))
    assert sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*")) == [
        "assets",
        "saved_model.pb",
        "tfhub_module.pb",
        "variables",
        "variables/variables.data-00000-of-00001",
        "variables/variables.index",
    ]
    assert (directory / "tfhub_module.pb").read_bytes() == b"\x08\x03"
    stored = dict(tf.train.list_variables(str(directory / "variables" / "variables")))
    assert {name: tuple(shape) for name, shape in stored.items()} == variable_shapes(ONE_CELL, head)
    assert stat.S_IMODE(directory.stat().st_mode) & 0o055 == 0o055 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("head", HEADS)
def test_the_module_is_tagged_signed_and_collected(head: Head):
    graphs = meta_graphs(head)
    assert set(graphs) == {frozenset(), frozenset({"train"})}
    tasks = ["image_feature_vector"] + ["image_classification"] * (head == "classification")
    shapes = variable_shapes(ONE_CELL, head)
    for tags, graph in graphs.items():
        expected = ["default", *tasks, *(f"{task}_with_bn_hparams" for task in tasks)]
        assert sorted(graph.signature_def) == sorted(expected)
        for name, signature in graph.signature_def.items():
            assert signature.method_name == ""
            hparams = ["batch_norm_momentum"] * name.endswith("_with_bn_hparams")
            assert sorted(signature.inputs) == [*hparams, "images"]
            outputs = ["default"] if name == "default" else END_POINTS[head]
            assert sorted(signature.outputs) == outputs
            size = [axis.size for axis in signature.inputs["images"].tensor_shape.dim]
            assert size == [-1, 32, 32, 3]
        sizes = {
            name: len(held.bytes_list.value or held.node_list.value)
            for name, held in graph.collection_def.items()
        }
        moving_statistics = sum(not is_trainable(name) for name in shapes)
        assert sizes == {
            "variables": len(shapes),
            "trainable_variables": len(shapes) - moving_statistics,
            "regularization_losses": sum(map(is_kernel, shapes)),
            "hub_module_attachments": 1,
            **({"update_ops": moving_statistics} if tags else {}),
        }
        assert not graph.HasField("saver_def")
        assert any(node.name.startswith("hub_input/") for node in graph.graph_def.node)


def test_the_module_tells_its_image_size(tmp_path: Path):
    spec = dataclasses.replace(ONE_CELL, image_size=224)
    export_hub_v1(spec, values(), "feature_vector", str(tmp_path / "model"))
    # ModuleAttachment{key: "image_module_info", value: 0a 06 08 e0 01 10 e0 01}
    attached = b"\x0a\x11image_module_info\x12\x08" + bytes.fromhex("0a0608e00110e001")
    assert attached in (tmp_path / "model" / "saved_model.pb").read_bytes()


@pytest.mark.parametrize("head", HEADS)
def test_the_module_gives_the_networks_values(head: Head):
    model = hub.load(exported("hub_v1", head))
    images = tf.constant(pictures())
    assert not callable(model)
    assert sorted(v.name for v in model.variables) == sorted(
        f"{name}:0" for name in variable_shapes(ONE_CELL, head)
    )
    assert_close(model.signatures["default"](images=images)["default"], default_of(head))
    features = model.signatures["image_feature_vector"](images=images)
    assert_close(features.pop("default"), built()["global_pool"])
    for name, value in features.items():
        assert_close(value, built()[name])
    if head == "classification":
        logits = model.signatures["image_classification_with_bn_hparams"](
            images=images, batch_norm_momentum=tf.constant(0.5)
        )
        assert_close(logits["default"], built()["Logits"])


def test_plain_loading_wants_the_empty_tags():
    directory = exported("hub_v1", "feature_vector")
    loaded = tf.saved_model.load(directory, tags=[])
    got = loaded.signatures["default"](images=tf.constant(pictures()))["default"]
    assert_close(got, built()["global_pool"])
    with pytest.raises(ValueError, match="tags"):
        tf.saved_model.load(directory)


@pytest.mark.parametrize("momentum", [None, 0.997])
def test_the_train_variant_uses_the_batch(momentum: float | None):
    """And moves its averages by 0.99, or by the momentum that is fed."""
    model = hub.load(exported("hub_v1", "feature_vector"), tags={"train"})
    signature = model.signatures["image_feature_vector_with_bn_hparams"]
    got = signature(images=tf.constant(pictures()), batch_norm_momentum=tf.constant(0.99))
    assert np.abs(got["default"] - built()["global_pool"]).max() > 0.01
    updates = model.graph.get_collection("update_ops")
    assert len(updates) == sum(not is_trainable(name) for name in values())

    images = pictures()
    fed = {"hub_input/images:0": tf.constant(images)}
    if momentum is not None:
        fed |= {"batch_norm_momentum:0": tf.constant(momentum)}
    update = model.prune([model.graph.get_tensor_by_name(name) for name in fed], updates[:2])
    by_name = {v.name: v for v in model.variables}
    before = by_name["conv0_bn/moving_mean:0"].numpy()
    update(*fed.values())
    batch = tf.nn.conv2d(images * 2 - 1, values()["conv0/weights"], 2, "VALID").numpy()
    kept = momentum or 0.99
    expected = kept * before + (1 - kept) * batch.mean(axis=(0, 1, 2))
    np.testing.assert_allclose(by_name["conv0_bn/moving_mean:0"], expected, rtol=1e-5, atol=1e-6)


def test_keras_takes_the_module_for_inference_only():
    layer = hub.KerasLayer(exported("hub_v1", "classification"))
    model = tf_keras.Sequential([layer])
    model.build([None, 32, 32, 3])
    assert_close(model(tf.constant(pictures())), built()["Logits"])
    with pytest.raises(ValueError, match="TF1 Hub"):
        hub.KerasLayer(exported("hub_v1", "classification"), trainable=True)(pictures())


# Directories and archives


@pytest.mark.parametrize("export", EXPORTERS)
def test_what_lies_there_is_left_alone(export, tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="model"):
        export(ONE_CELL, values(), "feature_vector", str(tmp_path / "model"))
    assert os.listdir(tmp_path / "model") == ["mine.txt"]
    assert os.listdir(tmp_path) == ["model"]


def test_an_empty_directory_is_taken(tmp_path: Path):
    (tmp_path / "model").mkdir()
    export_hub_v1(ONE_CELL, values(), "feature_vector", str(tmp_path / "model"))
    assert (tmp_path / "model" / "tfhub_module.pb").exists()
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("export", EXPORTERS)
def test_a_failed_export_leaves_nothing(export, tmp_path: Path):
    incomplete = {name: value for name, value in values().items() if name != "conv0/weights"}
    with pytest.raises(KeyError, match="conv0/weights"):
        export(ONE_CELL, incomplete, "feature_vector", str(tmp_path / "deep" / "model"))
    assert os.listdir(tmp_path / "deep") == []


def test_an_archive_is_tars(tmp_path: Path):
    archive = tmp_path / "m.tar.gz"
    write_archive(exported("hub_v1", "feature_vector"), str(archive))
    listed = subprocess.check_output(["tar", "-tzf", archive], text=True).split()
    assert listed == [
        "./",
        "./assets/",
        "./saved_model.pb",
        "./tfhub_module.pb",
        "./variables/",
        "./variables/variables.data-00000-of-00001",
        "./variables/variables.index",
    ]
    write_archive(exported("hub_v1", "feature_vector"), str(tmp_path / "again.tar.gz"))
    assert archive.read_bytes() == (tmp_path / "again.tar.gz").read_bytes()
    with pytest.raises(FileExistsError):
        write_archive(exported("hub_v1", "feature_vector"), str(archive))
    assert sorted(os.listdir(tmp_path)) == ["again.tar.gz", "m.tar.gz"]


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A folder and the address at which it is served; tensorflow_hub caches elsewhere."""
    monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "www").mkdir()
    handler = functools.partial(
        http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "www")
    )
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield tmp_path / "www", f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("format", ["saved_model", "hub_v1"])
def test_tensorflow_hub_loads_an_archive_by_its_url(format, served: tuple[Path, str]):
    folder, address = served
    write_archive(exported(format, "feature_vector"), str(folder / "m.tar.gz"))
    model = hub.load(f"{address}/m.tar.gz")
    images = tf.constant(pictures())
    got = model(images) if callable(model) else model.signatures["default"](images)["default"]
    assert_close(got, built()["global_pool"])
