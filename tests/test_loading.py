"""Loading: what a module holds is found, checked, and run as one function of uint8 pixels."""

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import exports
import numpy as np
import pytest
import tensorflow as tf
from reference_weights import images

from models import loading
from models.export import export_saved_model
from models.loading import Hints, LoadSpec, ModelError, load
from models.runtime import BFLOAT16_KERNELS, has_bfloat16
from storage.errors import RequestError

CLASSES, WIDTH, SIZE = 11, 48, 32


def uint8_pictures(side: int) -> np.ndarray:
    return np.rint(images(side) * 255).astype(np.uint8)


def worst(a: np.ndarray, b: np.ndarray) -> float:
    """The largest error relative to the largest value."""
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.mark.parametrize("format", ["saved_model", "hub_v1"])
def test_what_a_module_holds_is_found(format):
    info = load(LoadSpec(exports.exported(format, "classification"))).info
    assert (info.format, info.image_size) == (format, SIZE)
    assert dict(info.outputs) == {"embedding": WIDTH, "logits": CLASSES}
    info = load(LoadSpec(exports.exported(format, "feature_vector"))).info
    assert dict(info.outputs) == {"embedding": WIDTH}


@pytest.mark.parametrize("format", ["saved_model", "hub_v1"])
def test_the_embedding_of_a_classifier_is_that_of_the_feature_vector_module(format):
    pixels = uint8_pictures(SIZE)
    both = load(LoadSpec(exports.exported(format, "classification")))(pixels)
    alone = load(LoadSpec(exports.exported(format, "feature_vector")))(pixels)
    assert worst(both["embedding"], alone["embedding"]) < 2e-6


def test_an_embedding_lies_before_an_output_that_is_called_logits(tmp_path):
    """As the hub's TF2 classifiers of other networks call it."""
    model = tf.saved_model.load(exports.exported("saved_model", "classification"))
    spec = tf.TensorSpec([None, SIZE, SIZE, 3], tf.float32)
    serve = tf.function(lambda inputs: {"logits": model(inputs)}, input_signature=[spec])
    tf.saved_model.save(model, str(tmp_path / "m"), {"serving_default": serve})
    pixels = uint8_pictures(SIZE)
    got = load(LoadSpec(str(tmp_path / "m")))(pixels)
    wanted = load(LoadSpec(exports.exported("saved_model", "classification")))(pixels)
    assert list(got) == ["embedding", "logits"]
    for name, vectors in wanted.items():
        assert worst(got[name], vectors) < 2e-6


def test_the_fingerprint_is_of_graph_and_weights_alone(tmp_path):
    original = exports.exported("saved_model", "classification")
    fingerprint = load(LoadSpec(original)).info.fingerprint
    shutil.copytree(original, tmp_path / "copy")
    assert load(LoadSpec(str(tmp_path / "copy"))).info.fingerprint == fingerprint
    values = dict(exports.values())
    export_saved_model(exports.ONE_CELL, values, "classification", str(tmp_path / "again"))
    assert load(LoadSpec(str(tmp_path / "again"))).info.fingerprint == fingerprint
    name = "conv0/weights"
    values[name] = values[name] + np.float32(1e-3)
    export_saved_model(exports.ONE_CELL, values, "classification", str(tmp_path / "other"))
    assert load(LoadSpec(str(tmp_path / "other"))).info.fingerprint != fingerprint


def test_outputs_chosen_change_neither_values_nor_fingerprint():
    directory = exports.exported("saved_model", "classification")
    both, one = load(LoadSpec(directory)), load(LoadSpec(directory, ("logits",)))
    pixels = uint8_pictures(SIZE)
    assert set(one(pixels)) == {"logits"}
    assert one.info == both.info
    assert worst(one(pixels)["logits"], both(pixels)["logits"]) < 2e-6


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((SIZE, SIZE, 3), np.uint8),
        np.zeros((1, 224, 224, 3), np.uint8),
        np.zeros((1, SIZE, SIZE, 1), np.uint8),
        np.zeros((1, SIZE, SIZE, 3), np.float32),
        np.zeros((0, SIZE, SIZE, 3), np.uint8),
    ],
    ids=lambda pixels: f"{pixels.dtype}{pixels.shape}",
)
def test_wrong_pixels_are_refused_before_tensorflow_sees_them(pixels):
    model = load(LoadSpec(exports.exported("hub_v1", "classification")))
    with pytest.raises(ValueError, match="pixels"):
        model(pixels)


def test_an_output_that_is_not_there_is_named():
    with pytest.raises(ModelError, match=r"logits.*has only embedding"):
        load(LoadSpec(exports.exported("saved_model", "feature_vector"), ("logits",)))


