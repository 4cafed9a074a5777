"""WebDataset tars: samples, values beside an image, and every damage told where it is."""

from __future__ import annotations

import gzip
import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats import fields, webdataset
from formats.example import ExampleKeys, ExampleTypes
from formats.fields import Found, parse_found
from formats.records import Failure, ImageRecord, ImageRef
from formats.tfrecord import Damage

KEYS = ExampleKeys()
TYPES = ExampleTypes(pa.int64(), {})
MAX = 1 << 20


def tar(*members, format=tarfile.PAX_FORMAT, compress=False):
    """A tar of (name, content) pairs; a TarInfo in a name's place is taken as it is."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz" if compress else "w", format=format) as file:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def read(data, keys=KEYS, most=MAX, size=True):
    return list(webdataset.read_images(io.BytesIO(data), len(data) if size else None, keys, most))


def shape(items):
    """(index, image or error class) of each item, (offset, index, class) of damage."""
    return [
        (item.offset, item.index, item.error_class)
        if isinstance(item, Damage)
        else (item.index, item.error.error_class if item.error else item.data)
        for item in items
    ]


def sample(n, **more):
    members = {"cls": b"%d" % n, "jpg": b"picture %d" % n, **more}
    return [(f"train/{n:04}.{extension}", data) for extension, data in sorted(members.items())]


def samples(count, **more):
    return [member for n in range(count) for member in sample(n, **more)]


# ---------------------------------------------------------------- samples


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_images_carry_place_and_label(format, compress):
    items = read(tar(*samples(3), format=format, compress=compress))
    assert parse_found(items, "/d/a.tar", KEYS, TYPES) == [
        ImageRecord(ImageRef(f"/d/a.tar#{n}", "/d/a.tar", n, n), b"picture %d" % n)
        for n in range(3)
    ]


def test_webdatasets_own_rules_of_grouping():
    data = tar(
        ("./a/x.v2.jpg", b"1"),  # up to the first dot of the file name
        ("./a/x.cls", b"7"),
        ("b.c/x.jpg", b"2"),  # a dot in a folder's name is none of it
        ("b.c/x.JPG", b"3"),  # the same extension again: another sample
        ("b.c/y.png", b"4"),
        ("b.c/x.jpg", b"5"),  # samples are runs
        ("README", b"no sample"),
        (".hidden.jpg", b"no sample"),
        ("__meta__/x.jpg", b"about the tar"),
    )
    items = read(data, ExampleKeys(id="__key__"))
    assert shape(items) == [(n, b"%d" % (n + 1)) for n in range(5)]
    keys = [item.values["__key__"] for item in items]
    assert keys == ["a/x", "b.c/x", "b.c/x", "b.c/y", "b.c/x"]
    assert [item.values.get("image/class/label") for item in items] == [7, *[None] * 4]


def test_a_sample_may_hold_several_images():
    data = tar(("s.left.jpg", b"l"), ("s.right.png", b"r"), ("s.cls", b"3"), ("t.bmp", b"t"))
    items = read(data)
    assert shape(items) == [(0, b"l"), (1, b"r"), (2, b"t")]
    assert [item.values.get("image/class/label") for item in items] == [3, 3, None]
    only = read(data, ExampleKeys(image="right.png"))
    assert shape(only) == [(0, b"r"), (1, "MissingFeature")]


@pytest.mark.parametrize(
    "extension", ["jpg", "JPEG", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"]
)
def test_extensions_of_images(extension):
    assert shape(read(tar((f"a.{extension}", b"x")))) == [(0, b"x")]


def test_a_sample_without_an_image_is_told():
    items = read(tar(("a.cls", b"1"), ("a.npy", b"x"), *sample(1)))
    assert shape(items) == [(0, "MissingFeature"), (1, b"picture 1")]
    assert items[0].error.message == "sample 'a' has no image; it has cls, npy"


def test_a_tar_of_members_and_no_sample_is_told():
    (found,) = read(tar(("d/one", b"x"), ("d/two", b"y"), ("__meta__/a.txt", b"z")))
    assert (found.index, found.data, found.error.error_class) == (0, None, "MissingFeature")
    assert "none of 2 members belongs to a sample" in found.error.message
    assert "the first is 'd/one'" in found.error.message
    assert shape(read(tar(("README", b"x"), *sample(1)))) == [(0, b"picture 1")]
    assert read(tar(("__meta__/a.txt", b"z"))) == []


def test_what_cannot_be_an_image_is_told():
    link = tarfile.TarInfo("b.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    data = tar(("a.jpg", b""), (link, b""), ("c.jpg", b"x" * 50))
    items = read(data, most=20)
    assert shape(items) == [(0, "MissingFeature"), (1, "UnsupportedMember"), (2, "TooManyBytes")]
    assert items[2].size == 50
    assert "--max_image_bytes 20" in items[2].error.message


def test_names_of_any_length_and_bytes():
    names = ["d" * 90 + "/" + "n" * 150 + ".jpg", "caf\udce9.jpg", "grün.jpg", "x" * 300 + ".jpg"]
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        items = read(
            tar(*((name, b"x") for name in names), format=format), ExampleKeys(id="__key__")
        )
        found = parse_found(items, "s", ExampleKeys(id="__key__"), TYPES)
        assert [record.ref.key for record in found] == [
            names[0][:-4], "caf\\xe9", "grün", "x" * 300
        ]  # fmt: skip


# ---------------------------------------------------------------- values


def test_json_fields_and_text_members():
    about = json.dumps(
        {"width": 4, "score": 0.5, "tags": ["a"], "text": "é", "none": None}
    ).encode()
    keys = ExampleKeys(label="text", columns=("width", "score", "tags", "txt", "bin", "cls"))
    items = read(tar(*samples(2, json=about, txt=b"a cat\n", bin=b"\xff\0")), keys)
    types = fields.infer_types(items, keys)
    assert {name: str(kind) for name, kind in types.columns.items()} == {
        "width": "int64",
        "score": "double",
        "tags": "list<item: string>",
        "txt": "string",
        "bin": "binary",
        "cls": "int64",
    }
    assert types.label == pa.string()
    record = parse_found(items, "s", keys, types)[1]
    assert record.ref.label == "é"
    assert record.ref.columns == {
        "width": 4, "score": 0.5, "tags": ["a"], "txt": "a cat\n", "bin": b"\xff\0", "cls": 1
    }  # fmt: skip


@pytest.mark.parametrize(
    ("contents", "kind", "labels"),
    [
        ([b"0", b"12\n"], pa.int64(), [0, 12]),
        ([b"007", b"8"], pa.string(), ["007", "8"]),
        ([b"cat", b"dog"], pa.string(), ["cat", "dog"]),
    ],
)
def test_labels_are_numbers_where_all_are(contents, kind, labels):
    members = [m for n, cls in enumerate(contents) for m in ((f"{n}.jpg", b"x"), (f"{n}.cls", cls))]
    items = read(tar(*members))
    types = fields.infer_types(items, KEYS)
    assert types.label == kind
    assert [record.ref.label for record in parse_found(items, "s", KEYS, types)] == labels


def test_a_json_that_does_not_parse_costs_its_sample_alone():
    keys = ExampleKeys(columns=("width",))
    data = tar(*sample(0, json=b"{"), *sample(1, json=b'{"width": 3}'), *sample(2, json=b"[1]"))
    types = ExampleTypes(pa.int64(), {"width": pa.int64()})
    first, second, third = parse_found(read(data, keys), "s", keys, types)
    assert (first.error_class, first.sha256 is not None) == ("ColumnType", True)
    assert second.ref.columns == {"width": 3}
    assert third.ref.columns == {"width": None}
    assert shape(read(data)) == [(n, b"picture %d" % n) for n in range(3)]  # nobody asked for it


def test_a_value_of_another_type_is_a_failure():
    keys = ExampleKeys(columns=("w",))
    types = ExampleTypes(pa.int64(), {"w": pa.string()})
    contents = [b'{"w": "x"}', b'{"w": {"a": 1}}', b'{"w": "\\ud800"}']
    data = tar(*(member for n, about in enumerate(contents) for member in sample(n, json=about)))
    found = parse_found(read(data, keys), "s", keys, types)
    assert [type(item) for item in found] == [ImageRecord, Failure, Failure]
    assert {item.error_class for item in found[1:]} == {"ColumnType"}


def test_a_column_that_no_sampled_image_has_is_a_wrong_request():
    keys = ExampleKeys(columns=("nothing",))
    with pytest.raises(ValueError, match="--columns nothing: none of the first 2 images has it"):
        fields.infer_types(read(tar(*samples(2)), keys), keys)


def test_only_what_is_wanted_is_kept():
    data = tar(*samples(2, npy=bytes(3000)))
    (first, *_) = read(data, ExampleKeys(label=None), most=0)
    assert first.error.error_class == "TooManyBytes"
    assert first.data is None


# ---------------------------------------------------------------- damage


def offsets(data):
    with tarfile.open(fileobj=io.BytesIO(data)) as file:
        return [member.offset for member in file]


def test_a_wrong_header_ends_the_tar():
    data = bytearray(tar(*samples(3)))
    at = offsets(bytes(data))[3]  # the second image
    data[at + 5] ^= 1
    assert shape(read(bytes(data))) == [
        (0, b"picture 0"),
        (at, 1, "BadHeader"),  # of the second sample only the label was reached: no image
    ]


@pytest.mark.parametrize(
    ("keys", "last"),
    [
        (ExampleKeys(label=None), b"picture 1"),
        (ExampleKeys(id="name", label=None), "MissingFeature"),
        (ExampleKeys(label=None, columns=("txt",)), "MissingFeature"),
        (ExampleKeys(label="kind"), "MissingFeature"),
        (KEYS, b"picture 1"),  # no sample of this tar has a label
    ],
)
def test_a_picture_that_lost_what_lay_behind_it_is_no_whole_one(keys, last):
    """img2dataset writes jpg, json, txt; without id or columns the row could never be mended."""
    members = [
        (f"{n:04}.{extension}", data)
        for n in range(3)
        for extension, data in (
            ("jpg", b"picture %d" % n),
            ("json", json.dumps({"name": f"id {n}", "kind": "cat"}).encode()),
            ("txt", b"words"),
        )
    ]
    data = tar(*members)
    at = offsets(data)[4]  # the second picture's json
    (first, second, damage) = shape(read(data[:at], keys))
    assert first == (0, b"picture 0")
    assert second == (1, last)
    assert damage == (at, 2, "MissingEnd")


def test_a_column_of_its_own_member_may_lie_behind_the_json():
    members = [(f"{n}.{e}", d) for n in range(2) for e, d in (("jpg", b"7"), ("json", b"{}"))]
    data = tar(*members, ("1.txt", b"words"))
    at = offsets(data)[4]
    keys = ExampleKeys(label=None, columns=("txt",))
    assert shape(read(data[:at], keys)) == [(0, b"7"), (1, "MissingFeature"), (at, 2, "MissingEnd")]


def test_a_sample_before_the_end_mark_is_whole_whatever_follows_it():
    data = tar(("0.jpg", b"7"), ("0.txt", b"words"), ("1.jpg", b"8"))
    keys = ExampleKeys(label=None, columns=("txt",))
    *found, damage = shape(read(data + b"junk" * 200, keys))
    assert found == [(0, b"7"), (1, b"8")]
    assert damage[2] == "BadHeader"


def test_a_label_that_lay_behind_the_cut_is_missed_where_others_have_one():
    labelled = [(f"{n}.{e}", b"7") for n in range(2) for e in ("jpg", "zzz", "cls")]
    data = tar(*labelled)
    at = offsets(data)[4]
    assert shape(read(data[:at])) == [(0, b"7"), (1, "MissingFeature"), (at, 2, "MissingEnd")]


def test_numbers_of_absurd_length_in_an_extended_header_raise_nothing():
    member = tarfile.TarInfo("a.jpg")
    for size in ("9" * 5000, "²"):
        member.pax_headers = {"size": size}
        read(tar((member, b"picture"), format=tarfile.PAX_FORMAT))
    data = bytearray(tar((member, b"picture"), format=tarfile.PAX_FORMAT))
    assert data[512:513].isdigit()  # the record's length
    data[512:512] = b"9" * 5000
    read(bytes(data))


@pytest.mark.parametrize("known", [True, False])
def test_a_tar_that_is_cut_anywhere_says_so(known):
    """At every byte: what lies whole before the cut is read, and exactly one damage is told."""
    data = tar(*((f"{n}.jpg", bytes([65 + n]) * 700) for n in range(3)))
    whole = offsets(data)
    end = whole[-1] + 512 + 1024  # after the last payload with its padding
    for cut in range(0, end + 1, 37):
        items = read(data[:cut], size=known)
        damage = [item for item in items if isinstance(item, Damage)]
        images = [item.index for item in items if isinstance(item, Found)]
        # Of the last member's padding nothing is needed, but its loss is told.
        assert images == list(range(sum(at + 1536 <= cut for at in whole))), cut
        assert len(damage) == (cut > 0), cut
        if damage:
            assert damage[0].offset == max((a for a in [*whole, end] if a <= cut), default=0)
            expected = "MissingEnd" if cut in [*whole, end] else "TruncatedMember"
            assert damage[0].error_class == expected
    assert not any(isinstance(item, Damage) for item in read(data))


def test_a_stream_that_ends_before_the_files_size_says_so():
    data = tar(*samples(2))
    items = list(webdataset.read_images(io.BytesIO(data[:2000]), len(data), KEYS, MAX))
    assert items[-1].error_class == "TruncatedFile"
    assert items[-1].bytes == len(data) - items[-1].offset


def test_a_gzip_that_is_damaged_keeps_what_came_before():
    rng = np.random.default_rng(0)
    data = tar(*((f"{n}.jpg", rng.bytes(9000)) for n in range(20)))
    packed = bytearray(gzip.compress(data))
    cut = read(bytes(packed[: len(packed) // 2]))
    assert [item.index for item in cut[:-1]] == list(range(len(cut) - 1))
    assert 5 < len(cut) < 15
    assert cut[-1].error_class == "GzipDamage"
    assert "offset in the decompressed gzip stream" in cut[-1].message
    packed[-5] ^= 1  # the checksum at its end
    *images, damage = read(bytes(packed))
    assert (len(images), damage.error_class) == (20, "GzipDamage")


def test_tars_one_after_the_other_and_junk_at_the_end():
    one, two = tar(*sample(0)), tar(*sample(1))
    assert shape(read(one + two)) == [(0, b"picture 0"), (1, b"picture 1")]
    items = read(one + b"junk" * 200)
    assert shape(items) == [(0, b"picture 0"), (len(one), 1, "BadHeader")]
    assert "junk after the end" in items[-1].message
    assert shape(read(one + b"junk"))[1:] == [(len(one), 1, "TruncatedMember")]


def test_one_block_of_zeros_is_an_end():
    data = tar(*sample(0)).rstrip(b"\0")
    data += bytes(-len(data) % 512)
    assert shape(read(data + bytes(512))) == [(0, b"picture 0")]
    assert shape(read(data))[1:] == [(len(data), 1, "MissingEnd")]


def test_an_empty_tar_and_an_empty_file():
    assert read(tar()) == []
    assert read(b"") == []


@pytest.mark.parametrize(
    "data", [b"x" * 600, b"x", bytes(511) + b"x" + bytes(100), gzip.compress(b"x", mtime=0)]
)
def test_what_is_no_tar(data):
    (damage,) = read(data)
    assert (damage.offset, damage.index) == (0, 0)
    assert not webdataset.is_tar(data)


def test_a_tar_is_known_by_its_beginning():
    data = tar(*samples(2))
    assert webdataset.is_tar(data[:512])
    assert webdataset.is_tar(gzip.compress(data)[:4096])
    assert not webdataset.is_tar(data[1:513])
    assert not webdataset.is_tar(b"")


def test_a_header_that_lies_about_its_size_allocates_little():
    info = tarfile.TarInfo("a.jpg")
    info.size = 1 << 40
    header = info.tobuf(tarfile.GNU_FORMAT)
    (found,) = [item for item in read(header + b"x" * 600) if isinstance(item, Damage)]
    assert found.error_class == "TruncatedMember"
    info.type = tarfile.GNUTYPE_LONGNAME
    (damage,) = read(info.tobuf(tarfile.GNU_FORMAT) + b"x" * 600)
    assert damage.error_class == "BadHeader"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_is_flipped_nothing_comes_twice_or_raises(data):
    """Images before the flipped byte are as they were; indices run on without a gap."""
    whole = tar(*((f"{n}.jpg", bytes([65 + n]) * 600) for n in range(4)))
    at = data.draw(st.integers(0, len(whole) - 1))
    flipped = bytearray(whole)
    flipped[at] ^= 1 << data.draw(st.integers(0, 7))
    items = read(bytes(flipped))
    assert [item.index for item in items] == list(range(len(items)))
    assert all(isinstance(item, Found) for item in items[:-1])
    for n, item in enumerate(read(whole)):
        if (n + 1) * 1536 <= at:
            assert items[n].data == item.data


LONG = f"{'d' * 60}/{'e' * 60}/b"


def test_a_long_name_that_is_damaged_is_told_of_and_what_follows_is_read():
    members = [("a.jpg", b"one"), (f"{LONG}.jpg", b"two"), ("c.jpg", b"three")]
    data = tar(*members)
    assert shape(read(data)) == [(0, b"one"), (1, b"two"), (2, b"three")]
    at = data.index(b" path=")
    start = data.rindex(b"\0", 0, at) + 1
    for position in range(start, at + len(b" path=")):  # what follows is the name itself
        for bit in range(8):
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            items = read(bytes(damaged))
            found = [i.data for i in items if not isinstance(i, Damage) and i.data]
            told = [i for i in items if isinstance(i, Damage) or i.error]
            assert set(found) >= {b"one", b"three"}
            assert len(found) == 3 or told, (position - start, bit)
            indices = [item.index for item in items]
            assert len(set(indices)) == len(indices)  # by which a resumed run knows them


def test_a_name_that_fills_its_field_is_whole_beside_other_records():
    """As GNU tar writes times beside every member."""
    info = tarfile.TarInfo(f"{'n' * 96}.jpg")
    info.pax_headers = {"mtime": "1.5"}
    other = tarfile.TarInfo("n" * 100)
    other.pax_headers = {"mtime": "1.5", "SCHILY.xattr.user.note": "x"}
    short = tarfile.TarInfo("n" * 20)
    short.pax_headers = {"mine": "x"}
    data = tar((info, b"one"), (other, b""), (short, b""), ("b.jpg", b"two"))
    assert shape(read(data)) == [(0, b"one"), (1, b"two")]


def test_a_damaged_name_costs_no_member_of_the_tar_behind():
    # Only the header of a name, and then the end.
    broken = tar((f"{LONG}.jpg", b"two")).replace(b" path=", b"_path=")[:1024] + bytes(1024)
    whole = tar(("a.jpg", b"one"))
    items = read(broken + whole)
    assert [i.error_class for i in items if isinstance(i, Damage)] == ["DamagedName"]
    assert [i.data for i in items if not isinstance(i, Damage)] == [b"one"]


def test_times_of_an_incremental_archive_are_no_part_of_a_name():
    data = bytearray(tar(("1.cls", b"7"), ("1.jpg", b"one"), format=tarfile.GNU_FORMAT))
    for start in (0, 1024):
        assert data[start + 257 : start + 265] == b"ustar  \0"
        data[start + 345 : start + 369] = b"14524770627\x0014524770636\0"
        total = sum(data[start : start + 148]) + 8 * 32 + sum(data[start + 156 : start + 512])
        data[start + 148 : start + 156] = b"%06o\0 " % total
    (found,) = read(bytes(data), ExampleKeys(id="__key__"))
    assert (found.data, found.values) == (b"one", {"__key__": "1", "image/class/label": 7})


def test_a_sparse_member_has_its_real_name():
    info = tarfile.TarInfo("d/GNUSparseFile.18032/s")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.name": "d/s.jpg"}
    data = tar(("d/s.cls", b"3"), (info, b"1\n0\n"))
    assert shape(read(data)) == [(0, "UnsupportedMember")]
