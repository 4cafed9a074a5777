"""An output directory: keys settled, a commit that readers can trust, and what resuming keeps."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats import dataset, parts, resuming, table
from formats.dataset import Publication, publish, read_verdict
from formats.digests import image_digest, key_digest, place_digest
from formats.manifest import read_manifest, replaceable_manifest
from formats.parts import FAILURES, FEATURES, PartWriter, column_batches, describe_part, open_part
from formats.records import Failure, Features, ImageRef
from formats.resuming import resume
from formats.settling import settle, still_failed
from formats.table import TableSpec
from formats.verification import verify
from storage import files, temporaries
from storage.errors import RequestError, RunError

ROWS = {"model": "m1", "top_k": 0}


def metadata(rows=ROWS, run="r"):
    return table.metadata_text({"run_id": run, resuming.ROW_META: rows})


def write_part(output, kind, name, images, rows=ROWS):
    """A closed data file of `images`: (key, source, index) each."""
    if kind == FEATURES:
        spec = TableSpec({"embedding": 2}, metadata=metadata(rows))
        vector = {"embedding": np.ones(2, np.float32)}
        items = [Features(ImageRef(*image), "0" * 64, 1, 1, vector) for image in images]
        batch = table.features_table(items, spec, spec.schema())
    else:
        items = [Failure(*image, "decode", "CorruptImage", "why") for image in images]
        batch = table.failures_table(items, table.failure_schema(metadata(rows)))
    writer = PartWriter(str(output), kind, f"part-{name}", batch.schema, "zstd")
    writer.write(batch)
    return writer.close()


# Runs are called r1, r2 here; what else lies in an output is no run's.
LEFTOVER = resuming._LEFTOVER
SHORT_IDS = re.compile(LEFTOVER.pattern.replace(resuming._RUN, r"(r\d|2026[-\w]+)"))


@pytest.fixture(autouse=True)
def short_ids(monkeypatch):
    monkeypatch.setattr(resuming, "_LEFTOVER", SHORT_IDS)


def images(*numbers, source="/in/a"):
    return [(f"{source}#{n}", source, n) for n in numbers]


def publication(output, run_id, **changes):
    given = {
        "if_exists": "error",
        "replaces": None,
        "max_failure_rate": 0.5,
        "compression": "zstd",
        "described": {"options": {"a": 1}, "model": {}},
        **changes,
    }
    return Publication(str(output), run_id, **given)


def commit(run, parts, skipped=0):
    return publish(run, parts, skipped, lambda: {"seconds": 1.0})


def rows_of(output, paths):
    """(kind, key, source, index, error class or None) of every row, copies too."""
    found = []
    for path in paths:
        with open_part(str(output), path) as part:
            rows = part.read().to_pylist()
        found += [
            (path.partition("/")[0], r["key"], r["source"], r["record_index"], r.get("error_class"))
            for r in rows
        ]
    return sorted(found, key=repr)


def published(output):
    """What a reader by the manifest sees, every claim of the manifest held against the files."""
    manifest = read_manifest(str(output))
    if manifest is None:
        return None
    paths = [entry["path"] for entry in manifest["files"]]
    rows = rows_of(output, paths)
    for entry in manifest["files"]:
        data = (Path(output) / entry["path"]).read_bytes()
        assert entry["bytes"] == len(data)
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()
        assert entry["rows"] == len(rows_of(output, [entry["path"]]))
    kinds = Counter(row[0] for row in rows)
    counts = {"images": len(rows), "features": kinds[FEATURES], "failures": kinds[FAILURES]}
    assert manifest["counts"] == counts
    assert sum(manifest["failures_by"].values()) == kinds[FAILURES]
    assert len({row[1] for row in rows}) == len(rows), "a key stands twice"
    return rows


def files_below(output):
    return sorted(str(p.relative_to(output)) for p in Path(output).rglob("*") if p.is_file())


def good(*numbers):
    return [(FEATURES, *image, None) for image in images(*numbers)]


def described(output, part, entry=None):
    size = (Path(output) / part.path).stat().st_size
    return describe_part(str(output), part.path, size, entry)


# ---------------------------------------------------------------- one data file


def test_a_part_is_what_its_writer_says(tmp_path):
    part = write_part(tmp_path, FAILURES, "r-1", images(0, 1))
    data = (tmp_path / part.path).read_bytes()
    assert (part.path, part.kind, part.rows) == ("failures/part-r-1.parquet", FAILURES, 2)
    assert (part.bytes, part.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert part.reasons == {"decode/CorruptImage": 2}
    assert part.keys == key_digest("/in/a#0") + key_digest("/in/a#1")
    assert described(tmp_path, part) == part
    feature = write_part(tmp_path, FEATURES, "r-1", images(0))
    assert described(tmp_path, feature) == feature
    assert described(tmp_path, part, part.listed()) == part
    for name, value in (("rows", 3), ("bytes", 7)):
        with pytest.raises(RunError, match="is not what the manifest tells of"):
            described(tmp_path, part, {**part.listed(), name: value})


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_an_aborted_part_leaves_nothing(tmp_path):
    schema = table.failure_schema({})
    writer = PartWriter(str(tmp_path), FAILURES, "part-r-1", schema, "zstd")
    writer.write(table.failures_table([Failure("k", "s", 0, "read", "E", "m")], schema))
    writer.abort()
    del writer  # whose finalizer would like to write a footer
    gc.collect()
    assert files_below(tmp_path) == []


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_part_leaves_nothing_where_the_disk_is_full(tmp_path, monkeypatch, call):
    """Whichever write it is that fails: the first bytes, the rows or the footer."""
    schema = table.failure_schema({})
    batch = table.failures_table([Failure("k", "s", 0, "read", "E", "m")], schema)
    steps = iter(range(1, 4))

    def full(file, data):
        raise OSError(28, "No space left on device")

    def step():
        if next(steps) == call:
            monkeypatch.setattr(files.NewFile, "write", full)

    def write():
        step()
        writer = PartWriter(str(tmp_path), FAILURES, "part-r-1", schema, "zstd")
        try:
            step()
            writer.write(batch)
        except OSError:
            writer.abort()
            raise
        step()
        writer.close()  # which cleans up by itself

    with pytest.raises(OSError, match="No space left"):
        write()
    gc.collect()
    assert files_below(tmp_path) == []
    assert not [path for path in temporaries.tracked() if path.startswith(str(tmp_path))]


def test_a_carried_column_may_be_named_stage(tmp_path):
    spec = TableSpec({"embedding": 1}, columns={"stage": pa.string()})
    row = Features(ImageRef("k", "s", 0, None, {"stage": "x"}), "0", 1, 1, {"embedding": [1.0]})
    writer = PartWriter(str(tmp_path), FEATURES, "part-r-1", spec.schema(), "zstd")
    writer.write(table.features_table([row], spec, spec.schema()))
    assert writer.close().reasons == {}


# ---------------------------------------------------------------- settling


def settled(tmp_path, kept, fresh):
    kept_after, fresh_after = settle(str(tmp_path), kept, fresh, "r", "zstd")
    return tuple(rows_of(tmp_path, [p.path for p in ps]) for ps in (kept_after, fresh_after))


def test_keys_that_are_unique_touch_no_file(tmp_path):
    parts = [write_part(tmp_path, FEATURES, f"r-{n}", images(n)) for n in range(2)]
    before = files_below(tmp_path)
    assert settle(str(tmp_path), [], parts, "r", "zstd") == ([], parts)
    assert settle(str(tmp_path), [], [], "r", "zstd") == ([], [])
    assert files_below(tmp_path) == before


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        # the smallest (source, index) keeps an id, in whatever order they were written
        (
            [(FEATURES, [("id", "b", 0), ("id", "a", 10), ("id", "a", 9), ("x", "a", 1)])],
            [
                (FAILURES, "a#10", "a", 10, "DuplicateKey"),
                (FAILURES, "b#0", "b", 0, "DuplicateKey"),
                (FEATURES, "id", "a", 9, None),
                (FEATURES, "x", "a", 1, None),
            ],
        ),
        # a file is before the records of a container of its name; it has no index
        (
            [(FEATURES, [("id", "a", None)]), (FEATURES, [("id", "a", 0), ("id", "b", None)])],
            [
                (FAILURES, "a#0", "a", 0, "DuplicateKey"),
                (FAILURES, "b", "b", None, "DuplicateKey"),
                (FEATURES, "id", "a", None, None),
            ],
        ),
        # copies of one place, of a bundle that was tried again, are one image
        (
            [(FEATURES, [("id", "a", 1), ("y", "a", 2)]), (FEATURES, [("id", "a", 1)])],
            [(FEATURES, "id", "a", 1, None), (FEATURES, "y", "a", 2, None)],
        ),
        # ... features before failures
        (
            [(FAILURES, [("id", "a", 1)]), (FEATURES, [("id", "a", 1)])],
            [(FEATURES, "id", "a", 1, None)],
        ),
        # copies of a loser are one failure
        (
            [(FEATURES, [("id", "a", 1), ("id", "b", 2)]), (FEATURES, [("id", "b", 2)])],
            [(FAILURES, "b#2", "b", 2, "DuplicateKey"), (FEATURES, "id", "a", 1, None)],
        ),
        # an id may be what a loser would be called: its own, ...
        (
            [(FEATURES, [("a#1", "a", 0), ("a#1", "a", 1), ("a#1#2", "a", 2)])],
            [
                (FAILURES, "a#1#3", "a", 1, "DuplicateKey"),
                (FEATURES, "a#1", "a", 0, None),
                (FEATURES, "a#1#2", "a", 2, None),
            ],
        ),
        # ... a file's that is listed besides, and what another loser at its place is called
        (
            [
                (FEATURES, [("b", "b", None), ("id", "a", None), ("id", "b", None)]),
                (FEATURES, [("x", "a", 0), ("x", "c", 7), ("y", "a", 1), ("y", "c", 7)]),
            ],
            [
                (FAILURES, "b#2", "b", None, "DuplicateKey"),
                (FAILURES, "c#7", "c", 7, "DuplicateKey"),
                (FAILURES, "c#7#2", "c", 7, "DuplicateKey"),
                (FEATURES, "b", "b", None, None),
                (FEATURES, "id", "a", None, None),
                (FEATURES, "x", "a", 0, None),
                (FEATURES, "y", "a", 1, None),
            ],
        ),
        # a failure can keep an id, and can lose one
        (
            [
                (FAILURES, [("id", "a", 1), ("z", "c", 1)]),
                (FEATURES, [("id", "b", 1), ("z", "b", 2)]),
            ],
            [
                (FAILURES, "b#1", "b", 1, "DuplicateKey"),
                (FAILURES, "c#1", "c", 1, "DuplicateKey"),
                (FAILURES, "id", "a", 1, "CorruptImage"),
                (FEATURES, "z", "b", 2, None),
            ],
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("turned", [False, True])
def test_settle(tmp_path, parts, expected, turned):
    written = [write_part(tmp_path, kind, f"r-{i}", rows) for i, (kind, rows) in enumerate(parts)]
    after = settled(tmp_path, [], written[::-1] if turned else written)[1]
    assert after == sorted(expected, key=repr)


def test_a_duplicate_names_who_keeps_the_id_on_one_short_line(tmp_path):
    key = "two\nlines" + "x" * 600
    part = write_part(tmp_path, FEATURES, "r-1", [(key, "c" * 600, 0), (key, "b", 1)])
    _, (_, duplicates) = settle(str(tmp_path), [], [part], "r", "zstd")
    with open_part(str(tmp_path), duplicates.path) as reader:
        (row,) = reader.read().to_pylist()
        assert json.loads(reader.schema_arrow.metadata[resuming.ROW_META.encode()]) == ROWS
    assert (row["stage"], row["error_class"], row["sha256"]) == ("read", "DuplicateKey", "0" * 64)
    assert row["key"] == "c" * 600 + "#0"
    assert row["message"].endswith("is that of b#1 too, which keeps it")
    assert "\n" not in row["message"]
    assert len(row["message"]) < 500
    assert duplicates.reasons == {"read/DuplicateKey": 1}


def test_a_file_that_loses_rows_keeps_its_row_groups(tmp_path):
    spec = TableSpec({"embedding": 2})
    writer = PartWriter(str(tmp_path), FEATURES, "part-r-1", spec.schema(), "zstd")
    for group in ([("a", "s", 0), ("b", "s", 1)], [("a", "t", 2)], [("c", "s", 3), ("d", "s", 4)]):
        rows = [
            Features(ImageRef(*image), "0", 1, 1, {"embedding": np.zeros(2)}) for image in group
        ]
        writer.write(table.features_table(rows, spec, spec.schema()))
    _, (kept, _) = settle(str(tmp_path), [], [writer.close()], "r", "zstd")
    with open_part(str(tmp_path), kept.path) as reader:
        assert [reader.metadata.row_group(i).num_rows for i in range(reader.num_row_groups)] == [
            2,
            2,
        ]
        assert reader.read(["key"])["key"].to_pylist() == ["a", "b", "c", "d"]


KINDS = st.sampled_from([FEATURES, FAILURES])
PLACES = [(source, index) for source in "ab" for index in (None, 0, 1, 2)]


@settings(max_examples=60, deadline=None)
@given(
    keys=st.lists(st.sampled_from("xyz"), min_size=len(PLACES), max_size=len(PLACES)),
    parts=st.lists(st.tuples(KINDS, st.booleans(), st.lists(st.sampled_from(PLACES))), max_size=5),
)
def test_every_image_ends_once(keys, parts):
    """Each place ends in one row, on the side it came from; only copies are dropped."""
    key_of = dict(zip(PLACES, keys, strict=True))
    parts = sorted((p for p in parts if p[2]), key=lambda part: part[1])  # earlier runs' first
    with tempfile.TemporaryDirectory() as output:
        sides = ([], [])
        survivors = {}  # place -> (kind, side)
        for number, (kind, new, places) in enumerate(parts):
            rows = [(key_of[place], *place) for place in places]
            sides[new].append(write_part(output, kind, f"r-{number}", rows))
            for place in places:
                if survivors.get(place, (FAILURES,))[0] == FAILURES and (
                    kind == FEATURES or place not in survivors
                ):
                    survivors[place] = (kind, new)
        expected = ([], [])
        order = sorted(
            survivors, key=lambda place: (place[0], -1 if place[1] is None else place[1])
        )
        winners = {}
        for place in order:
            (source, index), (kind, new) = place, survivors[place]
            if winners.setdefault(key_of[place], place) == place:
                reason = "CorruptImage" if kind == FAILURES else None
                expected[new].append((kind, key_of[place], source, index, reason))
            else:
                key = source if index is None else f"{source}#{index}"
                expected[new].append((FAILURES, key, source, index, "DuplicateKey"))
        after = settle(output, *sides, "r", "zstd")
        for side, wanted in zip(after, expected, strict=True):
            assert rows_of(output, [part.path for part in side]) == sorted(wanted, key=repr)
            assert all(part.rows for part in side)
            assert [described(output, part) for part in side] == side


# ---------------------------------------------------------------- publishing


def test_the_first_commit(tmp_path):
    parts = [
        write_part(tmp_path, FEATURES, "r1-a", images(0, 1, 2)),
        write_part(tmp_path, FAILURES, "r1-b", images(3)),
    ]
    verdict = commit(publication(tmp_path, "r1"), parts, skipped=2)
    run = {"images": 6, "features": 3, "failures": 1, "skipped": 2}
    assert verdict == {"status": "complete", "run": run}
    assert read_verdict(str(tmp_path), "r1") == verdict
    assert published(tmp_path) == [(FAILURES, *images(3)[0], "CorruptImage"), *good(0, 1, 2)]
    manifest = read_manifest(str(tmp_path))
    assert (manifest["format_version"], manifest["status"]) == (1, "complete")
    assert (manifest["run_id"], manifest["options"]) == ("r1", {"a": 1})
    assert manifest["failures_by"] == {"decode/CorruptImage": 1}
    assert manifest["timing"] == {"seconds": 1.0}
    assert [entry["path"] for entry in manifest["files"]] == sorted(part.path for part in parts)
    assert (tmp_path / "_SUCCESS").read_bytes() == b"r1\n"


def test_an_empty_run_is_complete(tmp_path):
    assert commit(publication(tmp_path, "r1"), [])["status"] == "complete"
    assert published(tmp_path) == []
    assert files_below(tmp_path) == ["_SUCCESS", "manifest.json"]


def test_a_repeated_commit_changes_nothing(tmp_path):
    run, parts = publication(tmp_path, "r1"), [write_part(tmp_path, FEATURES, "r1-a", images(0))]
    first = commit(run, parts)
    text = (tmp_path / "manifest.json").read_bytes()
    (tmp_path / "_SUCCESS").unlink()  # as if the worker had died before it
    assert commit(run, parts) == first
    assert (tmp_path / "manifest.json").read_bytes() == text
    assert "_SUCCESS" in files_below(tmp_path)


def test_files_of_bundles_that_were_tried_again_are_removed(tmp_path):
    parts = [write_part(tmp_path, FEATURES, "r1-a", images(0))]
    write_part(tmp_path, FEATURES, "r1-lost", images(0))
    commit(publication(tmp_path, "r1"), parts)
    assert files_below(tmp_path) == ["_SUCCESS", "features/part-r1-a.parquet", "manifest.json"]


def first_run(output):
    """A published run r1 of images 0 to 3, the last of them a failure."""
    parts = [
        write_part(output, FEATURES, "r1-a", images(0, 1, 2)),
        write_part(output, FAILURES, "r1-b", images(3)),
    ]
    commit(publication(output, "r1"), parts)


def overwriting(output, run_id="r2", replaces="r1", **changes):
    return publication(output, run_id, if_exists="overwrite", replaces=replaces, **changes)


def test_overwrite_deletes_what_the_old_manifest_named_and_nothing_else(tmp_path):
    first_run(tmp_path)
    others = ["features/mine.parquet", "features/part-of-somebody.parquet", "notes.txt"]
    for name in others:
        (tmp_path / name).write_bytes(b"mine")
    commit(overwriting(tmp_path), [write_part(tmp_path, FEATURES, "r2-a", images(7))])
    assert published(tmp_path) == good(7)
    left = ["_SUCCESS", "features/part-r2-a.parquet", "manifest.json"]
    assert files_below(tmp_path) == sorted([*left, *others])
    superseded = ["failures/part-r1-b.parquet", "features/part-r1-a.parquet"]
    assert read_manifest(str(tmp_path))["superseded"] == superseded


def test_resuming_deletes_what_runs_have_left_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(resuming, "_LEFTOVER", LEFTOVER)
    first_run(tmp_path)
    run_id = "20261129T101112Z-0a1b2c3d"
    mine = [f"features/part-{run_id}-x.parquet", f"_run-{run_id}.finished"]
    mine += [
        "failures/.tmp-0a1b2c3d-part-x.parquet",
        ".tmp-probe-0a1b2c3d",
        ".tmp-0a1b2c3d-_SUCCESS",
    ]
    others = ["features/part-00000.csv", "features/part-r-00000", "features/part-0.snappy.parquet"]
    others += ["_run-notes.txt", "failures/.tmp-mine", "features/part-1.parquet"]
    for name in [*mine, *others]:
        (tmp_path / name).write_bytes(b"somebody's")
    found = resumed(tmp_path)
    assert found.retired == tuple(sorted(mine))
    run = publication(
        tmp_path, "r2", if_exists="resume", replaces="r1", kept=found.kept, retired=found.retired
    )
    commit(run, [])
    assert set(others) <= set(files_below(tmp_path))
    assert not set(mine) & set(files_below(tmp_path))


def test_folders_of_data_may_be_links(tmp_path):
    for kind in (FEATURES, FAILURES):
        (tmp_path / f"large-{kind}").mkdir()
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / kind).symlink_to(tmp_path / f"large-{kind}")
    first_run(tmp_path / "out")
    kept = ("failures/part-r1-b.parquet", "features/part-r1-a.parquet")
    assert resumed(tmp_path / "out").kept == kept
    write_part(tmp_path / "out", FEATURES, "r2-a", images(4))
    assert resumed(tmp_path / "out").kept == (*kept, "features/part-r2-a.parquet")


def test_what_could_not_be_deleted_never_comes_back(tmp_path, monkeypatch):
    first_run(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(OSError("busy")))
        with pytest.raises(OSError, match="busy"):
            commit(overwriting(tmp_path), [write_part(tmp_path, FEATURES, "r2-a", images(0))])
    assert len(files_below(tmp_path)) == 5
    assert resume(str(tmp_path), read_manifest(str(tmp_path)), ROWS).kept == (
        "features/part-r2-a.parquet",
    )
    part = write_part(tmp_path, FEATURES, "r3-a", images(1))
    commit(overwriting(tmp_path, "r3", "r2"), [part])
    assert files_below(tmp_path) == ["_SUCCESS", part.path, "manifest.json"]


@pytest.mark.parametrize("if_exists", ["error", "resume"])
def test_another_run_has_published_meanwhile(tmp_path, if_exists):
    mine = write_part(tmp_path, FEATURES, "r2-a", images(8))
    write_part(tmp_path, FEATURES, "r2-lost", images(8))
    first_run(tmp_path)
    before = published(tmp_path)
    run = publication(tmp_path, "r2", if_exists=if_exists)
    for _ in range(2):
        with pytest.raises(RunError, match="run r1 has published here since this run began"):
            commit(run, [mine])
        assert published(tmp_path) == before
        assert not [name for name in files_below(tmp_path) if "r2" in name]
    assert read_verdict(str(tmp_path), "r2") is None


def test_a_commit_that_is_retried_after_another_overwrote_it_is_refused(tmp_path):
    """A worker that was thought dead must not take the other's data for leftovers of its own."""
    first_run(tmp_path)
    mine = [write_part(tmp_path, FEATURES, "r2-a", images(8))]
    commit(overwriting(tmp_path), mine)
    commit(overwriting(tmp_path, "r3"), [write_part(tmp_path, FEATURES, "r3-a", images(9))])
    with pytest.raises(RunError, match=r"features/part-r2-a.parquet of this run is gone"):
        commit(overwriting(tmp_path), mine)
    assert published(tmp_path) == good(9)


