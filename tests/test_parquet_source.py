"""Images in Parquet files: bytes and structs, types by the schema, damage, and little memory."""

from __future__ import annotations

import datetime
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from formats import parquet
from formats.example import ExampleKeys, ExampleTypes
from formats.fields import parse_found
from formats.records import Failure, ImageRecord, ImageRef
from formats.tfrecord import Damage

KEYS = ExampleKeys()
HF = ExampleKeys(image="image", label="label")


def stored(table, **options):
    stream = io.BytesIO()
    pq.write_table(table, stream, **options)
    return stream.getvalue()


def read(data, keys=KEYS):
    return list(parquet.read_images(io.BytesIO(data), len(data), keys))


def records(data, keys=KEYS):
    """What becomes of the rows, with the types that the schema gives; damage is left out."""
    types = types_of(pq.read_schema(io.BytesIO(data)), keys)
    found = [item for item in read(data, keys) if not isinstance(item, Damage)]
    return parse_found(found, "/d/a", keys, types)


def types_of(schema, keys):
    inferred = parquet.infer_types(schema, "/d/a", keys)
    label = pa.int64() if inferred.label == pa.null() else inferred.label
    return ExampleTypes(label, inferred.columns)


def pictures(count):
    return [b"picture %d" % n for n in range(count)]


def structs(count, **changes):
    rows = [{"bytes": data, "path": f"{n}.jpg"} for n, data in enumerate(pictures(count))]
    for n, row in changes.items():
        rows[int(n[1:])] = row
    return rows


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_binary(), pa.dictionary(pa.int32(), pa.binary())], ids=str
)
def test_a_column_of_bytes(kind):
    data = stored(pa.table({"image/encoded": pa.array(pictures(3), kind)}))
    assert records(data) == [
        ImageRecord(ImageRef(f"/d/a#{n}", "/d/a", n), b"picture %d" % n) for n in range(3)
    ]


def test_the_struct_of_hugging_face_datasets():
    data = stored(pa.table({"image": structs(3), "label": [4, None, 6]}))
    found = records(data, HF)
    assert [record.data for record in found] == pictures(3)
    assert [record.ref.label for record in found] == [4, None, 6]


def test_a_struct_that_holds_a_path_alone_is_a_failure_that_says_so():
    rows = structs(4, _1={"bytes": None, "path": "x/1.jpg"}, _2=None, _3={"bytes": b"", "path": ""})
    found = records(stored(pa.table({"image": rows, "label": [1, 2, 3, 4]})), HF)
    assert isinstance(found[0], ImageRecord)
    assert [(f.key, f.record_index, f.error_class) for f in found[1:]] == [
        (f"/d/a#{n}", n, "MissingFeature") for n in (1, 2, 3)
    ]
    assert "'x/1.jpg' and no bytes" in found[1].message
    assert "is null" in found[2].message
    assert "zero bytes" in found[3].message


def test_every_row_may_hold_a_path_alone():
    rows = [{"bytes": None, "path": "a"}, {"bytes": None, "path": "b"}]
    found = records(stored(pa.table({"image": rows})), ExampleKeys(image="image"))
    assert [f.error_class for f in found] == ["MissingFeature"] * 2


def test_ids_labels_and_columns_of_every_type():
    table = pa.table(
        {
            "image": structs(2),
            "name": ["a", "b"],
            "label": pa.array(["cat", "dog"], pa.dictionary(pa.int8(), pa.string())),
            "small": pa.array([1, 2], pa.int8()),
            "huge": pa.array([2**64 - 1, 0], pa.uint64()),
            "half": pa.array([np.float16(0.5), None], pa.float16()),
            "double": [0.1, 0.2],
            "flag": [True, None],
            "raw": pa.array([b"\xff", b""], pa.large_binary()),
            "tags": pa.array([["x", None], []], pa.large_list(pa.string())),
            "boxes": pa.array([[1, 2], [3, 4]], pa.list_(pa.int32(), 2)),
            "when": [datetime.datetime(2026, 1, 2), None],
        }
    )
    names = tuple(table.column_names[3:])
    keys = ExampleKeys("image", "name", "label", names)
    data = stored(table)
    types = types_of(table.schema, keys)
    assert types.label == pa.string()
    assert {name: str(kind) for name, kind in types.columns.items()} == {
        "small": "int64",
        "huge": "uint64",
        "half": "float",
        "double": "double",
        "flag": "bool",
        "raw": "binary",
        "tags": "list<item: string>",
        "boxes": "list<item: int64>",
        "when": "timestamp[us]",
    }
    first, second = records(data, keys)
    assert (first.ref.key, first.ref.label) == ("a", "cat")
    assert first.ref.columns == {
        "small": 1,
        "huge": 2**64 - 1,
        "half": 0.5,
        "double": 0.1,
        "flag": True,
        "raw": b"\xff",
        "tags": ["x", None],
        "boxes": [1, 2],
        "when": datetime.datetime(2026, 1, 2),
    }
    assert second.ref.columns["flag"] is None
    for name, kind in types.columns.items():  # what flows can be written
        values = [record.ref.columns[name] for record in (first, second)]
        assert pa.array(values, kind).to_pylist() == values


