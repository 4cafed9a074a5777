"""What `--input` stands for: formats, doubts, and units of work that hold each file once."""

from __future__ import annotations

import gzip
import io
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from formats import containers, inputs
from formats.containers import Wanted
from formats.example import ExampleKeys, ExampleTypes, serialize_example
from formats.inputs import (
    IMAGES,
    MANIFEST,
    PARQUET,
    TFRECORD,
    WEBDATASET,
    Source,
    Unit,
    infer_types,
    list_units,
    sample,
    survey,
)
from formats.listing import Entry
from formats.tfrecord import Damage, write_record
from storage import files
from storage.errors import RequestError, RunError

JPEG = b"\xff\xd8\xff\xe0 something"


def framed(count, start=0):
    stream = io.BytesIO()
    for number in range(start, start + count):
        write_record(stream, b"record %d" % number)
    return stream.getvalue()


def tar(count):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as file:
        for number in range(count):
            info = tarfile.TarInfo(f"{number}.jpg")
            info.size = 1
            file.addfile(info, io.BytesIO(b"x"))
    return stream.getvalue()


def table(count):
    stream = io.BytesIO()
    pq.write_table(pa.table({"image": [b"x"] * count}), stream)
    return stream.getvalue()


TWO = framed(2)
TAR, TABLE, LIST = tar(2), table(2), b"uri\na.jpg\nb.jpg\n"
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
        ({"a.parquet": TABLE}, PARQUET),
        ({"a.parquet": TABLE, "sub__b.PQ": TABLE, "_SUCCESS": b"x", "c.parquet": b""}, PARQUET),
        ({"a.parquet": TABLE, "b.jpg": JPEG}, IMAGES),
        ({"a.parquet": b"no table", "b.parquet": TABLE}, PARQUET),
        ({"a.parquet": b"no table", "b.parquet": b"none either"}, IMAGES),
        ({"a.tar": b"no tar", "b.tar": TAR}, WEBDATASET),
        ({"a.csv": b"url\nx\n", "b.csv": LIST}, MANIFEST),
        ({"a": TABLE}, IMAGES),
        ({"a.tar": TAR}, WEBDATASET),
        ({"a.tar": TAR, "b.tgz": gzip.compress(TAR), "c.tar.gz": TAR}, WEBDATASET),
        ({"a.tar": TAR, "b.parquet": TABLE}, IMAGES),
        ({"a.tar": b"no tar"}, IMAGES),
        ({"a.tar.gz": gzip.compress(b"x")}, IMAGES),
        ({"a.csv": LIST}, MANIFEST),
        ({"a.csv": LIST, "b.jsonl": b'{"uri": "x"}', "c.ndjson": b'{"uri": "x"}'}, MANIFEST),
        ({"a.csv": b"url\nx\n"}, MANIFEST),  # which is told then
        ({"a.csv": JPEG}, IMAGES),
        ({"a.tar": bytes(10240)}, WEBDATASET),  # of no members
        ({"a.jsonl": b'{"text": "%s", "uri": "x"}\n' % (b"long " * 9999)}, MANIFEST),
        ({"a.csv": b"%s,uri\n" % (b"name," * 9999)}, MANIFEST),
        ({"a.csv": LIST, "a.jpg": JPEG}, IMAGES),
        ({"a.txt": LIST}, IMAGES),
        ({"manifest.json": b"{}", "features__part-1.parquet": TABLE}, IMAGES),
    ],
)
def test_detection(tmp_path, contents, expected):
    sources, _ = survey([write(tmp_path, **contents)], "auto", allow_empty=True)
    assert [(source.pattern, source.format) for source in sources] == [(str(tmp_path), expected)]


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
    assert warnings == [f"--input {nothing}: matches nothing, as --allow_empty lets it"]
    assert [source.pattern for source in sources] == [there, nothing]