def adopted(output):
    """r2 overwrites r1 and lives; r3 has resumed, and taken r2's files for a killed run's."""
    first_run(output)
    mine = [
        write_part(output, FEATURES, "r2-a", images(8)),
        write_part(output, FAILURES, "r2-b", images(9)),
    ]
    found = resumed(output)
    assert {part.path for part in mine} <= set(found.kept)
    run = publication(
        output, "r3", if_exists="resume", replaces="r1", kept=found.kept, retired=found.retired
    )
    commit(run, [write_part(output, FEATURES, "r3-a", images(10))])
    return mine


def test_a_rejected_run_leaves_what_another_has_adopted(tmp_path):
    mine = adopted(tmp_path)
    before = published(tmp_path)
    for _ in range(2):
        verdict = commit(overwriting(tmp_path, max_failure_rate=0), mine)
        assert verdict["status"] == "too_many_failures"
        assert published(tmp_path) == before


def test_a_run_whose_files_another_has_adopted_can_still_overwrite(tmp_path):
    mine = adopted(tmp_path)
    commit(overwriting(tmp_path), mine)
    assert published(tmp_path) == [(FAILURES, *images(9)[0], "CorruptImage"), *good(8)]
    paths = sorted(part.path for part in mine)
    assert files_below(tmp_path) == ["_SUCCESS", *paths, "manifest.json"]


