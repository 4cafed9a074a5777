"""What is told of an output's rows: the sample, places, pairs, examples."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import pyarrow as pa
import pytest
from test_dataset import publication

from formats import table
from formats.dataset import publish
from formats.manifest import read_manifest
from formats.overview import look, most_alike, principal_places
from formats.parts import FAILURES, FEATURES, PartWriter
from formats.records import Failure, Features, ImageRef
from formats.table import TableSpec


def rows(count, start=0, width=8, make=None):
    rng = np.random.default_rng(start)
    return [
        Features(
            ImageRef(f"/in/{n}", f"/in/{n}", None, n % 3, {}),
            hashlib.sha256(b"%d" % n).hexdigest(),
            40,
            20,
            {"embedding": rng.normal(size=width).astype(np.float32) if make is None else make(n)},
        )
        for n in range(start, start + count)
    ]


def write(output, *files, failures=(), groups=1, **changes):
    """A published output of one file for each list of features."""
    spec = TableSpec(**{"widths": {"embedding": 8}, "metadata": {"run_id": "r1"}, **changes})
    parts = []
    for at, features in enumerate(files):
        writer = PartWriter(str(output), FEATURES, f"part-r1-{at}", spec.schema(), "zstd")
        for some in np.array_split(np.arange(len(features)), groups):
            chosen = [features[n] for n in some]
            writer.write(table.features_table(chosen, spec, spec.schema()))
        parts.append(writer.close())
    if failures:
        batch = table.failures_table(failures, table.failure_schema({}))
        writer = PartWriter(str(output), FAILURES, "part-r1-f", batch.schema, "zstd")
        writer.write(batch)
        parts.append(writer.close())
    run = publication(output, "r1", max_failure_rate=1, described={"model": {}})
    publish(run, parts, 0, dict)
    return str(output), read_manifest(str(output))


def failure(n, error_class="CorruptImage"):
    return Failure(f"/in/x{n}", f"/in/x{n}", None, "decode", error_class, f"why {n}")


@pytest.mark.parametrize("most", [1, 7, 50, 90, 1000])
@pytest.mark.parametrize("kind", ["list", "fixed_size_list"])
def test_a_sample_is_spread_over_files_and_row_groups(tmp_path, most, kind):
    output, manifest = write(tmp_path, rows(60), rows(30, start=100), groups=6, vector_type=kind)
    found = look(output, manifest, most)
    keys = found.rows["key"].to_pylist()
    assert len(set(keys)) == len(keys) == len(found.places)
    assert min(most, 90) <= len(keys) <= 1.3 * most
    assert found.vectors["embedding"].width == 8
    numbers = [int(key.removeprefix("/in/")) for key in keys]
    assert numbers == sorted(numbers)
    if most >= 7:
        assert sum(number >= 100 for number in numbers) == pytest.approx(len(numbers) / 3, abs=1)
    if most >= 90:
        assert numbers == [*range(60), *range(100, 130)]


def test_large_files_count_by_their_rows(tmp_path):
    small = [rows(1, start=1000 + n) for n in range(20)]
    output, manifest = write(tmp_path, *small[:10], rows(300), *small[10:], groups=1)
    keys = look(output, manifest, 50).rows["key"].to_pylist()
    assert 40 <= sum(key < "/in/1000" or len(key) < 8 for key in keys) <= 60
    assert len(keys) <= 64


def test_what_is_not_shown_is_not_read(tmp_path):
    carried = rows(3)
    for row in carried:
        row.ref.columns["heavy"] = b"x"
    output, manifest = write(tmp_path, carried, columns={"heavy": pa.binary()})
    assert look(output, manifest, 9).rows.column_names == [
        "key", "sha256", "width", "height", "label"
    ]  # fmt: skip


def test_classes_are_told_apart_by_number_and_name(tmp_path):
    logits = np.eye(4, dtype=np.float32)
    made = [
        dataclasses.replace(row, vectors={"logits": logits[n]}) for n, row in enumerate(rows(3))
    ]
    names = ("crane", "crane", "heron", "stork")
    for folder, top, expected in (
        ("a", {}, ["0", "1", "2"]),
        ("b", {"top_k": 2}, ["0", "1", "2"]),
        ("c", {"top_k": 1, "class_names": names}, ["crane (0)", "crane (1)", "heron (2)"]),
    ):
        output, manifest = write(tmp_path / folder, made, widths={"logits": 4}, **top)
        assert look(output, manifest, 9).classes == expected


def test_vectors_are_described(tmp_path):
    base = np.arange(8, dtype=np.float32)
    output, manifest = write(tmp_path, rows(4, make=lambda n: base * np.float32([1] * 7 + [n])))
    found = look(output, manifest, 99).vectors["embedding"]
    arrays = np.stack([base * np.float32([1] * 7 + [n]) for n in range(4)])
    np.testing.assert_allclose(found.norms, np.linalg.norm(arrays, axis=1), rtol=1e-6)
    np.testing.assert_allclose([found.mean, found.deviation], [arrays.mean(), arrays.std()])
    assert found.still == 7


def test_nothing_but_failures(tmp_path):
    many = [failure(n) for n in range(9)] + [failure(n, "EmptyImage") for n in range(20, 22)]
    output, manifest = write(tmp_path, failures=many)
    found = look(output, manifest, 10)
    assert (found.rows.num_rows, found.vectors, found.alike) == (0, {}, [])
    assert found.examples == {
        "decode/CorruptImage": [(f"/in/x{n}", f"why {n}") for n in range(3)],
        "decode/EmptyImage": [("/in/x20", "why 20"), ("/in/x21", "why 21")],
    }


# ---------------------------------------------------------------- places


def test_places_are_the_principal_components_whatever_the_shape():
    rng = np.random.default_rng(0)
    for count, width in ((50, 5), (5, 50)):
        array = rng.normal(size=(count, width)) * np.geomspace(9, 0.1, width)
        places, shown = principal_places(array.astype(np.float32))
        left, values, _ = np.linalg.svd(array - array.mean(axis=0), full_matrices=False)
        expected = left[:, :2] * values[:2]
        np.testing.assert_allclose(np.abs(places), np.abs(expected), atol=1e-4)
        assert shown == pytest.approx((values[:2] ** 2).sum() / (values**2).sum(), rel=1e-4)
        again, _ = principal_places(array[::-1].astype(np.float32))
        np.testing.assert_allclose(again[::-1], places, atol=1e-4)  # signs too


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_places_of_few_or_equal_rows(count):
    places, shown = principal_places(np.ones((count, 4), np.float32))
    assert (places.shape, shown) == ((count, 2), 0.0)
    assert not places.any()


# ---------------------------------------------------------------- pairs


def test_the_most_alike_are_other_pictures_and_each_stands_once():
    array = np.float32([[1, 0], [1, 0], [1, 0.1], [0, 1], [0.2, 1], [-1, 0], [0, 0]])
    digests = ["a", "a", "b", "c", "d", "e", "f"]
    found = most_alike(array, list("ABCDEFG"), digests, 2)
    assert [(one, other) for _, one, other in found] == [("A", "C"), ("D", "E")]
    assert found[0][0] == pytest.approx(1 / np.sqrt(1.01))
    everyone = [key for _, *pair in most_alike(array, list("ABCDEFG"), digests) for key in pair]
    assert len(everyone) == len(set(everyone))
    assert most_alike(array[:2], ["A", "B"], ["a", "a"]) == []
