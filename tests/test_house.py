"""The laws of the house, held by tests, each of which is shown to be able to fail."""

import ast
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from sdists import bare_environment, built_sdist

ROOT = Path(__file__).parents[1]
# A room may import those below it. formats and models do not know each other.
MAY_IMPORT = {
    "pipeline": {"transforms", "formats", "models", "storage"},
    "transforms": {"formats", "models", "storage"},
    "formats": {"storage"},
    "models": {"storage"},
    "storage": set(),
}
SHARED_STEPS = {"beam_ml", "lookahead", "metrics", "reuse"}  # what every step may use
BEAM_AT_THE_TOP = {"pipeline", "transforms"}
TENSORFLOW = {"tensorflow", "tensorflow_hub", "tf_keras", "keras"}
EXAMPLES = "formats/example.py"  # where tf.Example is parsed


def imports(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """Every imported module and whether it is imported when the file is."""
    inside = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node not in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node not in inside
            yield from ((f"{node.module}.{a.name}", node not in inside) for a in node.names)


def broken_floors(files: dict[str, str]) -> list[str]:
    """What of `files` (path to text) imports upwards, across, or a library of another floor."""
    broken = []
    for path, text in files.items():
        room, *_ = path.partition("/")
        for module, at_top in imports(ast.parse(text)):
            top, *rest = module.split(".")
            if top in MAY_IMPORT and top != room and top not in MAY_IMPORT[room]:
                broken.append(f"{path} imports {module}")
            if room == top == "transforms" and rest and rest[0] not in SHARED_STEPS:
                broken.append(f"{path} imports the step {module}")
            beam_is_home = room in BEAM_AT_THE_TOP or (room == "storage" and not at_top)
            if top == "apache_beam" and not beam_is_home:
                broken.append(f"{path} imports Beam")
            if top in TENSORFLOW and room != "models" and path != EXAMPLES:
                broken.append(f"{path} imports TensorFlow")
    return broken


def undocumented(files: dict[str, str]) -> list[str]:
    """Public functions, classes and modules of `files` without a docstring or annotations."""
    missing = []
    for path, text in files.items():
        tree = ast.parse(text)
        if not ast.get_docstring(tree):
            missing.append(path)
        for node in ast.walk(tree):
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"
            if public and node in tree.body and not ast.get_docstring(node):
                missing.append(f"{path}:{node.name}")
            if public and isinstance(node, ast.FunctionDef) and node.returns is None:
                missing.append(f"{path}:{node.name} returns?")
    return missing


def sources() -> dict[str, str]:
    return {
        str(path.relative_to(ROOT)): path.read_text()
        for room in MAY_IMPORT
        for path in sorted((ROOT / room).rglob("*.py"))
    }


def test_imports_only_go_down():
    assert broken_floors(sources()) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("formats/a.py", "import models.loading"),
        ("formats/a.py", "from transforms import decode"),
        ("formats/a.py", "import apache_beam as beam"),
        ("formats/a.py", "def f():\n    import tensorflow as tf"),
        ("models/a.py", "from formats.records import Failure"),
        ("storage/a.py", "import apache_beam"),
        ("storage/a.py", "from pipeline.options import Options"),
        ("transforms/a.py", "from transforms.decode import DecodeImages"),
        ("transforms/a.py", "import tensorflow"),
        ("transforms/a.py", "from pipeline import options"),
    ],
)
def test_a_broken_floor_is_seen(path, text):
    assert broken_floors({path: text})


def test_everything_public_is_documented():
    assert undocumented(sources()) == []


def test_a_missing_docstring_is_seen():
    assert undocumented({"a.py": '"""A."""\ndef f() -> int: ...'}) == ["a.py:f"]
    assert undocumented({"a.py": '"""A."""\ndef f():\n    """F."""'}) == ["a.py:f returns?"]
    assert undocumented({"a.py": "x = 1"}) == ["a.py"]


UNPICKLES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "yaml"}
RUNS_TEXT = {"eval", "exec", "__import__"}


def trusting(files: dict[str, str]) -> list[str]:
    """What of `files` could run code that stands in data."""
    found = []
    for path, text in files.items():
        tree = ast.parse(text)
        modules = {module.partition(".")[0] for module, _ in imports(tree)}
        found += [f"{path} imports {module}" for module in modules & UNPICKLES]
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id in RUNS_TEXT:
                found.append(f"{path} calls {node.id}")
            if (
                isinstance(node, ast.keyword)
                and node.arg == "allow_pickle"
                and not (isinstance(node.value, ast.Constant) and node.value.value is False)
            ):
                found.append(f"{path} allows pickles")
    return found