@pytest.mark.parametrize("if_exists", ["error", "resume"])
def test_a_refused_run_leaves_what_another_has_adopted(tmp_path, if_exists):
    mine = adopted(tmp_path)
    before = published(tmp_path)
    with pytest.raises(RunError, match="run r3 has published here"):
        commit(publication(tmp_path, "r2", if_exists=if_exists, replaces="r1"), mine)
    assert published(tmp_path) == before


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("if_exists", ["error", "overwrite"])
def test_two_runs_that_commit_at_once_on_a_store(tmp_path, monkeypatch, when, if_exists):
    """Where no lock keeps them apart: just before, and just after, this one writes its manifest."""
    monkeypatch.setattr(files, "alone", lambda folder: contextlib.nullcontext())
    other = write_part(tmp_path, FEATURES, "r3-a", images(9))
    mine = [write_part(tmp_path, FEATURES, "r2-a", images(7, 8))]
    run = publication(tmp_path, "r2", if_exists=if_exists)

    def once(function):
        def interrupted(*args):
            monkeypatch.undo()
            monkeypatch.setattr(files, "alone", lambda folder: contextlib.nullcontext())
            result = function(*args) if when == "after" else None
            commit(publication(tmp_path, "r3", if_exists="overwrite"), [other])
            return function(*args) if when == "before" else result

        return interrupted

    name = "write_manifest" if when == "after" else "settle"
    monkeypatch.setattr(dataset, name, once(getattr(dataset, name)))
    if (when, if_exists) == ("before", "overwrite"):
        commit(run, mine)
        assert published(tmp_path) == good(7, 8)
    else:
        with pytest.raises(RunError, match="run r3 has published"):
            commit(run, mine)
        assert published(tmp_path) == good(9)
    (entry,) = read_manifest(str(tmp_path))["files"]
    assert files_below(tmp_path) == ["_SUCCESS", entry["path"], "manifest.json"]


