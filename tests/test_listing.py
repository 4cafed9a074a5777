"""Manifests: what their rows name, where it lies, and what is told where nothing does."""

from __future__ import annotations

import dataclasses
import io
import json

import pyarrow as pa
import pytest
from beams import pipe
from servers import http_site

from formats import fields, inputs
from formats.example import ExampleKeys, ExampleTypes
from formats.inputs import MANIFEST, Source, list_units, survey
from formats.listing import Entry, infer_types, read_entries, resolve
from formats.records import Failure, ImageRecord, ImageRef
from storage import files, retries
from transforms.sources import ReadImages, Reading
from transforms.sources import read_entries as read_unit

HOW = Reading()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(retries, "FIRST_WAIT", 0)


def entries(text, path="/d/list.csv", names=()):
    data = text if isinstance(text, bytes) else text.encode()
    return list(read_entries(io.BytesIO(data), path, names))


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def read(*patterns, how=HOW, input_format="manifest"):
    sources, _ = survey(list(patterns), input_format, allow_empty=False)
    units = list_units(sources, None, how.keys)
    return [item for unit in units for item in read_unit(unit, how)]


# ---------------------------------------------------------------- rows


def test_rows_of_csv():
    found = entries('uri,label\na.jpg,1\n"b, c.jpg",\n\n/x/d.jpg,"two\nlines"\n', names=("label",))
    assert found == [
        Entry("a.jpg", "/d/a.jpg", None, {"label": "1"}, cells=True),
        Entry("b, c.jpg", "/d/b, c.jpg", None, {"label": None}, cells=True),
        Entry("/x/d.jpg", "/x/d.jpg", None, {"label": "two\nlines"}, cells=True),
    ]


@pytest.mark.parametrize("path", ["/d/list.jsonl", "/d/list.NDJSON", "/d/list"])
def test_rows_of_json_lines(path):
    text = '{"uri": "a.jpg", "n": 1, "tags": ["x"]}\n\n{"n": null, "uri": "gs://b/c", "more": 3}'
    assert entries(text, path, ("n", "tags")) == [
        Entry("a.jpg", "/d/a.jpg", None, {"n": 1, "tags": ["x"]}),
        Entry("gs://b/c", "gs://b/c", None, {"n": None}),
    ]


def test_a_byte_order_mark_and_line_ends_of_windows():
    assert [e.key for e in entries(b"\xef\xbb\xbfuri,a\r\nx.jpg,1\r\ny.jpg,2")] == [
        "x.jpg",
        "y.jpg",
    ]
    assert [e.key for e in entries(b'\xef\xbb\xbf{"uri": "x"}\r\n', "/d/a.jsonl")] == ["x"]


@pytest.mark.parametrize(
    ("text", "path", "told"),
    [
        ("uri,a\nx.jpg\n", "/d/l.csv", "1 cells under a header of 2"),
        ("uri,a\nx,y,z\n", "/d/l.csv", "3 cells under a header of 2"),
        ("uri,a\n,1\n", "/d/l.csv", "the row has no 'uri'"),
        ('uri\n"a"b\n', "/d/l.csv", "line 2: "),
        ("uri\n" + "x" * 200_000 + "\n", "/d/l.csv", "line 2: field larger"),
        ("uri\na\0b\n", "/d/l.csv", "zero byte"),
        ('{"url": "x"}\n', "/d/l.jsonl", "the row has no 'uri'"),
        ('{"uri": 3}\n', "/d/l.jsonl", "the row has no 'uri'"),
        ("[]\n", "/d/l.jsonl", "line 1 is no JSON object"),
        ("{\n", "/d/l.jsonl", "line 1 is no JSON: "),
        ("[" * 100_000 + "\n", "/d/l.jsonl", "line 1 is no JSON: "),
    ],
)
def test_a_row_that_is_wrong_is_told_and_the_next_one_read(text, path, told):
    good = (
        "ok.jpg" + "," * (text.startswith("uri,a")) if path.endswith("csv") else '{"uri": "ok.jpg"}'
    )
    bad, fine = entries(text + good + "\n", path)
    assert (bad.key, bad.path, bad.index) == (f"{path}#0", path, 0)
    assert told in bad.wrong[1]
    assert fine.key == "ok.jpg"