def test_a_file_of_other_columns_fails_row_by_row():
    """A later file of a pattern, whose first one gave the types."""
    data = stored(pa.table({"other": [1, 2, 3]}))
    keys = ExampleKeys("image", columns=("text",))
    types = ExampleTypes(pa.int64(), {"text": pa.string()})
    found = parse_found(read(data, keys), "/d/a", keys, types)
    assert [(f.key, f.error_class) for f in found] == [
        (f"/d/a#{n}", "MissingFeature") for n in range(3)
    ]
    data = stored(pa.table({"image": pictures(2), "text": [{"a": 1}, {"a": 2}]}))
    found = parse_found(read(data, keys), "/d/a", keys, types)
    assert [f.error_class for f in found] == ["ColumnType"] * 2
    assert found[0].sha256 is not None


def test_images_of_another_type_are_failures():
    data = stored(pa.table({"image/encoded": ["text"]}))
    (found,) = parse_found(read(data), "/d/a", KEYS, ExampleTypes(pa.int64(), {}))
    assert found.error_class == "ImageType"


def test_only_what_is_asked_for_is_read():
    """Damage in a column that nobody wants costs nothing."""
    table = pa.table({"image/encoded": pictures(3), "huge": [b"z" * 9999] * 3})
    data = bytearray(
        stored(table, compression="none", use_dictionary=False, write_statistics=False)
    )
    at = data.index(b"zzzz")
    data[at - 20 : at + 9000] = bytes(9020)
    with pytest.raises(OSError, match=r"page header|thrift"):
        pq.read_table(io.BytesIO(bytes(data)))
    found = read(bytes(data))
    assert [item.data for item in found] == pictures(3)


# ---------------------------------------------------------------- types and wrong requests


@pytest.mark.parametrize(
    ("columns", "keys", "told"),
    [
        ({"image": structs(1)}, KEYS, "--image_key image/encoded: no such column in /d/a; pass "
         "--image_key image"),
        ({"image": pictures(1)}, KEYS, "pass --image_key image"),
        ({"jpg": pictures(1), "mask": pictures(1)}, KEYS, "columns of bytes are jpg, mask"),
        ({"a": [1], "b": [2]}, KEYS, "it has a, b"),
        ({"image": ["x"]}, ExampleKeys("image"), "is string in /d/a, not bytes"),
        ({"image": pictures(1), "label": [1]}, ExampleKeys("image", label="lable"), "nearest: lab"),
        ({"image": pictures(1), "a": [1]}, ExampleKeys("image", id="id"), "--id_key id: no such"),
        ({"image": pictures(1), "a": [.5]}, ExampleKeys("image", id="a"), "is double, not string"),
        ({"image": pictures(1), "a": [.5]}, ExampleKeys("image", label="a"), "--label_key a"),
        ({"image": pictures(1)}, ExampleKeys("image", columns=("imag",)), "--columns imag: no suc"),
        ({"image": pictures(1), "s": [{"a": 1}]}, ExampleKeys("image", columns=("s",)), "struct"),
        ({"image": pictures(1), "s": [[[1]]]}, ExampleKeys("image", columns=("s",)), "list"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_told_in_one_line(columns, keys, told):
    with pytest.raises(ValueError, match="--") as caught:
        parquet.infer_types(pa.table(columns).schema, "/d/a", keys)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([1], pa.uint8()), pa.int64()),
        (pa.array([True]), pa.int64()),
        (pa.array([b"a"]), pa.string()),
        (pa.array(["a"], pa.large_string()), pa.string()),
    ],
)
def test_label_types(column, expected):
    table = pa.table({"image": pictures(1), "label": column})
    assert parquet.infer_types(table.schema, "/d/a", HF).label == expected
    (found,) = records(stored(table), HF)
    assert pa.array([found.ref.label], expected).null_count == 0


