"""The model commands through the true `main([...])`: export, inspect, prepare."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import threading
import types
from pathlib import Path

import exports
import numpy as np
import pytest
import servers
import tensorflow as tf
from pictures import jpeg

from models import loading
from models import prepared as prepared_files
from models.catalog import FORMATS, HEADS, NETWORKS, ONE_CELL
from models.checkpoint import AVERAGED, seeded, write_checkpoint
from models.export import export_hub_v1
from models.handles import resolve
from models.loading import LoadSpec, load
from models.networks import is_trainable, variable_shapes
from pipeline import job as pipeline_job
from pipeline import models
from storage import files, reach
from storage.errors import RunError
from transforms.inference import FrozenModelHandler

WIDTHS = {"classification": {"embedding": 48, "logits": 11}, "feature_vector": {"embedding": 48}}
PIXELS = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """The one-cell network among the others, and a cache of this test's own."""
    monkeypatch.setitem(NETWORKS, ONE_CELL.name, ONE_CELL)
    monkeypatch.setenv("IMAGE_FEATURES_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def told(capsys):
    """Runs a command that must succeed; gives what it printed, as JSON where it is some."""

    def call(*argv: str | Path):
        capsys.readouterr()
        code = models.main([str(word) for word in argv])
        out, err = capsys.readouterr()
        assert code == 0, err
        return json.loads(out) if out else None

    return call


@pytest.fixture
def refused(capsys):
    """Runs a command that must be refused; gives its one line."""

    def call(*argv: str | Path) -> str:
        capsys.readouterr()
        assert models.main([str(word) for word in argv]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err

    return call


def export(output: Path, **flags: str | int | Path | bool) -> list[str | Path]:
    """The words of an export of the one-cell network, a classifier of seed 0 in TF2's format."""
    given = {"network": ONE_CELL.name, "head": "classification", "format": "saved_model"}
    if "checkpoint" not in flags:
        given["seed"] = 0
    words: list[str | Path] = ["export", "--output", output]
    for name, value in {**given, **flags}.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


# --- export ------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("format", FORMATS)
def test_a_model_is_exported_packed_inspected_and_prepared(format, head, told, tmp_path):
    model, archive, prepared = tmp_path / "m", tmp_path / "m.tar.gz", tmp_path / "prepared"
    told(*export(model, format=format, head=head, archive=archive))
    looked = told("inspect", model)
    assert looked == {
        "format": format,
        "image_size": 32,
        "value_range": [0.0, 1.0],
        "outputs": WIDTHS[head],
        "signatures": looked["signatures"],
        "fingerprint": looked["fingerprint"],
        "unsafe_ops": [],
    }
    assert len(looked["fingerprint"]) == 64

    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    assert digests(Path(resolve(str(archive), digest))) == digests(model)

    told("prepare", model, "--output", prepared)
    assert sorted(p.name for p in prepared.iterdir()) == [
        "graph.pb",
        "prepared.json",
        "weights.npz",
    ]
    assert told("inspect", prepared) == {**looked, "format": "prepared"}
    origin, again = load(LoadSpec(str(model))), load(LoadSpec(str(prepared)))
    for name, vectors in origin(PIXELS).items():
        assert np.array_equal(again(PIXELS)[name], vectors)
        assert vectors.shape == (4, WIDTHS[head][name])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> tuple[str, dict[str, np.ndarray]]:
    """A training's checkpoint, with plain and averaged names, and what the averages are."""
    shapes = variable_shapes(ONE_CELL, "classification")
    plain, averaged = seeded(shapes, 1), seeded(shapes, 2)
    averaged = {name: averaged[name] for name in shapes if is_trainable(name)}
    prefix = str(tmp_path_factory.mktemp("checkpoint") / "model.ckpt")
    write_checkpoint(
        prefix,
        {
            **plain,
            **{f"{name}{AVERAGED}": value for name, value in averaged.items()},
            "aux_7/aux_logits/FC/biases": np.zeros(11, np.float32),
            "global_step": np.int64(1),
        },
    )
    return prefix, {**plain, **averaged}


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_a_checkpoints_values_are_exported(format, ema, checkpoint, told, tmp_path):
    prefix, averaged = checkpoint
    flags = {"ema": True} if ema else {}
    told(*export(tmp_path / "m", format=format, checkpoint=prefix, **flags))
    shapes = variable_shapes(ONE_CELL, "classification")
    expected = averaged if ema else seeded(shapes, 1)
    model = tf.saved_model.load(str(tmp_path / "m"), tags=[] if format == "hub_v1" else None)
    assert {v.name.removesuffix(":0") for v in model.variables} == set(shapes)
    for variable in model.variables:
        assert np.array_equal(variable.numpy(), expected[variable.name.removesuffix(":0")])


def test_a_seed_is_the_same_model_each_time(told, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        told(*export(tmp_path / name, seed=seed, head="feature_vector", format="hub_v1"))
    a, b, c = (digests(tmp_path / name) for name in "abc")
    assert a == b
    assert {name for name in a if a[name] != c[name]} == {
        "variables/variables.data-00000-of-00001",
        "variables/variables.index",
    }


def test_an_archive_is_a_handle(told, tmp_path):
    archive = tmp_path / "m.tar.gz"
    told(*export(tmp_path / "m", head="feature_vector", format="hub_v1", archive=archive))
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    looked = told("inspect", archive, "--model_sha256", digest)
    assert looked == told("inspect", tmp_path / "m")


def test_an_export_that_cannot_be(refused, tmp_path, checkpoint):
    prefix, _ = checkpoint
    model = tmp_path / "m"
    assert "--ema" in refused(*export(model, ema=True))
    assert "unrecognized arguments: --sed" in refused(*export(model), "--sed", "1")
    assert "--format" in refused(*export(model, format="keras"))
    assert "no readable checkpoint" in refused(*export(model, checkpoint=tmp_path / "none"))
    wrong = refused(*export(model, network="nasnet_mobile", checkpoint=prefix))
    assert "has no variable" in wrong or "has shape" in wrong
    assert "must be local" in refused(*export("gs://bucket/m"))
    assert "must be local" in refused(*export(model, archive="s3://bucket/m.tar.gz"))
    assert "named so" in refused(*export(model, archive=tmp_path / "m.zip"))
    assert "would lie in" in refused(*export(model, archive=model / "m.tar.gz"))
    (tmp_path / "file").touch()
    assert "something is there already" in refused(*export(tmp_path / "file"))
    assert "something is there" in refused(*export(model, archive=tmp_path / "file"))
    assert "cannot be written" in refused(*export(tmp_path / "file" / "m"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


# --- inspect and prepare -----------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["inspect", "prepare"])
def test_what_is_no_model(verb, refused, tmp_path):
    more = ["--output", tmp_path / "out"] if verb == "prepare" else []
    assert "no such directory" in refused(verb, tmp_path / "none", *more)
    (tmp_path / "empty").mkdir()
    assert "holds no saved_model.pb" in refused(verb, tmp_path / "empty", *more)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "saved_model.pb").write_text("text")
    assert "cannot be loaded" in refused(verb, tmp_path / "text", *more)
    assert "cannot be reached" in refused(verb, f"{servers.nobody()}/m.tar.gz", *more)
    assert "hex digits" in refused(verb, tmp_path / "text", "--model_sha256", "ABC", *more)
    assert "at least 1" in refused(verb, tmp_path / "text", "--image_size", "0", *more)
    assert "--value_range" in refused(verb, tmp_path / "text", "--value_range", "1,0", *more)
    assert "--modelsha" in refused(verb, tmp_path / "text", "--modelsha", "1", *more)
    assert not (tmp_path / "out").exists()


def test_a_model_without_its_variables(refused, tmp_path):
    shutil.copytree(exports.exported("saved_model", "feature_vector"), tmp_path / "m")
    shutil.rmtree(tmp_path / "m" / "variables")
    assert "cannot be loaded" in refused("inspect", tmp_path / "m")
    assert "cannot be loaded" in refused("prepare", tmp_path / "m", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_over(refused, tmp_path):
    model = exports.exported("hub_v1", "feature_vector")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    assert "something is there" in refused("prepare", model, "--output", tmp_path / "mine")
    assert "cannot be written" in refused(
        "prepare", model, "--output", tmp_path / "mine" / "file" / "below"
    )
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["file"]


def test_a_module_is_inspected_without_a_warning(told, caplog):
    told("inspect", exports.exported("hub_v1", "classification"))
    assert caplog.text == ""


@pytest.fixture(scope="module")
def prepared_once(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "m"
    origin = exports.exported("saved_model", "classification")
    assert models.main(["prepare", origin, "--output", str(folder)]) == 0
    return folder


@pytest.fixture
def prepared(prepared_once, tmp_path) -> Path:
    return Path(shutil.copytree(prepared_once, tmp_path / "p"))


@pytest.fixture(params=[False, True], ids=["", "ahead"])
def ahead(request, monkeypatch):
    """Whether a prepared model is read as at a start, where TensorFlow is yet to be imported."""
    if request.param:
        modules = {name: module for name, module in sys.modules.items() if name != "tensorflow"}
        monkeypatch.setattr(prepared_files, "sys", types.SimpleNamespace(modules=modules))
    monkeypatch.setattr(loading, "_loaded", {})
    return request.param


def test_the_job_runs_a_prepared_model_bit_for_bit(ahead, prepared, job, monkeypatch, tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / "in" / f"{i}.jpg").write_bytes(jpeg(40 + i, 30))
    plain = job(tmp_path / "in", output=tmp_path / "plain")
    readers = []
    read = prepared_files._read

    def told(folder):
        readers.append(threading.current_thread().name)
        return read(folder)

    monkeypatch.setattr(prepared_files, "_read", told)
    ran = job(tmp_path / "in", output=tmp_path / "out", model=prepared)
    assert (plain.code, ran.code) == (0, 0)
    assert len(readers) == 1
    assert (readers[0] == "prepared") == ahead
    assert not prepared_files._ahead
    assert ran.rows("features") == plain.rows("features")
    assert len(ran.rows("features")) == 3
    assert ran.manifest["model"]["format"] == "prepared"
    assert ran.manifest["model"]["fingerprint"] == plain.manifest["model"]["fingerprint"]


def test_what_is_read_ahead_is_used_once_or_forgotten(prepared, monkeypatch):
    reads = []
    read = prepared_files._read
    counted = lambda folder: reads.append(folder) or read(folder)  # noqa: E731
    monkeypatch.setattr(prepared_files, "_read", counted)
    monkeypatch.setattr(prepared_files, "sys", types.SimpleNamespace(modules={}))
    folder = str(prepared)
    prepared_files.read_ahead(folder)
    first = prepared_files.read(folder)
    assert reads == [folder]
    prepared_files.read_ahead(folder)
    prepared_files.drop_ahead()
    again = prepared_files.read(folder)
    assert reads == [folder] * 3
    assert (again.info, again.graph) == (first.info, first.graph)
    assert again.weights.keys() == first.weights.keys() != set()
    for name, array in again.weights.items():
        assert np.array_equal(array, first.weights[name])


def test_a_model_that_is_swapped_between_plan_and_run_fails_the_run(job, monkeypatch, tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg())
    shutil.copytree(exports.exported("hub_v1", "classification"), tmp_path / "m")
    planned = load(LoadSpec(str(tmp_path / "m"))).info.fingerprint
    run_graph = pipeline_job.run_graph

    def elsewhere(*planned):
        """As a worker on another machine, which loads anew, would run it."""
        shutil.rmtree(tmp_path / "m")
        shutil.copytree(exports.exported("hub_v1", "feature_vector"), tmp_path / "m")
        monkeypatch.setattr(loading, "_loaded", {})
        return run_graph(*planned)

    monkeypatch.setattr(pipeline_job, "run_graph", elsewhere)
    ran = job(tmp_path / "a.jpg", model=tmp_path / "m", outputs="embedding")
    assert (ran.code, ran.line["status"]) == (1, "failed")
    found = load(LoadSpec(str(tmp_path / "m"))).info.fingerprint
    (line,) = [line for line in ran.stderr.splitlines() if line.startswith("ERROR    pipeline:")]
    assert planned in line
    assert found in line
    assert "prepare it once" in line
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_model_that_takes_another_range_on_a_worker_is_refused(tmp_path):
    """Prepared for another range it has the same graph and weights, and so the same fingerprint."""
    model = str(exports.exported("hub_v1", "feature_vector"))
    info = load(LoadSpec(model)).info

    def handler(value_range):
        return FrozenModelHandler(LoadSpec(model), 8, "float32", info.fingerprint, value_range)

    assert handler(info.value_range).load_model().info is info
    with pytest.raises(RunError, match=r"takes pixels of .* and the run was planned with"):
        handler((-3.0, 3.0)).load_model()


def test_a_prepared_model_prepared_again_is_the_same(prepared, told, tmp_path):
    told("prepare", prepared, "--output", tmp_path / "again")
    assert told("inspect", tmp_path / "again") == told("inspect", prepared)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGE = {
    "a bit of the graph": lambda folder: flip(folder / "graph.pb"),
    "a cut graph": lambda folder: (folder / "graph.pb").write_bytes(
        (folder / "graph.pb").read_bytes()[:-1]
    ),
    "a bit of the weights": lambda folder: flip(folder / "weights.npz"),
    "no weights": lambda folder: (folder / "weights.npz").unlink(),
    "no graph": lambda folder: (folder / "graph.pb").unlink(),
    "a cut description": lambda folder: (folder / "prepared.json").write_text("{"),
    "another description": lambda folder: (folder / "prepared.json").write_text("[1]"),
    "a newer version": lambda folder: (folder / "prepared.json").write_text(
        (folder / "prepared.json").read_text().replace('_version": 2', '_version": 99')
    ),
}


@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize("damage", DAMAGE)
def test_an_altered_prepared_model_is_refused(damage, prepared, refused, job, tmp_path):
    DAMAGE[damage](prepared)
    assert "not a whole prepared model" in refused("inspect", prepared)
    (tmp_path / "a.jpg").write_bytes(jpeg())
    ran = job(tmp_path / "a.jpg", model=prepared)
    assert ran.code == 2
    assert "not a whole prepared model" in ran.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["inspect", "prepare"])
def test_weights_that_are_not_finite_are_refused(verb, refused, job, tmp_path):
    """Fused layers would make 0 of them, and every vector finite and wrong."""
    values = dict(exports.values())
    values["conv0/weights"] = values["conv0/weights"].copy()
    values["conv0/weights"][0, 0, 0, 0] = np.nan
    model = str(tmp_path / "m")
    export_hub_v1(ONE_CELL, values, "feature_vector", model)
    more = ["--output", tmp_path / "out"] if verb == "prepare" else []
    assert "1 of its weights hold NaN or infinity" in refused(verb, model, *more)
    assert not (tmp_path / "out").exists()


def test_a_small_weight_that_is_not_finite_is_refused(refused, tmp_path):
    """It lies in the graph, not beside it."""
    (name, beta), *_ = (item for item in exports.values().items() if item[0].endswith("/beta"))
    values = {**exports.values(), name: np.full_like(beta, np.nan)}
    export_hub_v1(ONE_CELL, values, "feature_vector", str(tmp_path / "m"))
    assert "weights hold NaN or infinity" in refused("inspect", str(tmp_path / "m"))


# --- stores ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=servers.STORES)
def store(request):
    with servers.STORES[request.param]() as running:
        yield running


@pytest.mark.parametrize("scheme", servers.STORES)
@pytest.mark.parametrize("place", ["inspect", "prepare", "prepare --output"])
def test_an_address_at_which_nobody_listens(scheme, place, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(reach, "PATIENCE", 5.0)  # Google's client says nothing while it tries
    address, uri = servers.nobody(), f"{scheme}://bucket/model"
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
    flags = [f"--s3_endpoint_url={address}", "--s3_region_name=us-east-1", "--no_auth"]
    flags += ["--s3_access_key_id=a", "--s3_secret_access_key=b-secret"]
    argv = {
        "inspect": ["inspect", uri],
        "prepare": ["prepare", uri, "--output", tmp_path / "out"],
        "prepare --output": ["prepare", tmp_path, "--output", uri],
    }
    line = refused(*argv[place], *flags)
    assert f"{uri}: the store does not answer (" in line
    assert "b-secret" not in line
    assert not (tmp_path / "out").exists()


def test_a_misspelt_secret_is_not_shown(refused):
    line = refused("inspect", "/nowhere/model", "--s3_secret_acces_key", "a-planted-secret")
    assert "--s3_secret_acces_key" in line
    assert "planted" not in line


@pytest.mark.engines
def test_a_model_is_prepared_to_and_inspected_in_a_store(store, told, refused):
    origin = exports.exported("saved_model", "feature_vector")
    target = f"{store.uri}/prepared"
    told("prepare", origin, "--output", target, *store.argv)
    looked = told("inspect", target, *store.argv)
    assert looked == {**told("inspect", origin), "format": "prepared"}
    assert "something is there" in refused("prepare", origin, "--output", target, *store.argv)
    again = f"{store.uri}/again"
    told("prepare", *store.argv, target, "--output", again)
    assert files.read_bytes(f"{again}/graph.pb") == files.read_bytes(f"{target}/graph.pb")
    assert "nothing is there" in refused("inspect", f"{store.uri}/none", *store.argv)
    assert "cannot be" in refused(
        "prepare", origin, "--output", f"{store.uri}-that-is-not-there/m", *store.argv
    )


@pytest.mark.engines
def test_the_whole_job_in_a_store(store, job):
    """Input, model and output."""
    model = Path(exports.exported("hub_v1", "classification"))
    files.configure_stores(store.argv)
    for path in model.rglob("*"):
        if path.is_file():
            name = path.relative_to(model).as_posix()
            files.write_bytes(f"{store.uri}/model/{name}", path.read_bytes())
    for i in range(3):
        files.write_bytes(f"{store.uri}/in/{i}.jpg", jpeg(40 + i, 30) if i else b"no picture")
    flags = {"model": f"{store.uri}/model", "max_failure_rate": 0.5, **store.flags}

    output = f"{store.uri}/out"
    ran = job(f"{store.uri}/in", output=output, **flags)
    assert ran.code == 0, ran.stderr
    assert (ran.line["output"], ran.line["features"], ran.line["failures"]) == (output, 2, 1)
    manifest = json.loads(files.read_bytes(f"{output}/manifest.json"))
    assert files.is_file(f"{output}/_SUCCESS")
    listed = {info.path.removeprefix(f"{output}/") for info in files.list_folder(output)}
    assert listed == {"manifest.json", "_SUCCESS", *(f["path"] for f in manifest["files"])}

    rows = stored_rows(output, manifest)
    assert [row["key"] for row in rows["features"]] == [f"{store.uri}/in/{i}.jpg" for i in (1, 2)]
    assert [row["key"] for row in rows["failures"]] == [f"{store.uri}/in/0.jpg"]
    for i, row in enumerate(rows["features"], 1):
        assert row["sha256"] == hashlib.sha256(jpeg(40 + i, 30)).hexdigest()
        assert (len(row["embedding"]), len(row["logits"])) == (48, 11)

    assert "something is there" in job(f"{store.uri}/in", output=output, **flags).stderr
    elsewhere = f"{store.uri}-that-is-not-there/out"
    refused = job(f"{store.uri}/in", output=elsewhere, **{**flags, "model": model})
    assert refused.code == 2
    assert "error: --output" in refused.stderr


@pytest.mark.engines
def test_a_job_goes_on_in_a_store(job):
    with servers.gs_store() as store:
        files.configure_stores(store.argv)
        for i in range(2):
            files.write_bytes(f"{store.uri}/in/{i}.jpg", jpeg(40 + i, 30))
            ran = job(
                f"{store.uri}/in", output=f"{store.uri}/out", if_exists="resume", **store.flags
            )
            assert (ran.code, ran.line["features"], ran.line["skipped"]) == (0, 1, i), ran.stderr


def stored_rows(output: str, manifest: dict) -> dict[str, list[dict]]:
    """The rows of both kinds that a manifest names, by key; each file with its digest."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: dict[str, list[dict]] = {"features": [], "failures": []}
    for entry in manifest["files"]:
        data = files.read_bytes(f"{output}/{entry['path']}")
        assert hashlib.sha256(data).hexdigest() == entry["sha256"]
        table = pq.read_table(pa.BufferReader(data))
        rows[entry["path"].partition("/")[0]] += table.to_pylist()
    return {kind: sorted(found, key=lambda row: row["key"]) for kind, found in rows.items()}
