"""ReadImages: every record or file ends in one of three outputs, whatever is wrong with it."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import io
import itertools
import pickle
import tarfile

import apache_beam as beam
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import servers
from beams import pipe

from formats import inputs, tfrecord
from formats.digests import DigestSet, image_digest, key_digest, place_digest
from formats.example import ExampleKeys, ExampleTypes, serialize_example
from formats.inputs import IMAGES, MANIFEST, TFRECORD, Source, Unit, list_units
from formats.records import Failure, ImageRecord, ImageRef
from formats.tfrecord import write_record
from pipeline.options import INPUT_FORMATS
from pipeline.preflight import DIRECT_RUNNER
from storage import files, retries, steady
from storage.errors import RunError
from transforms import sources
from transforms.sources import (
    Finished,
    ReadImages,
    Reading,
    read_container,
    read_entries,
    read_image_file,
    read_image_files,
)

HOW = Reading()


def framed(*payloads):
    stream = io.BytesIO()
    for payload in payloads:
        write_record(stream, payload)
    return stream.getvalue()


def example(n, **more):
    features = {"image/encoded": b"picture %d" % n, "image/class/label": n, **more}
    return serialize_example(features)


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


def unit_of(folder, format=TFRECORD, limit=None):
    return Unit(format, tuple(files.find(str(folder))), limit)


def read(folder_or_file, how=HOW, limit=None):
    return list(read_container(unit_of(folder_or_file, limit=limit), how))


def run(source_list, how=HOW, **options):
    """The three outputs of the transform: keys of images, failures, and how many were skipped."""
    out = pipe([source_list], ReadImages(how, **options))
    return (
        sorted(record.ref.key for record in out.images),
        sorted(out.failures, key=lambda failure: failure.key),
        sum(out.skipped),
    )


# ---------------------------------------------------------------- image files


def test_an_image_file_is_its_own_key(tmp_path):
    path = write(tmp_path / "a.jpg", b"bytes")
    (record,) = read_image_files(unit_of(path, IMAGES), HOW)
    assert record == ImageRecord(ImageRef(path, path), b"bytes")


def test_image_files_come_in_order_with_failures_among_them(tmp_path):
    for n in range(40):
        write(tmp_path / f"{n:02}.jpg", b"x" * n)
    unit = unit_of(tmp_path, IMAGES)
    (tmp_path / "07.jpg").unlink()
    how = dataclasses.replace(HOW, max_image_bytes=38)
    rows = list(read_image_files(unit, how))
    kinds = [type(row) for row in rows]
    assert kinds == [Failure if n in (7, 39) else ImageRecord for n in range(40)]
    gone, large = rows[7], rows[39]
    assert (gone.stage, gone.error_class, gone.bytes) == ("read", "FileNotFoundError", 7)
    assert (large.stage, large.error_class, large.bytes) == ("read", "TooManyBytes", 39)
    assert large.message == "39 bytes, more than --max_image_bytes 38"
    assert large.sha256 is None
    assert large.key == large.source == f"{tmp_path}/39.jpg"


def test_a_file_that_is_too_large_is_not_opened(tmp_path, monkeypatch):
    write(tmp_path / "a", b"123")
    monkeypatch.setattr(files, "read_bytes", lambda path: pytest.fail("opened"))
    (info,) = files.find(str(tmp_path))
    assert read_image_file(info, 2).error_class == "TooManyBytes"


def test_a_file_that_has_grown_since_it_was_listed_is_held_to_the_limit_too(tmp_path):
    path = write(tmp_path / "a", b"123")
    (info,) = files.find(path)
    write(tmp_path / "a", b"123456789")
    failure = read_image_file(info, 5)
    assert (failure.error_class, failure.bytes) == ("TooManyBytes", 9)
    assert failure.sha256 == hashlib.sha256(b"123456789").hexdigest()


def test_what_is_read_ahead_is_bounded_by_bytes(tmp_path, monkeypatch):
    """32 files ahead would be 8 GiB at --max_image_bytes."""
    opened = []
    data = bytes(40 << 20)
    monkeypatch.setattr(files, "read_bytes", lambda path: opened.append(path) or data)
    listed = tuple(files.FileInfo(f"/d/{n}", len(data)) for n in range(32))
    next(iter(read_image_files(Unit(IMAGES, listed), HOW)))
    assert len(opened) <= 2


def test_a_name_that_is_no_utf8_is_read_and_shown_escaped(tmp_path):
    write(tmp_path / "caf\udce9.jpg", b"1")
    (record,) = read_image_files(unit_of(tmp_path, IMAGES), HOW)
    assert record.ref.key == f"{tmp_path}/caf\\xe9.jpg"
    assert record.data == b"1"


# ---------------------------------------------------------------- TFRecord files


def test_records_carry_place_label_and_columns(tmp_path):
    path = write(tmp_path / "a", framed(example(0, name=b"zero"), example(1, name=b"one")))
    types = ExampleTypes(pa.int64(), {"name": pa.string()})
    how = Reading(ExampleKeys(columns=("name",)), types)
    assert read(path, how) == [
        ImageRecord(ImageRef(f"{path}#0", path, 0, 0, {"name": "zero"}), b"picture 0"),
        ImageRecord(ImageRef(f"{path}#1", path, 1, 1, {"name": "one"}), b"picture 1"),
    ]


def test_a_damaged_place_is_one_failure_and_reading_goes_on(tmp_path):
    records = [framed(example(n)) for n in range(4)]
    records[1] = records[1][:20] + b"\xff" + records[1][21:]
    path = write(tmp_path / "a", b"".join(records))
    rows = read(path)
    assert [getattr(row, "key", None) or row.ref.key for row in rows] == [
        f"{path}@{len(records[0])}",
        f"{path}#0",
        f"{path}#2",
        f"{path}#3",
    ]
    damage = rows[0]
    assert (damage.stage, damage.error_class) == ("read", "BadChecksum")
    assert (damage.source, damage.record_index) == (path, 1)
    assert damage.bytes == len(records[1]) - 16


def test_a_cut_file_keeps_what_is_before_the_cut(tmp_path):
    data = framed(example(0), example(1))
    path = write(tmp_path / "a", data[:-5])
    rows = read(path)
    assert sorted(type(row).__name__ for row in rows) == ["Failure", "ImageRecord"]
    (failure,) = (row for row in rows if isinstance(row, Failure))
    assert (failure.key, failure.error_class) == (f"{path}@{len(data) // 2}", "TruncatedRecord")


def test_on_damage_fail_ends_the_run_with_one_line(tmp_path):
    data = framed(example(0), example(1))
    path = write(tmp_path / "a", data[:-5])
    how = dataclasses.replace(HOW, on_damage="fail")
    with pytest.raises(RunError, match=r"TruncatedRecord at byte .*--on_damage record") as caught:
        read(path, how)
    assert "\n" not in str(caught.value)
    with pytest.raises(Exception, match="TruncatedRecord at byte"):
        run([Source(path, TFRECORD)], how)


def test_a_file_that_cannot_be_read_is_one_failure(tmp_path):
    path = write(tmp_path / "a", framed(example(0)))
    unit = unit_of(path)
    (tmp_path / "a").unlink()
    (failure,) = read_container(unit, HOW)
    assert (failure.key, failure.source, failure.record_index) == (path, path, None)
    assert (failure.stage, failure.error_class) == ("read", "FileNotFoundError")
    assert failure.bytes == unit.files[0].size
    with pytest.raises(RunError, match=r"cannot be read on after 0 images .*--on_damage record"):
        list(read_container(unit, dataclasses.replace(HOW, on_damage="fail")))


def test_a_manifest_that_cannot_be_read_is_one_failure_or_ends_the_run(tmp_path):
    path = write(tmp_path / "a.csv", b"no,such\n1,2\n")
    (unit,) = list_units([Source(path, MANIFEST)], None)
    (failure,) = read_entries(unit, HOW)
    assert (failure.key, failure.error_class) == (path, "NoManifest")
    fail = dataclasses.replace(HOW, on_damage="fail")
    with pytest.raises(RunError, match=r"a\.csv: cannot be read on .*--on_damage record"):
        list(read_entries(unit, fail))
    path = write(tmp_path / "b.csv", b'uri\n""\n')
    (unit,) = list_units([Source(path, MANIFEST)], None)
    (failure,) = read_entries(unit, fail)  # a row of one that can be read
    assert (failure.key, failure.error_class) == (f"{path}#0", "MissingFeature")


def test_a_store_that_fails_in_the_middle_keeps_what_came_before(tmp_path, monkeypatch):
    data = framed(*(example(n) for n in range(3)))
    path = write(tmp_path / "a", data)

    class Failing(io.BytesIO):
        def read(self, count=-1):
            if self.tell() > len(data) // 2:
                raise OSError("the line is dead")
            return super().read(count)

    monkeypatch.setattr(files, "open_read", lambda path: Failing(data))
    monkeypatch.setattr(retries, "FIRST_WAIT", 0)
    rows = read(path)
    (failure,) = (row for row in rows if isinstance(row, Failure))
    assert (failure.key, failure.error_class, failure.record_index) == (path, "OSError", None)
    assert rows[1:] == [ImageRecord(ImageRef(f"{path}#0", path, 0, 0), b"picture 0")]


def test_an_image_in_a_record_is_held_to_the_limit(tmp_path):
    path = write(
        tmp_path / "a", framed(example(0), serialize_example({"image/encoded": b"y" * 50}))
    )
    rows = read(path, dataclasses.replace(HOW, max_image_bytes=20))
    assert isinstance(rows[0], ImageRecord)
    assert (rows[1].key, rows[1].error_class, rows[1].bytes) == (f"{path}#1", "TooManyBytes", 50)
    assert rows[1].sha256 == hashlib.sha256(b"y" * 50).hexdigest()


def test_a_record_may_be_as_large_as_the_largest_image_asks(tmp_path, monkeypatch):
    monkeypatch.setattr(tfrecord, "MAX_RECORD_BYTES", 20)
    path = write(tmp_path / "a", framed(serialize_example({"image/encoded": b"y" * 50})))
    (row,) = read(path, dataclasses.replace(HOW, max_image_bytes=50))
    assert isinstance(row, ImageRecord)
    (row,) = read(path, dataclasses.replace(HOW, max_image_bytes=20))
    assert row.error_class == "RecordTooLarge"


@pytest.mark.parametrize("bound", ["_PARSE_RECORDS", "_PARSE_BYTES"])
def test_records_are_parsed_in_batches_without_loss(tmp_path, monkeypatch, bound):
    monkeypatch.setattr(sources, bound, 3)
    path = write(tmp_path / "a", framed(*(example(n) for n in range(8))))
    assert [row.ref.record_index for row in read(path)] == list(range(8))


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 9])
def test_limit_counts_records_and_damage_alike(tmp_path, limit):
    records = [framed(example(n)) for n in range(3)]
    records[0] = records[0][:-1] + b"\0"
    path = write(tmp_path / "a", b"".join(records))
    assert len(read(path, limit=limit)) == min(limit, 3)


# ---------------------------------------------------------------- the transform


def corpus(folder):
    """Two containers, one of them damaged, and image files: 9 images in all."""
    damaged = [framed(example(n)) for n in range(3)]
    damaged[1] = damaged[1][:-1] + b"\0"
    write(folder / "t" / "a", framed(*(example(n) for n in range(3))))
    write(folder / "t" / "b", b"".join(damaged))
    for name in "xyz":
        write(folder / "i" / name, b"picture")
    return [Source(str(folder / "t"), TFRECORD), Source(str(folder / "i"), IMAGES)]


def test_everything_is_read_once(tmp_path):
    images, failures, skipped = run(corpus(tmp_path))
    t, i = tmp_path / "t", tmp_path / "i"
    assert images == sorted(
        [*(f"{t}/a#{n}" for n in range(3)), f"{t}/b#0", f"{t}/b#2", *(f"{i}/{n}" for n in "xyz")]
    )
    assert [failure.error_class for failure in failures] == ["BadChecksum"]
    assert skipped == 0


def every_format(folder):
    """Six sources of every format, some of it bad: 5 + 3 + 4 + 3 + 3 = 18 images."""
    rows = [{"bytes": b"p%d" % n if n else None, "path": "x"} for n in range(5)]
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({"image/encoded": rows}), folder / "a.parquet", row_group_size=2)
    with tarfile.open(folder / "b.tar", "w") as tar:
        for n in range(3):
            info = tarfile.TarInfo(f"{n}.jpg")
            info.size = 900
            tar.addfile(info, io.BytesIO(bytes(900)))
    write(folder / "b.tar", (folder / "b.tar").read_bytes()[:4000])  # cut in the third
    write(folder / "c.csv", b"uri\npictures/x\nnowhere\npictures/x\na,b\n")
    write(folder / "t", framed(*(example(n) for n in range(3))))
    for name in "xyz":
        write(folder / "pictures" / name, b"picture")
    sources, _ = inputs.survey(
        [f"{folder}/{name}" for name in ("a.parquet", "b.tar", "c.csv", "t", "pictures")],
        "auto",
        allow_empty=False,
    )
    assert len({source.format for source in sources}) == 5
    return sources


def read_all(source_list):
    """Keys of images and classes of failures, without Beam, which has options of its own."""
    units = inputs.list_units(source_list, None)
    items = [item for unit in units for item in sources.READERS[unit.format](unit, HOW)]
    return (
        [item.ref.key for item in items if isinstance(item, ImageRecord)],
        [item.error_class for item in items if isinstance(item, Failure)],
    )


EVERY_FAILURE = ["MissingFeature", "TruncatedMember", "FileNotFoundError", "BadRow"]


def test_every_image_of_every_format_ends_in_one_place(tmp_path):
    images, failures, skipped = run(every_format(tmp_path))
    assert (len(images), len(failures), skipped) == (14, 4, 0)
    assert sorted(failure.error_class for failure in failures) == sorted(EVERY_FAILURE)
    assert images.count("pictures/x") == 2  # which the commit will settle


def test_nothing_is_lost_or_doubled_on_a_store_that_fails_now_and_then(tmp_path, monkeypatch):
    """An error at every third opening and every fourth read of a file.

    So never at three in a row, after which reading gives up, whatever the threads' turns.
    """
    monkeypatch.setattr(retries, "FIRST_WAIT", 0)
    calm = run(every_format(tmp_path))
    open_read = files.open_read
    openings, reads = (collections.defaultdict(lambda: itertools.count(1)) for _ in range(2))
    errors = []

    def now_and_then(counts, path, every):
        if next(counts[path]) % every == 0:
            errors.append(path)
            raise OSError("try again")

    class Flaky(io.FileIO):
        def read(self, size=-1):
            now_and_then(reads, self.name, 4)
            return super().read(size)

    def open_flaky(path):
        now_and_then(openings, path, 3)
        return Flaky(path)

    sources = every_format(tmp_path)
    monkeypatch.setattr(files, "open_read", open_flaky)
    assert run(sources) == calm
    assert len(errors) > 5
    monkeypatch.setattr(files, "open_read", open_read)
    assert run(sources) == calm


@pytest.mark.parametrize("scheme", servers.STORES)
def test_every_format_reads_alike_from_a_store(tmp_path, scheme):
    """What is missing there is told by the class of a local file's error."""
    calm = read_all(every_format(tmp_path))
    with servers.STORES[scheme]() as store:
        files.configure_stores(store.argv)
        for path in tmp_path.rglob("*"):
            if path.is_file():
                name = path.relative_to(tmp_path)
                files.write_bytes(f"{store.uri}/in/{name}", path.read_bytes())
        names = ("a.parquet", "b.tar", "c.csv", "t", "pictures")
        patterns = [f"{store.uri}/in/{name}" for name in names]
        sources, _ = inputs.survey(patterns, "auto", allow_empty=False)
        assert len({source.format for source in sources}) == 5
        images, failures = read_all(sources)
    local = str(tmp_path)
    assert images == [key.replace(local, f"{store.uri}/in") for key in calm[0]]
    assert failures == calm[1]
    assert sorted(failures) == sorted(EVERY_FAILURE)


