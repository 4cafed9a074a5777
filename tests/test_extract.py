"""The job as a whole: the true `main([...])`, its files, columns, JSON line and exit codes."""

import csv
import dataclasses
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import exports
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import encode, good, jpeg, oriented, photo, truncated
from reference_weights import images

from formats.example import serialize_example
from formats.image import Preprocessing, decode_image
from formats.isolation import Limits
from formats.tfrecord import write_record
from models import loading
from pipeline import job as job_module
from pipeline import preflight, verify
from pipeline.options import parse
from storage import files
from storage.errors import RequestError

ROOT = Path(__file__).parents[1]
CLASSES, WIDTH, SIZE = 11, 48, 32


def write_pictures(folder: Path, pictures: dict[str, bytes]) -> Path:
    for name, data in pictures.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def write_tfrecord(path: Path, examples: list[dict], compress: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wb") if compress else path.open("wb") as stream:
        for features in examples:
            write_record(stream, serialize_example(features))
    return path


def different(count: int) -> dict[str, bytes]:
    return {f"{i}.jpg": jpeg(40 + i, 30 + i) for i in range(count)}


def assert_true_manifest(ran) -> None:
    """The manifest, the files and the JSON line tell the same, and nothing else lies there."""
    manifest = ran.manifest
    named = {"manifest.json", "_SUCCESS"}
    rows = {"features": 0, "failures": 0}
    for entry in manifest["files"]:
        data = (ran.output / entry["path"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry["sha256"]
        assert len(data) == entry["bytes"]
        assert pq.read_metadata(ran.output / entry["path"]).num_rows == entry["rows"]
        rows[entry["path"].split("/")[0]] += entry["rows"]
        named.add(entry["path"])
    present = {str(p.relative_to(ran.output)) for p in ran.output.rglob("*") if p.is_file()}
    assert present == named
    assert manifest["counts"] == {"images": sum(rows.values()), **rows}
    assert sum(manifest["failures_by"].values()) == rows["failures"]
    line = ran.line
    assert line["images"] == line["features"] + line["failures"] + line["skipped"]
    assert not set(ran.rows("features")) & set(ran.rows("failures"))


# --- what a run gives --------------------------------------------------------------------------


def test_files_and_tfrecords_of_one_picture_give_the_same_bits(tmp_path, job):
    pictures = different(5)
    files = job(write_pictures(tmp_path / "files", pictures), output=tmp_path / "a")
    write_tfrecord(tmp_path / "records", [{"image/encoded": data} for data in pictures.values()])
    records = job(tmp_path / "records", output=tmp_path / "b", batch_size=4)
    assert (files.code, records.code) == (0, 0)
    for ran in (files, records):
        assert_true_manifest(ran)
    by_digest = [
        {row["sha256"]: (row["embedding"], row["logits"]) for row in ran.rows("features").values()}
        for ran in (files, records)
    ]
    assert len(by_digest[0]) == 5
    assert by_digest[0] == by_digest[1]


def test_a_features_row_tells_everything_of_its_picture(tmp_path, job):
    data = oriented(6, "JPEG", 40, 28)
    folder = write_pictures(tmp_path / "in", {"a.jpg": data})
    ran = job(folder)
    assert ran.line["status"] == "complete"
    assert ran.line["output"] == str(tmp_path / "out")
    (row,) = ran.rows("features").values()
    key = str(folder / "a.jpg")
    assert row["key"] == row["source"] == key
    assert row["record_index"] is None
    assert row["label"] is None
    assert row["sha256"] == hashlib.sha256(data).hexdigest()
    assert (row["width"], row["height"]) == (28, 40)
    assert (len(row["embedding"]), len(row["logits"])) == (WIDTH, CLASSES)


def test_the_schema_and_metadata_of_a_features_file(tmp_path, job):
    ran = job(write_pictures(tmp_path / "in", different(2)))
    schema = ran.table("features").schema
    vector = pa.list_(pa.field("element", pa.float32()))
    assert {field.name: field.type for field in schema} == {
        "key": pa.string(),
        "source": pa.string(),
        "record_index": pa.int64(),
        "sha256": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "label": pa.int64(),
        "embedding": vector,
        "logits": vector,
    }
    metadata = {key.decode(): value.decode() for key, value in schema.metadata.items()}
    assert metadata["model_handle"] == exports.exported("saved_model", "classification")
    assert metadata["model_fingerprint"] == ran.manifest["model"]["fingerprint"]
    assert json.loads(metadata["preprocessing"]) == ran.manifest["preprocessing"]
    assert json.loads(metadata["vectors"])["embedding"] == {"dtype": "float32", "width": WIDTH}
    assert metadata["run_id"] == ran.manifest["run_id"]
    assert json.loads(metadata["versions"]) == ran.manifest["versions"]


def test_manifest_has_the_fields_of_the_contract(tmp_path, job):
    ran = job(write_pictures(tmp_path / "in", different(1)))
    manifest = ran.manifest
    assert manifest["format_version"] == 1
    assert manifest["status"] == "complete"
    assert manifest["model"] | {"fingerprint": "", "handle": ""} == {
        "handle": "",
        "format": "saved_model",
        "fingerprint": "",
        "image_size": SIZE,
        "outputs": {"embedding": WIDTH, "logits": CLASSES},
    }
    assert manifest["options"]["fit"] == "stretch"
    assert manifest["timing"]["seconds"] >= 0
    assert {"features", "failures", "images"} == set(manifest["counts"])


def test_the_manifest_tells_where_the_time_went_and_stderr_what_would_mend_it(tmp_path, job):
    folder = write_pictures(tmp_path / "in", {**different(5), "bad.jpg": b"bad"})
    ran = job(
        folder, batch_size=2, inference_threads=1, max_failure_rate=1.0, max_image_bytes="4KiB"
    )
    timing = ran.manifest["timing"]
    assert timing["images"] == 6
    assert timing["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert sum(timing["decode_ms"]["up_to"].values()) == 6
    assert 0 < timing["decode_ms"]["p50"] <= timing["decode_ms"]["p95"]
    assert (timing["batches"], timing["batch_fill"]) == (3, round(5 / 6, 4))
    assert timing["inference_ms"] > 0
    assert min(timing["read_ms"], timing["wait_ms"], timing["carry_ms"]) >= 0
    assert ran.stderr.count("the model ran") == 1
    assert "too short a run for advice" in ran.stderr


def test_the_manifest_counts_what_was_read_again(tmp_path, job, monkeypatch):
    folder = write_pictures(tmp_path / "in", different(3))
    read_bytes, failed = files.read_bytes, set()

    def flaky(path):
        if path.endswith(("0.jpg", "1.jpg")) and path not in failed:
            failed.add(path)
            raise OSError("try again")
        return read_bytes(path)

    monkeypatch.setattr(files, "read_bytes", flaky)
    ran = job(folder)
    assert (ran.line["features"], ran.manifest["timing"]["retries"]) == (3, 2)


def test_what_was_not_read_is_not_timed(tmp_path, job):
    folder = write_pictures(tmp_path / "in", {**different(2), "large.jpg": bytes(9999)})
    ran = job(folder, max_failure_rate=1.0, max_image_bytes=9000)
    assert ran.manifest["failures_by"] == {"read/TooManyBytes": 1}
    assert ran.manifest["timing"]["images"] == 2
    empty = job(tmp_path / "none" / "*", allow_empty=True, output=tmp_path / "empty")
    assert empty.code == 0, empty.stderr
    assert empty.manifest["timing"]["images"] == 0
    assert "the model ran" not in empty.stderr


def test_an_embedding_is_what_the_exported_network_says(tmp_path, job):
    import tensorflow as tf

    pictures = different(3)
    ran = job(write_pictures(tmp_path / "in", pictures))
    loaded = tf.saved_model.load(exports.exported("saved_model", "classification"))
    for name, data in pictures.items():
        pixels, *_ = decode_image(data, Preprocessing(SIZE))
        ends = loaded(tf.constant(pixels[None] / np.float32(255)), return_endpoints=True)
        row = ran.rows("features")[str(tmp_path / "in" / name)]
        for column, end in (("embedding", "global_pool"), ("logits", "default")):
            expected = ends[end].numpy()[0]
            worst = np.abs(np.array(row[column]) - expected).max() / np.abs(expected).max()
            assert worst < 1e-5, column


@pytest.mark.parametrize("format", ["saved_model", "hub_v1"])
@pytest.mark.parametrize("head", ["classification", "feature_vector"])
def test_every_format_and_head_gives_the_same_embedding(tmp_path, job, format, head):
    folder = write_pictures(tmp_path / "in", different(2))
    reference = job(folder, output=tmp_path / "reference").rows("features")
    ran = job(folder, model=exports.exported(format, head))
    assert ran.manifest["model"]["format"] == format
    outputs = {"embedding": WIDTH} | ({"logits": CLASSES} if head == "classification" else {})
    assert ran.manifest["model"]["outputs"] == outputs
    for key, row in ran.rows("features").items():
        np.testing.assert_allclose(row["embedding"], reference[key]["embedding"], rtol=1e-5)


MODULES = list(
    itertools.product(
        ("nasnet_mobile", "pnasnet_mobile"),
        ("saved_model", "hub_v1"),
        ("classification", "feature_vector"),
    )
)


@pytest.mark.parametrize(
    ("network", "format", "head"),
    [  # the others take minutes; smaller networks have their formats and heads
        MODULES[0],
        *(pytest.param(*module, marks=pytest.mark.engines) for module in MODULES[1:]),
    ],
)
def test_png_in_parquet_out_gives_slims_features_and_logits(tmp_path, job, network, format, head):
    """A reference picture of noise and a smooth one, and what TF-Slim said of them."""
    from PIL import Image

    chosen = [1, 3]
    for number, picture in enumerate(np.rint(images(224)[chosen] * 255).astype(np.uint8)):
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    ran = job(tmp_path / "*.png", model=exports.exported(format, head, network), batch_size=1)
    rows = [ran.rows("features")[str(tmp_path / f"{number}.png")] for number in range(2)]
    expected = np.load(Path(__file__).parent / "data" / f"{network}_expected.npz")
    outputs = {"embedding": "features"} | ({"logits": "logits"} if head[0] == "c" else {})
    assert set(ran.manifest["model"]["outputs"]) == set(outputs)
    for column, name in outputs.items():
        got, wanted = np.array([row[column] for row in rows]), expected[name][chosen]
        assert np.abs(got - wanted).max() / np.abs(wanted).max() < 2e-6


@pytest.mark.parametrize("wanted", ["embedding", "logits", "embedding,logits"])
def test_outputs_are_those_asked_for(tmp_path, job, wanted):
    ran = job(write_pictures(tmp_path / "in", different(1)), outputs=wanted)
    columns = set(ran.table("features").column_names) & {"embedding", "logits"}
    assert columns == set(wanted.split(","))


def test_top_classes_with_names(tmp_path, job):
    names = tmp_path / "names.txt"
    names.write_text("".join(f"class {i}\n" for i in range(CLASSES)))
    folder = write_pictures(tmp_path / "in", different(2))
    plain = job(folder, output=tmp_path / "plain").rows("features")
    ran = job(folder, top_k=3, class_names=names, outputs="embedding")
    for key, row in ran.rows("features").items():
        logits = np.array(plain[key]["logits"])
        softmax = np.exp(logits) / np.exp(logits).sum()
        best = np.argsort(-logits)[:3]
        assert row["top_classes"] == best.tolist()
        assert row["top_labels"] == [f"class {i}" for i in best]
        np.testing.assert_allclose(row["top_scores"], softmax[best], rtol=1e-6)
        assert "logits" not in row


def test_bfloat16_that_would_be_slower_is_float32_and_told(tmp_path, job, monkeypatch):
    monkeypatch.setattr(loading, "BFLOAT16", False)
    monkeypatch.setattr(loading, "_loaded", {})
    folder = write_pictures(tmp_path / "in", different(2))
    exact = job(folder, output=tmp_path / "exact").rows("features")
    ran = job(folder, precision="bfloat16")
    assert "so the layers stay in float32" in ran.manifest["warnings"][0]
    assert ran.rows("features") == exact


def test_a_gpu_that_tensorflow_does_not_see_is_told_of(tmp_path, job, monkeypatch):
    folder = write_pictures(tmp_path / "in", different(1))
    assert "NVIDIA" not in job(folder, dry_run=True).stderr
    monkeypatch.setattr(loading, "GPU_UNSEEN", True)
    assert "does not see this machine's NVIDIA GPU" in job(folder, dry_run=True).stderr
    assert "NVIDIA" not in job(folder, dry_run=True, engine="openvino").stderr


@pytest.mark.parametrize("vector_type", ["list", "fixed_size_list"])
def test_a_result_is_read_as_the_readme_has_it(tmp_path, job, monkeypatch, vector_type):
    folder = write_pictures(tmp_path / "in", different(5))
    output = tmp_path / "out" / "features"
    ran = job(folder, output=output, rows_per_file=2, vector_type=vector_type)
    text = (Path(__file__).parents[1] / "README.md").read_text()
    names: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"Reading the result:\n\n```python\n(.*?)```", text, re.S)[1], names)
    assert names["vectors"].shape == (5, WIDTH)
    written = dict(zip(names["table"]["key"].to_pylist(), names["vectors"].tolist(), strict=True))
    assert written == {key: row["embedding"] for key, row in ran.rows("features").items()}


def test_classes_without_their_logits_load_the_model_once(tmp_path, job, monkeypatch):
    monkeypatch.setattr(loading, "_loaded", {})
    names = tmp_path / "names.txt"
    names.write_bytes(b"\xef\xbb\xbf" + b"".join(b"class %d\r\n" % i for i in range(CLASSES)))
    folder = write_pictures(tmp_path / "in", different(1))
    ran = job(folder, top_k=CLASSES, class_names=names, outputs="embedding")
    (row,) = ran.rows("features").values()
    assert set(row["top_labels"]) == {f"class {i}" for i in range(CLASSES)}  # no mark before 0
    assert len(loading._loaded) == 1


def test_float16_and_fixed_size_vectors(tmp_path, job):
    folder = write_pictures(tmp_path / "in", different(2))
    exact = job(folder, output=tmp_path / "exact").rows("features")
    ran = job(folder, embedding_dtype="float16", vector_type="fixed_size_list")
    kind = ran.table("features").schema.field("embedding").type
    assert (kind.list_size, kind.value_type) == (WIDTH, pa.float16())
    for key, row in ran.rows("features").items():
        expected = np.array(exact[key]["embedding"], np.float32).astype(np.float16)
        assert np.array_equal(np.array(row["embedding"], np.float16), expected)


@pytest.mark.parametrize(
    ("fit", "filter"), itertools.product(["stretch", "slim", "cover", "pad"], ["antialias"])
)
def test_fit_and_filter_reach_the_pixels(tmp_path, job, fit, filter):
    import tensorflow as tf

    data = jpeg(90, 50)
    ran = job(write_pictures(tmp_path / "in", {"a.jpg": data}), fit=fit, filter=filter)
    assert ran.manifest["preprocessing"]["fit"] == fit
    pixels, *_ = decode_image(data, Preprocessing(SIZE, fit, filter))
    loaded = tf.saved_model.load(exports.exported("saved_model", "classification"))
    expected = loaded(tf.constant(pixels[None] / np.float32(255))).numpy()[0]
    (row,) = ran.rows("features").values()
    np.testing.assert_allclose(row["logits"], expected, rtol=1e-4, atol=1e-5)


def test_every_good_format_in_nested_folders(tmp_path, job):
    pictures = {f"{i % 3}/deep/{name}": data for i, (name, data) in enumerate(good().items())}
    pictures |= {".hidden.jpg": jpeg(), "_index.jpg": jpeg(), "_folder/seen.jpg": jpeg()}
    ran = job(write_pictures(tmp_path / "in", pictures))
    assert ran.rows("failures") == {}
    assert ran.line["features"] == len(good()) + 1
    assert_true_manifest(ran)


def test_keys_ids_labels_and_columns_of_examples(tmp_path, job):
    examples = [
        {
            "image/encoded": jpeg(40 + i, 30),
            "image/class/label": i,
            "name": f"n{i}".encode(),
            "image/class/text": b"cat",
            "box": [0.5, float(i)],
        }
        for i in range(3)
    ]
    path = write_tfrecord(tmp_path / "data-00000-of-00001", examples)
    ran = job(path, id_key="name", columns="image/class/text,box")
    rows = ran.rows("features")
    assert list(rows) == ["n0", "n1", "n2"]
    row = rows["n2"]
    assert (row["label"], row["source"], row["record_index"]) == (2, str(path), 2)
    assert (row["image/class/text"], row["box"]) == ("cat", [0.5, 2.0])
    plain = job(path, output=tmp_path / "plain", label_key="image/class/text")
    assert list(plain.rows("features")) == [f"{path}#{i}" for i in range(3)]
    assert plain.table("features").column("label").to_pylist() == ["cat"] * 3


def test_of_images_with_one_id_the_first_keeps_it(tmp_path, job):
    for shard in range(2):
        write_tfrecord(
            tmp_path / f"data-{shard:05}-of-00002",
            [{"image/encoded": jpeg(40 + shard, 30 + i), "id": b"same"} for i in range(2)],
        )
    ran = job(tmp_path / "data-*", id_key="id", max_failure_rate=1)
    first, second = tmp_path / "data-00000-of-00002", tmp_path / "data-00001-of-00002"
    assert {k: r["source"] for k, r in ran.rows("features").items()} == {"same": str(first)}
    failures = ran.rows("failures")
    assert list(failures) == [f"{first}#1", f"{second}#0", f"{second}#1"]
    assert {row["error_class"] for row in failures.values()} == {"DuplicateKey"}
    assert_true_manifest(ran)


def test_a_file_that_two_patterns_match_is_read_once(tmp_path, job):
    folder = write_pictures(tmp_path / "in", different(3))
    ran = job(folder, folder / "*.jpg", folder / "1.jpg")
    assert ran.line["images"] == 3


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("name", ["data.tfrecord", "data.gz", "data", "x-00000-of-00001"])
def test_tfrecords_are_known_by_content(tmp_path, job, name, compress):
    examples = [{"image/encoded": data} for data in different(2).values()]
    ran = job(write_tfrecord(tmp_path / name, examples, compress))
    assert (ran.code, ran.line["features"]) == (0, 2)


def test_limit_stops_early(tmp_path, job):
    folder = write_pictures(tmp_path / "in", different(6))
    write_tfrecord(tmp_path / "r", [{"image/encoded": d} for d in different(6).values()])
    assert job(folder, limit=4, output=tmp_path / "a").line["images"] == 4
    assert job(tmp_path / "r", limit=4, output=tmp_path / "b").line["images"] == 4


def test_names_that_are_no_utf8_are_written_as_text(tmp_path, job):
    """In the rows, in the manifest's options and in its warnings."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    write_pictures(folder, different(1))
    write_tfrecord(folder / "r" / "a-00000-of-00002", [{"image/encoded": jpeg()}])
    ran = job(folder / "0.jpg", folder / "r")
    told = str(tmp_path / r"caf\xe9")
    assert (ran.code, ran.line["features"]) == (0, 2), ran.stderr
    assert list(ran.rows("features")) == [f"{told}/0.jpg", f"{told}/r/a-00000-of-00002#0"]
    assert ran.manifest["options"]["input"] == [f"{told}/0.jpg", f"{told}/r"]
    assert ran.manifest["warnings"][0].startswith(f"{told}/r/a-00001-of-00002: ")
    again = job(folder / "0.jpg", folder / "r", if_exists="resume")
    assert (again.code, again.line["skipped"]) == (0, 2), again.stderr
    assert verify.main([str(ran.output)]) == 0


def test_rows_per_file(tmp_path, job):
    ran = job(write_pictures(tmp_path / "in", different(7)), rows_per_file=3)
    rows = sorted(f["rows"] for f in ran.manifest["files"])
    assert rows == [1, 3, 3]
    assert_true_manifest(ran)


# --- bad pictures ------------------------------------------------------------------------------


def test_bad_pictures_are_rows_with_a_reason(tmp_path, job):
    pictures = {
        "good.jpg": jpeg(),
        "cut.jpg": truncated(jpeg()),
        "empty.jpg": b"",
        "text.jpg": b"no picture at all",
        "large.png": encode(np.zeros((220, 230, 3), np.uint8), "PNG"),
        "heavy.jpg": jpeg(300, 300, quality=100),
    }
    folder = write_pictures(tmp_path / "in", pictures)
    ran = job(folder, max_failure_rate=1, max_image_bytes=20_000, max_image_pixels=50_000)
    assert ran.code == 0
    classes = {Path(k).name: r["error_class"] for k, r in ran.rows("failures").items()}
    assert classes == {
        "cut.jpg": "CorruptImage",
        "empty.jpg": "EmptyImage",
        "text.jpg": "UnsupportedFormat",
        "heavy.jpg": "TooManyBytes",
        "large.png": "TooManyPixels",
    }
    row = ran.rows("failures")[str(folder / "cut.jpg")]
    assert row["stage"] == "decode"
    assert row["sha256"] == hashlib.sha256(pictures["cut.jpg"]).hexdigest()
    assert row["bytes"] == len(pictures["cut.jpg"])
    assert ran.rows("failures")[str(folder / "heavy.jpg")]["sha256"] is None
    assert_true_manifest(ran)


def test_too_many_failures_publish_nothing(tmp_path, job):
    pictures = {"good.jpg": jpeg(), "bad.jpg": b"nothing"}
    ran = job(write_pictures(tmp_path / "in", pictures), max_failure_rate=0.4)
    assert ran.code == 3
    assert ran.line["status"] == "too_many_failures"
    assert (ran.line["features"], ran.line["failures"], ran.line["manifest"]) == (1, 1, None)
    told = "1 of 2 images failed (1 decode/UnsupportedFormat), more than --max_failure_rate 0.4"
    assert told in ran.stderr
    assert "give a larger --max_failure_rate, with --if_exists resume" in ran.stderr
    present = {str(p.relative_to(ran.output)) for p in ran.output.rglob("*") if p.is_file()}
    assert not any(path.startswith(("features", "manifest", "_SUCCESS")) for path in present)
    (part,) = ran.output.rglob("*.parquet")
    assert part.relative_to(ran.output).parts[0] == "_failed"
    assert pq.read_table(part).column("key").to_pylist() == [str(tmp_path / "in" / "bad.jpg")]
    (rejected,) = (ran.output / "_failed").iterdir()
    assert verify.main([str(rejected)]) == 0
    (tmp_path / "in" / "bad.jpg").write_bytes(jpeg())
    again = job(rejected, input_format="failures", output=tmp_path / "again")
    assert (again.code, again.line["features"]) == (0, 1)
    assert list(again.rows("features")) == [str(tmp_path / "in" / "bad.jpg")]
    into = job(rejected, input_format="failures", if_exists="resume")  # beside what it is read from
    assert (into.code, into.line["features"]) == (0, 1)


def test_after_too_many_failures_the_advice_given_works(tmp_path, job):
    folder = write_pictures(tmp_path / "in", {"good.jpg": jpeg(), "bad.jpg": b"nothing"})
    assert job(folder, max_failure_rate=0.4).code == 3
    ran = job(folder, max_failure_rate=0.5, if_exists="resume")
    assert (ran.code, ran.line["features"], ran.line["failures"]) == (0, 1, 1)
    assert verify.main([str(ran.output)]) == 0


def damaged(path: Path) -> Path:
    """Three records; the second's payload is altered."""
    write_tfrecord(path, [{"image/encoded": data} for data in different(3).values()])
    data = bytearray(path.read_bytes())
    first = int.from_bytes(data[:8], "little") + 16
    data[first + 200] ^= 1
    path.write_bytes(bytes(data))
    return path


def test_damage_in_a_tfrecord_is_one_row_a_place(tmp_path, job):
    path = damaged(tmp_path / "data")
    second = int.from_bytes(path.read_bytes()[:8], "little") + 16
    with path.open("ab") as stream:
        stream.write(b"junk at the end")
    end = path.stat().st_size - len(b"junk at the end")
    ran = job(path, max_failure_rate=1)
    assert list(ran.rows("features")) == [f"{path}#0", f"{path}#2"]
    assert set(ran.rows("failures")) == {f"{path}@{second}", f"{path}@{end}"}
    assert ran.line["images"] == 4
    assert_true_manifest(ran)


def test_damage_can_fail_the_run_in_one_short_line(tmp_path, job):
    ran = job(damaged(tmp_path / "data"), on_damage="fail")
    assert ran.code == 1
    assert ran.line["status"] == "failed"
    told = [line for line in ran.stderr.splitlines() if "BadChecksum" in line]
    assert told
    assert all(len(line) < 1000 for line in told)
    assert not (ran.output / "manifest.json").exists()


def test_missing_shards_and_empty_files_are_told(tmp_path, job):
    write_tfrecord(tmp_path / "d-00000-of-00003", [{"image/encoded": jpeg()}])
    (tmp_path / "d-00001-of-00003").write_bytes(b"")
    ran = job(tmp_path / "d-*")
    assert ran.code == 0
    assert len(ran.manifest["warnings"]) == 2
    for warning in ran.manifest["warnings"]:
        assert warning in ran.stderr


def test_of_many_missing_shards_the_first_are_told(tmp_path, job):
    path = write_tfrecord(tmp_path / "d-00000-of-01024", [{"image/encoded": jpeg()}])
    warnings = job(path).manifest["warnings"]
    assert len(warnings) == 6
    assert warnings[-1] == "1018 more like that last one"


def test_a_file_that_two_inputs_have_in_two_formats_is_told_of(tmp_path, job):
    folder = write_pictures(tmp_path / "in", different(1))
    (folder / "list.csv").write_text("uri\n0.jpg\n")
    ran = job(folder, folder / "list.csv", max_failure_rate=1)
    assert f"{folder}/list.csv is read as images, as an earlier --input" in ran.stderr
    ran = job(folder / "list.csv", folder, output=tmp_path / "other", max_failure_rate=1)
    assert f"{folder}/list.csv is read as manifest" in ran.stderr


# --- other sources -----------------------------------------------------------------------------


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as tar:
        for name, members in samples.items():
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{name}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def test_parquet_as_hugging_face_writes_it(tmp_path, job):
    pictures = list(different(5).values())
    rows = [{"bytes": data, "path": f"{n}.jpg"} for n, data in enumerate(pictures)]
    rows[3] = {"bytes": None, "path": "elsewhere/3.jpg"}
    columns = {"image": rows, "label": [4, 3, 2, 1, 0], "tags": [["a"], [], None, ["b"], ["c"]]}
    path = tmp_path / "train-00000-of-00001.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=2)
    asked = {"image_key": "image", "label_key": "label", "columns": "tags"}
    ran = job(path, max_failure_rate=1, **asked)
    rows = ran.rows("features")
    assert list(rows) == [f"{path}#{n}" for n in (0, 1, 2, 4)]
    row = rows[f"{path}#4"]
    assert (row["source"], row["record_index"], row["label"]) == (str(path), 4, 0)
    assert row["tags"] == ["c"]
    assert row["sha256"] == hashlib.sha256(pictures[4]).hexdigest()
    (failure,) = ran.rows("failures").values()
    assert (failure["key"], failure["error_class"]) == (f"{path}#3", "MissingFeature")
    assert_true_manifest(ran)
    wrong = job(path, output=tmp_path / "b")
    assert wrong.code == 2
    assert "pass --image_key image" in wrong.stderr


def test_webdataset_tars(tmp_path, job):
    about = [json.dumps({"wide": 40 + n, "text": f"t{n}"}).encode() for n in range(3)]
    for shard in range(2):
        samples = {
            f"s{shard}{n}": {"cls": b"%d" % n, "jpg": jpeg(40 + n + 5 * shard), "json": about[n]}
            for n in range(3)
        }
        write_tar(tmp_path / f"{shard}.{('tar', 'tgz')[shard]}", samples)
    cut = tmp_path / "0.tar"
    cut.write_bytes(cut.read_bytes()[:-11_000])
    ran = job(tmp_path / "*.t*", id_key="__key__", columns="wide", max_failure_rate=1)
    assert ran.code == 0, ran.stderr
    rows = ran.rows("features")
    assert {"s00", "s10", "s11", "s12"} <= set(rows) <= {"s00", "s01", "s02", "s10", "s11", "s12"}
    assert (rows["s12"]["label"], rows["s12"]["wide"], rows["s12"]["record_index"]) == (2, 42, 2)
    assert [row["error_class"] for row in ran.rows("failures").values()] == ["TruncatedMember"]
    assert_true_manifest(ran)


def test_a_manifest_with_labels_repetitions_and_what_is_not_there(tmp_path, job):
    write_pictures(tmp_path / "p", different(3))
    listing = tmp_path / "list.csv"
    rows = ["uri,label,note", "p/0.jpg,cat,1", "p/1.jpg,dog,", "gone.jpg,cat,3", "p/0.jpg,cat,4"]
    listing.write_text("\n".join([*rows, "http://127.0.0.1:9/x.jpg,cat,5", "cat"]))
    ran = job(listing, label_key="label", columns="note", max_failure_rate=1)
    rows = ran.rows("features")
    assert {key: (row["label"], row["note"]) for key, row in rows.items()} == {
        "p/0.jpg": ("cat", 1),
        "p/1.jpg": ("dog", None),
    }
    assert rows["p/0.jpg"]["source"] == str(tmp_path / "p" / "0.jpg")
    assert {key: row["error_class"] for key, row in ran.rows("failures").items()} == {
        "gone.jpg": "FileNotFoundError",
        f"{tmp_path}/p/0.jpg#3": "DuplicateKey",
        "http://127.0.0.1:9/x.jpg": "HttpNotAllowed",
        f"{listing}#5": "BadRow",
    }
    assert ran.line["images"] == 6
    assert_true_manifest(ran)
    lines = [f"p/{n}.jpg" for n in (2, 0, 1)]
    (tmp_path / "new.csv").write_text("\n".join(["uri,label,note"] + [f"{u},cat,1" for u in lines]))
    flags = {"label_key": "label", "columns": "note", "max_failure_rate": 1}
    more = job(tmp_path / "new.csv", if_exists="resume", **flags)
    assert (more.line["features"], more.line["skipped"]) == (1, 2)  # however rows are moved about
    assert_true_manifest(more)


def test_all_sources_of_one_picture_give_the_same_bits(tmp_path, job):
    data = jpeg()
    write_pictures(tmp_path / "p", {"a.jpg": data})
    write_tfrecord(tmp_path / "b.tfrecord", [{"image/encoded": data}])
    pq.write_table(pa.table({"image/encoded": [data]}), tmp_path / "c.parquet")
    write_tar(tmp_path / "d.tar", {"x": {"jpg": data}})
    (tmp_path / "e.jsonl").write_text('{"uri": "p/a.jpg"}\n')
    names = ("p", "b.tfrecord", "c.parquet", "d.tar", "e.jsonl")
    ran = job(*(tmp_path / name for name in names))
    assert ran.line["features"] == 5
    rows = list(ran.rows("features").values())
    for row in rows[1:]:
        assert (row["sha256"], row["embedding"]) == (rows[0]["sha256"], rows[0]["embedding"])
    assert_true_manifest(ran)


def test_a_cut_between_records_is_told_where_a_count_is_known(tmp_path, job):
    examples = [{"image/encoded": data} for data in different(3).values()]
    folder = tmp_path / "set"
    path = write_tfrecord(folder / "set-train.tfrecord-00000-of-00001", examples)
    told = {"splits": [{"name": "train", "shardLengths": ["3"]}]}
    (folder / "dataset_info.json").write_text(json.dumps(told))
    whole = job(folder / "set-*", output=tmp_path / "whole")
    assert (whole.line["features"], whole.line["failures"]) == (3, 0)
    write_tfrecord(path, examples[:2])
    ran = job(folder / "set-*", max_failure_rate=1)
    assert list(ran.rows("features")) == [f"{path}#0", f"{path}#1"]
    assert [row["error_class"] for row in ran.rows("failures").values()] == ["MissingRecords"]
    (folder / "dataset_info.json").unlink()
    again = job(folder / "set-*", output=tmp_path / "whole", if_exists="resume", max_failure_rate=1)
    assert (again.line["skipped"], again.line["failures"]) == (2, 1)  # an earlier run had three
    assert job(folder / "set-*", output=tmp_path / "unknown").line["failures"] == 0
    assert_true_manifest(again)


def test_damage_behind_which_new_records_lie_is_told_when_resuming(tmp_path, job, monkeypatch):
    """A file uploaded anew with more records, and cut inside one that is published already."""
    examples = [{"image/encoded": data} for data in different(5).values()]
    folder = tmp_path / "set"
    path = write_tfrecord(folder / "data.tfrecord", examples[:3])
    assert job(folder).line["features"] == 3
    whole = Path(write_tfrecord(path, examples)).read_bytes()
    third = len(Path(write_tfrecord(path, examples[:3])).read_bytes())
    Path(path).write_bytes(whole[: third - 20])
    flags = {"if_exists": "resume", "max_failure_rate": 1}
    ran = job(folder, **flags)
    assert (ran.line["skipped"], ran.line["failures"]) == (2, 1)
    (row,) = ran.rows("failures").values()
    assert (row["error_class"], row["record_index"]) == ("TruncatedRecord", None)
    again = job(folder, **flags)
    assert (again.line["skipped"], again.line["failures"]) == (3, 0)  # it is known
    open_read = files.open_read

    def refused(asked):
        if asked == str(path):
            raise PermissionError(asked)
        return open_read(asked)

    monkeypatch.setattr(files, "open_read", refused)
    other = write_tfrecord(folder / "other.tfrecord", examples[:1])
    ran = job(folder, **flags)
    assert ran.line["failures"] == 1  # which damage at a place of its own does not answer for
    assert ran.rows("failures")[str(path)]["error_class"] == "PermissionError"
    monkeypatch.setattr(files, "open_read", open_read)
    write_tfrecord(path, examples)
    ran = job(folder, retry_failures=True, **flags)
    assert sorted(ran.rows("features")) == [*(f"{path}#{n}" for n in range(5)), f"{other}#0"]
    assert ran.rows("failures") == {}
    assert_true_manifest(ran)


# --- what is there already ---------------------------------------------------------------------


def test_an_existing_output_is_refused(tmp_path, job):
    folder = write_pictures(tmp_path / "in", different(1))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "anything").touch()
    ran = job(folder)
    assert (ran.code, ran.line) == (2, None)
    assert "--if_exists" in ran.stderr


def test_a_manifest_of_something_else_is_a_wrong_request(tmp_path, job):
    folder = write_pictures(tmp_path / "in", different(1))
    write_pictures(tmp_path / "out", {"manifest.json": b'{"format_version": 1}'})
    for source, flags in (
        (folder, {"if_exists": "resume"}),
        (tmp_path / "out", {"input_format": "failures", "output": tmp_path / "other"}),
    ):
        ran = job(source, **flags)
        assert (ran.code, ran.line) == (2, None)
        assert "not a manifest" in ran.stderr


def test_overwrite_leaves_only_the_new(tmp_path, job):
    job(write_pictures(tmp_path / "in", different(4)), rows_per_file=1)
    ran = job(write_pictures(tmp_path / "other", different(2)), if_exists="overwrite")
    assert set(ran.rows("features")) == {str(tmp_path / "other" / f"{i}.jpg") for i in range(2)}
    assert_true_manifest(ran)


def test_overwrite_replaces_a_manifest_that_cannot_be_read(tmp_path, job):
    folder = write_pictures(tmp_path / "in", different(2))
    old = job(folder)
    (data,) = (old.output / "features").iterdir()
    (old.output / "manifest.json").write_text("{")
    ran = job(folder, if_exists="overwrite")
    assert (ran.code, ran.line["features"]) == (0, 2)
    assert "its manifest cannot be read and will be replaced" in ran.stderr
    assert data.exists()  # nobody knows whose it is
    assert verify.main([str(ran.output)]) == 0


def test_empty_folders_are_no_output(tmp_path, job):
    (tmp_path / "out" / "features").mkdir(parents=True)
    ran = job(write_pictures(tmp_path / "in", different(1)))
    assert (ran.code, ran.line["features"]) == (0, 1)


def test_a_resumed_run_keeps_the_order_of_the_columns(tmp_path, job):
    records = [
        {"image/encoded": data, "a": [n], "b": [b"x"]}
        for n, data in enumerate(different(4).values())
    ]
    flags = {"outputs": "logits,embedding", "columns": "b,a"}
    first = job(write_tfrecord(tmp_path / "r-00000-of-00002", records[:2]), **flags)
    assert first.table("features").schema.names[-4:] == ["logits", "embedding", "b", "a"]
    write_tfrecord(tmp_path / "r-00001-of-00002", records[2:])
    flags = {"outputs": "embedding,logits", "columns": "a,b", "if_exists": "resume"}
    ran = job(tmp_path / "r-*", **flags)
    assert (ran.line["features"], ran.line["skipped"]) == (2, 2)
    assert [row["a"] for row in ran.rows("features").values()] == [0, 1, 2, 3]
    assert verify.main([str(ran.output)]) == 0


def test_a_narrower_sample_fits_the_columns_that_are_there(tmp_path, job):
    write_pictures(tmp_path, {f"{n}.jpg": data for n, data in enumerate(different(4).values())})
    listing = tmp_path / "list.csv"
    flags = {"columns": "score", "label_key": "kind"}
    listing.write_text("uri,score,kind\n0.jpg,0.5,cat\n1.jpg,2,7\n")
    assert job(listing, **flags).code == 0
    listing.write_text("uri,score,kind\n2.jpg,3,8\n3.jpg,4,9\n")  # whole numbers alone
    ran = job(listing, if_exists="resume", **flags)
    assert (ran.code, ran.line["features"]) == (0, 2)
    rows = [(row["score"], row["label"]) for row in ran.rows("features").values()]
    assert rows == [(0.5, "cat"), (2.0, "7"), (3.0, "8"), (4.0, "9")]
    listing.write_text("uri,score,kind\n4.jpg,high,8\n")
    ran = job(listing, if_exists="resume", **flags)
    assert 'columns.score ("double", now "string")' in ran.stderr


def test_a_relative_uri_of_another_folder_is_another_picture(tmp_path, job):
    lists = []
    for folder in ("a", "b"):
        write_pictures(tmp_path / folder, {"1.jpg": jpeg(50 + len(lists), 50)})
        lists.append(tmp_path / folder / "list.csv")
        lists[-1].write_text("uri\n1.jpg\n")
    assert job(lists[0]).code == 0
    again = job(lists[0], if_exists="resume")
    assert (again.line["features"], again.line["skipped"]) == (0, 1)
    ran = job(lists[1], if_exists="resume", max_failure_rate=1)
    assert (ran.line["failures"], ran.line["skipped"]) == (1, 0)
    (row,) = ran.rows("failures").values()
    assert (row["error_class"], row["source"]) == ("DuplicateKey", str(tmp_path / "b" / "1.jpg"))
    assert ran.rows("features")["1.jpg"]["source"] == str(tmp_path / "a" / "1.jpg")


def test_a_record_that_failed_outlasts_a_file_that_is_cut_before_it(tmp_path, job):
    records = [{"image/encoded": data} for data in [*different(2).values(), b"nothing"]]
    path = write_tfrecord(tmp_path / "data", records)
    assert job(path, max_failure_rate=1).line["failures"] == 1
    write_tfrecord(path, records[:2])
    ran = job(path, if_exists="resume", retry_failures=True, max_failure_rate=1)
    assert ran.code == 0
    told = {key: row["error_class"] for key, row in ran.rows("failures").items()}
    assert told.pop(f"{path}#2") == "UnsupportedFormat"
    assert list(told.values()) == ["MissingRecords"]


def test_what_fails_again_is_no_new_failure(tmp_path, job):
    bad = {f"bad{i}.jpg": b"%d nothing" % i for i in range(4)}
    folder = write_pictures(tmp_path / "in", {**different(5), **bad})
    job(folder, max_failure_rate=0.5)
    write_pictures(folder, {"bad0.jpg": jpeg(60, 60)})
    ran = job(folder, if_exists="resume", retry_failures=True, max_failure_rate=0.5)
    assert (ran.code, ran.line["features"], ran.line["failures"]) == (0, 1, 3)
    assert ran.manifest["counts"] == {"images": 9, "features": 6, "failures": 3}
    write_pictures(folder, {f"bad{i}.jpg": jpeg(60 + i, 60) for i in (1, 2)})
    write_pictures(folder, {f"new{i}.jpg": b"%d nothing" % i for i in range(2)})
    flags = {"if_exists": "resume", "retry_failures": True}
    ran = job(folder, max_failure_rate=0.4, **flags)  # what is mended forgives nothing
    assert (ran.code, ran.line["features"], ran.line["failures"]) == (3, 2, 3)
    assert job(folder, max_failure_rate=0.5, **flags).code == 0


def test_resume_adds_what_is_new_and_keeps_failures(tmp_path, job):
    folder = write_pictures(tmp_path / "in", {**different(3), "bad.jpg": b"nothing"})
    first = job(folder, if_exists="resume", max_failure_rate=1)
    assert (first.code, first.line["skipped"]) == (0, 0)
    write_pictures(folder, {"new.jpg": jpeg(50, 50), "bad.jpg": jpeg(60, 60)})
    second = job(folder, if_exists="resume", max_failure_rate=1)
    assert (second.line["images"], second.line["features"]) == (5, 1)
    assert (second.line["failures"], second.line["skipped"]) == (0, 4)
    assert second.manifest["counts"] == {"images": 5, "features": 4, "failures": 1}
    third = job(folder, if_exists="resume", retry_failures=True)
    assert third.manifest["counts"] == {"images": 5, "features": 5, "failures": 0}
    assert_true_manifest(third)


@pytest.mark.parametrize("here", [True, False])
def test_a_job_elsewhere_keeps_what_it_reads_where_its_launcher_fails(
    tmp_path, job, monkeypatch, here
):
    """The connection to a job server may end before the job does."""
    folder = write_pictures(tmp_path / "in", different(1))
    assert job(folder).code == 0
    write_pictures(folder, different(2))
    monkeypatch.setattr(preflight, "runs_here", lambda beam_args: here)
    monkeypatch.setattr(job_module, "run_graph", lambda *_: (_ for _ in ()).throw(OSError("reset")))
    assert job(folder, if_exists="resume").code == 1
    assert len(list((tmp_path / "out").glob("_run-*.finished"))) == (not here)


def test_a_manifest_that_names_nothing_superseded(tmp_path, job):
    """As the contract has it, which knows no such field."""
    folder = write_pictures(tmp_path / "in", different(1))
    assert job(folder).code == 0
    path = tmp_path / "out" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["superseded"]
    path.write_text(json.dumps(manifest))
    write_pictures(folder, different(2))
    for how in ("resume", "overwrite"):
        assert_true_manifest(job(folder, if_exists=how))


@pytest.mark.parametrize("if_exists", ["resume", "overwrite"])
@pytest.mark.parametrize("pattern", [".", "**"])
def test_an_output_inside_the_input_is_no_input(tmp_path, job, monkeypatch, pattern, if_exists):
    folder = write_pictures(tmp_path / "in", different(2))
    monkeypatch.chdir(folder)
    job(pattern, output="out", max_failure_rate=1)
    write_pictures(folder, {"new.jpg": jpeg(50, 50)})
    again = job(pattern, output="out", if_exists=if_exists)
    assert again.manifest["counts"] == {"images": 3, "features": 3, "failures": 0}
    assert "earlier run wrote to --output" in again.stderr
    assert "not read" in again.manifest["warnings"][0]


def test_an_output_around_the_input_hides_none_of_it(tmp_path, job):
    for name in ("features", "images"):
        write_pictures(tmp_path / "out" / name, different(1))
    ran = job(tmp_path / "out", tmp_path / "out" / "features", if_exists="resume")
    assert ran.manifest["counts"]["features"] == 2
    assert "earlier run wrote" not in ran.stderr


def test_failures_that_are_not_read_again_stay(tmp_path, job):
    for name in "abc":
        write_pictures(tmp_path / name, {"0.jpg": jpeg(), "bad.jpg": b"nothing"})
    folders = [tmp_path / name for name in "abc"]
    flags = {"max_failure_rate": 1, "if_exists": "resume"}
    job(*folders, **flags)
    for folder in folders[:2]:
        write_pictures(folder, {"bad.jpg": jpeg(50, 50)})
    (tmp_path / "c" / "bad.jpg").unlink()
    for inputs, more, failures in (
        (folders[:1], {"limit": 1}, 3),
        (folders[:1], {}, 2),
        (folders, {}, 1),  # of the file that is gone
    ):
        ran = job(*inputs, retry_failures=True, **flags, **more)
        counts = {"images": 6, "features": 6 - failures, "failures": failures}
        assert ran.manifest["counts"] == counts
        assert_true_manifest(ran)


def test_damage_is_forgotten_once_its_file_is_whole(tmp_path, job):
    path = damaged(tmp_path / "data")
    with path.open("ab") as stream:
        stream.write(b"junk at the end")
    flags = {"max_failure_rate": 1, "if_exists": "resume"}
    assert len(job(path, **flags).rows("failures")) == 2
    listing = tmp_path / "list.csv"
    listing.write_text("uri,label\na,1,2\n")
    assert len(job(path, listing, **flags).rows("failures")) == 3
    write_tfrecord(path, [{"image/encoded": data} for data in different(3).values()])
    write_pictures(tmp_path, {"a": jpeg()})
    listing.write_text("uri,label\na,1\n")
    ran = job(path, listing, retry_failures=True, **flags)
    assert sorted(ran.rows("features")) == sorted(["a", *(f"{path}#{n}" for n in range(3))])
    assert ran.rows("failures") == {}
    assert_true_manifest(ran)


def test_resume_knows_ids_in_other_shards(tmp_path, job):
    examples = [{"image/encoded": d, "id": n.encode()} for n, d in different(4).items()]
    job(write_tfrecord(tmp_path / "a-00000-of-00001", examples), id_key="id")
    write_tfrecord(tmp_path / "b-00000-of-00002", examples[:2])
    examples.append({"image/encoded": jpeg(90, 90), "id": b"new"})
    write_tfrecord(tmp_path / "b-00001-of-00002", examples[2:])
    ran = job(tmp_path / "b-*", id_key="id", if_exists="resume")
    assert (ran.line["features"], ran.line["skipped"], ran.line["failures"]) == (1, 4, 0)
    assert list(ran.rows("features")) == ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "new"]


