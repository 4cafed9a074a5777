"""What `--input` stands for: formats, doubts, and units of work that hold each file once."""

from __future__ import annotations

import gzip
import io

import pytest

from formats import inputs
from formats.inputs import IMAGES, TFRECORD, Source, Unit, list_units, sample, survey
from formats.tfrecord import Damage, write_record
from storage import files
from storage.errors import RequestError

JPEG = b"\xff\xd8\xff\xe0 something"


def framed(count, start=0):
    stream = io.BytesIO()
    for number in range(start, start + count):
        write_record(stream, b"record %d" % number)
    return stream.getvalue()


TWO = framed(2)
WRONG_LENGTH = b"\1" + TWO[1:]


def write(folder, **contents):
    for name, data in contents.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return str(folder)


def names(unit):
    return [info.path.rpartition("/")[2] for info in unit.files]


# ---------------------------------------------------------------- detection


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        ({"a": TWO}, TFRECORD),
        ({"a": gzip.compress(TWO)}, TFRECORD),
        ({"a": TWO, "b": TWO}, TFRECORD),
        ({"a": JPEG}, IMAGES),
        ({"a": TWO, "b.jpg": JPEG}, IMAGES),
        ({"a": TWO, "README": b"what is this?"}, IMAGES),
        ({"a.tfrecord": b"damaged from its first byte on"}, TFRECORD),
        ({"a.tfrecord": b""}, TFRECORD),
        ({"a": b"", "b": TWO}, TFRECORD),
        ({"a": b""}, IMAGES),
        ({"train-00000-of-00001": b""}, TFRECORD),
        ({"_SUCCESS": b"not looked at", "a": TWO}, TFRECORD),
        ({"a": gzip.compress(b"a text")}, IMAGES),
        ({}, IMAGES),
    ],
)
def test_detection(tmp_path, contents, expected):
    sources, _ = survey([write(tmp_path, **contents)], "auto", allow_empty=True)
    assert sources == [Source(str(tmp_path), expected)]


def test_detection_looks_at_each_pattern_by_itself(tmp_path):
    first = write(tmp_path / "x", a=TWO)
    second = write(tmp_path / "y", a=JPEG)
    sources, _ = survey([first, second], "auto", allow_empty=False)
    assert [source.format for source in sources] == [TFRECORD, IMAGES]


def test_a_format_that_is_named_is_not_questioned(tmp_path):
    sources, _ = survey([write(tmp_path, a=JPEG)], TFRECORD, allow_empty=False)
    assert sources[0].format == TFRECORD


# ---------------------------------------------------------------- errors and warnings


def test_a_pattern_that_matches_nothing_is_a_wrong_request(tmp_path):
    there = write(tmp_path, a=JPEG)
    nothing = str(tmp_path / "*.png")
    with pytest.raises(RequestError, match=r"--input .*\*\.png: matches nothing"):
        survey([there, nothing], "auto", allow_empty=False)
    sources, warnings = survey([there, nothing], "auto", allow_empty=True)
    assert [source.pattern for source in sources] == [there, nothing]
    assert warnings == []


def test_an_input_that_cannot_be_read_is_a_wrong_request(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(files, "open_read", refuse)
    with pytest.raises(RequestError, match=r"--input .*cannot be read \(.*Permission denied"):
        survey([write(tmp_path, a=JPEG)], "auto", allow_empty=False)


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        ({"s-00000-of-00002": TWO, "s-00001-of-00002": TWO}, []),
        ({"s-00000-of-00002": TWO, "s-00001-of-00002": b""}, ["s-00001-of-00002: zero bytes"]),
        ({"s-00000-of-00003": TWO}, ["s-00001-of-00003: this", "s-00002-of-00003: this"]),
        ({"a.tfrecord": b""}, ["a.tfrecord: zero bytes"]),
        ({"a.jpg": b"", "b.jpg": JPEG}, []),  # it becomes a failure of its own
    ],
)
def test_warnings(tmp_path, contents, said):
    _, warnings = survey([write(tmp_path, **contents)], "auto", allow_empty=False)
    assert len(warnings) == len(said)
    for warning, start in zip(warnings, said, strict=True):
        assert warning.startswith(f"{tmp_path}/{start}")
        assert "\n" not in warning


# ---------------------------------------------------------------- units