def test_names_in_a_header_of_csv_may_stand_between_spaces():
    (entry,) = entries("label, uri ,n\ncat,a.jpg,1\n", names=("label", "n"))
    assert (entry.key, entry.values) == ("a.jpg", {"label": "cat", "n": "1"})


def test_an_open_quote_tells_how_many_lines_it_took():
    *whole, lost = entries('uri\na.jpg\n"b.jpg\n' + "c.jpg\n" * 40)
    assert [entry.key for entry in whole] == ["a.jpg"]
    assert lost.wrong[0] == "BadRow"
    assert "41 lines from 3 on are lost" in lost.wrong[1]


def test_a_csv_without_the_column_is_refused():
    with pytest.raises(
        ValueError, match=r"/d/list.csv: a manifest names .* 'uri'; it has url, label"
    ):
        entries("url,label\nx,1\n")


@pytest.mark.parametrize("header", ['"uri" ,"label"', '"uri,label'])
def test_a_header_that_is_no_csv_is_refused(header, tmp_path):
    with pytest.raises(ValueError, match=r"/d/list.csv: its header is no CSV \("):
        entries(f"{header}\nx,1\n")
    path = write(tmp_path / "l.csv", f"{header}\nx,1\n")  # beside others it is one failure
    (failure,) = read(path)
    assert (failure.key, failure.error_class) == (path, "NoManifest")


def test_an_empty_manifest():
    assert entries("") == entries("", "/d/l.jsonl") == entries("uri\n") == []


@pytest.mark.parametrize(
    ("uri", "base", "path"),
    [
        ("a.jpg", "/d", "/d/a.jpg"),
        ("../x/./a b#1.jpg", "/d/e", "/d/x/a b#1.jpg"),
        ("/abs/a.jpg", "gs://b/m", "/abs/a.jpg"),
        ("file:///abs/a.jpg", "/d", "/abs/a.jpg"),
        ("a/b.jpg", "gs://bucket/lists", "gs://bucket/lists/a/b.jpg"),
        ("../a.jpg", "s3://bucket/lists/x", "s3://bucket/lists/a.jpg"),
        ("../../../a/./b.jpg", "s3://bucket/lists", "s3://bucket/a/b.jpg"),
        ("x.jpg", "gs://bucket/a/", "gs://bucket/a//x.jpg"),  # of gs://bucket/a//list.csv
        ("x.jpg", "/", "/x.jpg"),
        ("a.jpg", "s3://bucket", "s3://bucket/a.jpg"),
        ("https://h/a?b=c", "/d", "https://h/a?b=c"),
        ("gs://other/a", "s3://b", "gs://other/a"),
        ("~/a.jpg", "/d", "/d/~/a.jpg"),
    ],
)
def test_where_an_image_lies(uri, base, path):
    assert resolve(uri, base) == path


@pytest.mark.parametrize(
    ("text", "told"),
    [("URI,label\na.jpg,1\n", "it has URI, label"), ("uri,uri\na,b\n", "has 2 columns 'uri'")],
)
def test_a_header_without_one_uri_is_a_wrong_request(text, told):
    with pytest.raises(ValueError, match="/d/list") as caught:
        list(entries(text))
    assert told in str(caught.value)


# ---------------------------------------------------------------- types


def types(text, path="/d/list.csv", **keys):
    wanted = ExampleKeys(**{"label": "image/class/label", **keys})
    names = inputs.fields.names_of(wanted)
    return infer_types(entries(text, path, names), path, wanted)


def test_cells_are_numbers_where_all_are():
    text = "uri,label,i,f,s,z,e\na,1,5,0.5,x,01,\nb,,-3,2,y,2,\nc,7,,1e3,,3,\n"
    found = types(text, label="label", columns=("i", "f", "s", "z"))
    assert found.label == pa.int64()
    assert list(found.columns.values()) == [pa.int64(), pa.float64(), pa.string(), pa.string()]
    assert types(text, label="s").label == pa.string()
    assert types(text, label="e").label == pa.null()