def test_what_is_no_model_is_told(tmp_path):
    with pytest.raises(RequestError, match="no such directory"):
        load(LoadSpec(str(tmp_path / "nothing")))
    with pytest.raises(RequestError, match=r"no saved_model\.pb"):
        load(LoadSpec(str(tmp_path)))
    (tmp_path / "saved_model.pb").write_bytes(b"not a graph")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(LoadSpec(str(tmp_path)))


class Plain(tf.Module):
    """Something of another architecture."""

    def __init__(self, size: int | None, rank: int = 4):
        super().__init__()
        self.kernel = tf.Variable(tf.ones([3, 5]))
        shape = [None, *[size] * (rank - 2), 3]
        self.serve = tf.function(self.run, input_signature=[tf.TensorSpec(shape, tf.float32)])

    def run(self, pictures: tf.Tensor) -> dict[str, tf.Tensor]:
        pooled = tf.reduce_mean(pictures, axis=list(range(1, len(pictures.shape) - 1)))
        return {"probabilities": pooled @ self.kernel, "grid": pictures}


def save_plain(directory: Path, **how) -> str:
    module = Plain(**how)
    tf.saved_model.save(module, str(directory), signatures={"serving_default": module.serve})
    return str(directory)


def test_another_architecture_loads_by_the_same_rules(tmp_path):
    model = load(LoadSpec(save_plain(tmp_path / "m", size=8), hints=Hints(None, (0.0, 1.0))))
    assert dict(model.info.outputs) == {"embedding": 3, "logits": 5}
    pixels = np.full((2, 8, 8, 3), 51, np.uint8)
    got = model(pixels)
    np.testing.assert_allclose(got["embedding"], 0.2, rtol=1e-6)
    np.testing.assert_allclose(got["logits"], 0.6, rtol=1e-6)


def test_inputs_that_are_no_pictures_are_refused(tmp_path):
    with pytest.raises(ModelError, match="one batch of pictures"):
        load(LoadSpec(save_plain(tmp_path / "flat", size=8, rank=3)))
    with pytest.raises(ModelError, match="give --image_size"):
        load(LoadSpec(save_plain(tmp_path / "open", size=None)))


def cpu(vendor: str, *flags: str) -> str:
    return f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: fpu {' '.join(flags)}\nbugs\t\t:\n"


AVX512 = ("avx512f", "avx512dq", "avx512bw", "avx512vl")


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        (cpu("AuthenticAMD", "avx2", "fma"), (False, False)),  # Zen 3
        (cpu("AuthenticAMD", "avx2", *AVX512, "avx512_bf16"), (True, True)),  # Zen 4 and 5
        (cpu("GenuineIntel", *AVX512, "avx512_bf16", "amx_bf16", "amx_tile"), (True, True)),
        (cpu("GenuineIntel", *AVX512, "avx512_bf16"), (True, False)),  # its AMX hidden from it
        (cpu("GenuineIntel", *AVX512, "avx512_vnni"), (True, False)),  # Ice Lake
        (cpu("GenuineIntel", "avx2", "avx_ne_convert"), (True, False)),
        ("", (False, False)),
    ],
)
def test_which_cpus_have_bfloat16_and_gain_by_it(cpuinfo, expected):
    assert has_bfloat16(cpuinfo) == expected


def test_bfloat16_is_near_and_says_the_same_of_a_picture_in_every_call(monkeypatch):
    monkeypatch.setattr(loading, "BFLOAT16", BFLOAT16_KERNELS)  # be it slower than float32
    monkeypatch.setattr(loading, "_loaded", {})
    exact = load(LoadSpec(exports.exported("saved_model", "classification")))
    rough = load(LoadSpec(exports.exported("saved_model", "classification"), precision="bfloat16"))
    pixels = uint8_pictures(SIZE)
    for name, vectors in rough(pixels).items():
        assert vectors.dtype == np.float32
        assert worst(vectors, exact(pixels)[name]) < 0.05
        assert not BFLOAT16_KERNELS or worst(vectors, exact(pixels)[name]) > 1e-5
        assert np.array_equal(vectors, rough(pixels)[name])
    assert rough.info.fingerprint == exact.info.fingerprint