def test_a_label_over_the_range_is_a_failure():
    table = pa.table({"image": pictures(2), "label": pa.array([2**63, 1], pa.uint64())})
    found = records(stored(table), HF)
    assert [type(item) for item in found] == [Failure, ImageRecord]
    assert found[0].error_class == "LabelType"


@pytest.mark.parametrize(
    ("column", "told"),
    [
        (pa.array([0, 2**62, 5], pa.timestamp("us")), "out of range"),
        (pa.array([0, 2**40, 5], pa.timestamp("s", "UTC")), "out of range"),
        (pa.array([0, 2**30, 5], pa.date32()), "must have magnitude"),
        (pa.array([[0], [1, 2**62], []], pa.list_(pa.timestamp("us"))), "out of range"),
        (pa.array([b"a", b"\xff", b"c"]).view(pa.string()), "can't decode"),
    ],
)
def test_a_value_that_python_cannot_hold_costs_its_row_alone(column, told):
    table = pa.table({"image": pictures(3), "id": ["x", "y", "z"], "extra": column})
    keys = ExampleKeys("image", "id", columns=("extra",))
    first, second, third = records(stored(table), keys)
    assert [r.data for r in (first, third)] == [b"picture 0", b"picture 2"]
    held = [column[0].as_py(), column[2].as_py()]
    assert [r.ref.columns["extra"] for r in (first, third)] == held
    assert (second.key, second.record_index, second.bytes) == ("y", 1, 9)
    assert (second.stage, second.error_class) == ("read", "ColumnType")
    assert "column 'extra'" in second.message
    assert told in second.message


@pytest.mark.parametrize(
    ("name", "error_class"), [("id", "IdType"), ("label", "LabelType"), ("image", "ImageType")]
)
def test_what_else_is_no_text_costs_its_row_alone(name, error_class):
    text = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    columns = {"image": pa.array(pictures(3)), "id": pa.array(list("xyz")), "label": text}
    columns[name] = text
    if name == "image":
        columns[name] = pa.StructArray.from_arrays([pa.array(pictures(3)), text], ["bytes", "path"])
    keys = ExampleKeys("image", "id", "label" if name == "label" else None)
    first, second, third = records(stored(pa.table(columns)), keys)
    assert isinstance(first, ImageRecord)
    assert isinstance(third, ImageRecord)
    assert (second.error_class, second.record_index) == (error_class, 1)


# ---------------------------------------------------------------- damage


def grouped(rows=40, a_group=10):
    table = pa.table({"image/encoded": [bytes([n]) * 3000 for n in range(rows)]})
    data = stored(
        table,
        row_group_size=a_group,
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
        data_page_size=3000,
    )
    return data


def test_damage_costs_the_rest_of_its_row_group():
    data = bytearray(grouped())
    at = data.index(bytes([25]) * 100)
    data[at] ^= 1
    found = read(bytes(data))
    (damage,) = [item for item in found if isinstance(item, Damage)]
    others = [item.index for item in found if item is not damage]
    assert set(others) >= {*range(20), *range(30, 40)}
    assert set(others) <= set(range(40)) - {25}
    assert sorted({*others, damage.index}) == sorted([*others, damage.index])
    assert (damage.error_class, damage.bytes > 0) == ("ParquetDamage", True)
    assert damage.offset == damage.index
    assert f"rows {damage.index} to 29" in damage.message
    assert all(item.data == bytes([item.index]) * 3000 for item in found if item is not damage)


