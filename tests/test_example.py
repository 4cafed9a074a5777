"""tf.Example -> ImageRecord: types of a sample, keys, labels, columns, and what fails alone."""

import hashlib
import pickle
import random

import numpy as np
import pyarrow as pa
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.example import (
    ExampleKeys,
    ExampleTypes,
    infer_types,
    names_there,
    parse_examples,
)
from formats.records import Failure, ImageRecord, ImageRef
from formats.tfrecord import Record

IMAGE, LABEL = "image/encoded", "image/class/label"
KEYS = ExampleKeys()
INT = ExampleTypes(pa.int64(), {})
STRING = ExampleTypes(pa.string(), {})
WRONG_UTF8 = b"caf\xe9"


def example(features=None, /, **more):
    """A serialized tf.Example; None leaves a feature's kind unset, [] is an empty bytes_list."""
    message = tf.train.Example()
    for name, values in {**(features or {}), **more}.items():
        feature = message.features.feature[name]
        if values is None:
            feature.SetInParent()
        elif values and isinstance(values[0], int):
            feature.int64_list.value.extend(values)
        elif values and isinstance(values[0], float):
            feature.float_list.value.extend(values)
        else:
            feature.bytes_list.SetInParent()
            feature.bytes_list.value.extend(values)
    return message.SerializeToString()


def parse(examples, keys=KEYS, types=INT):
    records = [Record(100 * i, i, data) for i, data in enumerate(examples)]
    return parse_examples(records, "/d/a.tfrecord", keys, types)


def parse_one(data, keys=KEYS, types=INT):
    (row,) = parse([data], keys, types)
    return row


def refusal(row):
    assert isinstance(row, Failure)
    assert row.stage == "read"
    assert len(row.message) < 500
    assert "\n" not in row.message
    return row.error_class


# parse_examples: what is right


def test_an_example_becomes_a_record():
    data = example({IMAGE: [b"jpeg bytes"], LABEL: [7], "image/height": [3]})
    expected = ImageRecord(
        ImageRef("/d/a.tfrecord#0", "/d/a.tfrecord", 0, 7, {}),
        b"jpeg bytes",
    )
    assert parse_one(data) == expected
    assert type(parse_one(data).ref.label) is int


def test_the_order_is_kept_and_the_index_is_the_records_own():
    records = [Record(0, i, example({IMAGE: [b"%d" % i], LABEL: [i]})) for i in (3, 1, 41)]
    rows = parse_examples(records, "gs://b/x", KEYS, INT)
    assert [(row.ref.key, row.data, row.ref.label) for row in rows] == [
        ("gs://b/x#3", b"3", 3),
        ("gs://b/x#1", b"1", 1),
        ("gs://b/x#41", b"41", 41),
    ]


def test_no_records_no_results():
    assert parse([]) == []


@given(
    st.lists(
        st.tuples(
            st.binary(min_size=1, max_size=50),
            st.none() | st.integers(-(2**63), 2**63 - 1),
            st.lists(st.floats(width=32, allow_nan=False), max_size=3),
            st.text(max_size=5),
        ),
        max_size=6,
    )
)
@settings(max_examples=100, deadline=None)
def test_what_tensorflow_writes_is_read_as_tensorflow_reads_it(rows):
    examples = [
        example(
            {IMAGE: [image], "f": floats, "t": [text.encode()]},
            **({} if label is None else {LABEL: [label]}),
        )
        for image, label, floats, text in rows
    ]
    keys = ExampleKeys(columns=("f", "t"))
    types = ExampleTypes(pa.int64(), {"f": pa.list_(pa.float32()), "t": pa.string()})
    results = parse(examples, keys, types)
    assert len(results) == len(rows)
    for data, result, row in zip(examples, results, rows, strict=True):
        image, label, floats, text = row
        assert (result.data, result.ref.label) == (image, label)
        assert result.ref.columns == {"f": floats, "t": text}
        if floats:
            theirs = tf.io.parse_single_example(
                data,
                {
                    IMAGE: tf.io.FixedLenFeature([], tf.string),
                    "f": tf.io.VarLenFeature(tf.float32),
                    "t": tf.io.FixedLenFeature([], tf.string),
                },
            )
            assert theirs[IMAGE].numpy() == result.data
            np.testing.assert_array_equal(theirs["f"].values, result.ref.columns["f"])
            assert theirs["t"].numpy().decode() == result.ref.columns["t"]