def test_a_device_without_bfloat16_computes_in_float32(monkeypatch):
    monkeypatch.setattr(loading, "BFLOAT16", False)
    monkeypatch.setattr(loading, "_loaded", {})
    handle = exports.exported("saved_model", "classification")
    asked = load(LoadSpec(handle, precision="bfloat16"))
    pixels = uint8_pictures(SIZE)
    exact = load(LoadSpec(handle))(pixels)
    for name, vectors in asked(pixels).items():
        assert np.array_equal(vectors, exact[name])
    assert loading.default_batch_size(224, "bfloat16", on_gpu=False) == 8
    assert loading.default_batch_size(331, "bfloat16", on_gpu=False) == 1
    monkeypatch.setattr(loading, "BFLOAT16", True)
    assert loading.default_batch_size(224, "bfloat16", on_gpu=False) == 16
    assert loading.default_batch_size(331, "bfloat16", on_gpu=False) == 2
    assert loading.default_batch_size(331, "float32", on_gpu=False) == 1


def test_a_gpu_takes_large_batches_and_copies_one_while_it_computes_another():
    assert loading.default_batch_size(224, "float32", on_gpu=True) == 256
    assert loading.default_batch_size(331, "bfloat16", on_gpu=True) == 128
    assert loading.default_copies(on_gpu=True) == 2


RUN = """
import numpy as np
from models.loading import LoadSpec, load
load(LoadSpec({handle!r}))(np.zeros([2, {side}, {side}, 3], np.uint8))
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="oneDNN is left as it is elsewhere")
def test_depthwise_convolutions_are_onednns_on_every_cpu():
    """TensorFlow would use its own on those without AVX-512 VNNI, and take twice as long."""
    code = RUN.format(handle=exports.exported("saved_model", "classification"), side=SIZE)
    environment = {k: v for k, v in os.environ.items() if k != "TF_ENABLE_ONEDNN_OPTS"}
    told = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "ONEDNN_VERBOSE": "1"},
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    assert re.search(r"exec,cpu,convolution,.*,g\d+mb2_", told)


def test_threads_share_as_many_arenas_as_there_are_cores():
    """The C library would give each of them its own, up to eight a core."""
    code = """
import ctypes, os, threading
from models.runtime import CORES
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.fdopen.restype = ctypes.c_void_p, ctypes.c_void_p
at_once = threading.Barrier(4 * CORES)
def take():
    at_once.wait()
    assert libc.malloc(1000)
    at_once.wait()
threads = [threading.Thread(target=take) for _ in range(4 * CORES)]
for thread in threads: thread.start()
for thread in threads: thread.join()
told = os.memfd_create("told")
stream = ctypes.c_void_p(libc.fdopen(os.dup(told), b"w"))
libc.malloc_info(0, stream)
libc.fclose(stream)
print(os.pread(told, 1 << 20, 0).decode().count("<heap nr="), max(2, CORES))
"""
    free = {k: v for k, v in os.environ.items() if k != "MALLOC_ARENA_MAX"}
    more = {**free, "MALLOC_ARENA_MAX": str(2 * len(os.sched_getaffinity(0)) + 2)}
    for environment, bounded in ((free, True), (more, False)):
        told = subprocess.check_output(
            [sys.executable, "-c", code], text=True, env=environment, cwd=Path(__file__).parents[1]
        )
        arenas, most = map(int, told.split())
        assert (arenas <= most) == bounded


def test_keras_is_imported_where_it_is_asked_for_and_only_there():
    code = """
import sys
from models.runtime import tf
assert not {"keras", "tf_keras"} & set(sys.modules)
assert tf.keras.layers.Dense(2)(tf.zeros([1, 3])).shape == (1, 2)
import tensorflow.keras.layers
import keras.src.optimizers
"""
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)


@pytest.mark.parametrize("size", [2, 3, 8, 11])
def test_a_picture_has_the_same_bits_at_every_place_in_a_batch(size):
    model = load(LoadSpec(exports.exported("saved_model", "classification")))
    picture = uint8_pictures(SIZE)[0]
    noise = np.random.default_rng(0).integers(0, 255, (size, SIZE, SIZE, 3), np.uint8)
    found = []
    for place in range(size):
        batch = noise.copy()
        batch[place] = picture
        found.append({name: vectors[place] for name, vectors in model(batch).items()})
    for vectors in found:
        assert all(np.array_equal(vectors[name], found[0][name]) for name in vectors)


def test_calls_run_side_by_side_give_the_same_bits():
    spec = LoadSpec(exports.exported("saved_model", "classification"), copies=3)
    model = load(spec)
    pixels = uint8_pictures(SIZE)
    alone = model(pixels)
    with ThreadPoolExecutor(6) as pool:
        for vectors in pool.map(model, [pixels] * 24):
            assert all(np.array_equal(vectors[name], alone[name]) for name in alone)