def with_ids(path, *ids):
    """A TFRecord of one picture for each id, which the id decides."""
    pictures = list(different(9).values())
    return write_tfrecord(
        path, [{"image/encoded": pictures[int(n[1:])], "id": n.encode()} for n in ids]
    )


def test_resume_sees_new_ids_in_a_file_that_was_written_anew(tmp_path, job):
    """What lay at a place before says nothing of an image with an id; nor does a renamed loser."""
    path = with_ids(tmp_path / "a", "p1", "p2", "p1")
    flags = {"id_key": "id", "max_failure_rate": 1}
    assert list(job(path, **flags).rows("failures")) == [f"{path}#2"]  # the second p1
    with_ids(path, "p0", "p3", "p4", "p1", "p2", "p1", "p3")
    ran = job(path, if_exists="resume", **flags)
    assert (ran.line["features"], ran.line["failures"], ran.line["skipped"]) == (3, 1, 3)
    assert list(ran.rows("features")) == ["p0", "p1", "p2", "p3", "p4"]
    assert list(ran.rows("failures")) == [f"{path}#2", f"{path}#6"]
    assert_true_manifest(ran)
    again = job(path, if_exists="resume", **flags)
    assert (again.line["skipped"], again.line["images"]) == (7, 7)  # the losers too
    assert again.table("features") == ran.table("features")