def test_names_are_unicode():
    keys = ExampleKeys(image="bild/größe", id="名", label="étiquette", columns=("столбец",))
    data = example(
        {
            "bild/größe": [b"x"],
            "名": ["犬".encode()],
            "étiquette": [b"chien"],
            "столбец": ["собака".encode()],
        }
    )
    types = infer_types([data], keys)
    ref = parse_one(data, keys, types).ref
    assert (ref.key, ref.label, ref.columns) == ("犬", "chien", {"столбец": "собака"})


# the key


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ([b"photo 7"], "photo 7"),
        (["żółw".encode()], "żółw"),
        ([12], "12"),
        ([-(2**63)], "-9223372036854775808"),
        ([WRONG_UTF8], r"caf\xe9"),
        ([0], "0"),
        ([b""], "/d/a.tfrecord#0"),
        ([], "/d/a.tfrecord#0"),
        (None, "/d/a.tfrecord#0"),
    ],
)
def test_the_key_is_the_id_feature_where_there_is_one(values, key):
    keys = ExampleKeys(id="id")
    assert parse_one(example({IMAGE: [b"x"], "id": values}), keys).ref.key == key


def test_without_an_id_feature_the_key_is_the_position():
    data = example({IMAGE: [b"x"]})
    assert parse_one(data, ExampleKeys(id="id")).ref.key == "/d/a.tfrecord#0"
    assert parse_one(data, ExampleKeys(id=None)).ref.key == "/d/a.tfrecord#0"


@pytest.mark.parametrize("values", [[b"a", b"b"], [1, 2], [1.5]])
def test_an_id_that_names_nothing_is_a_failure_under_its_position(values):
    row = parse_one(example({IMAGE: [b"x"], "id": values}), ExampleKeys(id="id"))
    assert refusal(row) == "IdType"
    assert row.key == "/d/a.tfrecord#0"


def test_a_failure_carries_the_id():
    row = parse_one(example(id=[b"photo 7"]), ExampleKeys(id="id"))
    assert (refusal(row), row.key) == ("MissingFeature", "photo 7")


# the image


def test_a_missing_image_is_named_with_what_is_there():
    data = example({"image": [b"x"], "height": [3]})
    row = parse_one(data)
    assert refusal(row) == "MissingFeature"
    assert row.message == f"image feature '{IMAGE}' is missing; the example has height, image"
    assert (row.sha256, row.bytes, row.record_index) == (None, len(data), 0)


@pytest.mark.parametrize(
    ("values", "state"),
    [([], "is empty"), (None, "is missing"), ([b""], "holds zero bytes")],
)
def test_an_empty_image_is_missing(values, state):
    row = parse_one(example({IMAGE: values}))
    assert refusal(row) == "MissingFeature"
    assert state in row.message


@pytest.mark.parametrize(
    ("values", "found"),
    [([b"a", b"b"], "2 values of bytes"), ([3], "one int64"), ([0.5, 0.5], "2 values of float")],
)
def test_an_image_is_one_bytes_value(values, found):
    row = parse_one(example({IMAGE: values}))
    assert refusal(row) == "ImageType"
    assert found in row.message


def test_zero_bytes_are_an_example_without_features():
    row = parse_one(b"")
    assert refusal(row) == "MissingFeature"
    assert row.message.endswith("the example has nothing")


def test_a_sequence_example_shows_its_context():
    message = tf.train.SequenceExample()
    message.context.feature["length"].int64_list.value.append(2)
    frame = message.feature_lists.feature_list[IMAGE].feature.add()
    frame.bytes_list.value.append(b"frame")
    row = parse_one(message.SerializeToString())
    assert refusal(row) == "MissingFeature"
    assert row.message.endswith("the example has length")


