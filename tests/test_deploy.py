"""The images and the Flex Template: versions that agree, and files that hold what they name.

No image was built here: there is no Docker daemon.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import exports
import pytest
from apache_beam.io.gcp import gcsio
from pictures import jpeg
from sdists import bare_environment, built_sdist
from test_house import pins

import pipeline
from formats.webdataset import IMAGE_EXTENSIONS
from models.loading import default_batch_size
from pipeline import options, plan
from pipeline.beam_flags import BEAM_FLAGS

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
DAG = (ROOT / "dags" / "image_features.py").read_text()
RUNBOOK = (ROOT / "deploy" / "README.md").read_text()


def arguments(text: str) -> dict[str, str]:
    """The ARGs of a Dockerfile that have a value."""
    return dict(re.findall(r"^ARG (\w+)=(\S+)$", text, re.M))


def stage(name: str) -> str:
    """The instructions of a stage of the Dockerfile, without those it builds on."""
    return re.split(r"^FROM ", DOCKERFILE.split(f" AS {name}\n", 1)[1], maxsplit=1, flags=re.M)[0]


def environment(name: str) -> dict[str, str]:
    """The variables that a stage sets."""
    joined = stage(name).replace("\\\n", " ")
    settings = " ".join(re.findall(r"^ENV (.*)$", joined, re.M))
    return dict(re.findall(r"(\w+)=(\S+)", settings))


def disagreements(dockerfile: str, lock: dict[str, set[str]], runbook: str) -> list[str]:
    """Where the versions of image, lock and runbook differ."""
    given = arguments(dockerfile)
    wrong = []
    beams = {given["BEAM_VERSION"], *lock["apache-beam"], importlib.metadata.version("apache-beam")}
    if len(beams) > 1:
        wrong.append(f"Beam of image, lock and launcher: {beams}")
    if not "3.11" <= given["PYTHON_VERSION"] <= "3.13":
        wrong.append(f"Python {given['PYTHON_VERSION']}")
    pythons = re.findall(r"/python(\d)(\d+)-template-launcher-base", dockerfile)
    pythons = {given["PYTHON_VERSION"], *map(".".join, pythons)}
    pythons |= set(re.findall(r"PYTHON_VERSION`, ([\d.]+\d)", runbook))
    if len(pythons) > 1:
        wrong.append(f"Python of image, template's launcher and runbook: {pythons}")
    told = re.search(r"PYTHON_VERSION=([\d.]+\d)`, or ([\d.]+\d)", runbook)
    launcher = f"{sys.version_info.major}.{sys.version_info.minor}"
    if launcher not in {given["PYTHON_VERSION"], *(told.groups() if told else ())}:
        wrong.append(f"Python {launcher} launches, and the runbook tells of no image for it")
    tags = {
        *re.findall(r"IMAGE:([\d.]+)-", dockerfile),
        *re.findall(r"\bVERSION=([\d.]+)", runbook),
        *re.findall(r"worker:([\d.]+)-", DAG),
    }
    if tags != {pipeline.__version__}:
        wrong.append(f"tags {tags}")
    return wrong


def test_launcher_image_and_lock_agree():
    assert disagreements(DOCKERFILE, pins("runtime.txt"), RUNBOOK) == []


@pytest.mark.parametrize(
    "change",
    [
        ("BEAM_VERSION=2.77.0", "BEAM_VERSION=2.76.0"),
        ("PYTHON_VERSION=3.11", "PYTHON_VERSION=3.10"),
        ("PYTHON_VERSION=3.11", "PYTHON_VERSION=3.12"),
        ("python311-template", "python312-template"),
        (f"IMAGE:{pipeline.__version__}-gpu", "IMAGE:0.0.9-gpu"),
    ],
)
def test_a_version_that_differs_is_seen(change):
    assert change[0] in DOCKERFILE
    assert disagreements(DOCKERFILE.replace(*change), pins("runtime.txt"), RUNBOOK)


def test_the_launching_python_is_looked_at(monkeypatch):
    monkeypatch.setattr(sys, "version_info", SimpleNamespace(major=3, minor=14))
    assert disagreements(DOCKERFILE, pins("runtime.txt"), RUNBOOK)


def test_the_installed_beam_is_looked_at(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.76.0")
    assert disagreements(DOCKERFILE, pins("runtime.txt"), RUNBOOK)


def test_the_gpu_lock_is_the_runtime_lock_and_cuda():
    runtime, gpu = pins("runtime.txt"), pins("gpu.txt")
    both = runtime.keys() & gpu.keys()
    assert {name: gpu[name] for name in both} == {name: runtime[name] for name in both}
    more = gpu.keys() - runtime.keys()
    assert more
    assert all(re.fullmatch(r"nvidia-\w+(-\w+)?-cu12", name) for name in more)
    text = (ROOT / "requirements" / "gpu.txt").read_text()
    assert "://" not in text
    assert text.count("--hash=sha256:") >= len(gpu)


def test_cuda_is_the_one_that_tensorflow_was_built_for():
    import tensorflow as tf

    built = tf.sysconfig.get_build_info()
    gpu = pins("gpu.txt")
    (runtime,), (cudnn,) = gpu["nvidia-cuda-runtime-cu12"], gpu["nvidia-cudnn-cu12"]
    major, minor = map(int, built["cuda_version"].split(".")[:2])
    assert (major, minor) <= tuple(map(int, runtime.split(".")[:2])) < (major + 1, 0)
    assert cudnn.split(".")[0] == str(built["cudnn_version"]).split(".")[0]


def test_workers_start_by_beams_boot_and_the_driver_is_found():
    assert 'ENTRYPOINT ["/opt/apache/beam/boot"]' in stage("cpu")
    assert "COPY --from=beam /opt/apache/beam /opt/apache/beam" in stage("cpu")
    assert "FROM cpu AS gpu\n" in DOCKERFILE
    gpu = environment("gpu")
    assert gpu["TF_FORCE_GPU_ALLOW_GROWTH"] == "true"
    assert gpu["LD_LIBRARY_PATH"] == "/usr/local/nvidia/lib64"
    assert "pip install" not in DOCKERFILE.replace("--no-deps --require-hashes", "").replace(
        "RUN pip install --no-cache-dir  -r", ""
    )


def test_workers_install_the_staged_code_without_an_index(tmp_path):
    """As Beam's boot does, with the variables of the image and the setuptools of the lock."""
    archive = built_sdist(tmp_path)
    python, _ = bare_environment(tmp_path / "worker")
    variables = {**os.environ, **environment("cpu"), "PIP_NO_INDEX": "1"}
    variables.pop("PYTHONPATH", None)
    install = [python, "-m", "pip", "install", str(archive)]
    subprocess.run(install, env=variables, capture_output=True, check=True)
    where = [python, "-c", "import transforms.inference as t; print(t.__file__)"]
    told = subprocess.run(where, cwd=tmp_path, capture_output=True, text=True)
    assert "apache_beam" in told.stderr  # found, and wants what the lock holds
    variables["PIP_NO_BUILD_ISOLATION"] = "1"
    other = subprocess.run(install, env=variables, capture_output=True)
    assert other.returncode != 0  # with isolation, pip looks for a setuptools of its own