def test_whole_numbers_keep_every_digit():
    """As 64-bit hashes have, which a float would round."""
    exact, beyond = "12345678901234567890", "9007199254740993"
    text = f"uri,hash,big,f\na,{exact},0.5,1e999\nb,2,9007199254740992,2\n"
    found = types(text, columns=("hash", "big", "f"))
    assert list(found.columns.values()) == [pa.string(), pa.float64(), pa.string()]
    assert fields.fit(exact, pa.string()) == exact
    assert fields.fit("9007199254740992", pa.float64()) == 2.0**53
    for lost in (beyond, exact, "1e999", "9" * 400, "9" * 5000):
        with pytest.raises(ValueError, match=r"[0-9]{4}|1e999"):
            fields.fit(lost, pa.float64())
    with pytest.raises(ValueError, match="10000"):
        fields.fit(10**400, pa.float64())  # which JSON may spell


def test_types_of_json():
    text = '{"uri": "a", "n": 1, "b": true, "l": [1, 2.5]}\n{"uri": "b", "n": "2", "b": null}\n'
    found = types(text, "/d/l.jsonl", label="n", columns=("b", "l"))
    assert found == ExampleTypes(pa.string(), {"b": pa.bool_(), "l": pa.list_(pa.float64())})


def test_types_of_json_lines_below_a_folder_beside_csv(tmp_path):
    """By what each file is, not by how it was asked for."""
    keys = ExampleKeys(label="label", columns=("n",))
    write(tmp_path / "d" / "a.jsonl", '{"uri": "a", "label": "7", "n": "1"}\n')
    for pattern in (tmp_path / "d", tmp_path / "d" / "a*"):
        found = inputs.infer_types([Source(str(pattern), MANIFEST)], keys, 9)
        assert found == ExampleTypes(pa.string(), {"n": pa.string()})
    write(tmp_path / "d" / "b.csv", "uri,label,n\nb,8,2\n")
    found = inputs.infer_types([Source(str(tmp_path / "d" / "b.csv"), MANIFEST)], keys, 9)
    assert found == ExampleTypes(pa.int64(), {"n": pa.int64()})
    write(tmp_path / "d" / "a.jsonl", '{"uri": "a", "label": 7, "n": 1.5}\n')
    found = inputs.infer_types([Source(str(tmp_path / "d"), MANIFEST)], keys, 9)
    assert found == ExampleTypes(pa.int64(), {"n": pa.float64()})


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"label": "lable"}, "'lable' is in none of the first 1 rows of /d/list.csv"),
        ({"id": "nr"}, "'nr' is in none"),
        ({"columns": ("nr",)}, "'nr' is in none"),
    ],
)
def test_a_name_that_no_row_has_is_a_wrong_request(keys, told):
    with pytest.raises(ValueError, match=told):
        types("uri,label\na,1\n", **keys)


def test_values_of_several_types_cannot_be_carried():
    text = '{"uri": "a", "n": 1}\n{"uri": "b", "n": "x"}\n'
    with pytest.raises(ValueError, match=r"--columns n: .*type int64, string in one column"):
        types(text, "/d/l.jsonl", columns=("n",))
    with pytest.raises(ValueError, match="--label_key n: its values are of type object"):
        types('{"uri": "a", "n": {}}\n', "/d/l.jsonl", label="n")


# ---------------------------------------------------------------- images


def test_images_are_read_where_they_lie_and_named_as_written(tmp_path):
    one = write(tmp_path / "pictures" / "a.jpg", b"a")
    write(tmp_path / "lists" / "list.csv", f"uri,label,note\n../pictures/a.jpg,3,x\n{one},4,\n")
    keys = ExampleKeys(label="label", columns=("note",))
    how = Reading(keys, ExampleTypes(pa.int64(), {"note": pa.string()}))
    assert read(str(tmp_path / "lists"), how=how) == [
        ImageRecord(ImageRef("../pictures/a.jpg", one, None, 3, {"note": "x"}), b"a"),
        ImageRecord(ImageRef(one, one, 1, 4, {"note": None}), b"a"),
    ]