# the label


@pytest.mark.parametrize(
    ("values", "types", "label"),
    [
        ([3], INT, 3),
        ([3], STRING, "3"),
        ([b"cat"], STRING, "cat"),
        (["kočka".encode()], STRING, "kočka"),
        ([b"12"], INT, 12),
        ([b"-12"], INT, -12),
        ([b"9223372036854775807"], INT, 2**63 - 1),
        ([b""], STRING, ""),
        ([], INT, None),
        (None, STRING, None),
    ],
)
def test_a_label_is_of_the_runs_type(values, types, label):
    row = parse_one(example({IMAGE: [b"x"], LABEL: values}), types=types)
    assert isinstance(row, ImageRecord)
    assert row.ref.label == label
    assert type(row.ref.label) is type(label)


@pytest.mark.parametrize(
    ("values", "types"),
    [
        ([b"cat"], INT),
        ([b"007"], INT),
        ([b" 7"], INT),
        ([b"1_0"], INT),
        ([b""], INT),
        ([b"9223372036854775808"], INT),
        ([b"1" * 5000], INT),
        ([WRONG_UTF8], INT),
        ([WRONG_UTF8], STRING),
        ([1.0], INT),
        ([1.0], STRING),
        ([1, 2], INT),
        ([b"a", b"b"], STRING),
    ],
)
def test_a_label_that_would_lose_something_is_a_failure(values, types):
    row = parse_one(example({IMAGE: [b"x"], LABEL: values}), types=types)
    assert refusal(row) == "LabelType"
    assert LABEL in row.message
    assert (row.sha256, row.bytes) == (hashlib.sha256(b"x").hexdigest(), 1)


def test_without_a_label_key_no_label_is_read():
    row = parse_one(example({IMAGE: [b"x"], LABEL: [1.5]}), ExampleKeys(label=None))
    assert row.ref.label is None


# the columns


@pytest.mark.parametrize(
    ("values", "to", "column"),
    [
        ([3], pa.int64(), 3),
        ([0.5], pa.float32(), 0.5),
        ([3], pa.float32(), 3.0),
        ([b"a"], pa.string(), "a"),
        ([3], pa.string(), "3"),
        ([WRONG_UTF8], pa.binary(), WRONG_UTF8),
        ([3], pa.binary(), b"3"),
        ([b"3"], pa.int64(), 3),
        ([1, 2], pa.list_(pa.int64()), [1, 2]),
        ([1], pa.list_(pa.int64()), [1]),
        ([b"a", b"b"], pa.list_(pa.string()), ["a", "b"]),
        ([], pa.list_(pa.int64()), []),
        ([], pa.int64(), None),
        (None, pa.list_(pa.int64()), None),
    ],
)
def test_a_column_is_of_the_runs_type(values, to, column):
    keys = ExampleKeys(columns=("c",))
    row = parse_one(
        example({IMAGE: [b"x"], "c": values}), keys, ExampleTypes(pa.int64(), {"c": to})
    )
    assert isinstance(row, ImageRecord)
    assert row.ref.columns == {"c": column}
    assert type(row.ref.columns["c"]) is type(column)
    assert pa.array([row.ref.columns["c"]], to).to_pylist() == [column]


@pytest.mark.parametrize(
    ("values", "to"),
    [
        ([1, 2], pa.int64()),
        ([b"a"], pa.int64()),
        ([0.5], pa.int64()),
        ([b"0.5"], pa.float32()),
        ([2**24 + 1], pa.float32()),
        ([0.5], pa.string()),
        ([0.5], pa.binary()),
        ([WRONG_UTF8], pa.string()),
        ([b"a", WRONG_UTF8], pa.list_(pa.string())),
    ],
)
def test_a_column_that_would_lose_something_is_a_failure(values, to):
    keys = ExampleKeys(columns=("c",))
    row = parse_one(
        example({IMAGE: [b"x"], "c": values}), keys, ExampleTypes(pa.int64(), {"c": to})
    )
    assert refusal(row) == "ColumnType"
    assert "'c'" in row.message