def test_every_file_is_in_one_unit_however_many_patterns_match_it(tmp_path):
    folder = write(tmp_path, **{"a.jpg": JPEG, "b.jpg": JPEG, "sub__c.jpg": JPEG})
    sources = [
        Source(p, IMAGES) for p in (f"{folder}/b.jpg", folder, f"{folder}/*.jpg", f"{folder}/sub")
    ]
    assert [names(u) for u in list_units(sources, None)] == [["b.jpg"], ["a.jpg", "c.jpg"]]


def test_images_are_spread_in_runs_and_containers_stand_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "_IMAGES_A_UNIT", 2)
    images = write(tmp_path / "i", a=JPEG, b=JPEG, c=JPEG, d=JPEG, e=JPEG)
    shards = write(tmp_path / "t", a=TWO, b=TWO)
    units = list(list_units([Source(images, IMAGES), Source(shards, TFRECORD)], None))
    assert [(u.format, names(u), u.limit) for u in units] == [
        (IMAGES, ["a", "b"], None),
        (IMAGES, ["c", "d"], None),
        (IMAGES, ["e"], None),
        (TFRECORD, ["a"], None),
        (TFRECORD, ["b"], None),
    ]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (1, [("x", 1)]),
        (3, [("x", 3)]),
        (4, [("x", 3), ("z", 1)]),
        (6, [("x", 3), ("z", 2), (["i", "j"], 1)]),
        (7, [("x", 3), ("z", 2), (["i", "j"], 2)]),
        (99, [("x", 3), ("z", 2), (["i", "j"], 2), ("w", 4)]),
    ],
)
def test_limit_counts_over_files_and_formats(tmp_path, limit, expected):
    first = write(tmp_path / "1", x=framed(3), y=b"", z=TWO)
    second = write(tmp_path / "2", i=JPEG, j=JPEG)
    third = write(tmp_path / "3", w=framed(4))
    sources = [Source(first, TFRECORD), Source(second, IMAGES), Source(third, TFRECORD)]
    found = []
    for unit in list_units(sources, limit):
        if unit.format == IMAGES:
            found.append((["i", "j"], len(unit.files)))
        elif unit.limit:
            found.append((*names(unit), unit.limit))
    assert found == expected
    assert sum(count for _, count in found) == min(limit, 11)


def test_limit_counts_a_damaged_place_as_one(tmp_path):
    folder = write(tmp_path, a=WRONG_LENGTH, b=TWO)
    units = list(list_units([Source(folder, TFRECORD)], 2))
    assert [(names(u), u.limit) for u in units] == [(["a"], 1), (["b"], 1)]


def test_limit_counts_a_container_that_cannot_be_read_as_one(tmp_path, monkeypatch):
    """Reading it gives one failure: listing must not end the run where reading would not."""
    folder = write(tmp_path, a=TWO, b=TWO, c=TWO)
    open_read = files.open_read

    def refuse(path):
        if path.endswith("/b"):
            raise PermissionError(13, "Permission denied", path)
        return open_read(path)

    monkeypatch.setattr(files, "open_read", refuse)
    units = list(list_units([Source(folder, TFRECORD)], 4))
    assert [(names(u), u.limit) for u in units] == [(["a"], 2), (["b"], 1), (["c"], 1)]


def test_sources_that_match_nothing_give_no_units(tmp_path):
    assert list(list_units([Source(str(tmp_path / "no"), TFRECORD)], None)) == []
    assert list(list_units([Source(str(tmp_path / "no"), IMAGES)], 5)) == []


# ---------------------------------------------------------------- a look at the records


def test_walk_gives_records_and_damage(tmp_path):
    write(tmp_path, good=TWO, bad=TWO + WRONG_LENGTH)
    bad, good = files.find(str(tmp_path))
    assert [r.data for r in inputs.walk(good)] == [b"record 0", b"record 1"]
    assert [type(r) is Damage for r in inputs.walk(bad)] == [False, False, True]


def test_sample_takes_the_first_records_of_containers_alone(tmp_path):
    images = write(tmp_path / "i", a=JPEG)
    shards = write(tmp_path / "t", a=WRONG_LENGTH, b=framed(3), c=framed(3, 3))
    sources = [Source(images, IMAGES), Source(shards, TFRECORD)]
    assert sample(sources, 4) == [b"record %d" % n for n in range(4)]
    assert sample(sources, 99) == [b"record %d" % n for n in range(6)]
    assert sample(sources[:1], 9) == []


def test_a_unit_can_cross_a_shuffle():
    import pickle

    unit = Unit(TFRECORD, (files.FileInfo("/d/caf\udce9", 3),), 2)
    assert pickle.loads(pickle.dumps(unit)) == unit