def test_what_is_missing_or_forbidden_is_a_failure_each(tmp_path, monkeypatch):
    write(tmp_path / "dir" / "x", b"")
    write(tmp_path / "large.jpg", b"x" * 30)
    write(tmp_path / "secret.jpg", b"x")
    open_read = files.open_read

    def refuse(path):
        if path.endswith("secret.jpg"):
            raise PermissionError(13, "Permission denied")
        return open_read(path)

    monkeypatch.setattr(files, "open_read", refuse)
    uris = ["gone.jpg", "secret.jpg", "dir", "large.jpg", "ftp://h/a.jpg", "http://h/a.jpg"]
    path = write(tmp_path / "list.csv", "\n".join(["uri", *uris]))
    found = read(path, how=dataclasses.replace(HOW, max_image_bytes=20))
    assert [(f.key, f.error_class) for f in found] == [
        ("gone.jpg", "FileNotFoundError"),
        ("secret.jpg", "PermissionError"),
        ("dir", "IsADirectoryError"),
        ("large.jpg", "TooManyBytes"),
        ("ftp://h/a.jpg", "UnsupportedScheme"),
        ("http://h/a.jpg", "HttpNotAllowed"),
    ]
    assert found[0].source == str(tmp_path / "gone.jpg")
    assert "--allow_http" in found[-1].message
    assert all(f.stage == "read" and f.record_index is None for f in found)


def test_http_is_fetched_where_it_is_allowed(tmp_path):
    with http_site() as site:
        uris = [
            site.give("/a.jpg", b"picture"),
            site.give("/busy.jpg", b"later", busy=2),
            site.give("/dead.jpg", b"never", busy=99),
            f"{site.address}/gone.jpg",
            site.give("/secret.jpg", status=403),
            site.give("/large.jpg", b"x" * 50),
            site.give("/cut.jpg", b"x" * 15, sent=9),
            site.give("/moved.jpg", location="/a.jpg"),
            site.give("/astray.jpg", location="file:///etc/passwd"),
            site.give("/ftp.jpg", location="ftp://127.0.0.1/x"),
        ]
        path = write(tmp_path / "l.csv", "\n".join(["uri", *uris]))
        how = dataclasses.replace(HOW, max_image_bytes=20, allow_http=True)
        found = read(path, how=how)
        assert (site.requests["/busy.jpg"], site.requests["/dead.jpg"]) == (3, 6)
        assert site.requests["/gone.jpg"] == site.requests["/secret.jpg"] == 1
    told = [f.data if isinstance(f, ImageRecord) else f.error_class for f in found]
    assert told[:6] == [
        b"picture", b"later", "HTTPError", "FileNotFoundError", "PermissionError", "TooManyBytes"
    ]  # fmt: skip
    assert told[6:8] == ["OSError", b"picture"]
    assert all(isinstance(f, Failure) for f in found[8:])
    assert [f.key for f in found if isinstance(f, Failure)] == [
        uri for uri, item in zip(uris, found, strict=True) if isinstance(item, Failure)
    ]


def test_names_that_are_no_utf8(tmp_path):
    write(tmp_path / "caf\udce9.jpg", b"1")
    path = write(tmp_path / "l.csv", b"uri\ncaf\xe9.jpg\n")
    (record,) = read(path)
    assert (record.ref.key, record.data) == ("caf\\xe9.jpg", b"1")
    (failure,) = read(write(tmp_path / "l.jsonl", '{"uri": "\\ud800.jpg"}'))
    assert (failure.key, failure.error_class) == (f"{tmp_path}/l.jsonl#0", "BadRow")


def test_the_id_names_the_row_and_one_image_may_have_many(tmp_path):
    write(tmp_path / "a.jpg", b"1")
    path = write(tmp_path / "l.csv", "uri,id\na.jpg,one\na.jpg,two\na.jpg,\n")
    found = read(path, how=Reading(ExampleKeys(id="id")))
    assert [(r.ref.key, r.ref.record_index) for r in found] == [
        ("one", None),
        ("two", 1),
        ("a.jpg", 2),
    ]


