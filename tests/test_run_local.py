"""run_local.sh: the first thing that a newcomer runs, from wherever they stand."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import exports
import pytest
from pictures import jpeg

from pipeline import demo, verify

ROOT = Path(__file__).parents[1]
slow = pytest.mark.engines  # no engine, but a minute: the network is built in full size


def run(command, folder):
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ended = subprocess.run(
        [str(word) for word in command],
        capture_output=True, text=True, cwd=folder, env=env, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1]), ended.stderr


@slow
def test_it_works_in_a_folder_with_names_like_ours(tmp_path):
    for name in ("models", "formats", "storage", "transforms"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not ours')")
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "__init__.py").touch()
    line, told = run(
        [ROOT / "run_local.sh", "--output", f"{tmp_path}/out/", "--limit", 3], tmp_path
    )
    assert "SEEDED RANDOM weights" in told
    for result, name in ((line, "tfrecord"), (line["also"], "files")):
        assert (result["status"], result["images"]) == ("complete", result["features"])
        assert result["features"] >= 3
        assert result["output"] == f"{tmp_path}/out/{name}"
        assert verify.main([result["output"]]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["files", "tfrecord"]


@slow
def test_every_call_has_an_output_of_its_own_and_pictures_are_written_once(tmp_path):
    command = [sys.executable, "-P", "-m", "pipeline.demo", "--root", tmp_path]
    first, _ = run(command, tmp_path)
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / ".photographs").rglob("*")}
    second, _ = run(command, tmp_path)
    assert stamps == {
        p: p.stat().st_mtime_ns for p in (tmp_path / "out" / ".photographs").rglob("*")
    }
    for line in (first, second):
        assert line["features"] == line["also"]["features"] == len(demo.PHOTOGRAPHS)
        assert Path(line["output"]).parents[1] == tmp_path / "out"
    assert first["output"] != second["output"]


def test_a_folder_that_cannot_be_written_is_one_line_and_exit_2(tmp_path, capsys):
    (tmp_path / "root").touch()
    assert demo.main(["--root", str(tmp_path / "root")]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: --root {tmp_path}/root/out: cannot be written")
    assert told.count("\n") == 1


def test_what_a_killed_call_left_is_in_nobodys_way(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "photographs", lambda: [("a.png", b"one"), ("b.png", b"two")])
    folder = tmp_path / ".photographs"
    (tmp_path / f".photographs.{os.getpid()}" / "tfrecord").mkdir(parents=True)
    for _ in range(2):
        records, pictures = demo.write_photographs(folder)
        assert sorted(path.read_bytes() for path in pictures.iterdir()) == [b"one", b"two"]
        assert len(list(records.iterdir())) == 2
    assert len(list(tmp_path.iterdir())) == 2


def test_a_line_that_nobody_reads_changes_nothing(tmp_path, monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(demo, "photographs", lambda: [(f"{n}.jpg", jpeg(40 + n)) for n in (0, 1)])
    monkeypatch.setattr(sys, "stdout", Gone())
    model = exports.exported("saved_model", "classification")
    assert demo.main(["--root", str(tmp_path), "--model", model]) == 0