def test_no_data_is_unpickled_or_run():
    assert trusting(sources()) == []


@pytest.mark.parametrize(
    "text", ["import pickle", "from dill import loads", "eval(x)", "np.load(x, allow_pickle=True)"]
)
def test_trust_in_data_is_seen(text):
    assert trusting({"formats/a.py": text})


def test_every_room_and_file_is_in_the_architecture():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    files = [path for path in sources() if not path.endswith("__init__.py")]
    files += map(str, ROOT.glob("dags/*.py"))
    assert [path for path in files if not re.search(rf"\b{Path(path).name}\b", text)] == []


@pytest.mark.parametrize(
    "module",
    [
        "pipeline.options",
        "pipeline.extract",
        "pipeline.models",
        "pipeline.plan",
        "pipeline.report",
        "pipeline.verify",
        "models.catalog",
        "models.handles",
    ],
)
def test_quick_modules_pull_in_no_heavy_library(module):
    heavy = sorted(TENSORFLOW | {"apache_beam", "pyarrow", "numpy", "PIL"})
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert told.stdout.strip() == "[]"


def test_the_sdist_installs_alone_and_answers_help(tmp_path):
    """What Beam's --setup_file ships: no dependency asked for, nothing of it missing."""
    archive = built_sdist(tmp_path)
    with tarfile.open(archive) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    compiled = ("formats/_resampling", "models/_separable", "models/_separable_avx512")
    assert {*sources(), *(f"{name}.c" for name in compiled)} <= names
    assert not any(name.startswith(("tests/", "out/")) for name in names)
    python, library = bare_environment(tmp_path / "empty")
    quiet = {"capture_output": True, "check": True, "text": True}
    pip = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, str(archive)], cwd=tmp_path, **quiet)
    for command in ("extract", "models", "plan", "report", "verify"):
        told = subprocess.run(
            [python, "-m", f"pipeline.{command}", "--help"], cwd=tmp_path, **quiet
        )
        assert "usage:" in told.stdout
    metadata = next(library.glob("image_features-*.dist-info")) / "METADATA"
    asked = re.findall(r"^Requires-Dist: .*", metadata.read_text(), re.M)
    assert [line for line in asked if "extra ==" not in line] == []


@pytest.mark.parametrize("compiler", [None, "/nowhere/cc"])
def test_without_a_compiler_it_installs_too(tmp_path, compiler):
    """The worker's image may have none; with one, all three sources in C are compiled."""
    archive = built_sdist(tmp_path)
    python, library = bare_environment(tmp_path / "empty")
    pip = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    environment = {**os.environ, **({"CC": compiler} if compiler else {})}
    subprocess.run([*pip, str(archive)], cwd=tmp_path, env=environment, check=True)
    assert (library / "formats" / "resampling.py").exists()
    built = [
        *(library / "formats").glob("_resampling*.so"),
        *(library / "models").glob("_separable*.so"),
    ]
    here = platform.machine() == "x86_64" and shutil.which(os.environ.get("CC", "gcc")) is not None
    headers = Path(sysconfig.get_paths()["include"], "Python.h").exists()
    assert len(built) == 3 * (here and headers and not compiler)


def pins(name: str) -> dict[str, set[str]]:
    """Package to the versions that a lock allows (by platform)."""
    found: dict[str, set[str]] = {}
    for package, version in re.findall(
        r"^([\w.-]+)==(\S+)", (ROOT / "requirements" / name).read_text(), re.M
    ):
        found.setdefault(package, set()).add(version)
    return found


def test_the_locks_agree_and_hold_no_address():
    runtime = pins("runtime.txt")
    for name in ("runtime.txt", "openvino.txt", "test.txt", "bench.txt"):
        assert {package: pins(name).get(package) for package in runtime} == runtime
    for name in ("runtime.txt", "openvino.txt", "test.txt", "bench.txt", "airflow.txt"):
        text = (ROOT / "requirements" / name).read_text()
        assert "://" not in text
        assert "index" not in re.sub(r"#.*", "", text)
        assert text.count("--hash=sha256:") >= len(pins(name))


def test_the_lock_holds_the_pillow_that_beams_pin_refuses():
    (version,) = pins("runtime.txt")["pillow"]
    assert int(version.split(".")[0]) >= 13
    assert "pillow>=13" not in (ROOT / "pyproject.toml").read_text().replace(" ", "")