def test_what_the_images_copy_is_there_and_not_ignored():
    kept = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.M))
    for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.M):
        *sources, _ = line.split()
        for source in sources:
            for lock in ("runtime", "openvino"):
                assert (ROOT / source.replace("${LOCK}", lock)).exists(), source
            assert source.split("/")[0] in kept, source
    for package in ("pipeline", "transforms", "formats", "models", "storage"):
        assert f"COPY {package} {package}" in stage("launcher")


def launched(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """The launcher's entry in a folder laid out as the image's, without this project installed."""
    template, library = folder / "template", folder / "library"
    for package in ("pipeline", "transforms", "formats", "models", "storage"):
        shutil.copytree(ROOT / package, template / package)
    shutil.copy(ROOT / "deploy" / "launch.py", template)
    library.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "image_features" not in path.name:
            (library / path.name).symlink_to(path)
    return subprocess.run(
        [sys.executable, "-S", template / "launch.py", *flags],
        capture_output=True,
        text=True,
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(library)},
    )


def test_the_launchers_entry_runs_the_job(tmp_path):
    assert environment("launcher")["FLEX_TEMPLATE_PYTHON_PY_FILE"] == "/template/launch.py"
    assert environment("launcher")["FLEX_TEMPLATE_PYTHON_SETUP_FILE"] == "/template/setup.py"
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(jpeg(40, 30))
    model = exports.exported("saved_model", "classification")
    where = (f"--input={tmp_path}/in", f"--model={model}", f"--output={tmp_path}/out")
    told = launched(tmp_path, *where, "--dry_run=true", "--allow_empty=false")
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout.splitlines()[-1])["status"] == "dry_run"