def test_an_absent_column_is_none():
    keys = ExampleKeys(columns=("c", "d"))
    types = ExampleTypes(pa.int64(), {"c": pa.int64(), "d": pa.list_(pa.int64())})
    assert parse_one(example({IMAGE: [b"x"]}), keys, types).ref.columns == {"c": None, "d": None}


# what is bad fails alone


def test_what_is_no_example_fails_alone():
    good = [example({IMAGE: [b"%d" % i], LABEL: [i]}) for i in range(6)]
    noise = random.Random(1).randbytes(100)
    bad = {1: b"\xff\xd8\xff\xe0 a JPEG", 3: noise, 5: good[5][:-1]}
    rows = parse([bad.get(i, data) for i, data in enumerate(good)])
    assert [i for i, row in enumerate(rows) if isinstance(row, Failure)] == list(bad)
    for i, row in enumerate(rows):
        if i in bad:
            assert refusal(row) == "NotAnExample"
            assert (row.key, row.record_index) == (f"/d/a.tfrecord#{i}", i)
            assert (row.sha256, row.bytes) == (None, len(bad[i]))
        else:
            assert (row.data, row.ref.label) == (b"%d" % i, i)


def test_features_of_two_types_fail_nobody_else():
    examples = [
        example({IMAGE: [b"a"], LABEL: [1], "other": [1]}),
        example({IMAGE: [b"b"], LABEL: [b"2"], "other": [b"x"]}),
        example({IMAGE: [b"c"], LABEL: [b"cat"], "other": [0.5]}),
        example({IMAGE: [4], LABEL: [3]}),
        example({IMAGE: [b"d"], LABEL: []}),
    ]
    rows = parse(examples)
    assert [row.ref.label if isinstance(row, ImageRecord) else refusal(row) for row in rows] == [
        1,
        2,
        "LabelType",
        "ImageType",
        None,
    ]
    assert parse(examples[:1]) == rows[:1]


@given(st.lists(st.binary(max_size=60), min_size=1, max_size=4), st.randoms())
@settings(max_examples=150, deadline=None)
def test_no_bytes_raise_and_good_ones_stay(junk, order):
    good = example({IMAGE: [b"image"], LABEL: [1], "id": [b"k"], "c": [0.5]})
    flipped = bytearray(good)
    flipped[order.randrange(len(good))] ^= 1 << order.randrange(8)
    examples = [good, *junk, bytes(flipped), good]
    keys = ExampleKeys(id="id", columns=("c",))
    rows = parse(examples, keys, ExampleTypes(pa.int64(), {"c": pa.float32()}))
    assert len(rows) == len(examples)
    assert [rows[0].data, rows[-1].data] == [b"image", b"image"]
    assert rows[0].ref.columns == {"c": 0.5}
    # Fields that no one knows are let through, so that junk may parse, but it holds no image.
    assert all(isinstance(row, Failure) for row in rows[1 : 1 + len(junk)])


def test_results_travel_to_workers():
    data = example({IMAGE: [b"x"], LABEL: [1], "c": [b"a"]})
    keys = ExampleKeys(columns=("c",))
    types = pickle.loads(pickle.dumps(infer_types([data], keys)))
    assert types == infer_types([data], keys)
    row = parse_one(data, keys, types)
    assert pickle.loads(pickle.dumps(row)) == row


# infer_types


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([[1], [2]], pa.int64()),
        ([[b"cat"], [b"dog"]], pa.string()),
        ([[1], [b"cat"]], pa.string()),
        ([[b"1"]], pa.string()),
        ([[WRONG_UTF8]], pa.string()),
        ([[], None], pa.null()),
        ([[], [b"cat"]], pa.string()),
        ([], pa.null()),
    ],
)
def test_the_type_of_the_label(labels, expected):
    examples = [example({IMAGE: [b"x"], LABEL: values}) for values in labels]
    assert infer_types([*examples, example({IMAGE: [b"x"]})], KEYS).label == expected


