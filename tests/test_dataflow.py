"""A run on Dataflow: the job that the service would get, made by the true main([...]).

The service itself is not here: what it does with the job is told by its documentation alone.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import exports
import pytest
import servers
from pictures import jpeg

from pipeline import dataflow, preflight
from pipeline.options import parse
from storage import files
from storage.errors import RequestError

ROOT = Path(__file__).parents[1]
IMAGE = "europe-docker.pkg.dev/p/features/worker:0.1.0-gpu"
ACCELERATOR = "beam:resources:accelerator:v1"


# --- what is refused, and what is added ----------------------------------------------------------


def options(*argv: str):
    given = {"--input": "gs://b/in", "--model": "gs://b/m", "--output": "gs://b/out"}
    for flag, value in zip(argv[::2], argv[1::2], strict=True):
        given[flag] = value
    return parse([word for pair in given.items() for word in pair])


BEAM = ["--runner", "DataflowRunner", "--sdk_container_image", IMAGE]


@pytest.mark.parametrize(
    ("ours", "beams", "told"),
    [
        (["--model", "models/m"], [], "--model models/m: a path of this machine"),
        (["--model", "/m.tar.gz"], [], "--model /m.tar.gz: a path of this machine"),
        (["--input", "/in/*.jpg"], [], "--input /in/*.jpg: a path of this machine"),
        (["--output", "out"], [], "--output out: a path of this machine"),
        (
            ["--gpu", "nvidia-l4"],
            ["--dataflow_service_options=worker_accelerator=type:nvidia-l4;count:1"],
            "Dataflow takes one of the two",
        ),
        (
            ["--gpu", "nvidia-l4"],
            ["--experiments=worker_accelerator=type:nvidia-l4;count:1"],
            "Dataflow takes one of the two",
        ),
        (
            [],
            [
                "--dataflow_service_options=worker_accelerator=type:nvidia-l4;count:1",
                "--resource_hints=accelerator=type:nvidia-l4;count:1",
            ],
            "Dataflow takes one of the two",
        ),
        (
            ["--gpu", "nvidia-l4"],
            ["--resource_hints=accelerator=type:nvidia-l4;count:1"],
            "beside --gpu for inference",
        ),
        (
            ["--engine", "openvino"],
            ["--dataflow_service_options=worker_accelerator=type:nvidia-l4;count:1"],
            "the GPU would idle",
        ),
        (["--gpu", "nvidia-l4"], ["--flexrs_goal=COST_OPTIMIZED"], "flexible scheduling has no"),
        (
            [],
            [
                "--flexrs_goal=SPEED_OPTIMIZED",
                "--dataflow_service_options=worker_accelerator=type:nvidia-l4;count:1",
            ],
            "flexible scheduling has no",
        ),
    ],
)
def test_what_would_fail_far_away_is_refused_here(ours, beams, told):
    wanted, _ = options(*ours)
    with pytest.raises(RequestError) as raised:
        dataflow.check(wanted, [*BEAM, *beams])
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)


def test_no_cloud_is_called_and_no_bucket_made_for_want_of_a_place(monkeypatch):
    from apache_beam.io.gcp import gcsio

    def called(*_):
        pytest.fail("a cloud was called")

    monkeypatch.setattr(gcsio, "GcsIO", called)
    monkeypatch.setattr(gcsio, "get_or_create_default_gcs_bucket", called)
    wanted, _ = options()
    flags = [*BEAM, "--project", "project", "--region", "europe-west1"]
    with pytest.raises(RequestError, match="temp_location"):
        preflight._check_beam_flags(wanted, flags, [])
    preflight._check_beam_flags(wanted, [*flags, "--temp_location", "gs://bucket/tmp"], [])


def test_workers_without_tensorflow_are_refused():
    wanted, _ = options()
    with pytest.raises(RequestError, match="--sdk_container_image"):
        dataflow.check(wanted, BEAM[:2])
    dataflow.check(wanted, BEAM)
    dataflow.check(wanted, [*BEAM[:2], "--requirements_file", "requirements/runtime.txt"])


def test_workers_that_are_sent_no_code(monkeypatch, tmp_path):
    assert dataflow.sends_code(BEAM)
    monkeypatch.setattr(dataflow, "_SETUP_FILE", tmp_path / "setup.py")  # installed by pip
    assert not dataflow.sends_code(BEAM)
    assert dataflow.sends_code([*BEAM, "--setup_file", "./setup.py"])
    assert dataflow.sends_code([*BEAM, "--extra_package", "features.tar.gz"])


@pytest.mark.parametrize("model", ["nasnet_mobile", "https://tfhub.dev/google/x/1", "s3://b/m"])
def test_a_model_that_workers_can_fetch_is_taken(model):
    dataflow.check(options("--model", model)[0], BEAM)


def test_cheap_scheduling_without_a_gpu_is_taken():
    dataflow.check(options()[0], [*BEAM, "--flexrs_goal=COST_OPTIMIZED"])


@pytest.mark.parametrize(
    ("machine", "cores"),
    [
        ("n1-standard-8", 8),
        ("g2-standard-16", 16),
        ("custom-6-20480", 6),
        ("n2-custom-12-65536", 12),
        ("a2-highgpu-2g", 24),
        ("a2-ultragpu-1g", 12),
        ("a2-megagpu-16g", 96),
        ("a3-highgpu-8g", 208),
        ("c3-standard-8-lssd", 8),
        ("something", 1),
        (None, 1),
    ],
)
def test_the_cores_of_a_machine(machine, cores):
    given = ["--machine_type", machine] if machine else []
    assert dataflow.workers(options()[0], given) == dataflow.Workers(False, cores)
    on_gpu, _ = options("--gpu", "nvidia-l4")
    assert dataflow.workers(on_gpu, given) == dataflow.Workers(True, cores)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("DataflowRunner", True),
        ("dataflow", True),
        ("apache_beam.runners.dataflow.dataflow_runner.DataflowRunner", True),
        ("DirectRunner", False),
        ("FlinkRunner", False),
    ],
)
def test_which_runners_are_dataflow(name, expected):
    assert dataflow.is_dataflow(["--runner", name]) is expected
    assert not dataflow.is_dataflow([])


def test_what_is_given_is_not_added_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = [
        "--experiments=use_multiple_sdk_containers",
        "--number_of_worker_harness_threads=1",
        "--setup_file=setup.py",
    ]
    assert dataflow.completed(told)[3:] == ["--setup_file", f"{tmp_path}/setup.py"]
    added = dataflow.completed([])
    assert added[added.index("--setup_file") + 1] == str(ROOT / "setup.py")


# --- the job, by the true main -------------------------------------------------------------------


@dataclass
class Made:
    """A job as the service would get it: its description, the graph, and the store it is in."""

    job: dict[str, Any]
    graph: Any
    line: dict[str, Any]
    store: servers.Store
    log: str

    @property
    def pool(self) -> dict[str, Any]:
        (pool,) = self.job["environment"]["workerPools"]
        return pool

    @property
    def sdk_options(self) -> dict[str, Any]:
        return self.job["environment"]["sdkPipelineOptions"]["options"]

    def leaves(self) -> dict[str, Any]:
        """Name to proto of every transform that does something itself."""
        transforms = self.graph.components.transforms.values()
        return {t.unique_name: t for t in transforms if not t.subtransforms}

    def do_fn(self, part: str) -> Any:
        """The function of the one step whose name has `part` in it."""
        from apache_beam.internal import pickler
        from apache_beam.portability.api import beam_runner_api_pb2
        from apache_beam.utils import proto_utils

        (leaf,) = (leaf for name, leaf in self.leaves().items() if part in name)
        payload = proto_utils.parse_Bytes(leaf.spec.payload, beam_runner_api_pb2.ParDoPayload)
        return pickler.loads(payload.do_fn.payload)[0]

    def hints(self, transform: Any) -> dict[str, bytes]:
        environment = self.graph.components.environments.get(transform.environment_id)
        return dict(environment.resource_hints) if environment else {}


@pytest.fixture(scope="module")
def gs():
    """A gs:// server with a picture and a model."""
    with servers.gs_store() as store:
        files.configure_stores(store.argv)
        model = Path(exports.exported("saved_model", "classification"))
        for path in model.rglob("*"):
            if path.is_file():
                name = f"{store.uri}/model/{path.relative_to(model).as_posix()}"
                files.write_bytes(name, path.read_bytes())
        files.write_bytes(f"{store.uri}/in/a.jpg", jpeg(40, 30))
        yield store