def test_equal_pictures_have_equal_rows_and_are_computed_once(tmp_path, job):
    pictures = different(5)
    alone = job(write_pictures(tmp_path / "in", pictures), output=tmp_path / "alone")
    twins = {f"twin/{name}": data for name, data in pictures.items()}
    write_pictures(tmp_path / "in", twins)
    both = job(tmp_path / "in", batch_size=2)
    assert (both.line["features"], both.manifest["timing"]["reused"]) == (10, 5)
    assert alone.manifest["timing"]["reused"] == 0
    for key, row in alone.rows("features").items():
        name = Path(key).name
        for other in (key, str(tmp_path / "in" / "twin" / name)):
            same = both.rows("features")[other]
            assert same == {**row, "key": other, "source": other}


def test_resume_refuses_other_options(tmp_path, job):
    folder = write_pictures(tmp_path / "in", different(1))
    names = tmp_path / "names.txt"
    names.write_text("\n".join(map(str, range(CLASSES))))
    ran = job(folder)
    before = {path: path.read_bytes() for path in ran.output.rglob("*") if path.is_file()}
    for flags, name in (
        ({"model": exports.exported("hub_v1", "feature_vector")}, "model"),
        ({"fit": "pad"}, 'preprocessing.fit ("stretch", now "pad")'),
        ({"filter": "bilinear"}, 'preprocessing.filter ("antialias", now "bilinear")'),
        ({"jpeg_scaling": "off"}, 'preprocessing.jpeg_scaling ("auto", now "off")'),
        ({"precision": "bfloat16"}, "precision"),
        (
            {"embedding_dtype": "float16"},
            'vectors.embedding.dtype ("float32", now "float16"), '
            'vectors.logits.dtype ("float32", now "float16")',
        ),
        ({"outputs": "embedding"}, "vectors.logits ("),
        ({"vector_type": "fixed_size_list"}, "vector_type"),
        ({"top_k": 2}, "top_k"),
        ({"top_k": 2, "class_names": names}, "top_k"),
        ({"id_key": "id"}, "keys"),
        ({"label_key": "other"}, "keys"),
    ):
        ran = job(folder, if_exists="resume", **flags)
        assert ran.code == 2, flags
        assert f"was made with another {name}" in ran.stderr, flags
        (line,) = [text for text in ran.stderr.splitlines() if text.startswith("error")]
        assert len(line) < 1000
    assert before == {path: path.read_bytes() for path in ran.output.rglob("*") if path.is_file()}