def test_a_run_whose_files_another_is_about_to_delete_is_refused(tmp_path, monkeypatch):
    """On a store: between another's manifest, which retires them, and its deletions."""
    first_run(tmp_path)
    mine = [write_part(tmp_path, FEATURES, "r2-a", images(8), {**ROWS, "model": "m2"})]
    found = resumed(tmp_path)
    assert found.retired == (mine[0].path,)
    run = publication(
        tmp_path, "r3", if_exists="resume", replaces="r1", kept=found.kept, retired=found.retired
    )
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "_finish", lambda *_: None)
        commit(run, [])
    with pytest.raises(RunError, match=r"r2-a\.parquet of this run is gone"):
        commit(overwriting(tmp_path), mine)
    commit(run, [])
    assert published(tmp_path) == [(FAILURES, *images(3)[0], "CorruptImage"), *good(0, 1, 2)]


def test_one_run_commits_at_a_time(tmp_path):
    """The second waits for the first, and takes its output for the old one."""
    order = []

    def settling(*args):
        order.append("in")
        time.sleep(0.05)
        order.append("out")
        return settle(*args)

    def publish_one(number):
        part = write_part(tmp_path, FEATURES, f"r{number}-a", images(number))
        commit(overwriting(tmp_path, f"r{number}", None), [part])

    with mock.patch.object(dataset, "settle", settling), ThreadPoolExecutor(4) as threads:
        list(threads.map(publish_one, range(4)))
    assert order == ["in", "out"] * 4
    assert len(published(tmp_path)) == 1
    assert len(files_below(tmp_path)) == 3


# ---------------------------------------------------------------- too many failures


@pytest.mark.parametrize(
    ("features", "failures", "rate", "status"),
    [
        (9, 1, 0.1, "complete"),
        (8, 2, 0.1, "too_many_failures"),
        (0, 1, 1.0, "complete"),
        (0, 1, 0.99, "too_many_failures"),
        (5, 0, 0.0, "complete"),
        (5, 1, 0.0, "too_many_failures"),
        (71, 29, 0.29, "complete"),  # 0.29 * 100 is less than 29
        (43, 57, 0.57, "complete"),
        (0, 0, 0.0, "complete"),
    ],
)
def test_the_failure_rate(tmp_path, features, failures, rate, status):
    parts = [
        write_part(tmp_path, kind, "r1-a", images(*range(count), source=kind))
        for kind, count in ((FEATURES, features), (FAILURES, failures))
        if count
    ]
    run = publication(tmp_path, "r1", max_failure_rate=rate)
    verdict = commit(run, parts, skipped=1000)
    counts = {"images": features + failures + 1000, "features": features, "failures": failures}
    assert verdict == {"status": status, "run": {**counts, "skipped": 1000}}
    assert commit(run, parts, skipped=1000) == verdict == read_verdict(str(tmp_path), "r1")
    assert (published(tmp_path) is not None) == (status == "complete")


@pytest.mark.parametrize(
    ("left", "fresh", "status"),
    [((0, 60), (40, 0), "too_many_failures"), ((90, 0), (8, 6), "complete")],
)
def test_what_a_killed_run_left_is_judged_with_the_rest(tmp_path, left, fresh, status):
    """As if the run had not been killed."""

    def write(run_id, counts):
        return [
            write_part(tmp_path, kind, f"{run_id}-a", images(*range(count), source=kind + run_id))
            for kind, count in zip((FEATURES, FAILURES), counts, strict=True)
            if count
        ]

    write("r1", left)
    found = resumed(tmp_path)
    run = publication(
        tmp_path, "r2", if_exists="resume", kept=found.kept, max_failure_rate=0.3,
        retired=found.retired,
    )  # fmt: skip
    skipped = sum(left)
    verdict = commit(run, write("r2", fresh), skipped)
    counts = {"images": sum(fresh) + skipped, "features": fresh[0], "failures": fresh[1]}
    assert verdict == {"status": status, "run": {**counts, "skipped": skipped}}
    assert (published(tmp_path) is not None) == (status == "complete")
    if status != "complete":
        told = read_manifest(str(tmp_path / "_failed" / "r2"))
        assert told["judged"] == {"failures": left[1] + fresh[1], "images": sum(left) + sum(fresh)}
        assert len(published(tmp_path / "_failed" / "r2")) == told["judged"]["failures"]
        assert resumed(tmp_path).kept == ()  # the next run tries them again


