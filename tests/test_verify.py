"""python -m pipeline.verify: whatever is wrong with an output is found, and nothing else."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from test_dataset import publication

from formats import table
from formats.dataset import publish
from formats.parts import FAILURES, FEATURES, PartWriter, open_part
from formats.records import Failure, Features, ImageRef
from formats.table import TableSpec
from pipeline import verify
from storage import files, retries

ROOT = Path(__file__).parents[1]
WIDTH = 8


def features(count, start=0, vector=None, **columns):
    rng = np.random.default_rng(start)
    made = [rng.normal(size=WIDTH).astype(np.float32) for _ in range(count)]
    return [
        Features(
            ImageRef(f"/in/{start + n}.jpg", f"/in/{start + n}.jpg", None, n, columns),
            hashlib.sha256(b"%d" % n).hexdigest(),
            40,
            30,
            {"embedding": made[n] if vector is None else vector},
        )
        for n in range(count)
    ]


def failures(count, start=1000):
    return [
        Failure(f"/in/{start + n}.jpg", f"/in/{start + n}.jpg", None, "decode", "CorruptImage", "x")
        for n in range(count)
    ]


def spec(**changes):
    metadata = {"model_fingerprint": "f1", "run_id": "r1"}
    return TableSpec({"embedding": WIDTH}, metadata=metadata, **changes)


def write_part(output, kind, name, rows, made=None):
    made = made or spec()
    if kind == FEATURES:
        batch = table.features_table(rows, made, made.schema())
    else:
        batch = table.failures_table(rows, table.failure_schema(made.metadata))
    writer = PartWriter(str(output), kind, f"part-r1-{name}", batch.schema, "zstd")
    writer.write(batch)
    return writer.close()


def commit(output, *parts):
    described = {"options": {}, "model": {"fingerprint": "f1", "outputs": {"embedding": WIDTH}}}
    run = publication(output, "r1", max_failure_rate=1, described=described)
    assert publish(run, parts, 0, dict)["status"] == "complete"
    return Path(output)


@pytest.fixture
def output(tmp_path):
    """A whole output: 40 features in two files, 5 failures."""
    folder = tmp_path / "out"
    return commit(
        folder,
        write_part(folder, FEATURES, "a", features(30)),
        write_part(folder, FEATURES, "b", features(10, start=100)),
        write_part(folder, FAILURES, "c", failures(5)),
    )


@pytest.fixture
def check(capsys):
    """Calls `main`: exit code, JSON summary and the problems, a line each."""

    def call(output):
        code = verify.main([str(output)])
        out, err = capsys.readouterr()
        return code, json.loads(out.splitlines()[-1]) if out else None, err.splitlines()

    return call


def change(output, edit):
    """Edit the manifest of `output`."""
    path = output / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def vouch(output):
    """Make the manifest tell size and digest of the files as they are, whatever they hold."""

    def edit(manifest):
        for entry in manifest["files"]:
            data = (output / entry["path"]).read_bytes()
            entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    change(output, edit)


def data_files(output):
    return sorted(output.rglob("*.parquet"))


# ---------------------------------------------------------------- what is whole


def test_a_whole_output(output, check):
    code, summary, problems = check(output)
    assert (code, problems) == (0, [])
    assert summary == {
        "status": "ok",
        "output": str(output),
        "files": 3,
        "images": 45,
        "features": 40,
        "failures": 5,
        "problems": 0,
    }


@pytest.mark.parametrize(
    "made",
    [
        spec(vector_type="fixed_size_list"),
        spec(dtype="float16"),
        spec(label=pa.string(), columns={"stage": pa.string(), "tags": pa.list_(pa.string())}),
    ],
)
def test_every_kind_of_column_is_understood(tmp_path, check, made):
    rows = features(3)
    if made.columns:
        for row in rows:
            object.__setattr__(row.ref, "label", "cat")
            object.__setattr__(row.ref, "columns", {"stage": "s", "tags": ["a"]})
    commit(tmp_path, write_part(tmp_path, FEATURES, "a", rows, made))
    assert check(tmp_path)[0] == 0


def test_an_empty_output_and_files_that_no_manifest_names(tmp_path, check):
    commit(tmp_path)
    (tmp_path / "features").mkdir()
    (tmp_path / "features" / "part-stray.parquet").write_bytes(b"not data")
    assert check(tmp_path)[0] == 0


def test_the_output_of_a_true_run_is_whole(tmp_path, job, check):
    from pictures import jpeg

    folder = tmp_path / "in"
    folder.mkdir()
    for n in range(3):
        (folder / f"{n}.jpg").write_bytes(jpeg(40 + n))
    (folder / "bad.jpg").write_bytes(b"nothing")
    ran = job(folder, max_failure_rate=1, top_k=2)
    code, summary, problems = check(ran.output)
    assert (code, problems) == (0, [])
    assert (summary["features"], summary["failures"]) == (3, 1)


# ---------------------------------------------------------------- what is not


def test_one_flipped_bit_is_found_400_times_of_400(output, check, tmp_path):
    """Copies with one bit flipped anywhere in any data file."""
    rng = np.random.default_rng(20261120)
    names = [path.relative_to(output) for path in data_files(output)]
    found = 0
    for n in range(400):
        name = names[n % len(names)]
        data = bytearray((output / name).read_bytes())
        at = int(rng.integers(len(data)))
        data[at] ^= 1 << int(rng.integers(8))
        copy = tmp_path / "copy"
        shutil.copytree(output, copy)
        (copy / name).write_bytes(data)
        code, summary, problems = check(copy)
        found += code == 1 and summary["status"] == "damaged" and str(name) in problems[0]
        shutil.rmtree(copy)
    assert found == 400


def test_a_flipped_bit_in_a_page_is_found_by_the_page_itself(output, check):
    """Even where the manifest vouches for the file as it is."""
    (path,) = output.glob("features/*-a.parquet")
    with open_part(str(output), str(path.relative_to(output))) as part:
        columns = [part.metadata.row_group(0).column(n) for n in range(part.metadata.num_columns)]
    data = path.read_bytes()
    for column in columns:
        start = column.dictionary_page_offset or column.data_page_offset
        flipped = bytearray(data)
        flipped[start + column.total_compressed_size - 2] ^= 4
        path.write_bytes(flipped)
        vouch(output)
        code, _, problems = check(output)
        assert code == 1, column.path_in_schema
        assert "cannot be read" in problems[0]


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes, the manifest tells of"),
        (lambda path: path.write_bytes(b""), "0 bytes, the manifest tells of"),
    ],
)
def test_a_file_that_is_gone_or_cut(output, check, harm, told):
    for path in data_files(output):
        data = path.read_bytes()
        harm(path)
        code, summary, problems = check(output)
        assert (code, summary["status"]) == (1, "damaged")
        assert problems[0].startswith(str(path.relative_to(output)))
        assert told in problems[0]
        path.write_bytes(data)
    assert check(output)[0] == 0


@pytest.mark.parametrize(
    ("vector", "told"),
    [
        (np.array([1, 2, np.nan, *[0] * 5], np.float32), "row 0: embedding is no finite vector"),
        (np.array([-np.inf, *[0] * 7], np.float32), "row 0: embedding is no finite vector"),
        (np.ones(WIDTH - 1, np.float32), "row 0: embedding is no finite vector of width 8"),
        (np.ones(WIDTH + 1, np.float32), "row 0: embedding is no finite vector of width 8"),
    ],
)
def test_vectors_that_are_none(tmp_path, check, vector, told):
    commit(
        tmp_path,
        write_part(tmp_path, FEATURES, "a", features(1, vector=vector)),
        write_part(tmp_path, FEATURES, "b", features(5, start=9)),
    )
    code, _, problems = check(tmp_path)
    assert code == 1
    assert len(problems) == 1
    assert told in problems[0]


def test_of_rows_in_a_batch_the_bad_one_is_named(tmp_path, check):
    rows = features(7)
    rows[4].vectors["embedding"][3] = np.inf
    commit(tmp_path, write_part(tmp_path, FEATURES, "a", rows))
    assert check(tmp_path)[2] == [
        "features/part-r1-a.parquet: row 4: embedding is no finite vector of width 8"
    ]


@pytest.mark.parametrize("kind", [FEATURES, FAILURES])
def test_a_key_that_stands_twice(output, check, kind):
    """In two files of one kind, or once as a feature and once as a failure."""
    rows = features(1, start=100) if kind == FEATURES else failures(1, start=100)
    part = write_part(output, kind, "twice", rows)

    def edit(manifest):
        manifest["files"].append(part.listed())
        manifest["counts"]["images"] += 1
        manifest["counts"][kind] += 1
        if kind == FAILURES:
            manifest["failures_by"]["decode/CorruptImage"] += 1

    change(output, edit)
    code, _, problems = check(output)
    assert code == 1
    assert sorted(problems) == sorted(
        f"{path}: row 0: its key stands more than once"
        for path in ("features/part-r1-b.parquet", part.path)
    )


def test_many_problems_of_a_kind_are_told_in_few_lines(tmp_path, check):
    rows = features(500, vector=np.full(WIDTH, np.nan, np.float32))
    commit(tmp_path, write_part(tmp_path, FEATURES, "a", rows))
    _, summary, problems = check(tmp_path)
    assert len(problems) == summary["problems"] == 21
    assert "480 more rows up to 499" in problems[-1]


def set_rows(manifest):
    manifest["files"][0]["rows"] += 1


def set_count(manifest):
    manifest["counts"]["features"] -= 1


def set_images(manifest):
    manifest["counts"]["images"] = 44


def set_reason(manifest):
    manifest["failures_by"] = {"read/OSError": 5}


def set_width(manifest):
    manifest["model"]["outputs"]["embedding"] = 9


def set_model(manifest):
    manifest["model"]["fingerprint"] = "f2"


def drop_file(manifest):
    del manifest["files"][0]


def same_file_twice(manifest):
    manifest["files"].append(manifest["files"][0])


def leave_the_output(manifest):
    manifest["files"][0]["path"] = "features/../../secret.parquet"


def lose_a_field(manifest):
    del manifest["counts"]


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (set_rows, "5 rows, the manifest tells of 6"),
        (set_count, "counts.features is 39, the files hold 40"),
        (set_images, "counts.images is 44, the files hold 45"),
        (set_reason, "failures_by has 0 of decode/CorruptImage, the files hold 5"),
        (set_width, "embedding is no finite vector of width 9"),
        (set_model, "rows of the model f1"),
        (drop_file, "counts.failures is 5, the files hold 0"),
        (same_file_twice, "twice"),
        (leave_the_output, "no data file of an output"),
        (lose_a_field, "its fields are not those of a manifest"),
        (lambda m: m.pop("run"), "its fields are not those of a manifest (KeyError: 'run')"),
        (lambda m: m["files"][0].update(rows=float("inf")), "(TypeError: rows is no int)"),
        (lambda m: m["counts"].update(images=float("inf")), "(OverflowError"),
        (lambda m: m.update(options=[1]), "(AttributeError"),
        (lambda m: m.update(options={"outputs": "embedding"}), "is no list of the model's vectors"),
        (lambda m: m["model"].update(outputs={}), "model.outputs names no vector"),
        (lambda m: m["files"][0].update(path="features/a\0.parquet"), "no data file of an output"),
    ],
)
def test_a_manifest_that_tells_something_else(output, check, edit, told):
    change(output, edit)
    code, summary, problems = check(output)
    assert (code, summary["status"]) == (1, "damaged")
    assert any(told in line for line in problems), problems


def test_files_of_two_schemas(tmp_path, check):
    commit(
        tmp_path,
        write_part(tmp_path, FEATURES, "a", features(2)),
        write_part(tmp_path, FEATURES, "b", features(2, start=9), spec(dtype="float16")),
    )
    code, _, problems = check(tmp_path)
    assert code == 1
    assert problems == [
        "features/part-r1-b.parquet: another schema than features/part-r1-a.parquet (embedding)"
    ]


def test_a_vector_that_the_run_was_to_write_and_no_file_has(tmp_path, check):
    commit(tmp_path, write_part(tmp_path, FEATURES, "a", features(2)))

    def two_outputs(manifest):
        manifest["model"]["outputs"]["logits"] = 3

    def asked_for_one(manifest):
        manifest["options"]["outputs"] = ["embedding"]

    change(tmp_path, two_outputs)
    code, _, problems = check(tmp_path)
    assert (code, len(problems)) == (1, 1)
    assert problems[0].endswith("has no logits, which the run was to write")
    change(tmp_path, asked_for_one)
    assert check(tmp_path)[0] == 0


# ---------------------------------------------------------------- what is no output


@pytest.mark.parametrize(
    ("there", "code", "status"),
    [
        ({}, 2, None),
        ({"a.jpg": "a picture"}, 1, "unreadable"),
        ({"manifest.json": '{"name": "a web app"}'}, 1, "unreadable"),
        ({"manifest.json": '{"format_version": 2}'}, 1, "unreadable"),
        ({"manifest.json": '{"format_version": "1"}'}, 1, "unreadable"),
        ({"manifest.json": "[]"}, 1, "unreadable"),
        ({"manifest.json": "no JSON"}, 1, "unreadable"),
        ({"manifest.json": "no JSON", "features/part-a.parquet": "x"}, 1, "damaged"),
    ],
)
def test_what_is_no_output_at_all(tmp_path, check, there, code, status):
    for name, text in there.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found, summary, problems = check(tmp_path)
    assert found == code
    assert (summary["status"] if summary else None) == status
    assert len(problems) == 1


def test_a_store_that_does_not_answer_is_asked_once(monkeypatch, capsys):
    asked = []

    def silent(path):
        asked.append(path)
        raise OSError(f"{path}: refused")

    monkeypatch.setattr(files, "occupied", silent)
    assert verify.main(["gs://bucket/out"]) == 2
    assert asked == ["gs://bucket/out"]
    assert "gs://bucket/out: refused" in capsys.readouterr().err


def test_a_read_that_fails_now_and_then_is_no_damage(output, check, monkeypatch):
    opened, failed = files.open_read, set()

    class Cut(io.BufferedReader):
        def read(self, count=-1):
            if self.name not in failed:
                failed.add(self.name)
                raise ConnectionError("cut")
            return super().read(count)

    def open_read(path):
        name = path.rpartition("/")[2]
        wanted = name.endswith(".parquet") or name == "manifest.json"
        return Cut(open(path, "rb", buffering=0)) if wanted else opened(path)

    monkeypatch.setattr(retries, "FIRST_WAIT", 0)
    monkeypatch.setattr(files, "open_read", open_read)
    assert check(output)[0] == 0
    assert len(failed) == 4


def test_a_misspelt_flag_is_a_wrong_request(output, capsys):
    assert verify.main([str(output), "--s3_endpoint"]) == 2
    assert "did you mean" in capsys.readouterr().err


def test_a_flag_of_beams_may_stand_before_the_output(output, capsys):
    secret = "a-planted-secret"
    flags = ["--s3_endpoint_url", "http://localhost:1", "--s3_secret_access_key", secret]
    assert verify.main([*flags, str(output)]) == 0
    assert verify.main([*flags, str(output / "no")]) == 2
    assert verify.main(["--s3_secret_acces_key", secret, str(output)]) == 2
    told = capsys.readouterr().err
    assert "did you mean --s3_secret_access_key?" in told
    assert secret not in told


def test_failures_of_a_run_by_another_model_may_stay(tmp_path, check):
    """They hold no vectors, and --retry_failures goes on with the model that it is given."""
    other = spec()
    other.metadata["model_fingerprint"] = "f0"
    folder = tmp_path / "out"
    commit(
        folder,
        write_part(folder, FEATURES, "a", features(3)),
        write_part(folder, FAILURES, "b", failures(2), other),
    )
    assert check(folder)[0] == 0


def test_a_flag_of_beams_without_its_value_is_told_in_one_line(capsys):
    assert verify.main(["gs://bucket/out", "--project"]) == 2
    told = capsys.readouterr().err
    assert told == "error: argument --project: expected one argument\n"


def test_an_empty_value_is_one(output):
    assert verify.main(["--s3_endpoint_url=", str(output)]) == 0


def test_a_flag_of_the_jobs_is_none_of_this(output, capsys):
    assert verify.main([str(output), "--quiet"]) == 2
    told = capsys.readouterr().err
    assert "--quiet: no such flag" in told
    assert "did you mean --quiet" not in told


def test_it_is_a_command(output):
    call = [sys.executable, "-m", "pipeline.verify", str(output)]
    ended = subprocess.run(call, capture_output=True, text=True, cwd=ROOT, check=False)
    assert ended.returncode == 0
    assert json.loads(ended.stdout.splitlines()[-1])["status"] == "ok"
    assert ended.stderr == ""