def test_a_wrong_request_to_the_launchers_entry_is_one_line(tmp_path):
    told = launched(tmp_path, "--input=/i", "--model=m", "--output=/o", "--nope")
    assert told.returncode == 2
    assert told.stderr.startswith("error: --nope: no such flag")


def test_the_launchers_entry_takes_switches_as_a_template_gives_them():
    words = runpy.run_path(str(ROOT / "deploy" / "launch.py"))["words"]
    given = ["--retry_failures=true", "--allow_empty=false", "--fit=pad", "--if_exists=true"]
    assert words(given) == ["--retry_failures", "--fit=pad", "--if_exists=true"]


# Knobs that the template leaves out, each with the reason.
NOT_IN_THE_TEMPLATE = {
    "allow_unsafe_ops": "who starts a template need not be who answers for what a model reaches",
    "engine": "the launcher's image holds no openvino, and tensorflow is the default",
    "sink": "a template is for rows; null is to see what bounds a run",
    "stop_after": "goes with sink null",
    "quiet": "the launcher's log is the only word of a template's start",
    "dry_run": "a template's start is told as failed where it submits no job",
}


def test_the_template_declares_every_knob_or_there_is_a_reason():
    """A template refuses what it does not declare."""
    metadata = json.loads((ROOT / "deploy" / "metadata.json").read_text())
    declared = {parameter["name"] for parameter in metadata["parameters"]}
    ours = {field.name for field in dataclasses.fields(options.Options)}
    assert declared & ours == ours - NOT_IN_THE_TEMPLATE.keys()
    assert NOT_IN_THE_TEMPLATE.keys() <= ours
    sections = re.findall(r"^## [89]\..*?(?=^## )", RUNBOOK, re.M | re.S)
    advised = set(re.findall(r"--(\w+)", "".join(sections)))
    by_the_service = {"region", "worker_zone"}  # flags of gcloud itself
    assert advised & (ours | BEAM_FLAGS.keys()) <= declared | by_the_service


def test_the_templates_parameters_are_flags():
    metadata = json.loads((ROOT / "deploy" / "metadata.json").read_text())
    ours = {field.name: field for field in dataclasses.fields(options.Options)}
    names = [parameter["name"] for parameter in metadata["parameters"]]
    assert len(set(names)) == len(names)
    required = {p["name"] for p in metadata["parameters"] if not p["isOptional"]}
    assert required == {"input", "model", "output", "sdk_container_image"}
    for parameter in metadata["parameters"]:
        name = parameter["name"]
        assert name in ours or BEAM_FLAGS[name]
        assert {"name", "label", "helpText", "isOptional"} <= parameter.keys()
        if name in ours and ours[name].default is False:  # a switch, as launch.py takes them
            assert parameter["regexes"] == ["^(true|false)$"]
        elif name in ours and ours[name].default not in (None, "", dataclasses.MISSING):
            for pattern in parameter.get("regexes", ()):
                assert re.fullmatch(pattern, str(ours[name].default)), name
        for pattern in parameter.get("regexes", ()):
            for choice in ours[name].metadata.get("choices", ()) if name in ours else ():
                assert re.fullmatch(pattern, choice), (name, choice)


def test_the_template_tells_the_default_batch_sizes_of_a_gpu():
    metadata = json.loads((ROOT / "deploy" / "metadata.json").read_text())
    (told,) = (p["helpText"] for p in metadata["parameters"] if p["name"] == "batch_size")
    for size in (224, 331):
        assert str(default_batch_size(size, "float32", on_gpu=True)) in told


def test_the_runbook_names_flags_that_there_are():
    ours = {field.name for field in dataclasses.fields(options.Options)}
    commands = re.findall(r"python -m pipeline\.extract((?:.*\\\n)*.*)", RUNBOOK)
    assert commands
    for command in commands:
        flags = re.findall(r"--(\w+)", command)
        assert [flag for flag in flags if flag not in ours and flag not in BEAM_FLAGS] == []