def test_an_input_that_cannot_be_read_is_a_wrong_request(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(files, "open_read", refuse)
    with pytest.raises(RequestError, match=r"--input .*cannot be read \(.*Permission denied"):
        survey([write(tmp_path, a=JPEG)], "auto", allow_empty=False)


def test_one_of_several_that_cannot_be_read_says_nothing_of_the_rest(tmp_path, monkeypatch):
    open_read = files.open_read

    def refuse(path):
        if path.endswith("/a"):
            raise PermissionError(13, "Permission denied", path)
        return open_read(path)

    monkeypatch.setattr(files, "open_read", refuse)
    sources, _ = survey([write(tmp_path, a=JPEG, b=JPEG)], "auto", allow_empty=False)
    assert sources[0].format == IMAGES


def test_a_file_that_cannot_be_read_makes_no_pictures_of_tfrecords(tmp_path, monkeypatch):
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(TWO)
    refuse(monkeypatch, tmp_path / "b")
    (source,), _ = survey([str(tmp_path)], "auto", allow_empty=False)
    assert source.format == TFRECORD
    for name in ("a", "c"):
        refuse(monkeypatch, tmp_path / name)
    (source,), _ = survey([str(tmp_path)], "auto", allow_empty=False)
    assert source.format == IMAGES
    for number in range(100):
        (tmp_path / f"d{number}").write_bytes(TWO)
    asked = []

    def refused(path):
        asked.append(path)
        raise PermissionError(path)

    monkeypatch.setattr(files, "open_read", refused)
    (source,), _ = survey([str(tmp_path)], "auto", allow_empty=False)
    assert (source.format, len(asked)) == (IMAGES, 17)


def refuse(monkeypatch, path):
    open_read = files.open_read

    def opened(asked):
        if asked == str(path):
            raise PermissionError(asked)
        return open_read(asked)

    monkeypatch.setattr(files, "open_read", opened)


def test_many_files_of_one_name_are_known_by_the_first(tmp_path, monkeypatch):
    """A bucket of 100,000 tables is not opened table by table before the run."""
    folder = write(tmp_path, **{f"{n:03}.parquet": TABLE for n in range(40)})
    opened = []
    open_read = files.open_read
    monkeypatch.setattr(files, "open_read", lambda path: opened.append(path) or open_read(path))
    sources, _ = survey([folder], "auto", allow_empty=False)
    assert sources[0].format == PARQUET
    assert len(opened) < 20


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        ({"s-00000-of-00002": TWO, "s-00001-of-00002": TWO}, []),
        ({"s-00000-of-00002": TWO, "s-00001-of-00002": b""}, ["s-00001-of-00002: zero bytes"]),
        ({"s-00000-of-00003": TWO}, ["s-00001-of-00003: this", "s-00002-of-00003: this"]),
        ({"a.tfrecord": b""}, ["a.tfrecord: zero bytes"]),
        ({"a.parquet": TABLE, "b.parquet": b""}, ["b.parquet: zero bytes"]),
        ({"a.tar": TAR, "b.tar": b""}, ["b.tar: zero bytes"]),
        ({"a.jpg": b"", "b.jpg": JPEG}, []),  # it becomes a failure of its own
    ],
)
def test_warnings(tmp_path, contents, said):
    _, warnings = survey([write(tmp_path, **contents)], "auto", allow_empty=False)
    assert len(warnings) == len(said)
    for warning, start in zip(warnings, said, strict=True):
        assert warning.startswith(f"{tmp_path}/{start}")
        assert "\n" not in warning


@pytest.mark.parametrize("place", ["/d/out", "gs://b/out", "s3://b/out"])
def test_what_a_run_made_in_its_output_is_no_input(monkeypatch, place):
    own = [
        "manifest.json",
        "_SUCCESS",
        "features/part-1.parquet",
        "_failed/r/failures/part-1.parquet",
        "_failed/r/manifest.json",
    ]
    other = ["a.jpg", "features/b.jpg", "x/manifest.json", "x/features/part-1.parquet"]
    listed = [files.FileInfo(f"{place}/{name}", 1) for name in (*own, *other)]
    listed.append(files.FileInfo(f"{place}2/manifest.json", 1))
    monkeypatch.setattr(files, "find", lambda pattern: iter(listed))
    sources, warnings = survey([place], "images", False, place + "/")
    (unit,) = list_units(sources, None)
    assert [info.path for info in unit.files] == [info.path for info in listed[len(own) :]]
    assert warnings == [
        f"--input {place}: 5 of its files are what an earlier run wrote to --output {place}; they "
        "are not read"
    ]
    listed[len(own) :] = []
    with pytest.raises(RequestError, match="matches nothing"):
        survey([place], "images", False, place)


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
        else:  # None: it ends before the limit
            (name,) = names(unit)
            count = {"x": 3, "y": 0, "z": 2, "w": 4}[name] if unit.limit is None else unit.limit
            found += [(name, count)] if count else []
    assert found == expected
    assert sum(count for _, count in found) == min(limit, 11)


@pytest.mark.parametrize("limit", [1, 2, 3, 6, 7, 8, 9])
def test_limit_counts_over_every_format(tmp_path, limit):
    sources = [
        Source(write(tmp_path / "1", **{"a.parquet": table(3), "b.parquet": b""}), PARQUET),
        Source(write(tmp_path / "2", **{"a.tar": TAR}), WEBDATASET),
        Source(write(tmp_path / "3", **{"a.csv": LIST}), MANIFEST),
        Source(write(tmp_path / "4", a=JPEG), IMAGES),
        Source(write(tmp_path / "5", **{"a.parquet": b"no table"}), PARQUET),
    ]
    units = list(list_units(sources, limit))

    def count(unit):
        if unit.limit is not None:
            return unit.limit
        held = {"a.parquet": 3, "b.parquet": 0, "a.tar": 2}  # it ends before the limit
        return len(unit.entries) or sum(held.get(name, 1) for name in names(unit))

    assert sum(map(count, units)) == min(limit, 9)