@pytest.fixture
def make(gs, job, tmp_path):
    """Makes a job by main([...]) as a template, with flags by name besides the usual ones."""
    from apache_beam.portability.api import beam_runner_api_pb2

    def call(**flags: Any) -> Made:
        template = f"{gs.uri}/templates/{tmp_path.name}.json"
        ran = job(
            f"{gs.uri}/in/*",
            **{
                "model": f"{gs.uri}/model",
                "output": f"{gs.uri}/out-{tmp_path.name}",
                "runner": "DataflowRunner",
                "project": "a-project",
                "region": "europe-west4",
                "temp_location": f"{gs.uri}/tmp",
                "template_location": template,
                "setup_file": str(ROOT / "setup.py"),
                "sdk_container_image": IMAGE,
                "machine_type": "n1-standard-8",
                "num_workers": 2,
                "max_num_workers": 20,
                **gs.flags,
                **flags,
            },
        )
        assert ran.code == 0, ran.stderr
        made = json.loads(files.read_bytes(template))
        url = made["environment"]["sdkPipelineOptions"]["options"]["pipelineUrl"]
        graph = beam_runner_api_pb2.Pipeline.FromString(files.read_bytes(url))
        return Made(made, graph, ran.line, gs, ran.stderr)

    return call


@pytest.mark.engines
def test_the_job_that_dataflow_would_get(make):
    made = make(gpu="nvidia-tesla-t4")
    assert made.line["status"] == "submitted"
    assert made.line["manifest"] is None

    assert made.job["type"] == "JOB_TYPE_BATCH"
    assert made.pool["machineType"] == "n1-standard-8"
    assert made.pool["numWorkers"] == 2
    assert made.pool["autoscalingSettings"]["maxNumWorkers"] == 20
    assert made.pool["numThreadsPerWorker"] == 4
    experiments = made.job["environment"]["experiments"]
    assert "no_use_multiple_sdk_containers" in experiments
    assert "use_multiple_sdk_containers" not in experiments
    assert not any("worker_accelerator" in text for text in experiments)
    assert "serviceOptions" not in made.job["environment"]
    assert "flexResourceSchedulingGoal" not in made.job["environment"]

    images = {image["containerImage"] for image in made.pool["sdkHarnessContainerImages"]}
    assert images == {IMAGE}