def test_resume_minds_no_option_that_changes_no_row(tmp_path, job):
    folder = write_pictures(tmp_path / "in", different(2))
    job(folder)
    ran = job(
        folder, if_exists="resume", batch_size=3, rows_per_file=1, compression="snappy",
        max_failure_rate=0.5, limit=2, max_image_bytes="1MiB", on_damage="fail",
    )  # fmt: skip
    assert (ran.code, ran.line["skipped"]) == (0, 2)


def test_resume_takes_pictures_that_were_not_admitted_before(tmp_path, job):
    folder = write_pictures(
        tmp_path / "in", {"a.tiff": encode(photo(40, 28), "TIFF"), "b.png": oriented(1)}
    )
    first = job(folder, formats="png,jpeg", max_image_pixels=5000, max_failure_rate=1)
    assert first.manifest["counts"] == {"images": 2, "features": 1, "failures": 1}
    flags = {"if_exists": "resume", "retry_failures": True}
    ran = job(folder, formats="jpeg,png,tiff", max_image_pixels=6000, **flags)
    assert ran.manifest["counts"] == {"images": 2, "features": 2, "failures": 0}
    assert_true_manifest(ran)


def test_resume_goes_on_from_a_killed_run(tmp_path, job):
    folder = write_pictures(tmp_path / "in", different(6))
    whole = job(folder, output=tmp_path / "whole", rows_per_file=2).rows("features")
    killed = job(folder, rows_per_file=2)
    (killed.output / "manifest.json").unlink()
    (killed.output / "_SUCCESS").unlink()
    parts = sorted((killed.output / "features").iterdir())
    parts[0].write_bytes(parts[0].read_bytes()[:-10])  # torn
    (killed.output / "features" / ".tmp-0a1b2c3d-part").write_bytes(b"half")
    ran = job(folder, if_exists="resume")
    assert (ran.line["features"], ran.line["skipped"]) == (2, 4)
    assert ran.rows("features") == whole
    assert_true_manifest(ran)