@pytest.mark.parametrize("name", ["a.parquet", "b.tar", "t"])
def test_a_container_whose_store_dies_in_the_middle_is_one_failure(tmp_path, monkeypatch, name):
    monkeypatch.setattr(retries, "FIRST_WAIT", 0)
    every_format(tmp_path)
    path = tmp_path / name
    data = path.read_bytes()
    (source,), _ = inputs.survey([str(path)], "auto", allow_empty=False)
    (unit,) = inputs.list_units([source], None)
    whole = [item.ref.key for item in read_container(unit, HOW) if isinstance(item, ImageRecord)]
    dead = {
        "a.parquet": (150, len(data) - 700),
        "b.tar": (1900, 10**9),
        "t": (len(data) // 3, 10**9),
    }
    start, end = dead[name]

    class Dead(io.BytesIO):
        def read(self, size=-1):
            if start < self.tell() < end:
                raise OSError("the line is dead")
            return super().read(size)

    monkeypatch.setattr(files, "open_read", lambda path: Dead(data))
    rows = list(read_container(unit, HOW))
    failures = [row for row in rows if isinstance(row, Failure) and row.error_class == "OSError"]
    assert [(f.key, f.record_index, f.bytes) for f in failures] == [(str(path), None, len(data))]
    assert [row.ref.key for row in rows if isinstance(row, ImageRecord)] == whole[:1]


@pytest.mark.parametrize("name", ["a.parquet", "b.tar"])
def test_on_damage_fail_holds_for_every_container(tmp_path, name):
    every_format(tmp_path)
    path = tmp_path / name
    (source,), _ = inputs.survey([str(path)], "auto", allow_empty=False)
    path.write_bytes(path.read_bytes()[:-30])
    (unit,) = inputs.list_units([source], None)
    with pytest.raises(RunError, match=r"at byte .*--on_damage record"):
        list(read_container(unit, dataclasses.replace(HOW, on_damage="fail")))


@pytest.mark.parametrize("limit", [1, 4, 6, 8, 9, 99])
def test_a_limited_run_reads_as_many(tmp_path, limit):
    images, failures, _ = run(corpus(tmp_path), limit=limit)
    assert len(images) + len(failures) == min(limit, 9)


def test_a_file_that_two_patterns_match_is_read_once(tmp_path):
    images, _, _ = run([*corpus(tmp_path), Source(str(tmp_path / "i" / "*"), IMAGES)])
    assert len(images) == 8


def test_what_is_finished_is_skipped_and_counted(tmp_path, monkeypatch):
    t, i = tmp_path / "t", tmp_path / "i"
    done = [(f"{t}/a", 0), (f"{t}/b", 1), (f"{i}/x", None), (f"{i}/y", None), ("elsewhere", 0)]
    finished = str(tmp_path / "f")
    Finished.write(finished, b"".join(place_digest(*place) for place in done))
    opened = []
    read_bytes = files.read_bytes
    monkeypatch.setattr(files, "read_bytes", lambda path: opened.append(path) or read_bytes(path))
    images, failures, skipped = run(corpus(tmp_path), finished=finished)
    assert images == sorted([f"{t}/a#1", f"{t}/a#2", f"{t}/b#0", f"{t}/b#2", f"{i}/z"])
    assert failures == []  # the damaged place was told of by an earlier run
    assert skipped == 4
    assert sorted(set(opened)) == [f"{i}/z"]  # finished files are not read again


def test_an_empty_source_reads_nothing(tmp_path):
    assert run([Source(str(tmp_path / "nothing"), TFRECORD)]) == ([], [], 0)
    assert run([]) == ([], [], 0)


def test_the_transform_counts_what_it_reads(tmp_path):
    with beam.Pipeline(DIRECT_RUNNER) as p:
        _ = p | beam.Create([corpus(tmp_path)]) | ReadImages(HOW)
    counters = {
        counter.key.metric.name: counter.committed
        for counter in p.result.metrics().query()["counters"]
        if counter.key.metric.namespace == "ReadImages"
    }
    size = 5 * len(b"picture 0") + 3 * len(b"picture")
    assert counters == {"images": 8, "failures": 1, "bytes": size}


def test_every_format_has_a_reader():
    listed = set(INPUT_FORMATS) - {"auto", "failures"}  # whose work is of the other formats
    assert set(sources.READERS) == listed


# ---------------------------------------------------------------- what is finished


def record(source, index, key="k"):
    return ImageRecord(ImageRef(key, source, index), b"")


def at(source, index):
    """A record without an id."""
    return record(source, index, f"{source}#{index}")


def test_finished_knows_places_of_images_without_an_id():
    places = [(f"s{n % 7}", n) for n in range(500)] + [("file", None)]
    finished = Finished(DigestSet.of(b"".join(place_digest(*place) for place in places)))
    assert all(at(*place) in finished for place in places[:-1])
    assert record("file", None, "file") in finished
    assert not any(record(*place) in finished for place in places)  # with an id
    assert Failure("file", "file", None, "read", "E", "m") in finished
    assert Failure("s1@99", "s1", 1, "read", "BadChecksum", "m") in finished  # to a known record
    assert Failure("s1@99", "s1", 1, "read", "TruncatedRecord", "m") not in finished
    for source, index in [("s0", 1), ("file", 0), ("file\nNone", None), ("s7", 7)]:
        assert at(source, index) not in finished


def test_what_hides_others_is_told_though_its_own_record_is_finished(tmp_path):
    """A file that is there anew, longer, and cut inside a record that an earlier run published."""
    path = write(tmp_path / "a", framed(*(example(n) for n in range(9)))[:-10])
    finished = str(tmp_path / "f")
    Finished.write(finished, b"".join(key_digest(f"{path}#{n}") for n in range(9)))
    images, failures, skipped = run([Source(path, TFRECORD)], finished=finished)
    assert (images, skipped) == ([], 8)
    (failure,) = failures
    assert (failure.error_class, failure.record_index) == ("TruncatedRecord", None)  # and no row's
    Finished.write(finished, key_digest(failure.key))
    assert run([Source(path, TFRECORD)], finished=finished)[1] == []  # when it is known itself
    Finished.write(finished, key_digest("none"))
    (failure,) = run([Source(path, TFRECORD)], finished=finished)[1]
    assert failure.record_index == 8


def test_a_record_that_is_damaged_hides_no_missing_ones(tmp_path):
    data = bytearray(framed(*(example(n) for n in range(6))))
    data[20] ^= 1
    path = write(tmp_path / "a", bytes(data))
    how = Reading(counts={path: 10}, max_image_bytes=100)
    assert [item.error_class for item in read(path, how) if isinstance(item, Failure)] == [
        "BadChecksum",
        "MissingRecords",
    ]


def test_finished_knows_published_keys(tmp_path):
    path = str(tmp_path / "f")
    done = key_digest("id") + key_digest("old#0") + image_digest("mine", "killed", 0)
    Finished.write(path, done)
    finished = Finished.read(path)
    assert at("old", 0) in finished
    assert record("old", 0, key="other") not in finished  # a new image where another was before
    assert record("killed", 0, key="mine") in finished
    assert record("killed", 1, key="mine") not in finished  # not published: the id is still free
    assert record("elsewhere", 7, key="id") in finished  # the same data under another name
    assert record("elsewhere", 7, key="new") not in finished
    assert record("elsewhere", 7, key="id") not in Finished.read(None)
    gone = Finished.read(str(tmp_path / "gone"))  # with the commit, before an engine began anew
    assert record("elsewhere", 7, key="id") not in gone


def test_the_threads_of_a_worker_fetch_what_is_finished_once(monkeypatch):
    asked, data = [], b"".join(DigestSet.of(key_digest("id")).store())
    monkeypatch.setattr(steady, "read_bytes", lambda path: asked.append(path) or data)
    found = [Finished.read("gs://b/x.finished") for _ in range(4)]
    assert all(record("elsewhere", 7, key="id") in one for one in found)
    assert asked == ["gs://b/x.finished"]


def test_nothing_is_finished_at_first():
    assert record("s", 0) not in Finished()


def test_finished_tells_digests_apart_that_begin_alike():
    digest = place_digest("s", 1)
    for near in (digest[:8] + bytes(8), digest[:8] + b"\xff" * 8, digest[:15] + b"\0"):
        assert at("s", 1) not in Finished(DigestSet.of(near))
        assert at("s", 1) in Finished(DigestSet.of(near + digest))


def test_what_flows_and_what_reads_can_be_pickled(tmp_path):
    for thing in (HOW, unit_of(tmp_path), record("s", 0)):
        assert pickle.loads(pickle.dumps(thing)) == thing