def test_the_runbook_tells_what_the_plan_does():
    (command,) = re.findall(r"python -m pipeline\.plan((?:.*\\\n)+.*)", RUNBOOK)
    words = command.replace("\\", "").split()
    told = {}
    for workers in ("1", "4"):
        told[workers] = plan.reckon(plan.parser().parse_args([*words[:-1], workers]))
    one, four = told.values()
    text = " ".join(RUNBOOK.split())
    assert (
        f"reckons {one['hours']:.2f} h, {one['gpu_hours']:.2f} GPU hours and "
        f"{one['usd']['run']:.2f} USD, and {one['usd_a_month']:.2f} USD a month to keep the "
        f"output; with `--workers 4` "
        f"{four['hours']:.2f} h and {four['usd']['run']:.2f} USD" in text
    )
    assert f"The plan of §6 needs one worker for {one['hours']:.2f} h" in text
    assert f"reckons {one['vcpus_to_a_gpu']} where photographs are small" in text
    most = set(re.findall(r"--max[_-](?:num_)?workers[ `]+(\d+)", RUNBOOK))
    assert most == {"4"}
    assert "| 4 |" in RUNBOOK.split("`GPUS_ALL_REGIONS`")[1].splitlines()[0]


def test_the_runbook_makes_the_tars_that_it_reads(tmp_path, job):
    endings = [*IMAGE_EXTENSIONS, "JPG"]
    for number, ending in enumerate([*endings, "txt", "xjpg"]):
        path = tmp_path / "photos" / f"day {number % 2}" / f"{number}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(40 + number, 30))  # what a picture is, its bytes tell
    (block,) = [b for b in re.findall(r"```bash\n(.*?)```", RUNBOOK, re.S) if "tar --create" in b]
    script = block.replace("5000", "3").partition("gcloud")[0]
    subprocess.run(["bash", "-euc", script], cwd=tmp_path, check=True)
    assert sorted(path.name for path in (tmp_path / "tars").iterdir()) == [
        f"photos-{number:05}.tar" for number in range(4)
    ]
    ran = job(tmp_path / "tars" / "*.tar", sink="null", stop_after="decode", id_key="__key__")
    assert ran.code == 0, ran.stderr
    assert (ran.line["passed"], ran.line["failures"]) == (len(endings), 0)


def test_the_runbook_tells_who_may_launch_and_what_beam_warns_of():
    (binding,) = re.findall(r"gcloud iam service-accounts add-iam(?:.*\\\n)*.*", RUNBOOK)
    assert "$SERVICE_ACCOUNT" in binding
    assert "roles/iam.serviceAccountUser" in binding
    (warning,) = re.findall(r"`(Unexpected[^`]*)` is Beam's warning", RUNBOOK)
    assert " ".join(warning.split()) in inspect.getsource(gcsio.GcsIO.is_soft_delete_enabled)
    assert "`storage.buckets.get`" in RUNBOOK


def test_growing_gpu_memory_and_true_float32_are_asked_for_before_anything_touches_it():
    """On a machine that seems to have a GPU: there is none here."""
    code = (
        "import pathlib, tensorflow as tf\n"
        "real = pathlib.Path.exists\n"
        "pathlib.Path.exists = lambda p: str(p) == '/dev/nvidiactl' or real(p)\n"
        "tf.config.list_physical_devices = lambda kind=None: ['gpu 0', 'gpu 1']\n"
        "def grow(device, on):\n"
        "    from tensorflow.python.eager import context\n"
        "    print(device, on, context.context()._initialized)\n"
        "tf.config.experimental.set_memory_growth = grow\n"
        "import models.runtime as runtime\n"
        "print(runtime.GPUS)\n"
        "print(tf.config.experimental.tensor_float_32_execution_enabled())\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert told.stdout.splitlines() == [
        "gpu 0 True False",
        "gpu 1 True False",
        "['gpu 0', 'gpu 1']",
        "False",
    ]


def test_float32_is_true_where_the_caller_has_used_tensorflow_already():
    code = (
        "import tensorflow as tf\n"
        "tf.zeros([1]).numpy()\n"
        "import models.runtime\n"
        "print(tf.config.experimental.tensor_float_32_execution_enabled())\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert told.stdout == "False\n"