def test_a_rejected_run_that_is_killed_is_not_published_by_the_next(tmp_path, monkeypatch):
    run, parts, skipped = plan_reject(tmp_path)
    before = published(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "_delete", mock.Mock(side_effect=Kill))
        with pytest.raises(Kill):
            commit(run, parts, skipped)
    assert go_on(tmp_path, max_failure_rate=0.1)["status"] == "too_many_failures"
    assert published(tmp_path) == before


def test_a_rejected_run_leaves_its_failures_readable_and_the_old_output_as_it_was(tmp_path):
    first_run(tmp_path)
    before, names = published(tmp_path), files_below(tmp_path)
    parts = [
        write_part(tmp_path, FEATURES, "r2-a", images(5)),
        write_part(tmp_path, FAILURES, "r2-b", images(6, 7)),
    ]
    write_part(tmp_path, FEATURES, "r2-lost", images(5))
    run = overwriting(tmp_path)
    assert commit(run, parts)["status"] == "too_many_failures"
    assert published(tmp_path) == before
    folder = "_failed/r2"
    left = [f"{folder}/failures/part-r2-b.parquet", f"{folder}/manifest.json"]
    assert files_below(tmp_path) == sorted([*names, *left])
    rejected = published(tmp_path / folder)  # an output of its own, of failures alone
    assert [row[1] for row in rejected] == ["/in/a#6", "/in/a#7"]
    assert read_manifest(str(tmp_path / folder))["status"] == "too_many_failures"
    again = resume(str(tmp_path), read_manifest(str(tmp_path)), ROWS)
    assert not any("_failed" in path for path in again.retired)


# ---------------------------------------------------------------- resuming


def resumed(output, rows=ROWS, retry=None):
    return resume(str(output), read_manifest(str(output)), rows, retry)


def places(images):
    return b"".join(place_digest(source, index) for _, source, index in images)


def keys(images):
    return b"".join(key_digest(key) for key, *_ in images)


def test_resuming_nothing(tmp_path):
    assert resume(str(tmp_path / "new"), None, ROWS) == resuming.Resumed()


def test_a_resumed_run_keeps_published_and_whole_files(tmp_path):
    first_run(tmp_path)
    write_part(tmp_path, FEATURES, "r2-a", images(4))  # r2 was killed before its commit
    torn = tmp_path / "features" / "part-r2-torn.parquet"
    torn.write_bytes((tmp_path / "features/part-r2-a.parquet").read_bytes()[:-9])
    (tmp_path / "features" / ".tmp-00000001-part-r2-c.parquet").write_bytes(b"PAR1")
    (tmp_path / "_run-r2.finished").write_bytes(b"")
    (tmp_path / "mine" / "features").mkdir(parents=True)
    (tmp_path / "mine" / "features" / "part-1.parquet").write_bytes(b"not yours")
    found = resumed(tmp_path)
    assert found.kept == (
        "failures/part-r1-b.parquet",
        "features/part-r1-a.parquet",
        "features/part-r2-a.parquet",
    )
    assert found.retired == (
        "_run-r2.finished",
        "features/.tmp-00000001-part-r2-c.parquet",
        "features/part-r2-torn.parquet",
    )
    (killed,) = images(4)
    assert found.finished == keys(images(3, 0, 1, 2)) + image_digest(*killed)
    assert (found.retried, found.reread) == ((), b"")
    run = publication(
        tmp_path, "r3", if_exists="resume", replaces="r1", kept=found.kept, retired=found.retired
    )
    verdict = commit(run, [write_part(tmp_path, FEATURES, "r3-a", images(5, 6))], skipped=5)
    assert verdict["run"] == {"images": 7, "features": 2, "failures": 0, "skipped": 5}
    assert published(tmp_path) == [
        (FAILURES, *images(3)[0], "CorruptImage"),
        *good(0, 1, 2, 4, 5, 6),
    ]
    left = ["_SUCCESS", "features/part-r3-a.parquet", "manifest.json"]
    assert files_below(tmp_path) == sorted([*left, *found.kept, "mine/features/part-1.parquet"])


def test_failures_that_are_tried_again_are_replaced(tmp_path):
    first_run(tmp_path)
    verdict = retried(tmp_path, [(FEATURES, images(3))], ["/in/a"])
    assert verdict["run"] == {"images": 4, "features": 1, "failures": 0, "skipped": 3}
    assert published(tmp_path) == good(0, 1, 2, 3)
    assert len(files_below(tmp_path)) == 4


def retried(output, fresh, reread=()):
    """A run r2 that tries failures again, and reads `reread` whole; it writes `fresh`."""
    found = resumed(output, retry=reread)
    assert found.kept == ("features/part-r1-a.parquet",)
    assert found.retried == ("failures/part-r1-b.parquet",)
    assert found.finished == keys(images(0, 1, 2))
    run = publication(
        output, "r2", if_exists="resume", replaces="r1", max_failure_rate=1, kept=found.kept,
        retried=found.retried, reread=found.reread, retired=found.retired,
    )  # fmt: skip
    parts = [write_part(output, kind, f"r2-{n}", rows) for n, (kind, rows) in enumerate(fresh)]
    verdict = commit(run, parts, skipped=3)
    assert commit(run, parts, skipped=3) == verdict
    return verdict


@pytest.mark.parametrize(
    ("failure", "fresh", "reread", "stays"),
    [
        (("/in/a#3", "/in/a", 3), [], [], True),  # not read again: another input, a limit
        (("/in/b", "/in/b", None), [], ["/in/a"], True),  # the file is gone
        (("/in/b", "/in/b", None), [(FEATURES, [("/in/b", "/in/b", None)])], [], False),
        (("/in/b", "/in/b", None), [(FAILURES, [("/in/b", "/in/b", None)])], [], False),
        (("id", "/in/a", 3), [(FEATURES, [("id", "/in/a", 5)])], [], False),  # it has moved
        (("id", "/in/a", 3), [(FEATURES, [("other", "/in/a", 3)])], [], False),  # mended
        (("id", "/in/a", 3), [(FEATURES, [("other", "/in/a", 5)])], [], True),
        (("/in/a@99", "/in/a", 3), [(FEATURES, images(3))], [], False),
        (("/in/a@99", "/in/a", 3), [], ["/in/a"], False),  # there is no more damage
        (("/in/a@99", "/in/a", 3), [], ["/in"], True),
        (("/in/a", "/in/a", None), [], ["/in/a"], False),  # the whole of it could not be read
        # Of what cannot be read to its end this time, nobody knows what lies behind.
        (("/in/a#9", "/in/a", 9), [(FAILURES, [("/in/a", "/in/a", None)])], ["/in/a"], True),
        (("/in/a#9", "/in/a", 9), [(FAILURES, [("/in/a@70", "/in/a", 5)])], ["/in/a"], True),
        (("/in/a#9", "/in/a", 9), [(FAILURES, [("/in/a#5", "/in/a", 5)])], ["/in/a"], False),
        (("/in/a#9", "/in/a", 9), [(FAILURES, [("/in/b@70", "/in/b", 5)])], ["/in/a"], False),
        # It could not be read at all, and was, to its end or to the damage.
        (("/in/a", "/in/a", None), [(FAILURES, [("/in/a@70", "/in/a", 5)])], ["/in/a"], False),
    ],
)
def test_a_failure_stays_unless_it_is_tried_again(tmp_path, failure, fresh, reread, stays):
    parts = [
        write_part(tmp_path, FEATURES, "r1-a", images(0, 1, 2)),
        write_part(tmp_path, FAILURES, "r1-b", [failure, ("else", "/else", 7)]),
    ]
    commit(publication(tmp_path, "r1"), parts)
    retried(tmp_path, fresh, reread)
    new = [image[0] for _, rows in fresh for image in rows]
    expected = ["else", *new, *(["/in/a#0", "/in/a#1", "/in/a#2"])] + [failure[0]] * stays
    assert sorted(row[1] for row in published(tmp_path)) == sorted(expected)
    named = [entry["path"] for entry in read_manifest(str(tmp_path))["files"]]
    assert files_below(tmp_path) == sorted(["_SUCCESS", "manifest.json", *named])