@pytest.mark.engines
def test_the_gpu_is_for_the_steps_that_run_the_model_alone(make):
    made = make(gpu="nvidia-tesla-t4")
    hint = b"type:nvidia-tesla-t4;count:1;install-nvidia-driver:5xx"
    hinted = {name: made.hints(leaf) for name, leaf in made.leaves().items() if made.hints(leaf)}
    assert set(map(str, hinted.values())) == {str({ACCELERATOR: hint})}
    assert {name.partition("/")[0] for name in hinted} == {"ExtractFeatures"}
    assert any("RunInference" in name for name in hinted)
    loads = [name for name in made.leaves() if "BeamML_RunInference" in name]
    assert loads
    assert set(loads) <= set(hinted)


@pytest.mark.engines
def test_the_gpu_of_every_worker_by_beams_own_flag(make):
    told = "worker_accelerator=type:nvidia-l4;count:1;install-nvidia-driver:5xx"
    made = make(dataflow_service_options=told, machine_type="g2-standard-8")
    assert made.job["environment"]["serviceOptions"] == [told]
    assert not any(made.hints(leaf) for leaf in made.leaves().values())
    assert batch_size(made) == (256, 512)  # two at once: the workers have a GPU, the launcher none


@pytest.mark.engines
def test_on_cpus_batches_run_side_by_side_on_the_cores_of_the_worker(make):
    assert batch_size(make(machine_type="n2-standard-16")) == (8, 16 * 8)
    assert batch_size(make(gpu="nvidia-l4")) == (256, 512)


def batch_size(made: Made) -> tuple[int, int]:
    """Images a batch, and images that are handed to the model together."""
    handler = made.do_fn("BeamML_RunInference")._model_handler
    return handler._batch_size, handler.call_size


@pytest.mark.engines
def test_workers_get_this_code_and_no_dependency(make):
    made = make()
    (staged,) = {p["location"] for p in made.pool["packages"] if p["name"].endswith(".tar.gz")}
    uri = staged.replace("storage.googleapis.com/", "gs://")
    with tarfile.open(fileobj=BytesIO(files.read_bytes(uri))) as sdist:
        text = {}
        for member in sdist.getmembers():
            if member.isfile():
                name = member.name.partition("/")[2]
                text[name] = sdist.extractfile(member).read().decode(errors="replace")
    assert text["transforms/inference.py"] == (ROOT / "transforms/inference.py").read_text()
    modules = {
        str(path.relative_to(ROOT))
        for room in ("pipeline", "transforms", "formats", "models", "storage")
        for path in (ROOT / room).glob("*.py")
    }
    assert modules <= set(text)
    assert "dependencies = []" in text["pyproject.toml"]
    for environment in made.graph.components.environments.values():
        assert [d.type_urn for d in environment.dependencies]  # on every environment of the graph