@pytest.mark.parametrize("data", [b"PAR1", b"x" * 100, grouped()[:-3], b"PAR1" + bytes(99)])
def test_what_is_no_parquet_file_is_one_damage(data):
    (damage,) = read(data)
    assert (damage.error_class, damage.offset, damage.index) == ("NotParquet", 0, 0)
    assert damage.bytes == len(data)
    assert parquet.count_rows(io.BytesIO(data)) == 1
    assert parquet.read_schema(io.BytesIO(data)) is None


_FLIPS = """
import io, sys
from formats import parquet
from formats.example import ExampleKeys
from formats.tfrecord import Damage

data, step = sys.stdin.buffer.read(), int(sys.argv[1])
foot = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
silent = []
for bit in range(8 * foot, 8 * (len(data) - 8), step):
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    items = list(parquet.read_images(io.BytesIO(flipped), len(data), ExampleKeys(image="image")))
    whole = [(n, b"%d" % n * 40) for n in range(60)] == [
        (i.index, getattr(i, "data", None)) for i in items
    ]
    told = any(isinstance(i, Damage) for i in items) or all(i.error for i in items if items)
    if not whole and not (told and items):
        silent.append(bit)
print(silent)
"""


def test_no_flipped_bit_of_a_footer_ends_the_process_or_hides_rows():
    """Arrow's library aborts where it is asked of a column whose description is damaged."""
    stream = io.BytesIO()
    table = pa.table({"image": [b"%d" % n * 40 for n in range(60)], "label": list(range(60))})
    pq.write_table(table, stream, row_group_size=20, write_page_checksum=True)
    ran = subprocess.run(
        [sys.executable, "-c", _FLIPS, "5"],
        input=stream.getvalue(),
        capture_output=True,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    assert ran.returncode == 0, ran.stderr.decode()[-1000:]
    assert ran.stdout.decode().strip() == "[]"


def test_a_column_whose_name_is_no_utf8_is_one_damage():
    stream = io.BytesIO()
    pq.write_table(pa.table({"image": [b"x"], "caption": ["y"]}), stream, store_schema=False)
    (damage,) = read(stream.getvalue().replace(b"caption", b"\xe3aption"))
    assert (damage.error_class, damage.index) == ("NotParquet", 0)
    assert "no UTF-8" in damage.message


def test_a_null_in_a_list_of_fixed_size_costs_the_rows_that_carry_it_and_no_others():
    values = [[1.0, n] if n != 20 else None for n in range(40)]
    sized = pa.array(values, pa.list_(pa.float32(), 2))
    table = pa.table({"image": [b"%d" % n for n in range(40)], "sized": sized})
    stream = io.BytesIO()
    pq.write_table(table, stream)
    data = stream.getvalue()
    keys = ExampleKeys(image="image", columns=("sized",))
    found = list(parquet.read_images(io.BytesIO(data), len(data), keys))
    assert [item.index for item in found] == list(range(40))
    assert {item.error.error_class for item in found if item.error} == {"ColumnType"}
    whole = [item.index for item in found if item.error is None]
    assert whole == list(range(16))  # what Arrow gives before it
    alone = list(parquet.read_images(io.BytesIO(data), len(data), ExampleKeys(image="image")))
    assert all(item.error is None for item in alone)


def test_an_error_of_the_store_is_no_damage():
    class Failing(io.BytesIO):
        error = None

        def read(self, count=-1):
            if self.tell() < 1000:
                self.error = OSError("the line is dead")
                raise self.error
            return super().read(count)

    data = grouped()
    with pytest.raises(OSError, match="the line is dead"):
        list(parquet.read_images(Failing(data), len(data), KEYS))


def test_rows_are_read_a_few_at_a_time():
    """A row group of any size: what was read for the first row is pages, a small part of it."""
    read_so_far = 0

    class Counting(io.BytesIO):
        def read(self, count=-1):
            nonlocal read_so_far
            data = super().read(count)
            read_so_far += len(data)
            return data

    table = pa.table(
        {"image/encoded": [np.random.default_rng(n).bytes(1 << 17) for n in range(320)]}
    )
    data = stored(table, row_group_size=320, use_dictionary=False, write_batch_size=4)
    rows = parquet.read_images(Counting(data), len(data), KEYS)
    first = next(rows)
    assert first.index == 0
    assert len(data) > 40 << 20
    assert read_so_far < 8 << 20
    rows.close()