# --- wrong requests ----------------------------------------------------------------------------


NOBODY = {"runner": "PortableRunner", "job_endpoint": "localhost:1"}
LOOPBACK = {"environment_type": "LOOPBACK"}
DATAFLOW = {"runner": "DataflowRunner", "project": "p", "region": "r"}


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"inptu_format": "images"}, "--input_format"),
        ({"input": "/nowhere/*.jpg"}, "/nowhere/*.jpg"),
        ({"output": "/dev/null/out"}, "/dev/null/out"),
        ({"model": "/nowhere/model"}, "/nowhere/model"),
        ({"model": "."}, "saved_model.pb"),
        ({"input": "s3a://bucket/x"}, "s3a"),
        ({"top_k": "12"}, "11 classes"),
        ({"outputs": "embeddings"}, "embeddings"),
        ({"columns": "key"}, "key"),
        ({"max_failure_rate": "10"}, "0 to 1"),
        ({"batch_size": "0"}, "at least 1"),
        ({"batch_size": "1000000"}, "at most 4096"),
        ({"input": ""}, "names nothing"),
        ({"input": "gs://"}, "names no bucket"),
        ({"output": __file__}, "is a file"),
        ({"model": __file__}, ": a file, and no .tar.gz"),
        ({"model": "/nowhere/nasnet_mobil"}, "did you mean nasnet_mobile?"),
        ({"max_image_bytes": "many"}, "such as 4096, 64MiB"),
        ({"value_range": "5,5"}, "such as 0,1 or -1,1"),
        ({"value_range": "0,inf"}, "such as 0,1 or -1,1"),
        ({"value_range": "-3e38,3e38"}, "such as 0,1 or -1,1"),
        ({"formats": "jpeg,heic"}, "heic"),
        ({"runner": "NoSuchRunner"}, "NoSuchRunner"),
        ({"direct_num_workers": "many"}, "direct_num_workers"),
        ({"no_wait_until_finish": True}, "would end with this command"),
        ({"no_wait_until_finish": True, "runner": "PrismRunner"}, "would end with this command"),
        ({"no_wait_until_finish": True, **NOBODY, **LOOPBACK}, "would end with this command"),
        ({**NOBODY, **LOOPBACK}, "--job_endpoint localhost:1: no job server answers there"),
        ({**NOBODY, **LOOPBACK, "job_endpoint": "localhost"}, "give the HOST:PORT of one that"),
        (NOBODY, "--environment_type is not given"),
        ({**NOBODY, "sdk_container_image": "i"}, "--environment_type is not given"),
        (DATAFLOW, "a path of this machine"),
        ({"runner": "PortableRunner"}, "needs --job_endpoint"),
        ({"job_endpoint": "localhost:1"}, "--job_endpoint: nothing reads it"),
        (
            {"sdk_container_image": "i", "max_num_workers": "4"},
            "--sdk_container_image, --max_num_workers: nothing reads it, since DirectRunner runs",
        ),
        ({"setup_file": "/nowhere/setup.py"}, "--setup_file /nowhere/setup.py: no such file"),
        ({"setup_file": __file__}, "takes one named setup.py only"),
        ({"extra_package": "/nowhere/p.tar.gz"}, "--extra_package /nowhere/p.tar.gz: no such file"),
        ({"runner": "PrismRunner", "prism_location": "/nowhere/p"}, "--prism_location /nowhere/p:"),
        (
            {"class_names": "/nowhere/names", "top_k": "1", "model": "/no/model"},
            "--class_names /now",
        ),
        ({"input_format": "failures"}, "no output of this program"),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_2(tmp_path, job, flags, told):
    folder = write_pictures(tmp_path / "in", different(1))
    inputs = [] if "input" in flags else [folder]
    ran = job(*inputs, **flags)
    assert (ran.code, ran.line) == (2, None)
    assert told in ran.stderr
    assert len([line for line in ran.stderr.splitlines() if line.startswith("error:")]) == 1
    assert not (tmp_path / "out").exists()


