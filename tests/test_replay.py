"""--input_format failures: what an output's failures name is tried again, and nothing else."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import jpeg, truncated
from test_dataset import publication

from formats import table
from formats.dataset import publish
from formats.example import ExampleKeys, serialize_example
from formats.inputs import Source, infer_types, list_units, survey
from formats.parts import FAILURES, FEATURES, PartWriter
from formats.records import Failure, Features, ImageRecord, ImageRef, utf8
from formats.table import TableSpec
from formats.tfrecord import write_record
from storage import files
from storage.errors import RequestError, RunError
from transforms.sources import READERS, Reading


def output_of(folder, failed, done=(), input_format="auto"):
    """An output with `failed` (key, source, index, stage, class) and `done` (source, index)."""
    spec = TableSpec({"embedding": 1}, metadata={})
    parts = []
    rows = [Failure(*place, stage, kind, "why") for *place, stage, kind in failed]
    features = [
        Features(ImageRef(f"{s}#{i}", s, i), "0" * 64, 1, 1, {"embedding": [1.0]}) for s, i in done
    ]
    for kind, batch in (
        (FAILURES, table.failures_table(rows, table.failure_schema({})) if rows else None),
        (FEATURES, table.features_table(features, spec, spec.schema()) if features else None),
    ):
        if batch is not None:
            writer = PartWriter(str(folder), kind, f"part-r1-{kind}", batch.schema, "zstd")
            writer.write(batch)
            parts.append(writer.close())
    described = {"options": {"input_format": input_format}, "model": {}}
    run = publication(folder, "r1", max_failure_rate=1, described=described)
    publish(run, parts, 0, lambda: {"seconds": 1})
    return str(folder)


def again(output, keys=None, limit=None):
    """Keys of what is read, and (key, class) of what fails, in order."""
    keys = keys or ExampleKeys()
    sources, _ = survey([output], "failures", allow_empty=False)
    how = Reading(keys, infer_types(sources, keys, 64) or Reading().types)
    rows = []
    for unit in list_units(sources, limit, keys):
        for item in READERS[unit.format](unit, how):
            rows.append(
                item.ref.key if isinstance(item, ImageRecord) else (item.key, item.error_class)
            )
    return rows


@pytest.mark.parametrize(
    "path",
    ["failures/../../other/failures/part-1.parquet", "/d/part-1.parquet", "failures/x.parquet"],
)
def test_a_manifest_that_leads_out_of_its_output_is_a_wrong_request(tmp_path, path):
    out = output_of(tmp_path / "out", [("/d/a", "/d/a", None, "decode", "CorruptImage")])
    manifest = tmp_path / "out" / "manifest.json"
    told = json.loads(manifest.read_text())
    told["files"][0]["path"] = path
    manifest.write_text(json.dumps(told))
    with pytest.raises(RequestError, match="is no data file of an output"):
        again(out)


def write_tfrecord(path: Path, count: int) -> list[int]:
    """Records with a number each; the offsets where they begin."""
    offsets = []
    with path.open("wb") as stream:
        for n in range(count):
            offsets.append(stream.tell())
            features = {"image/encoded": b"picture %d" % n, "image/class/label": n}
            write_record(stream, serialize_example(features))
    return offsets


# ---------------------------------------------------------------- what is read


def test_image_files_are_read_by_source_and_keep_their_keys(tmp_path):
    one, two = tmp_path / "a.jpg", tmp_path / "b.jpg"
    one.write_bytes(b"x")
    failed = [
        (str(one), str(one), None, "decode", "CorruptImage"),
        ("listed/b.jpg", str(two), None, "read", "FileNotFoundError"),
        ("gone.jpg", str(tmp_path / "gone.jpg"), None, "read", "FileNotFoundError"),
        (f"{one}#7", str(one), 7, "read", "DuplicateKey"),  # a repeated row of a manifest
    ]
    out = output_of(tmp_path / "out", failed)
    two.write_bytes(b"it has come")
    assert sorted(again(out), key=str) == sorted(
        [("gone.jpg", "FileNotFoundError"), str(one), "listed/b.jpg"], key=str
    )


def test_an_id_that_is_anothers_is_not_tried_again(tmp_path):
    out = output_of(tmp_path / "out", [("/d/a.jpg#7", "/d/a.jpg", 7, "read", "DuplicateKey")])
    with pytest.raises(RequestError, match="nothing failed there that could be tried again"):
        survey([out], "failures", allow_empty=False)
    sources, _ = survey([out], "failures", allow_empty=True)
    assert list(list_units(sources, None)) == []


@pytest.mark.parametrize("name", [b"caf\xe9.jpg", b"a\\xe9.jpg"])
def test_a_name_that_is_no_utf8_is_found_again(tmp_path, name):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/" + name)
    Path(path).write_bytes(b"picture")
    shown = utf8(path)
    out = output_of(tmp_path / "out", [(shown, shown, None, "decode", "CorruptImage")])
    assert again(out) == [shown]


def test_an_archive_among_pictures_is_no_container(tmp_path):
    path = tmp_path / "backup.tar"
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo("0.jpg"), io.BytesIO())
    failed = [(str(path), str(path), None, "read", "TooManyBytes")]
    assert again(output_of(tmp_path / "out", failed)) == [str(path)]


def test_records_are_read_by_index(tmp_path):
    path = tmp_path / "data"
    write_tfrecord(path, 9)
    failed = [(f"{path}#{n}", str(path), n, "decode", "CorruptImage") for n in (2, 5)]
    out = output_of(tmp_path / "out", failed, [(str(path), n) for n in range(9) if n not in (2, 5)])
    assert again(out) == [f"{path}#2", f"{path}#5"]
    keys = ExampleKeys(id="image/class/label")
    assert again(out, keys) == ["2", "5"]


@pytest.mark.parametrize(
    ("cut", "told"),
    [
        ("clean", ["#2", ("#5", "MissingRecords")]),
        ("empty", [("#2", "MissingRecords"), ("#5", "MissingRecords")]),
        ("inside", ["#2", ("@", "TruncatedRecord")]),
    ],
)
def test_a_record_that_cannot_be_reached_any_more_is_told_of(tmp_path, cut, told):
    path = tmp_path / "data.tfrecord"
    offsets = write_tfrecord(path, 9)
    failed = [(f"{path}#{n}", str(path), n, "decode", "CorruptImage") for n in (2, 5)]
    out = output_of(tmp_path / "out", failed)
    end = {"clean": offsets[4], "empty": 0, "inside": offsets[3] + 20}[cut]
    path.write_bytes(path.read_bytes()[:end])
    where = {"@": f"{path}@{offsets[3]}"}

    def name(text):
        return where.get(text, f"{path}{text}")

    expected = [name(t) if isinstance(t, str) else (name(t[0]), t[1]) for t in told]
    assert sorted(again(out), key=str) == sorted(expected, key=str)


def test_a_missing_record_is_told_of_behind_damage_that_is_read_over_and_by_its_id(tmp_path):
    path = tmp_path / "data.tfrecord"
    offsets = write_tfrecord(path, 9)
    failed = [
        (f"{path}@{offsets[2]}", str(path), 2, "read", "BadChecksum"),
        ("five", str(path), 5, "decode", "CorruptImage"),
    ]
    done = [(str(path), n) for n in range(9) if n not in (2, 5)]
    out = output_of(tmp_path / "out", failed, done)
    data = bytearray(path.read_bytes()[: offsets[4]])
    data[offsets[2] + 30] ^= 1
    path.write_bytes(data)
    expected = [(f"{path}@{offsets[2]}", "BadChecksum"), ("five", "MissingRecords")]
    assert sorted(again(out)) == sorted(expected)
    sources, _ = survey([out], "failures", allow_empty=False)
    (unit,) = list_units(sources, None)
    with pytest.raises(RunError, match=r"--on_damage record"):
        list(READERS[unit.format](unit, Reading(on_damage="fail")))


def test_an_image_whose_id_is_anothers_is_not_read_again_behind_damage(tmp_path):
    path = tmp_path / "data"
    offsets = write_tfrecord(path, 8)
    failed = [
        (f"{path}@{offsets[3]}", str(path), 3, "read", "TruncatedRecord"),
        (f"{path}#5", str(path), 5, "read", "DuplicateKey"),
    ]
    out = output_of(tmp_path / "out", failed, [(str(path), n) for n in (0, 1, 2, 6)])
    assert again(out) == [f"{path}#{n}" for n in (3, 4, 7)]


def test_rows_of_parquet_and_images_of_tars(tmp_path):
    table_path, tar_path = tmp_path / "a.parquet", tmp_path / "b.tar"
    pq.write_table(pa.table({"image/encoded": [b"%d" % n for n in range(40)]}), table_path)
    with tarfile.open(tar_path, "w") as tar:
        for n in range(4):
            info = tarfile.TarInfo(f"{n}.jpg")
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    failed = [
        (f"{path}#{n}", str(path), n, "infer", "ModelError")
        for path, n in ((table_path, 3), (table_path, 39), (tar_path, 2))
    ]
    out = output_of(tmp_path / "out", failed)
    assert again(out) == [f"{table_path}#3", f"{table_path}#39", f"{tar_path}#2"]
    assert again(out, limit=2) == [f"{table_path}#3", f"{table_path}#39"]


def test_damage_that_is_still_there_is_the_same_failure(tmp_path):
    path = tmp_path / "data"
    second = write_tfrecord(path, 4)[1]
    data = bytearray(path.read_bytes())
    data[second + 30] ^= 1
    path.write_bytes(data)
    failed = [(f"{path}@{second}", str(path), 1, "read", "BadChecksum")]
    out = output_of(tmp_path / "out", failed, [(str(path), n) for n in (0, 2, 3)])
    assert again(out) == [(f"{path}@{second}", "BadChecksum")]


def test_damage_that_is_mended_gives_all_that_it_hid(tmp_path):
    """The rest of a container that ended there, without what the output has already."""
    path = tmp_path / "data"
    offsets = write_tfrecord(path, 6)
    failed = [
        (f"{path}@{offsets[3]}", str(path), 3, "read", "TruncatedRecord"),
        (f"{path}#1", str(path), 1, "decode", "CorruptImage"),
    ]
    out = output_of(tmp_path / "out", failed, [(str(path), n) for n in (0, 2)])
    assert again(out) == [f"{path}#{n}" for n in (1, 3, 4, 5)]
    bad = [(f"{path}@{offsets[3]}", str(path), 3, "read", "BadChecksum")]
    out = output_of(tmp_path / "out2", bad, [(str(path), n) for n in (0, 1, 2, 4, 5)])
    assert again(out) == [f"{path}#3"]


def test_a_container_that_could_not_be_opened_is_read_whole_but_for_what_is_there(tmp_path):
    path = tmp_path / "data"
    write_tfrecord(path, 4)
    failed = [(str(path), str(path), None, "read", "PermissionError")]
    assert again(output_of(tmp_path / "o1", failed)) == [f"{path}#{n}" for n in range(4)]
    out = output_of(tmp_path / "o2", failed, [(str(path), 0), (str(path), 1)])
    assert again(out) == [f"{path}#2", f"{path}#3"]


def test_a_container_that_is_gone_is_a_failure_for_each_of_its_images(tmp_path):
    path = str(tmp_path / "gone.tfrecord")
    failed = [(f"{path}#{n}", path, n, "decode", "CorruptImage") for n in range(3)]
    failed.append((f"{path}@77", path, 9, "read", "BadChecksum"))
    out = output_of(tmp_path / "out", failed)
    expected = [(key, "FileNotFoundError") for key, *_ in failed]
    assert sorted(again(out)) == sorted(expected)


def test_a_format_that_was_named_then_is_remembered(tmp_path):
    """A tar under another name was read as `--input_format webdataset`."""
    path = tmp_path / "shard.bin"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("0.jpg")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    failed = [(f"{path}#0", str(path), 0, "decode", "CorruptImage")]
    assert again(output_of(tmp_path / "o", failed, input_format="webdataset")) == [f"{path}#0"]


def test_wrong_rows_of_a_manifest_are_read_again(tmp_path):
    path = tmp_path / "list.csv"
    (tmp_path / "a.jpg").write_bytes(b"x")
    path.write_text("uri\nb.jpg\na.jpg\n")
    failed = [(f"{path}#1", str(path), 1, "read", "BadRow")]
    assert again(output_of(tmp_path / "out", failed)) == ["a.jpg"]


def test_types_come_from_the_containers_that_failed(tmp_path):
    path = tmp_path / "a.parquet"
    columns = {"image": [b"x"], "label": ["cat"], "n": [1.5]}
    pq.write_table(pa.table(columns), path)
    out = output_of(tmp_path / "out", [(f"{path}#0", str(path), 0, "decode", "CorruptImage")])
    keys = ExampleKeys("image", None, "label", ("n",))
    types = infer_types([Source(out, "failures")], keys, 9)
    assert (types.label, types.columns) == (pa.string(), {"n": pa.float64()})


# ---------------------------------------------------------------- wrong requests


def test_a_folder_that_is_no_output_is_a_wrong_request(tmp_path):
    with pytest.raises(RequestError, match="no output of this program"):
        survey([str(tmp_path)], "failures", allow_empty=False)


def test_an_output_without_failures_is_an_empty_input(tmp_path):
    out = output_of(tmp_path / "out", [], [("s", 0)])
    with pytest.raises(RequestError, match="nothing failed there"):
        survey([out], "failures", allow_empty=False)
    sources, _ = survey([out], "failures", allow_empty=True)
    assert list(list_units(sources, None)) == []


# ---------------------------------------------------------------- the whole job


def test_what_is_mended_moves_to_the_features(tmp_path, job):
    folder = tmp_path / "in"
    folder.mkdir()
    for n in range(4):
        (folder / f"{n}.jpg").write_bytes(truncated(jpeg()) if n % 2 else jpeg(40 + n))
    first = job(folder, max_failure_rate=1)
    (folder / "1.jpg").write_bytes(jpeg(80))
    ran = job(first.output, input_format="failures", output=tmp_path / "again", max_failure_rate=1)
    assert ran.code == 0
    assert list(ran.rows("features")) == [str(folder / "1.jpg")]
    assert list(ran.rows("failures")) == [str(folder / "3.jpg")]
    same = job(
        first.output,
        input_format="failures",
        if_exists="resume",
        retry_failures=True,
        max_failure_rate=1,
    )
    assert same.manifest["counts"] == {"images": 4, "features": 3, "failures": 1}
    assert job(first.output, input_format="auto", output=tmp_path / "no").code == 3


def test_an_output_is_not_overwritten_by_its_own_failures(tmp_path, job):
    folder = tmp_path / "in"
    folder.mkdir()
    for n in range(3):
        (folder / f"{n}.jpg").write_bytes(jpeg(40 + n) if n else b"nothing")
    first = job(folder, max_failure_rate=1)
    before = first.manifest
    (folder / "0.jpg").write_bytes(jpeg(80))
    (tmp_path / "link").symlink_to(first.output)
    for place in (first.output, f"{first.output}/", tmp_path / "link"):
        ran = job(place, input_format="failures", if_exists="overwrite")
        assert (ran.code, ran.line, ran.manifest) == (2, None, before)
        assert "give --if_exists resume --retry_failures" in ran.stderr
    kept = job(first.output, input_format="failures", if_exists="resume")
    assert kept.manifest["counts"] == before["counts"]
    told = job(first.output, input_format="failures", if_exists="resume", retry_failures=True)
    assert told.manifest["counts"] == {"images": 3, "features": 3, "failures": 0}


def test_a_record_behind_a_cut_that_nobody_sees_stays_failed(tmp_path, job):
    path = tmp_path / "a.tfrecord"
    with path.open("wb") as stream:
        for data in (jpeg(), b"no picture"):
            end = stream.tell()
            write_record(stream, serialize_example({"image/encoded": data}))
    first = job(path, max_failure_rate=1)
    path.write_bytes(path.read_bytes()[:end])
    flags = {"if_exists": "resume", "retry_failures": True, "max_failure_rate": 1}
    ran = job(first.output, input_format="failures", **flags)
    assert ran.manifest["counts"] == {"images": 2, "features": 1, "failures": 1}


def test_records_that_are_missing_yet_stay_told(tmp_path, job):
    folder = tmp_path / "in"
    folder.mkdir()
    name = "d-train.tfrecord-00000-of-00001"
    with (folder / name).open("wb") as stream:
        write_record(stream, serialize_example({"image/encoded": jpeg()}))
    told = {"splits": [{"name": "train", "shardLengths": ["3"]}]}
    (folder / "dataset_info.json").write_text(json.dumps(told))
    first = job(folder / name, max_failure_rate=1)
    assert first.manifest["failures_by"] == {"read/MissingRecords": 1}
    assert job(folder / name, output=tmp_path / "some", limit=9, max_failure_rate=1).manifest[
        "failures_by"
    ] == {"read/MissingRecords": 1}
    flags = {"if_exists": "resume", "retry_failures": True, "max_failure_rate": 1}
    ran = job(first.output, input_format="failures", **flags)
    assert ran.manifest["failures_by"] == {"read/MissingRecords": 1}
    with (folder / name).open("ab") as stream:
        for n in range(2):
            write_record(stream, serialize_example({"image/encoded": jpeg(50 + n)}))
    ran = job(folder / name, **flags)
    assert ran.manifest["counts"] == {"images": 3, "features": 3, "failures": 0}


def test_a_container_that_opens_again_leaves_no_failure(tmp_path, job, monkeypatch):
    (tmp_path / "in").mkdir()
    for name in "ab":
        with (tmp_path / "in" / f"{name}.tfrecord").open("wb") as stream:
            for n in range(2):
                write_record(stream, serialize_example({"image/encoded": jpeg(40 + n)}))
    locked = str(tmp_path / "in" / "b.tfrecord")
    really = files.open_read

    def refuse(path, *args, **kwargs):
        if path == locked:
            raise PermissionError(13, "Permission denied", path)
        return really(path, *args, **kwargs)

    flags = {"input_format": "tfrecord", "max_failure_rate": 1}
    with monkeypatch.context() as patch:
        patch.setattr(files, "open_read", refuse)
        first = job(tmp_path / "in", **flags)
    assert first.manifest["counts"] == {"images": 3, "features": 2, "failures": 1}
    flags = {"if_exists": "resume", "retry_failures": True}
    ran = job(first.output, input_format="failures", **flags)
    assert ran.manifest["counts"] == {"images": 4, "features": 4, "failures": 0}