def test_a_value_that_does_not_fit_is_a_failure_without_a_read(tmp_path):
    path = write(tmp_path / "l.csv", "uri,label\nnowhere.jpg,cat\n")
    (failure,) = read(path, how=Reading(ExampleKeys(label="label")))
    assert (failure.key, failure.error_class) == ("nowhere.jpg", "LabelType")


def test_a_manifest_that_cannot_be_read_is_one_failure(tmp_path):
    path = write(tmp_path / "l.csv", "url\na\n")
    (failure,) = read(path)
    assert (failure.key, failure.error_class) == (path, "NoManifest")
    sources, _ = survey([path], "manifest", allow_empty=False)
    with pytest.raises(ValueError, match="'uri'"):
        inputs.infer_types(sources, ExampleKeys(), 9)


def test_a_manifest_that_cannot_be_opened_is_one_failure(tmp_path, monkeypatch):
    path = write(tmp_path / "l.csv", "uri\na.jpg\n")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files, "open_read", refuse)
    units = list_units([Source(path, MANIFEST)], None)
    (failure,) = (item for unit in units for item in read_unit(unit, HOW))
    assert (failure.key, failure.error_class) == (path, "PermissionError")


# ---------------------------------------------------------------- units


def test_manifests_are_spread_in_runs_and_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "_IMAGES_A_UNIT", 2)
    path = write(tmp_path / "l.csv", "uri\n" + "".join(f"{n}.jpg\n" for n in range(5)))
    source = [Source(path, MANIFEST)]
    assert [len(unit.entries) for unit in list_units(source, None)] == [2, 2, 1]
    assert [len(unit.entries) for unit in list_units(source, 3)] == [2, 1]


def test_repeated_rows_are_known_apart_over_all_manifests(tmp_path):
    for name in "xyz":
        write(tmp_path / f"{name}.csv", "uri\na.jpg\nb.jpg\n")
    units = list_units([Source(str(tmp_path), MANIFEST)], None)
    places = [(e.path, e.index) for unit in units for e in unit.entries]
    assert len(set(places)) == 6
    assert places[:2] == [(str(tmp_path / "a.jpg"), None), (str(tmp_path / "b.jpg"), None)]


def test_retries_are_counted_whatever_thread_they_happen_in(tmp_path, monkeypatch):
    import apache_beam as beam

    from pipeline.preflight import DIRECT_RUNNER

    for n in range(4):
        write(tmp_path / f"{n}.jpg", b"x")
    path = write(tmp_path / "l.csv", "uri\n" + "".join(f"{n}.jpg\n" for n in range(4)))
    open_read, seen = files.open_read, set()

    def flaky(path):
        if path.endswith(".jpg") and path not in seen:
            seen.add(path)
            raise OSError("try again")
        return open_read(path)

    monkeypatch.setattr(files, "open_read", flaky)
    with beam.Pipeline(DIRECT_RUNNER) as p:
        _ = p | beam.Create([[Source(path, MANIFEST)]]) | ReadImages(HOW)
    counters = {
        counter.key.metric.name: counter.committed
        for counter in p.result.metrics().query()["counters"]
        if counter.key.metric.namespace == "ReadImages"
    }
    assert counters == {"images": 4, "bytes": 4, "retries": 4}


def test_what_is_finished_is_not_read_again(tmp_path):
    from formats.digests import key_digest, place_digest
    from transforms.sources import Finished

    write(tmp_path / "a.jpg", b"x")
    rows = [{"uri": "a.jpg", "id": name} for name in ("p3", "p1", "p2")]
    path = write(tmp_path / "l.jsonl", "\n".join(map(json.dumps, rows)))
    finished = str(tmp_path / "finished")
    image = str(tmp_path / "a.jpg")
    done = key_digest("p1") + key_digest("p2") + place_digest(image, None) + place_digest(image, 1)
    Finished.write(finished, done)
    source = [Source(path, MANIFEST)]
    out = pipe([source], ReadImages(Reading(ExampleKeys(id="id")), finished=finished))
    assert [record.ref.key for record in out.images] == ["p3"]  # though its file was read before
    out = pipe([source], ReadImages(HOW, finished=finished))
    assert sum(out.skipped) == 2