def test_flags_of_other_runners_are_told_of_where_this_one_is_asked_for(tmp_path, job):
    folder = write_pictures(tmp_path / "in", different(1))
    ran = job(folder, runner="DirectRunner", num_workers=2)
    assert (ran.code, ran.line["features"]) == (0, 1)
    (warning,) = ran.manifest["warnings"]
    assert warning.startswith("--num_workers: nothing reads it")


def test_logits_of_a_feature_vector_module_are_refused_by_name(tmp_path, job):
    folder = write_pictures(tmp_path / "in", different(1))
    ran = job(folder, model=exports.exported("saved_model", "feature_vector"), outputs="logits")
    assert ran.code == 2
    assert "has only embedding" in ran.stderr


def test_class_names_are_as_many_as_logits(tmp_path, job):
    names = tmp_path / "names.txt"
    names.write_text("\n".join(map(str, range(CLASSES - 1))))
    folder = write_pictures(tmp_path / "in", different(1))
    ran = job(folder, top_k=1, class_names=names)
    assert (ran.code, ran.line) == (2, None)
    assert f"{CLASSES - 1} lines for {CLASSES} classes" in ran.stderr


def test_an_empty_input_can_be_allowed(tmp_path, job):
    (tmp_path / "in").mkdir()
    assert job(tmp_path / "in").code == 2
    ran = job(tmp_path / "in", allow_empty=True)
    assert (ran.code, ran.line["images"]) == (0, 0)
    assert_true_manifest(ran)