def test_a_float_label_is_refused_in_one_line():
    with pytest.raises(ValueError, match=f"--label_key {LABEL}: .*one float.*'' for none") as error:
        infer_types([example({LABEL: [0.5]})], KEYS)
    assert "\n" not in str(error.value)
    assert infer_types([example({LABEL: [0.5]})], ExampleKeys(label=None)).label == pa.null()


def test_labels_of_several_values_alone_are_a_wrong_request():
    several = [example({LABEL: [1, 2]}), example({LABEL: [1, 2, 3]})]
    with pytest.raises(ValueError, match=f"--label_key {LABEL}: .*3 values of int64"):
        infer_types(several, KEYS)
    assert infer_types(several, ExampleKeys(label=None)).label == pa.null()
    assert infer_types([*several, example({LABEL: [0.5]}), example({LABEL: [b"a"]})], KEYS) == (
        infer_types([example({LABEL: [b"a"]})], KEYS)
    )


def test_which_features_are_there():
    examples = [example({LABEL: [1], "a": []}), b"no example", example({"b": [b"x"]})]
    assert names_there(examples, ["a", "b", LABEL, "c"]) == {"b", LABEL}


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        ([[1], [2]], pa.int64()),
        ([[0.5]], pa.float32()),
        ([[b"a"]], pa.string()),
        ([["é".encode()], [WRONG_UTF8]], pa.binary()),
        ([[1], [2, 3]], pa.list_(pa.int64())),
        ([[0.5, 0.5]], pa.list_(pa.float32())),
        ([[b"a", b"b"]], pa.list_(pa.string())),
        ([[b"a", WRONG_UTF8]], pa.list_(pa.binary())),
        ([[], [1], None], pa.int64()),
        ([[1], [0.5]], pa.float32()),
        ([[1], [b"a"]], pa.string()),
    ],
)
def test_the_type_of_a_column(seen, expected):
    examples = [example(c=values) for values in seen]
    assert infer_types(examples, ExampleKeys(columns=("c",))).columns == {"c": expected}


def test_every_sampled_value_fits_its_inferred_type():
    examples = [
        example({IMAGE: [b"x"], LABEL: [1], "c": [1], "d": [b"a", b"b"]}),
        example({IMAGE: [b"y"], LABEL: [b"cat"], "c": [b"z"]}),
    ]
    keys = ExampleKeys(columns=("c", "d"))
    rows = parse(examples, keys, infer_types(examples, keys))
    assert [row.ref.label for row in rows] == ["1", "cat"]
    assert [row.ref.columns for row in rows] == [
        {"c": "1", "d": ["a", "b"]},
        {"c": "z", "d": None},
    ]


def test_a_column_that_no_example_has_names_the_nearest():
    examples = [
        example({IMAGE: [b"x"], "image/height": [3]}),
        b"\xff no example",
        example({"image/width": [4], LABEL: [1], "image/filename": []}),
    ]
    with pytest.raises(ValueError, match="'image/widht'; nearest: image/width") as error:
        infer_types(examples, ExampleKeys(columns=("image/height", "image/widht")))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="'image/filename'"):
        infer_types(examples, ExampleKeys(columns=("image/filename",)))
    with pytest.raises(ValueError, match="nearest: none"):
        infer_types([], ExampleKeys(columns=("c",)))


def test_what_does_not_parse_gives_no_type():
    examples = [b"\xff no example", example({LABEL: [b"cat"]})]
    assert infer_types(examples, KEYS).label == pa.string()


def test_a_column_may_be_the_label():
    data = example({IMAGE: [b"x"], LABEL: [3]})
    keys = ExampleKeys(columns=(LABEL,))
    ref = parse_one(data, keys, infer_types([data], keys)).ref
    assert (ref.label, ref.columns) == (3, {LABEL: 3})
