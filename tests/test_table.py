"""Features and failures as Arrow and Parquet: every schema, every bit, every bad name."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats import table
from formats.records import MESSAGE_LIMIT, Failure, Features, ImageError, ImageRef, one_line
from formats.table import TableSpec, failure_schema, failures_table, features_table, top_classes

WIDTHS = {"embedding": 5, "logits": 7}


def vectors(n, widths=WIDTHS):
    """Awkward float32 values: both zeros, subnormals, the largest, and noise."""
    rng = np.random.default_rng(n)
    edges = np.array([0.0, -0.0, 1e-45, -1e-38, 3.4028235e38, 65504.0, 1 / 3], np.float32)
    return {
        name: np.where(rng.random(w) < 0.5, rng.choice(edges, w), rng.normal(0, 9, w)).astype("f4")
        for name, w in widths.items()
    }


def features(n, label=None, widths=WIDTHS, **columns):
    ref = ImageRef(f"k{n}", "/d/a.tfrecord", n, label, columns)
    return Features(ref, f"{n:064x}", 10 + n, 20 + n, vectors(n, widths))


def build(rows, spec):
    batch = features_table(rows, spec, spec.schema())
    batch.validate(full=True)
    return batch


def parquet(batch, compression="zstd"):
    sink = io.BytesIO()
    with table.parquet_writer(sink, batch.schema, compression) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


def read(data):
    return pq.read_table(io.BytesIO(data), page_checksum_verification=True)


# ---------------------------------------------------------------- the schema


@pytest.mark.parametrize(
    ("vector_type", "dtype", "expected"),
    [
        ("list", "float32", "list<element: float>"),
        ("list", "float16", "list<element: halffloat>"),
        ("fixed_size_list", "float32", "fixed_size_list<element: float>[5]"),
        ("fixed_size_list", "float16", "fixed_size_list<element: halffloat>[5]"),
    ],
)
@pytest.mark.parametrize("compression", ["zstd", "snappy", "gzip", "none"])
def test_vectors_come_back_bit_by_bit(vector_type, dtype, expected, compression):
    spec = TableSpec({"embedding": 5}, dtype, vector_type)
    rows = [features(n, widths={"embedding": 5}) for n in range(9)]
    if dtype == "float16":
        for row in rows:
            np.clip(row.vectors["embedding"], -65504, 65504, out=row.vectors["embedding"])
    back = read(parquet(build(rows, spec), compression))
    assert str(back.schema.field("embedding").type) == expected
    flat = back["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    wanted = np.concatenate([row.vectors["embedding"] for row in rows]).astype(dtype)
    assert flat.dtype == wanted.dtype
    assert flat.tobytes() == wanted.tobytes()


def test_the_columns_of_the_contract():
    spec = TableSpec(
        WIDTHS,
        top_k=2,
        class_names=tuple("abcdefg"),
        label=pa.string(),
        columns={"w": pa.list_(pa.int64()), "image/format": pa.string(), "raw": pa.binary()},
        metadata={"run_id": "r"},
    )
    rows = [
        features(0, "cat", **{"w": [1, 2], "image/format": "jpeg", "raw": b"\xff"}),
        features(1, None, w=[], raw=None),
    ]
    back = read(parquet(build(rows, spec)))
    assert [(f.name, str(f.type), f.nullable) for f in back.schema] == [
        ("key", "string", False),
        ("source", "string", False),
        ("record_index", "int64", True),
        ("sha256", "string", False),
        ("width", "int32", False),
        ("height", "int32", False),
        ("label", "string", True),
        ("embedding", "list<element: float>", True),
        ("logits", "list<element: float>", True),
        ("top_classes", "list<element: int32>", True),
        ("top_scores", "list<element: float>", True),
        ("top_labels", "list<element: string>", True),
        ("w", "list<element: int64>", True),
        ("image/format", "string", True),
        ("raw", "binary", True),
    ]
    assert back.schema.metadata == {b"run_id": b"r"}
    first, second = back.to_pylist()
    assert first["label"] == "cat"
    assert (first["w"], first["image/format"], first["raw"]) == ([1, 2], "jpeg", b"\xff")
    assert (second["label"], second["w"], second["image/format"]) == (None, [], None)
    assert first["top_labels"] == ["abcdefg"[c] for c in first["top_classes"]]
    assert (first["key"], first["record_index"], first["width"], first["height"]) == (
        "k0",
        0,
        10,
        20,
    )


def test_only_what_was_asked_for_is_written():
    assert build([features(0)], TableSpec({"logits": 7})).schema.names[-1] == "logits"
    names = build([features(0)], TableSpec({"embedding": 5}, top_k=3)).schema.names
    assert names[-3:] == ["embedding", "top_classes", "top_scores"]


def test_an_image_file_has_no_index_and_its_label_is_null():
    ref = ImageRef("/d/a.jpg", "/d/a.jpg")
    row = Features(ref, "0" * 64, 1, 1, vectors(0))
    (back,) = read(parquet(build([row], TableSpec(WIDTHS)))).to_pylist()
    assert (back["record_index"], back["label"]) == (None, None)


@pytest.mark.parametrize("name", ["key", "embedding", "logits", "label", "top_scores"])
def test_a_carried_column_may_not_take_a_name_of_ours(name):
    with pytest.raises(ValueError, match=f"column {name}: the output has one of this name"):
        TableSpec({"embedding": 5}, columns={name: pa.string()}).schema()


def test_a_value_of_another_type_is_refused_not_bent():
    spec = TableSpec(WIDTHS, columns={"size": pa.int64()})
    with pytest.raises((pa.ArrowInvalid, pa.ArrowTypeError)):
        build([features(0, size="text")], spec)


# ---------------------------------------------------------------- top classes


def softmax(row):
    shifted = np.exp(row.astype(np.float64) - row.astype(np.float64).max())
    return shifted / shifted.sum()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.data())
def test_top_classes_against_a_plain_reference(n, width, data):
    k = data.draw(st.integers(1, width))
    values = st.one_of(st.sampled_from([0.0, 1.0, -1.0]), st.floats(-80, 80, width=32))
    flat = data.draw(st.lists(values, min_size=n * width, max_size=n * width))
    logits = np.array(flat, np.float32).reshape(n, width)
    classes, scores = top_classes(logits, k)
    assert (classes.dtype, scores.dtype) == (np.int32, np.float32)
    for row, chosen, score in zip(logits, classes, scores, strict=True):
        expected = sorted(range(width), key=lambda c: (-row[c], c))[:k]
        assert chosen.tolist() == expected
        np.testing.assert_allclose(score, softmax(row)[expected], rtol=1e-6, atol=1e-40)


def test_huge_logits_do_not_overflow():
    _, scores = top_classes(np.array([[3e38, -3e38, 0]], np.float32), 3)
    assert scores.tolist() == [[1.0, 0.0, 0.0]]


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        ("plain", "plain"),
        ("snow ☃ and 𝄞", "snow ☃ and 𝄞"),
        ("caf\udce9.jpg", "caf\\xe9.jpg"),  # Latin-1 bytes of a file's name
        (None, None),
    ],
)
def test_names_that_are_no_utf8(text, stored):
    assert table.utf8(text) == stored
    row = Failure(text or "k", text or "s", None, "read", "E", text or "m", text)
    (back,) = failures_table([row], failure_schema({})).to_pylist()
    assert back["sha256"] == stored
    if text:
        assert (back["key"], back["source"], back["message"]) == (stored,) * 3
        name = features_table(
            [Features(ImageRef(text, text), "0", 1, 1, vectors(0))],
            TableSpec(WIDTHS),
            TableSpec(WIDTHS).schema(),
        )["key"][0]
        assert name.as_py() == stored


# ---------------------------------------------------------------- failures


def test_failures_have_the_columns_of_the_contract():
    rows = [
        Failure("k", "s", 3, "decode", "CorruptImage", "why", "ab", 99),
        Failure("k2", "s2", None, "read", "FileNotFoundError", "gone"),
    ]
    back = read(parquet(failures_table(rows, failure_schema({"a": "b"}))))
    assert back.to_pylist() == [
        {
            "key": "k",
            "source": "s",
            "record_index": 3,
            "sha256": "ab",
            "stage": "decode",
            "error_class": "CorruptImage",
            "message": "why",
            "bytes": 99,
        },
        {
            "key": "k2",
            "source": "s2",
            "record_index": None,
            "sha256": None,
            "stage": "read",
            "error_class": "FileNotFoundError",
            "message": "gone",
            "bytes": None,
        },
    ]
    assert [str(t) for t in back.schema.types][2] == "int64"
    assert back.schema.metadata == {b"a": b"b"}


def test_metadata_is_text():
    values = {"text": "as it is", "map": {"b": 1, "a": [True, None]}}
    path = {"path": "caf\udce9", "map": {"caf\udce9": ["\udce9"]}}  # bytes that are no UTF-8
    told = {"path": r"caf\xe9", "map": r'{"caf\\xe9": ["\\xe9"]}'}
    assert table.metadata_text(path) == told
    assert table.metadata_text(values) == {"text": "as it is", "map": '{"a": [true, null], "b": 1}'}


# ---------------------------------------------------------------- the file


def outcome(data, checked, wanted):
    """What a reader makes of a file: "refused", "right" or "wrong"."""
    try:
        back = pq.read_table(io.BytesIO(data), page_checksum_verification=checked)
        return "right" if back.equals(wanted) else "wrong"
    except Exception:
        return "refused"


def test_one_flipped_bit_in_a_page_is_seen():
    batch = build([features(n) for n in range(20)], TableSpec(WIDTHS))
    data = parquet(batch, "none")
    wanted = read(data)
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    outcomes = {True: set(), False: set()}
    for at in range(4, footer, 5):
        damaged = bytearray(data)
        damaged[at] ^= 1 << at % 8
        for checked in outcomes:
            outcomes[checked].add(outcome(bytes(damaged), checked, wanted))
    assert outcomes[True] == {"refused", "right"}  # right: a flip in statistics, not in a value
    assert "wrong" in outcomes[False]  # the same flips, read without checksums


def test_vectors_have_neither_statistics_nor_dictionary():
    batch = build([features(n) for n in range(20)], TableSpec(WIDTHS))
    group = pq.ParquetFile(io.BytesIO(parquet(batch))).metadata.row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    vector = columns["embedding.list.element"]
    assert vector.statistics is None
    assert "RLE_DICTIONARY" not in vector.encodings
    assert columns["key"].statistics.min == "k0"
    assert "RLE_DICTIONARY" in columns["source"].encodings


def test_a_message_of_a_name_that_is_no_utf8_keeps_its_bound():
    """Each such byte is four characters in the file."""
    error = ImageError("ShortRead", "\udcc4" * 400)
    failure = Failure.of(ImageRef("k", "s", None), "read", error)
    batch = failures_table([failure], failure_schema({}))
    (message,) = batch.column("message").to_pylist()
    assert message.startswith("\\xc4\\xc4")
    assert len(message) < MESSAGE_LIMIT
    assert one_line("\ud800") == "\\ud800"
