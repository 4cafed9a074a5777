"""WriteFeatures, WriteFailures and Publish: rows -> files that roll -> one commit."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from beams import pipe

from formats.dataset import Publication
from formats.parts import PartFile
from formats.records import Failure, Features, ImageRef
from formats.table import TableSpec
from formats.timing import Timing
from pipeline.preflight import DIRECT_RUNNER
from storage import temporaries
from storage.files import NewFile
from transforms import sink
from transforms.sink import Publish, WriteFailures, WriteFeatures

SPEC = TableSpec({"embedding": 4}, columns={"name": pa.string()}, metadata={"run_id": "r"})


def features(n, name="x", source="/d/a"):
    ref = ImageRef(f"{source}#{n}", source, n, n, {"name": name})
    return Features(ref, "0" * 64, 1, 2, {"embedding": np.full(4, n, np.float32)})


def failure(n, source="/d/f"):
    return Failure(f"{source}#{n}", source, n, "decode", "CorruptImage", "why", None, 9)


def rows_of(output, parts):
    return [row for part in parts for row in pq.read_table(Path(output) / part.path).to_pylist()]


def write(output, rows, spec=SPEC, **options):
    return list(pipe(rows, WriteFeatures(str(output), "r", spec, **options)))


def group_rows(output, part):
    meta = pq.ParquetFile(Path(output) / part.path).metadata
    return [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]


# ---------------------------------------------------------------- files


def test_a_file_is_what_its_part_says(tmp_path):
    (part,) = write(tmp_path, [features(n) for n in range(5)])
    path = tmp_path / part.path
    assert part.path.startswith("features/part-r-")
    assert (part.rows, part.bytes) == (5, path.stat().st_size)
    assert part.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    table = pq.read_table(path, page_checksum_verification=True)
    assert table.schema.equals(SPEC.schema(), check_metadata=True)
    assert [row["embedding"] for row in table.to_pylist()] == [[float(n)] * 4 for n in range(5)]


def test_failures_are_written_with_their_reasons(tmp_path):
    (part,) = pipe([failure(1), failure(2)], WriteFailures(str(tmp_path), "r", {"run_id": "r"}))
    assert part.path.startswith("failures/part-r-")
    assert part.reasons == {"decode/CorruptImage": 2}
    assert [row["record_index"] for row in rows_of(tmp_path, [part])] == [1, 2]


def test_no_rows_no_file(tmp_path):
    assert write(tmp_path / "out", []) == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rows_per_file", "sizes"), [(1, [1] * 7), (3, [3, 3, 1]), (7, [7]), (8, [7]), (None, [7])]
)
def test_files_roll_by_rows(tmp_path, rows_per_file, sizes):
    parts = write(tmp_path, [features(n) for n in range(7)], rows_per_file=rows_per_file)
    assert sorted((part.rows for part in parts), reverse=True) == sizes
    assert sorted(row["record_index"] for row in rows_of(tmp_path, parts)) == list(range(7))
    assert len({part.path for part in parts}) == len(sizes)


def test_files_of_failures_roll_by_rows_too(tmp_path):
    parts = pipe([failure(n) for n in range(5)], WriteFailures(str(tmp_path), "r", {}, "zstd", 2))
    assert sorted(part.rows for part in parts) == [1, 2, 2]


def test_files_roll_by_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(sink, "_ROW_GROUP_BYTES", 700)  # two rows: 300 + 16 each, and their name
    monkeypatch.setattr(sink, "_FILE_BYTES", 1)
    parts = write(tmp_path, [features(n, "y" * 50) for n in range(7)])
    assert sorted(part.rows for part in parts) == [1, 2, 2, 2]


def test_files_roll_by_time(tmp_path, monkeypatch):
    monkeypatch.setattr(sink, "_FILE_SECONDS", -1.0)
    parts = write(tmp_path, [features(n) for n in range(4)])
    assert [part.rows for part in parts] == [1, 1, 1, 1]


def test_each_file_of_a_bundle_has_its_own_time(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(sink, "time", SimpleNamespace(monotonic=lambda: now[0]))
    step = WriteFeatures(str(tmp_path), "r", SPEC)._write
    step.start_bundle()
    sizes = []
    for n in range(8):
        sizes += [part.rows for part in step.process(features(n))]
        now[0] += sink._FILE_SECONDS / 2
    assert sizes == [4, 4]


def test_row_groups_are_bounded_by_bytes_carried_columns_too(tmp_path, monkeypatch):
    monkeypatch.setattr(sink, "_ROW_GROUP_BYTES", 4000)
    (small,) = write(tmp_path, [features(n) for n in range(30)])
    assert group_rows(tmp_path, small) == [13, 13, 4]
    (large,) = write(tmp_path, [features(n, "y" * 1500) for n in range(30)])
    assert group_rows(tmp_path, large) == [3] * 10


@pytest.mark.parametrize(
    ("value", "size"),
    [(None, 8), (7, 8), ("abc", 3), (b"ab", 2), ([1, 2, 3], 24), (["ab", "c"], 3), ([], 0)],
)
def test_the_size_of_a_carried_value(value, size):
    assert sink._size(value) == size


def test_a_row_that_does_not_fit_its_schema_fails_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sink, "_ROW_GROUP_BYTES", 1)
    with pytest.raises(Exception, match="Expected bytes, got a 'float' object"):
        write(tmp_path, [features(0), features(1), features(2, name=3.5)])
    assert list(tmp_path.rglob("*.parquet")) == []  # a temporary, perhaps, but no file
    temporaries.abandon_all()  # as the job does
    assert list(tmp_path.rglob(".tmp-*")) == []


def test_a_full_disk_fails_the_run(tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(NewFile, "write", full)
    with pytest.raises(Exception, match="No space left on device"):
        write(tmp_path, [features(0)])
    monkeypatch.undo()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


# ---------------------------------------------------------------- the commit


def run_to_the_commit(output, rows, failed, skipped=(), **changes):
    """Both writers and the commit, as in the graph."""
    given = {
        "if_exists": "error",
        "replaces": None,
        "max_failure_rate": 0.5,
        "compression": "zstd",
        "described": {"options": {}},
        **changes,
    }
    run = Publication(str(output), "r", **given)
    with beam.Pipeline(DIRECT_RUNNER) as p:
        written = p | "Rows" >> beam.Create(rows) | WriteFeatures(str(output), "r", SPEC)
        lost = p | "Failed" >> beam.Create(failed) | WriteFailures(str(output), "r", {})
        timings = p | "Timings" >> beam.Create([Timing(images=2), Timing(images=3, batches=1)])
        counts = p | "Skipped" >> beam.Create(list(skipped))
        _ = (written, lost) | beam.Flatten() | Publish(run, counts, timings, started=0.0)


def test_the_commit_names_every_file(tmp_path):
    run_to_the_commit(tmp_path, [features(n) for n in range(3)], [failure(0)], skipped=[2, 3])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["counts"] == {"images": 4, "features": 3, "failures": 1}
    assert manifest["run"] == {"images": 9, "features": 3, "failures": 1, "skipped": 5}
    assert manifest["timing"]["started"] == 0.0
    assert (manifest["timing"]["images"], manifest["timing"]["batches"]) == (5, 1)
    assert {entry["path"] for entry in manifest["files"]} == {
        str(path.relative_to(tmp_path)) for path in tmp_path.glob("f*/part-*.parquet")
    }
    assert (tmp_path / "_SUCCESS").exists()


def test_a_run_without_rows_commits_too(tmp_path):
    run_to_the_commit(tmp_path, [], [])
    assert json.loads((tmp_path / "manifest.json").read_text())["files"] == []


def test_a_run_with_too_many_failures_publishes_nothing(tmp_path):
    run_to_the_commit(tmp_path, [features(0)], [failure(0), failure(1)])
    left = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert len(left) == 2
    assert left[0] == "manifest.json"


def test_ids_are_settled_over_all_files(tmp_path):
    rows = [features(n) for n in (0, 1)] + [features(0, source="/d/z"), failure(0)]
    same = ImageRef("id", "/d/z", 0)
    rows[2] = Features(same, "1" * 64, 1, 2, rows[2].vectors)
    rows[0] = Features(ImageRef("id", "/d/a", 0), "0" * 64, 1, 2, rows[0].vectors)
    run_to_the_commit(tmp_path, rows[:3], rows[3:])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["failures_by"] == {"decode/CorruptImage": 1, "read/DuplicateKey": 1}
    assert manifest["counts"] == {"images": 4, "features": 2, "failures": 2}


def test_a_part_crosses_a_shuffle():
    part = PartFile("features/part-1.parquet", 2, "ab", b"k" * 32, 9, {"a/b": 1})
    (back,) = pipe([part], beam.Reshuffle())
    assert back == part