@pytest.mark.parametrize("input_format", ["auto", "tfrecord"])
def test_an_empty_day_asks_nothing_of_columns_and_labels(tmp_path, job, input_format):
    flags = {"label_key": "name", "allow_empty": True, "if_exists": "resume"}
    flags |= {"columns": "note,tags", "input_format": input_format}
    (tmp_path / "none").mkdir()
    ran = job(tmp_path / "none", **flags)
    assert (ran.code, ran.line["images"]) == (0, 0), ran.stderr
    record = {"image/encoded": jpeg(), "name": b"cat", "note": [0.5], "tags": [1, 2]}
    path = write_tfrecord(tmp_path / "a.tfrecord", [record])
    full = job(path, **flags)
    assert (full.code, full.line["features"]) == (0, 1), full.stderr
    ran = job(tmp_path / "none", **flags)
    assert (ran.code, ran.line["images"]) == (0, 0), ran.stderr
    assert ran.manifest["counts"] == full.manifest["counts"]
    write_tfrecord(path, [record, {"image/encoded": jpeg(50, 50), "note": [1.5], "tags": [3]}])
    ran = job(path, **flags)
    (cat, unnamed) = ran.rows("features").values()
    assert (cat["label"], cat["note"], unnamed["label"], unnamed["note"]) == ("cat", 0.5, None, 1.5)


def test_labels_that_no_new_record_has_stay_what_they_were(tmp_path, job):
    flags = {"label_key": "name", "if_exists": "resume"}
    job(write_tfrecord(tmp_path / "a", [{"image/encoded": jpeg(), "name": b"cat"}]), **flags)
    ran = job(write_tfrecord(tmp_path / "b", [{"image/encoded": jpeg(50, 50)}]), **flags)
    assert [row["label"] for row in ran.rows("features").values()] == ["cat", None]
    ran = job(write_pictures(tmp_path / "in", {"c.jpg": jpeg(60, 60)}), **flags)
    assert [row["label"] for row in ran.rows("features").values()] == ["cat", None, None]
    assert verify.main([str(ran.output)]) == 0


def test_failures_of_image_files_have_no_columns(tmp_path, job):
    folder = write_pictures(tmp_path / "in", {**different(1), "bad.jpg": b"bad"})
    ran = job(folder, max_failure_rate=1)
    flags = {"input_format": "failures", "columns": "note", "output": tmp_path / "again"}
    again = job(ran.output, **flags)
    assert (again.code, again.line) == (2, None)
    assert "--columns note: image files have no features to carry" in again.stderr


def test_a_store_that_is_gone_after_the_verdict_hides_nothing(tmp_path, job, monkeypatch):
    def gone(*args):
        raise OSError("refused")

    folder = write_pictures(tmp_path / "in", different(2))
    job(folder)
    monkeypatch.setattr(job_module, "files", SimpleNamespace(**{**vars(files), "delete": gone}))
    monkeypatch.setattr(job_module, "_advise", gone)
    write_pictures(folder, {"new.jpg": jpeg(50, 50)})
    ran = job(folder, if_exists="resume")
    assert (ran.code, ran.line["status"], ran.line["features"]) == (0, "complete", 1)
    assert "OSError: refused" in ran.stderr


def test_keys_of_image_files_are_told_to_do_nothing(tmp_path, job):
    folder = write_pictures(tmp_path / "in", different(1))
    ran = job(folder, id_key="id", label_key="name", dry_run=True)
    assert ran.code == 0
    assert "--id_key id: image files have no features" in ran.stderr
    assert "--label_key name: image files have no features" in ran.stderr


@pytest.mark.parametrize("place", ["gs://bucket/out/", "gs://bucket/out"])
def test_a_folder_that_a_console_made_is_no_file(place, monkeypatch):
    """It leaves an object of the folder's name and a slash."""
    monkeypatch.setattr(preflight.files, "is_file", lambda path: path == "gs://bucket/out/")
    monkeypatch.setattr(preflight, "replaceable_manifest", lambda *_: None)
    warnings = []
    assert preflight._check_output(place, "resume", warnings) is None
    assert warnings == []