def test_records_that_failed_count_among_those_that_a_container_is_known_to_have(tmp_path):
    failed = [("/in/a#7", "/in/a", 7), ("/in/b@900", "/in/b", 9)]  # damage may lie behind the last
    parts = [
        write_part(tmp_path, FEATURES, "r1-a", images(0, 1, 2)),
        write_part(tmp_path, FAILURES, "r1-b", failed),
    ]
    commit(publication(tmp_path, "r1"), parts)
    for retry in (None, [], ["/in/a"]):
        assert resumed(tmp_path, retry=retry).counts == {"/in/a": 8}


def test_what_an_attempt_after_the_commit_has_written_does_not_stay(tmp_path):
    """As an engine makes that begins the whole job anew."""
    part = write_part(tmp_path, FEATURES, "r1-a", images(0))
    verdict = commit(publication(tmp_path, "r1"), [part])
    again = write_part(tmp_path, FEATURES, "r1-b", images(0))
    assert commit(publication(tmp_path, "r1"), [again]) == verdict
    assert files_below(tmp_path) == ["_SUCCESS", part.path, "manifest.json"]


def test_an_attempt_that_finds_another_one_committing_deletes_nothing(tmp_path, monkeypatch):
    """On a store, where two attempts of one commit may run at once."""
    part = write_part(tmp_path, FEATURES, "r1-a", images(0))
    run = publication(tmp_path, "r1")
    look = dataset.list_parts

    def meanwhile(output):  # the other commits between this one's two looks
        monkeypatch.setattr(dataset, "list_parts", look)
        found = look(output)
        commit(run, [part])
        return found

    monkeypatch.setattr(dataset, "list_parts", meanwhile)
    monkeypatch.setattr(files, "alone", lambda folder: contextlib.nullcontext())
    assert commit(run, [part])["status"] == "complete"
    assert published(tmp_path) == good(0)
    assert files_below(tmp_path) == ["_SUCCESS", part.path, "manifest.json"]


def test_an_image_that_lost_its_id_stays_where_the_other_is_not_read_again(tmp_path):
    twice = [*images(0, 1, 2), ("/in/a#0", "/in/b", 5)]
    commit(publication(tmp_path, "r1"), [write_part(tmp_path, FEATURES, "r1-a", twice)])
    before = published(tmp_path)
    found = resumed(tmp_path, retry=["/in/b"])
    run = publication(
        tmp_path, "r2", if_exists="resume", replaces="r1", kept=found.kept, retried=found.retried,
        reread=found.reread,
    )  # fmt: skip
    assert found.reread == key_digest("/in/b")
    commit(run, [], skipped=4)
    assert published(tmp_path) == before
    assert [row[4] for row in before] == ["DuplicateKey", None, None, None]


def test_an_id_that_a_later_run_brings_again_is_settled_with_the_earlier_rows(tmp_path):
    earlier = write_part(tmp_path, FEATURES, "r1-a", [("x", "b", 0), ("y", "b", 1)])
    commit(publication(tmp_path, "r1"), [earlier])
    found = resumed(tmp_path)
    fresh = write_part(tmp_path, FEATURES, "r2-a", [("x", "a", 0), ("y", "c", 0), ("z", "c", 1)])
    run = publication(tmp_path, "r2", if_exists="resume", replaces="r1", kept=found.kept)
    verdict = commit(run, [fresh], skipped=2)
    # of this run: x, z, and c#0 which lost y; the earlier b#0, which lost x, was counted then
    assert verdict["run"] == {"images": 5, "features": 2, "failures": 1, "skipped": 2}
    assert published(tmp_path) == [
        (FAILURES, "b#0", "b", 0, "DuplicateKey"),
        (FAILURES, "c#0", "c", 0, "DuplicateKey"),
        (FEATURES, "x", "a", 0, None),
        (FEATURES, "y", "b", 1, None),
        (FEATURES, "z", "c", 1, None),
    ]


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ({**ROWS, "model": "m2"}, r'another model \("m1", now "m2"\)'),
        ({**ROWS, "x": [1]}, r"another x \(null, now \[1\]\)"),
        (
            {**ROWS, "top_k": 3, "model": "m" * 99},
            rf'another model \("m1", now "{"m" * 36}\.\.\.\), top_k \(0, now 3\); one output',
        ),
    ],
)
def test_other_options_are_refused_naming_the_difference(tmp_path, rows, named):
    write_part(tmp_path, FEATURES, "r0-a", images(9))
    with pytest.raises(RequestError, match=named):
        resumed(tmp_path, rows)  # nothing is published yet: the work of hours, perhaps
    first_run(tmp_path)
    with pytest.raises(RequestError, match=f"--if_exists resume: .*{named}") as caught:
        resumed(tmp_path, rows)
    assert "\n" not in str(caught.value)


def test_the_difference_is_told_down_to_the_leaf():
    """However much that is alike lies beside it, in whatever order, and within a line."""
    there = {
        "preprocessing": {"fit": "stretch", "range": [0, 1], "means": list("abcdef") * 9},
        "class_names": [str(n) for n in range(1000)],
        "keys": ["image", None],
    }
    now = json.loads(json.dumps(there, sort_keys=True))
    now["preprocessing"]["fit"] = "pad"
    now["preprocessing"]["means"][53] = "x"
    now["class_names"].append("more")
    now["keys"][1] = "id"
    text = {resuming.ROW_META.encode(): json.dumps(there).encode()}
    assert resuming._other_rows(text, now) == (
        'class_names[1000] (null, now "more"), keys.id_key (null, now "id"), '
        'preprocessing.fit ("stretch", now "pad"), preprocessing.means[53] ("f", now "x")'
    )
    assert resuming._other_rows(text, there) is None
    now["class_names"] = ["x" * 300] * 1000
    now["preprocessing"] = {}
    told = resuming._other_rows(text, now)
    assert told.endswith(", 999 more")
    assert len(told) < 700