@pytest.mark.engines
def test_no_picture_crosses_a_shuffle(make):
    """Units of work are grouped before any picture is read, and timings after; nothing else is.

    The commit is given files, counts and timings.
    """
    made = make(gpu="nvidia-tesla-t4")
    leaves = made.leaves()
    spread, add = "ReadImages/Spread/ReshufflePerKey/GroupByKey", "Publish/AddTimings"
    grouping = {name for name, leaf in leaves.items() if is_grouping(leaf.spec.urn)}
    assert spread in grouping
    assert {name for name in grouping if not name.startswith(f"{add}/")} == {spread}
    read = "ReadImages/ReadUnits/ParDo(_ReadUnits)"
    later = after(leaves, read)
    assert spread not in later
    assert {"DecodeImages", "ExtractFeatures"} <= {name.partition("/")[0] for name in later}

    by_output = {
        pcollection: (name, tag)
        for name, leaf in leaves.items()
        for tag, pcollection in leaf.outputs.items()
    }

    def given(*steps: str) -> set[tuple[str, str]]:
        """What `steps` take from others: step and tag."""
        taken = {by_output[p] for step in steps for p in leaves[step].inputs.values()}
        return {(name, tag) for name, tag in taken if not name.startswith("Publish/")}

    adding = [name for name in leaves if name.startswith(f"{add}/")]
    assert given(*adding) == {("AllTimings", "None")}
    assert {tag for _, tag in given("AllTimings")} == {"timings"}
    assert given("Publish/Map(_publish)") == {("AllFiles", "None"), (read, "skipped")}
    files_of = {name.partition("/")[0] for name, _ in given("AllFiles")}
    assert files_of == {"WriteFeatures", "WriteFailures"}


def is_grouping(urn: str) -> bool:
    return bool(re.search("group|shuffle|redistribute|combine", urn))


def after(leaves: dict[str, Any], start: str) -> set[str]:
    """The steps that what `start` gives flows through."""
    reached, waiting = set(), [start]
    while waiting:
        outputs = set(leaves[waiting.pop()].outputs.values())
        found = {n for n, leaf in leaves.items() if outputs & set(leaf.inputs.values())} - reached
        reached |= found
        waiting += found
    return reached


@pytest.mark.engines
def test_a_job_that_is_not_waited_for_keeps_what_it_will_read(make, gs, job, tmp_path):
    """The digests of what is finished: the job reads them, and its commit removes them."""
    output = f"{gs.uri}/out-{tmp_path.name}"
    first = job(f"{gs.uri}/in/*", model=f"{gs.uri}/model", output=output, **gs.flags)
    assert first.code == 0, first.stderr
    made = make(if_exists="resume")
    left = [info.path for info in files.list_folder(output) if "_run-" in info.path]
    assert len(left) == 1
    assert made.do_fn("ReadUnits")._finished_path == left[0]
    (publication,) = made.do_fn("Publish/Create/FlatMap").process(None)
    assert os.path.basename(left[0]).encode() in publication


@pytest.mark.engines
def test_without_a_bound_of_workers_a_line_warns(gs, job, monkeypatch, tmp_path):
    flags = {
        "model": f"{gs.uri}/model",
        "output": f"{gs.uri}/unbounded",
        "runner": "DataflowRunner",
        "project": "a-project",
        "region": "europe-west4",
        "temp_location": f"{gs.uri}/tmp",
        "sdk_container_image": IMAGE,
        "dry_run": True,
        **gs.flags,
    }
    assert "--max_num_workers is not given" in job(f"{gs.uri}/in/*", **flags).stderr
    monkeypatch.setattr(dataflow, "_SETUP_FILE", tmp_path / "setup.py")
    bounded = job(f"{gs.uri}/in/*", max_num_workers=3, **flags)
    assert "workers are not sent this code" in bounded.stderr
    assert bounded.code == 0, bounded.stderr
    assert "--max_num_workers" not in bounded.stderr
    other = job(f"{gs.uri}/in/*", engine="openvino", **flags)
    assert "--engine openvino: every worker needs it" in other.stderr


def test_a_gpu_on_another_runner_is_refused(job, tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(40, 30))
    ran = job(tmp_path / "a.jpg", gpu="nvidia-l4")
    assert ran.code == 2
    assert "--gpu nvidia-l4: asks Dataflow for one" in ran.stderr