def test_a_dry_run_leaves_no_trace(tmp_path, job):
    folder = write_pictures(tmp_path / "in", {"a.jpg": b"nothing", "b.jpg": jpeg()})
    ran = job(folder, dry_run=True)
    assert (ran.code, ran.line["status"]) == (0, "dry_run")
    assert not ran.output.exists()
    bad = write_pictures(tmp_path / "bad", {"a.jpg": b"nothing"})
    ran = job(bad, dry_run=True)
    assert ran.code == 2
    assert "none of the first images can be used" in ran.stderr


def test_every_knob_reaches_the_plan(tmp_path):
    write_pictures(tmp_path / "in", different(1))
    words = {
        "input": tmp_path / "in",
        "model": exports.exported("saved_model", "classification"),
        "output": tmp_path / "out",
        "image_size": SIZE,
        "value_range": "0,1",
        "precision": "bfloat16",
        "inference_threads": 3,
        "formats": "png,jpeg",
        "filter": "bilinear",
        "max_image_pixels": 12345,
        "decode_seconds": 7,
        "decode_memory": "99MiB",
        "compression": "snappy",
        "embedding_dtype": "float16",
    }
    options, beam_args = parse([f"--{name}={value}" for name, value in words.items()])
    plan = preflight.make_plan(options, beam_args, "r", 0.0)
    assert plan.model == loading.LoadSpec(
        words["model"], hints=loading.Hints(SIZE, (0.0, 1.0)), precision="bfloat16", copies=3
    )
    how = plan.preprocessing
    assert (how.formats, how.max_pixels, how.filter) == (("png", "jpeg"), 12345, "bilinear")
    assert plan.isolation == Limits(7.0, 99 << 20)
    assert plan.publication.compression == "snappy"
    assert plan.table.dtype == "float16"
    by_openvino = dataclasses.replace(options, engine="openvino", precision="float32")
    assert preflight.make_plan(by_openvino, beam_args, "r", 0.0).model.engine == "openvino"
    wrong = dataclasses.replace(options, model_sha256="0" * 64)
    with pytest.raises(RequestError, match="--model_sha256"):
        preflight.make_plan(wrong, beam_args, "r", 0.0)


@pytest.mark.parametrize("compression", ["snappy", "none"])
def test_data_files_are_compressed_as_told(tmp_path, job, compression):
    ran = job(write_pictures(tmp_path / "in", different(1)), compression=compression)
    (entry,) = ran.manifest["files"]
    column = pq.ParquetFile(ran.output / entry["path"]).metadata.row_group(0).column(0)
    assert column.compression == {"snappy": "SNAPPY", "none": "UNCOMPRESSED"}[compression]


def test_a_record_behind_the_limit_stays_failed(tmp_path, job):
    path = write_tfrecord(
        tmp_path / "a.tfrecord", [{"image/encoded": data} for data in (jpeg(), b"bad")]
    )
    job(path, max_failure_rate=1)
    flags = {"if_exists": "resume", "retry_failures": True, "max_failure_rate": 1}
    ran = job(path, limit=1, **flags)
    assert ran.manifest["counts"] == {"images": 2, "features": 1, "failures": 1}


def test_a_fault_before_the_graph_is_one_line_and_the_json(tmp_path, job, monkeypatch):
    def boom(*args):
        raise LookupError("at https://h/m?token=s3cret\nsecond line")

    monkeypatch.setattr(preflight.inputs, "survey", boom)
    ran = job(write_pictures(tmp_path / "in", different(1)))
    assert (ran.code, ran.line["status"]) == (1, "failed")
    assert ran.line["output"] == str(tmp_path / "out")
    assert "LookupError: at https://h/m?token=*** second line" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert "s3cret" not in ran.stderr


@pytest.mark.parametrize("reader", ["gone", "full"])
def test_a_complete_run_is_complete_whoever_reads_its_line(tmp_path, reader):
    folder = write_pictures(tmp_path / "in", different(1))
    call = [sys.executable, "-m", "pipeline.extract", "--input", str(folder), "--quiet"]
    call += ["--model", exports.exported("saved_model", "classification")]
    call += ["--output", str(tmp_path / "out")]
    if reader == "full":
        out = os.open("/dev/full", os.O_WRONLY)
    else:
        end, out = os.pipe()
        os.close(end)
    ended = subprocess.run(call, stdout=out, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(out)
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    assert '"status": "complete"' in ended.stderr
    assert (tmp_path / "out" / "_SUCCESS").exists()


def test_names_that_rows_would_show_alike_are_refused(tmp_path, job):
    folder = write_pictures(tmp_path / "in", different(1))
    for name in (b"bad\xff.jpg", b"bad\\xff.jpg"):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(jpeg())
    ran = job(folder)
    assert (ran.code, ran.line) == (2, None)
    assert "two files are both called" in ran.stderr


def test_a_slip_in_the_name_of_id_or_label_is_told(tmp_path, job):
    path = tmp_path / "a.tfrecord"
    with path.open("wb") as stream:
        for number in range(2):
            features = {"image/encoded": jpeg(40 + number, 30), "id": b"%d" % number}
            write_record(stream, serialize_example(features))
    ran = job(path, id_key="ID", label_key="lable")
    assert ran.code == 0
    told = ["--id_key ID: none of the first images", "--label_key lable: none of the first images"]
    assert [line[: len(one)] for line, one in zip(ran.manifest["warnings"], told, strict=True)] == (
        told
    )
    ran = job(path, id_key="id", label_key="", output=tmp_path / "other")
    assert ran.manifest["warnings"] == []
    assert set(ran.rows("features")) == {"0", "1"}


def test_a_wrong_image_key_is_told_of_at_once_and_at_the_end(tmp_path, job):
    few = write_tfrecord(tmp_path / "few.tfrecord", [{"image": jpeg()}, {"image": jpeg(50, 30)}])
    ran = job(few)
    assert ran.code == 3
    told = (
        f"--image_key image/encoded: none of the first 2 records of {few} has it (the example has "
        "image); each such record fails"
    )
    assert told in ran.stderr
    assert "(2 read/MissingFeature)" in ran.stderr
    assert "mend the input (--image_key names what holds the picture), or" in ran.stderr
    ran = job(few, image_key="image", output=tmp_path / "other")
    assert (ran.code, ran.line["features"], ran.manifest["warnings"]) == (0, 2, [])
    folder = write_pictures(tmp_path / "pictures", different(1))
    ran = job(folder, image_key="image", output=tmp_path / "third")
    assert ran.manifest["warnings"] == ["--image_key image: image files have no features"]


def test_local_places_may_be_given_as_file_uris(tmp_path, job):
    folder = write_pictures(tmp_path / "in", different(1))
    model = exports.exported("saved_model", "classification")
    out = tmp_path / "out"
    ran = job(f"file://{folder}", model=f"file://{model}", output=f"file://{out}")
    assert (ran.code, ran.line["output"]) == (0, str(out))
    (key,) = pq.read_table(out / "features")["key"].to_pylist()
    assert Path(key).parent == folder


def test_wrong_flags_are_told_without_traceback_by_the_process(tmp_path):
    call = [sys.executable, "-m", "pipeline.extract", "--inptu", "x"]
    ended = subprocess.run(call, capture_output=True, text=True, cwd=ROOT, check=False)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1
    assert "--input" in ended.stderr


# --- real pictures -----------------------------------------------------------------------------


def test_the_corpus_of_real_and_damaged_pictures(job, corpus):
    ran = job(*[corpus / kind for kind in ("derived", "hostile", "photos")], max_failure_rate=1)
    assert ran.code == 0
    assert_true_manifest(ran)
    features, failures = ran.rows("features"), ran.rows("failures")
    assert len(features) + len(failures) == 366
    supported = {"jpeg", "png", "webp", "gif", "bmp"}
    with (corpus / "manifest.csv").open() as stream:
        for row in csv.DictReader(stream):
            key = str(corpus / row["path"])
            if row["expected"] == "decode" and row["container"] in supported:
                width, height = int(row["width"]), int(row["height"])
                if row["orientation"] in ("5", "6", "7", "8"):
                    width, height = height, width
                assert (features[key]["width"], features[key]["height"]) == (width, height), key
            elif row["expected"] in ("reject", "limit"):
                assert key in failures
            if row["expected"].startswith("decode") and row["container"] not in supported:
                assert failures[key]["error_class"] == "UnsupportedFormat", key


def test_photographs_differ_in_their_embeddings(tmp_path, job):
    from PIL import Image

    for seed in range(3):
        Image.fromarray(photo(64, 64, seed)).save(tmp_path / f"{seed}.png")
    ran = job(tmp_path / "*.png")
    vectors = np.array([row["embedding"] for row in ran.rows("features").values()])
    assert len(np.unique(vectors.round(3), axis=0)) == 3