def test_a_killed_run_of_other_options_does_not_lock_a_published_output(tmp_path):
    first_run(tmp_path)
    write_part(tmp_path, FEATURES, "r2-a", images(9), {**ROWS, "model": "m2"})
    found = resumed(tmp_path)
    assert found.retired == ("features/part-r2-a.parquet",)
    assert "features/part-r2-a.parquet" not in found.kept


def test_rows_that_an_overwriting_run_came_after_are_not_adopted(tmp_path):
    """They may be of pictures that are there no longer, or are others by now."""
    killed, whole, later = (f"2026010{day}T000000Z-aaaaaaaa" for day in (1, 2, 3))
    write_part(tmp_path, FEATURES, f"{killed}-a", images(0))
    run = publication(tmp_path, whole, if_exists="overwrite")
    commit(run, [write_part(tmp_path, FEATURES, f"{whole}-a", images(1))])
    write_part(tmp_path, FEATURES, f"{later}-a", images(2))
    found = resumed(tmp_path)
    assert found.kept == tuple(f"features/part-{run_id}-a.parquet" for run_id in (whole, later))
    assert found.retired == (f"features/part-{killed}-a.parquet",)


@pytest.mark.parametrize("harm", ["missing", "torn"])
def test_a_published_file_that_is_lost_is_refused(tmp_path, harm):
    first_run(tmp_path)
    path = tmp_path / "features" / "part-r1-a.parquet"
    path.unlink() if harm == "missing" else path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RequestError, match=r"part-r1-a.parquet is named by the manifest and miss"):
        resumed(tmp_path)


def test_a_published_file_that_is_another_is_refused(tmp_path):
    first_run(tmp_path)
    other = write_part(tmp_path, FEATURES, "x", images(*range(40)))
    (tmp_path / other.path).rename(tmp_path / "features" / "part-r1-a.parquet")
    with pytest.raises(RequestError, match="would publish altered rows"):
        resumed(tmp_path)


def test_failures_that_were_tried_again_are_let_go_of_in_every_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "_BATCH_ROWS", 2)
    failed = write_part(tmp_path, FAILURES, "r1-b", images(0, 1, 2, 3, 4))
    fresh = [write_part(tmp_path, FEATURES, "r2-a", images(3))]
    (left,), again = still_failed(str(tmp_path), [failed], fresh, b"", "r2", "zstd")
    assert [row[3] for row in rows_of(tmp_path, [left.path])] == [0, 1, 2, 4]
    assert again == {key_digest("/in/a#3")}


def damage(path, column):
    """Flip a bit in a page of `column`."""
    group = pq.ParquetFile(path).metadata.row_group(0)
    (found,) = [
        c for i in range(group.num_columns) if (c := group.column(i)).path_in_schema == column
    ]
    data = bytearray(path.read_bytes())
    data[found.data_page_offset + found.total_compressed_size - 1] ^= 1
    path.write_bytes(data)


def test_damage_in_a_published_file_stays_visible(tmp_path):
    """Resuming does not read it whole: the digest it had is carried on, for verify to hold."""
    model = {"fingerprint": None, "outputs": {"embedding": 2}}
    parts = [write_part(tmp_path, FEATURES, "r1-a", images(*range(50)))]
    described = {"options": {}, "model": model}
    commit(publication(tmp_path, "r1", described=described), parts)
    damage(tmp_path / parts[0].path, "embedding.list.element")
    run = publication(
        tmp_path, "r2", if_exists="resume", replaces="r1", kept=resumed(tmp_path).kept,
        described=described,
    )  # fmt: skip
    assert commit(run, [])["status"] == "complete"
    assert read_manifest(str(tmp_path))["files"] == [parts[0].listed()]
    told = []
    verify(str(tmp_path), told.append)
    assert [line for line in told if "sha256" in line and parts[0].path in line]


def test_damage_in_what_resuming_reads_is_refused(tmp_path):
    first_run(tmp_path)
    damage(tmp_path / "features" / "part-r1-a.parquet", "key")
    with pytest.raises(OSError, match="CRC"):
        resumed(tmp_path)


def test_resuming_reads_no_vectors(tmp_path, monkeypatch):
    parts = [write_part(tmp_path, FEATURES, f"r1-{n}", images(n)) for n in range(3)]
    commit(publication(tmp_path, "r1"), parts)
    asked = []
    read = column_batches
    for module in ("parts", "resuming", "settling"):
        monkeypatch.setattr(
            f"formats.{module}.column_batches", lambda *args: asked.append(args[-1]) or read(*args)
        )
    monkeypatch.setattr("formats.parts.sha256_of", lambda *_: pytest.fail("read a kept file whole"))
    found = resumed(tmp_path)
    commit(
        publication(tmp_path, "r2", if_exists="resume", replaces="r1", kept=found.kept), [],
        skipped=3,
    )  # fmt: skip
    assert {name for names in asked for name in names} == {"key", "source", "record_index"}
    assert published(tmp_path) == good(0, 1, 2)


def test_what_is_known_by_its_key_and_what_by_its_place(tmp_path):
    by_key = [("x", "/in/a", 0), ("/in/a", "/in/a", None), ("/in/a#2", "/in/a", 2)]
    by_place = [("a.jpg", "/in/a.jpg", None)]  # as a list names it
    features = write_part(tmp_path, FEATURES, "r1-a", [*by_key, *by_place])
    failed, damaged = [("/b@5", "/in/b", 3)], [("/in/b@99", "/in/b", 4)]
    failures = write_part(tmp_path, FAILURES, "r1-b", [*failed, *damaged])
    commit(publication(tmp_path, "r1", max_failure_rate=1), [features, failures])
    assert resumed(tmp_path).finished == (
        keys([*failed, *damaged]) + places(damaged) + keys([*by_key, *by_place]) + places(by_place)
    )


def test_how_many_records_a_container_had(tmp_path):
    rows = [("x", "a", 7), ("y", "a", 3), ("z", "b", None), ("v", "c", 0)]
    write_part(tmp_path, FEATURES, "r1-a", rows)
    assert resumed(tmp_path).counts == {"a": 8, "c": 1}
    write_part(tmp_path, FAILURES, "r1-b", [("c@99", "c", 3), ("id", "a", 9)])
    assert resumed(tmp_path).counts == {"a": 10, "c": 1}  # damage is none: it may follow the last


def test_the_temporary_of_a_run_that_is_alive_is_left_alone(tmp_path):
    first_run(tmp_path)
    alive = files.NewFile(str(tmp_path / "features" / "part-r9-a.parquet"))
    dead = tmp_path / "features" / ".tmp-00000001-part-r8-a.parquet"
    dead.write_bytes(b"PAR1")
    found = resumed(tmp_path)
    assert found.retired == (str(dead.relative_to(tmp_path)),)
    run = publication(
        tmp_path, "r2", if_exists="resume", replaces="r1", kept=found.kept, retired=found.retired
    )
    commit(run, [])
    assert not dead.exists()
    alive.write(b"whole")
    alive.close()
    assert (tmp_path / "features" / "part-r9-a.parquet").read_bytes() == b"whole"


