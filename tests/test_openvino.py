"""`--engine openvino` computes what TensorFlow does."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import exports
import numpy as np
import pytest
from pictures import jpeg

from models import loading
from models.loading import LoadSpec, ModelError, load
from models.runtime import BFLOAT16_KERNELS

SIZE = exports.ONE_CELL.image_size
PIXELS = np.random.default_rng(0).integers(0, 255, (6, SIZE, SIZE, 3), np.uint8)


def error(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def in_a_fresh_process(program: str, *arguments: str) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", program, *arguments]
    subprocess.run(command, env=env, timeout=120, check=True)


@pytest.mark.parametrize(
    "export",
    [
        ("saved_model", "classification"),
        ("hub_v1", "classification"),
        ("saved_model", "feature_vector"),
        pytest.param(  # minutes on two cores
            ("saved_model", "classification", "nasnet_mobile"), marks=pytest.mark.engines
        ),
    ],
)
def test_both_engines_give_the_same_vectors(export):
    handle = exports.exported(*export)
    ours, theirs = load(LoadSpec(handle)), load(LoadSpec(handle, engine="openvino"))
    assert theirs.info == ours.info
    side = ours.info.image_size
    pixels = np.random.default_rng(0).integers(0, 255, (3, side, side, 3), np.uint8)
    wanted, got = ours(pixels), theirs(pixels)
    assert got.keys() == wanted.keys()
    for name, vectors in got.items():
        assert (vectors.shape, vectors.dtype) == (wanted[name].shape, np.float32)
        assert error(vectors, wanted[name]) < 1e-5


def test_bfloat16_is_near(monkeypatch):
    monkeypatch.setattr(loading, "BFLOAT16", BFLOAT16_KERNELS)  # be it slower than float32
    monkeypatch.setattr(loading, "_loaded", {})
    handle = exports.exported("saved_model", "classification")
    exact = load(LoadSpec(handle))(PIXELS)
    rough = load(LoadSpec(handle, precision="bfloat16", engine="openvino"))(PIXELS)
    for name, vectors in rough.items():
        assert error(vectors, exact[name]) < 0.05
        assert not BFLOAT16_KERNELS or error(vectors, exact[name]) > 1e-5


def test_a_picture_has_the_same_bits_in_every_place_lane_and_call():
    spec = LoadSpec(exports.exported("saved_model", "classification"), engine="openvino", copies=3)
    model = load(spec)
    forth = model(PIXELS)
    for _ in range(4):  # the lanes take turns
        back = model(PIXELS[::-1].copy())
        for name, vectors in forth.items():
            assert np.array_equal(vectors, back[name][::-1])
    few = model(PIXELS[:2])  # another size is compiled beside the first
    assert all(error(few[name], forth[name][:2]) < 1e-5 for name in forth)


def test_nothing_between_its_layers_changes_their_layout(monkeypatch):
    """Turned around at every factorized reduction, pictures took a seventh longer."""
    import openvino

    compiled, compile_model = [], openvino.Core.compile_model

    def kept(*arguments, **named):
        compiled.append(compile_model(*arguments, **named))
        return compiled[-1]

    monkeypatch.setattr(openvino.Core, "compile_model", kept)
    handle = exports.exported("saved_model", "classification", "nasnet_mobile")
    model = load(LoadSpec(handle, ("logits",), engine="openvino"))
    model(np.zeros((2, 224, 224, 3), np.uint8))
    layers = Counter(
        layer.get_rt_info()["layerType"].astype(str)
        for layer in compiled[0].get_runtime_model().get_ops()
        if layer.get_output_partial_shape(0).rank.get_length() == 4  # the dense layer is turned too
    )
    assert layers["Convolution"] + layers["GroupConvolution"] > 300
    assert layers["Transpose"] <= 1  # of the pixels


BEGIN_AT_ONCE = """
import sys, threading
from models.loading import LoadSpec, load
load(LoadSpec(sys.argv[1], engine="openvino", copies=2))
import openvino
sys.setswitchinterval(1e-6)
both = threading.Barrier(2)
def ask():
    both.wait()
    openvino.Type.u8.to_dtype()  # as each call of a lane does
lanes = [threading.Thread(target=ask) for _ in range(2)]
[lane.start() for lane in lanes]
[lane.join() for lane in lanes]
"""


def test_lanes_that_begin_at_once_do_not_wait_for_each_other():
    handle = exports.exported("saved_model", "classification")
    in_a_fresh_process(BEGIN_AT_ONCE, handle)


def test_the_job_tells_its_engine_and_goes_on_with_no_other(tmp_path, job):
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / "in" / f"{number}.jpg").write_bytes(jpeg(40 + number, 30))
    plain = job(tmp_path / "in", output=tmp_path / "plain")
    other = job(tmp_path / "in", output=tmp_path / "other", engine="openvino")
    assert (plain.code, other.code) == (0, 0)
    assert other.manifest["options"]["engine"] == "openvino"
    assert other.manifest["versions"].keys() - plain.manifest["versions"] == {"openvino"}
    assert other.manifest["model"] == plain.manifest["model"]
    for key, row in plain.rows("features").items():
        for name in ("embedding", "logits"):
            got = np.array(other.rows("features")[key][name])
            assert error(got, np.array(row[name])) < 1e-5
    again = job(tmp_path / "in", output=tmp_path / "other", if_exists="resume")
    assert again.code == 2
    assert 'engine ("openvino", now "tensorflow")' in again.stderr


def test_where_it_is_not_installed_one_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    spec = LoadSpec(exports.exported("saved_model", "feature_vector"), engine="openvino", copies=9)
    with pytest.raises(ModelError, match=r"not installed .* pip install openvino"):
        load(spec)


def test_it_and_a_gpu_exclude_one_another(job, tmp_path):
    ran = job(tmp_path, engine="openvino", gpu="nvidia-l4")
    assert ran.code == 2
    assert "computes on CPUs" in ran.stderr


def test_its_import_tells_nobody():
    """OpenVINO's package forks a process that calls its makers where the telemetry is installed."""
    program = (
        "import sys\n"
        "from models.openvino import functions\n"
        "from models.graphs import Graph\n"
        "from models.runtime import tf\n"
        "try: functions(Graph(tf.compat.v1.GraphDef()), [], False, 1)\n"
        "except Exception: pass\n"
        "assert 'openvino' in sys.modules and 'openvino_telemetry' not in sys.modules\n"
    )
    in_a_fresh_process(program)