def test_limit_counts_a_damaged_place_as_one(tmp_path):
    folder = write(tmp_path, a=WRONG_LENGTH, b=TWO)
    units = list(list_units([Source(folder, TFRECORD)], 2))
    assert [(names(u), u.limit) for u in units] == [(["a"], None), (["b"], 1)]


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
    assert [(names(u), u.limit) for u in units] == [(["a"], None), (["b"], 1), (["c"], 1)]


def test_what_had_files_and_has_none_any_more_is_no_empty_run(tmp_path, monkeypatch):
    """As where a worker has another disk, or this one's is gone since the run was planned."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(JPEG)
    monkeypatch.chdir(tmp_path)
    sources, _ = survey(["in/*.jpg"], "auto", allow_empty=False)
    monkeypatch.chdir("/")
    assert [unit.files[0].path for unit in list_units(sources, None)] == [f"{tmp_path}/in/a.jpg"]
    (tmp_path / "in" / "a.jpg").unlink()
    with pytest.raises(RunError, match=r"in/.*jpg: had files when the run was planned, and has no"):
        list(list_units(sources, None))
    sources, _ = survey(["in/*.jpg"], "auto", allow_empty=True)
    assert list(list_units(sources, None)) == []


def test_sources_that_match_nothing_give_no_units(tmp_path):
    assert list(list_units([Source(str(tmp_path / "no"), TFRECORD)], None)) == []
    assert list(list_units([Source(str(tmp_path / "no"), IMAGES)], 5)) == []


# ---------------------------------------------------------------- a look at the records


def test_walk_gives_records_and_damage(tmp_path):
    write(tmp_path, good=TWO, bad=TWO + WRONG_LENGTH)
    bad, good = files.find(str(tmp_path))
    good_ones, bad_ones = (
        list(containers.walk(info, TFRECORD, ExampleKeys(), 0)) for info in (good, bad)
    )
    assert [r.data for r in good_ones] == [b"record 0", b"record 1"]
    assert [type(r) is Damage for r in bad_ones] == [False, False, True]


def test_sample_takes_the_first_records_of_containers_alone(tmp_path):
    images = write(tmp_path / "i", a=JPEG)
    shards = write(tmp_path / "t", a=WRONG_LENGTH, b=framed(3), c=framed(3, 3))
    sources = [Source(images, IMAGES), Source(shards, TFRECORD)]
    assert sample(sources, 4) == [b"record %d" % n for n in range(4)]
    assert sample(sources, 99) == [b"record %d" % n for n in range(6)]
    assert sample(sources[:1], 9) == []


def test_a_sample_of_large_records_is_a_small_one(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(framed(5))
    monkeypatch.setattr(inputs, "_SAMPLED_BYTES", 2 * len(b"record 0"))
    source = Source(str(tmp_path / "a"), TFRECORD)
    assert sample([source], 9) == [b"record 0", b"record 1"]


def test_one_type_a_run_over_inputs_of_several_formats(tmp_path):
    stream = io.BytesIO()
    write_record(stream, serialize_example({"image": b"x", "label": 1, "n": 0.5}))
    both = pa.table({"image": [b"x"], "label": [2], "n": [3]})
    pq.write_table(both, tmp_path / "b.parquet")
    text = b"uri,label,n\na.jpg,cat,7\n"
    folder = write(tmp_path, **{"a.tfrecord": stream.getvalue(), "c.csv": text})
    sources, _ = survey([f"{folder}/a*", f"{folder}/b*", f"{folder}/c*"], "auto", False)
    keys = ExampleKeys("image", None, "label", ("n",))
    assert infer_types(sources[:2], keys, 9) == ExampleTypes(pa.int64(), {"n": pa.float64()})
    assert infer_types(sources, keys, 9) == ExampleTypes(pa.string(), {"n": pa.float64()})
    assert infer_types([Source(folder, IMAGES)], keys, 9) is None
    (tmp_path / "c.csv").write_bytes(text.replace(b"7", b"x"))
    with pytest.raises(ValueError, match="--columns n: double in one input and string in another"):
        infer_types(sources, keys, 9)


def tables(folder, **columns):
    for name, values in columns.items():
        table = pa.table({"image": [b"x"] * len(values["label"]), **values})
        pq.write_table(table, folder / f"{name}.parquet")
    return [Source(str(folder), PARQUET)]


def test_one_type_a_run_over_the_tables_of_one_input(tmp_path):
    keys = ExampleKeys("image", None, "label", ("n", "when"))
    seconds, nanos = pa.array([1], pa.timestamp("s")), pa.array([1], pa.timestamp("ns"))
    sources = tables(
        tmp_path,
        a={"label": [1], "n": [1], "when": seconds},
        b={"label": ["cat"], "n": [0.5], "when": nanos},
        c={"label": [1]},  # its rows have null columns
    )
    assert infer_types(sources, keys, 9) == ExampleTypes(
        pa.string(), {"n": pa.float64(), "when": pa.timestamp("ns")}
    )
    with pytest.raises(ValueError, match=r"--columns m: no such column in .*/a\.parquet"):
        infer_types(sources, ExampleKeys("image", None, "label", ("m",)), 9)


def test_a_list_with_a_wrong_header_among_others_is_a_failure_of_its_own(tmp_path):
    for number, header in enumerate(("uri,label", "url,label", "uri,label")):
        (tmp_path / f"{number}.csv").write_text(f"{header}\na.jpg,3\n")
    sources, _ = survey([str(tmp_path)], "auto", allow_empty=False)
    keys = ExampleKeys(label="label")
    assert infer_types(sources, keys, 10) == ExampleTypes(pa.int64(), {})
    entries = [entry for unit in list_units(sources, None, keys) for entry in unit.entries]
    assert [entry.wrong and entry.wrong[0] for entry in entries] == [None, "NoManifest", None]
    for number in (0, 2):
        (tmp_path / f"{number}.csv").unlink()
    with pytest.raises(ValueError, match="names images in a column 'uri'; it has url, label"):
        infer_types(sources, keys, 10)


def test_a_column_that_stands_twice_is_a_wrong_request(tmp_path):
    twice = pa.Table.from_arrays([pa.array([b"x"]), pa.array([b"y"])], names=["image", "image"])
    pq.write_table(twice, tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(TABLE)
    sources, _ = survey([str(tmp_path)], "auto", allow_empty=False)
    with pytest.raises(ValueError, match=r"a\.parquet: has 2 columns 'image'; which is meant"):
        infer_types(sources, ExampleKeys(image="image"), 10)


def test_each_input_is_sampled_for_types(tmp_path):
    for name, label in (("a", 1), ("b", b"cat")):
        stream = io.BytesIO()
        for _ in range(3):
            write_record(stream, serialize_example({"image": b"x", "label": label}))
        (tmp_path / name).write_bytes(stream.getvalue())
    sources = [Source(str(tmp_path / name), TFRECORD) for name in "ab"]
    keys = ExampleKeys("image", None, "label")
    assert infer_types(sources[:1], keys, 2) == ExampleTypes(pa.int64(), {})
    assert infer_types(sources, keys, 2) == ExampleTypes(pa.string(), {})


def test_a_unit_can_cross_a_shuffle():
    import pickle

    entry = Entry("a", "/d/a", 3, {"label": 1}, ("BadRow", "why"))
    wanted = Wanted({1: "one", 2: "two"}, 7, frozenset([9]))
    unit = Unit(TFRECORD, (files.FileInfo("/d/caf\udce9", 3),), 2, (entry,), wanted)
    assert pickle.loads(pickle.dumps(unit)) == unit


def test_a_source_whose_first_records_all_lack_the_image_is_found(tmp_path):
    def written(name, rows):
        with (tmp_path / name).open("wb") as stream:
            for row in rows:
                write_record(stream, row)
        return str(tmp_path / name)

    def found(source, keys, count=3):
        return list(inputs.without_image([source], keys, count))

    with_image, without = (serialize_example({name: b"x"}) for name in ("image", "picture"))
    keys = ExampleKeys(image="image")
    none = Source(written("none", [without] * 4), TFRECORD)
    assert found(none, keys) == [(none.pattern, 3, "the example has picture")]
    assert found(none, keys, 9) == [(none.pattern, 4, "the example has picture")]
    assert found(none, ExampleKeys(image="picture")) == []
    for name, rows in {
        "one": [without, with_image],
        "damaged": [without, b"\xff no example"],
        "empty": [],
    }.items():
        assert found(Source(written(name, rows), TFRECORD), keys) == []

    (tmp_path / "a.tar").write_bytes(tar(3))
    tars = Source(str(tmp_path / "a.tar"), WEBDATASET)
    assert found(tars, ExampleKeys()) == []
    ((pattern, count, told),) = found(tars, ExampleKeys(image="png"))
    assert (pattern, count) == (tars.pattern, 3)
    assert "has no image; it has jpg" in told
    assert list(inputs.without_image([Source(str(tmp_path), IMAGES)], keys, 3)) == []