def test_the_temporary_of_a_worker_that_was_lost_is_removed_by_its_own_run(tmp_path):
    part = write_part(tmp_path, FEATURES, "r1-a", images(0))
    (tmp_path / "features" / ".tmp-00000001-part-r1-b.parquet").write_bytes(b"PAR1")
    (tmp_path / dataset.finished_name("r1")).write_bytes(b"")  # the launcher has left
    commit(publication(tmp_path, "r1"), [part])
    assert files_below(tmp_path) == ["_SUCCESS", part.path, "manifest.json"]


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1PAR1", bytes(500), b"x" * 500])
def test_files_that_are_no_parquet_are_not_whole(tmp_path, data):
    part = write_part(tmp_path, FEATURES, "r1-a", images(0))
    (tmp_path / "features" / "part-r1-b.parquet").write_bytes(data)
    assert list(resumed(tmp_path).kept) == [part.path]


MANIFEST = (
    '{"format_version": 1, "run_id": "r", "status": "complete", "counts": {}, "run": {}, '
    '"failures_by": {}, "files": %s}'
)


def test_only_a_manifest_of_a_newer_version_is_not_overwritten(tmp_path):
    (tmp_path / "manifest.json").write_text('{"format_version": 2}')
    with pytest.raises(RequestError, match="newer"):
        replaceable_manifest(str(tmp_path), "overwrite")
    (tmp_path / "manifest.json").write_text("damaged")
    assert replaceable_manifest(str(tmp_path), "overwrite") is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not a manifest"),
        ("[]", "not a manifest"),
        ("null", "not a manifest"),
        ('{"name": "a web app"}', "not a manifest"),
        ('{"format_version": "1"}', "not a manifest"),
        ('{"format_version": 2}', "format_version 2 is newer than 1"),
        ('{"format_version": 1}', "not a manifest .*'files'"),
        ('{"format_version": 1, "files": 3}', "not a manifest"),
        ('{"format_version": 1, "files": []}', "not a manifest .*'run_id'"),
        (MANIFEST % "null", "not a manifest .TypeError: .*"),
        (MANIFEST % '[{"path": "features/a"}]', "not a manifest .*'rows'"),
        (
            MANIFEST % '[{"path": "a", "rows": 1, "bytes": "2", "sha256": ""}]',
            "not a manifest .*bytes is no int",
        ),
    ],
)
def test_manifests_that_cannot_be_used(tmp_path, text, said):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(RequestError, match=said) as caught:
        read_manifest(str(tmp_path))
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- killed at every step


def plan_first(output):
    """A first run with an id that stands twice, and a copy."""
    parts = [
        write_part(output, FEATURES, "r2-a", [*images(0, 1), ("id", "/in/b", 0)]),
        write_part(output, FEATURES, "r2-b", [("id", "/in/c", 0), *images(1)]),
    ]
    return publication(output, "r2"), parts, 0


def plan_overwrite(output):
    first_run(output)
    _, parts, _ = plan_first(output)
    return overwriting(output), parts, 0


def plan_resume(output):
    """A resumed run that finds a killed one's files, and brings an id again."""
    first_run(output)
    write_part(output, FEATURES, "r0-a", [("id", "/in/b", 7)])
    (output / "features" / "part-r0-torn.parquet").write_bytes(b"PAR1")
    found = resumed(output)
    run = publication(
        output, "r2", if_exists="resume", replaces="r1", kept=found.kept, retired=found.retired
    )
    return run, [write_part(output, FEATURES, "r2-a", [("id", "/in/b", 0), *images(5)])], 5


def plan_reject(output):
    first_run(output)
    run, parts, _ = plan_first(output)
    run = overwriting(output, max_failure_rate=0.1)
    return run, [*parts, write_part(output, FAILURES, "r2-c", images(8, 9))], 0


def go_on(output, skipped=0, **changes):
    """A run r9 that resumes, and finds nothing new."""
    found = resumed(output)
    manifest = read_manifest(str(output))
    replaces = manifest["run_id"] if manifest else None
    run = publication(
        output, "r9", if_exists="resume", replaces=replaces, kept=found.kept, retired=found.retired,
        **changes,
    )  # fmt: skip
    return commit(run, [], skipped)


class Kill(BaseException):
    """The process is to end; handlers still run, unlike in `dying`."""


class Disk:
    """Counts renames and deletions, looks at each state, and dies before the one numbered `at`."""

    def __init__(self, monkeypatch, look, at=None):
        self.count = 0
        self.look, self.at = look, at
        for owner, name in ((os, "replace"), (Path, "unlink")):
            monkeypatch.setattr(owner, name, self.step(getattr(owner, name)))

    def step(self, function):
        def stepped(*args, **kwargs):
            if self.at is not None and self.count >= self.at:
                raise Kill
            self.count += 1
            result = function(*args, **kwargs)
            self.look()
            return result

        return stepped


@pytest.mark.parametrize("plan", [plan_first, plan_overwrite, plan_resume, plan_reject])
def test_a_commit_that_is_killed_anywhere(tmp_path, monkeypatch, plan):
    """At every instant a reader sees the whole old or the whole new output; a retry completes."""
    calm = tmp_path / "calm"
    run, parts, skipped = plan(calm)
    old, seen = published(calm), []
    with monkeypatch.context() as patch:
        disk = Disk(patch, lambda: seen.append(published(calm)))
        verdict = commit(run, parts, skipped)
    new = published(calm)
    assert disk.count > 5
    assert (new == old) == (plan is plan_reject)
    assert [rows for rows in seen if rows not in (old, new)] == []
    for at in range(disk.count):
        output = tmp_path / f"killed-{at}"
        run, parts, skipped = plan(output)
        with monkeypatch.context() as patch:
            Disk(patch, lambda: None, at)
            with pytest.raises(Kill):
                commit(run, parts, skipped)
        assert published(output) in (old, new)
        assert commit(run, parts, skipped) == verdict
        assert published(output) == new
        names = [name for name in files_below(output) if ".tmp-" not in name]
        assert names == files_below(calm)


@pytest.mark.parametrize("plan", [plan_first, plan_resume])
def test_a_run_that_is_killed_in_its_commit_can_be_resumed(tmp_path, monkeypatch, plan):
    """Another run takes over what the killed one had written; nothing is lost or stands twice."""
    calm = tmp_path / "calm"
    run, parts, skipped = plan(calm)
    with monkeypatch.context() as patch:
        disk = Disk(patch, lambda: None)
        commit(run, parts, skipped)
    new = published(calm)
    for at in range(disk.count):
        output = tmp_path / f"killed-{at}"
        run, parts, skipped = plan(output)
        with monkeypatch.context() as patch:
            Disk(patch, lambda: None, at)
            with pytest.raises(Kill):
                commit(run, parts, skipped)
        verdict = go_on(output, len(new))
        assert verdict["run"] == {
            "images": len(new), "features": 0, "failures": 0, "skipped": len(new),
        }  # fmt: skip
        assert published(output) == new
        named = {entry["path"] for entry in read_manifest(str(output))["files"]}
        assert set(files_below(output)) == named | {"_SUCCESS", "manifest.json"}


@pytest.mark.parametrize("plan", ["plan_first", "plan_overwrite", "plan_resume", "plan_reject"])
def test_a_process_that_ends_anywhere_in_its_commit(tmp_path, plan):
    """os._exit before and after every open, close, rename, deletion and sync of the commit.

    A reader sees the whole old or the whole new output; a retry and a resumed run complete it, and
    leave nothing besides, temporaries included.
    """
    command = [sys.executable, str(Path(__file__).with_name("dying.py")), plan, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert told["wrong"] == []
    assert all(told["seen"][name] >= 2 for name in ("open", "close", "replace", "unlink", "fsync"))
