"""The law of the job as a property: every image in exactly one place, and the manifest true.

Mixes of files, records, shards, damage and options as Hypothesis draws them, each through the true
`main([...])`. `LAW_EXAMPLES=1000 ./run_tests.sh -k law` looks further.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import os
import re
import tarfile
import tempfile
from pathlib import Path

import exports
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, currently_in_test_context, given, note, settings
from hypothesis import strategies as st
from pictures import declaring, encode, jpeg, photo, truncated

from benchmarks.faults.world import Ran, call, files_below, leftovers, manifest, published
from formats.example import serialize_example
from formats.tfrecord import write_record
from pipeline import verify

EXAMPLES = int(os.environ.get("LAW_EXAMPLES", "10"))
MOST_BYTES = 20_000

GOOD = [jpeg(40 + n, 30) for n in range(4)] + [encode(photo(20, 30), "PNG")]
BAD = [
    b"",
    b"nothing",
    truncated(GOOD[0]),
    declaring("png", 20_000, 20_000),  # huge when decoded
    GOOD[0] + bytes(MOST_BYTES),  # huge as it is
]


@dataclasses.dataclass(frozen=True)
class Expected:
    """An image of the input: where it lies, its key, and whether the model can see it."""

    source: str
    index: int | None
    key: str
    good: bool


# --- drawing an input --------------------------------------------------------------------------

contents = st.one_of(st.sampled_from(GOOD), st.sampled_from(GOOD), st.sampled_from(BAD))
ids = st.one_of(st.none(), st.sampled_from(["a", "b", "c", "d", "#0", "#1", "@0"]))  # see Inputs
record = st.tuples(st.one_of(st.none(), contents), ids)
damage = st.sampled_from(["none", "none", "payload", "length", "cut", "junk"])
folder_of_files = st.tuples(st.just("files"), st.lists(contents, min_size=1, max_size=6), damage)
tfrecord = st.tuples(st.just("tfrecord"), st.lists(record, max_size=6), damage)
parquet = st.tuples(st.just("parquet"), st.lists(record, min_size=1, max_size=5), damage)
tar = st.tuples(st.just("tar"), st.lists(contents, min_size=1, max_size=4), damage)
listing = st.tuples(
    st.just("listing"), st.lists(st.sampled_from("012345x"), min_size=1, max_size=6), damage
)
with_ids = st.lists(st.one_of(tfrecord, tfrecord, parquet), min_size=2, max_size=4)
without_ids = st.lists(
    st.one_of(folder_of_files, tfrecord, parquet, tar), min_size=2, max_size=3
).flatmap(lambda some: st.one_of(st.just(some), st.tuples(listing).map(lambda one: [*some, *one])))
inputs = st.one_of(st.tuples(st.just("id"), with_ids), st.tuples(st.just(None), without_ids))

options = st.fixed_dictionaries(
    {
        "fit": st.sampled_from(["stretch", "slim", "cover", "pad"]),
        "filter": st.sampled_from(["antialias", "bilinear"]),
        "batch_size": st.sampled_from([2, 5]),
        "compression": st.sampled_from(["zstd", "none"]),
        "embedding_dtype": st.sampled_from(["float32", "float16"]),
        "vector_type": st.sampled_from(["list", "fixed_size_list"]),
        "top_k": st.sampled_from([0, 3]),
    }
)
how = st.fixed_dictionaries(
    {
        "rows_per_file": st.sampled_from([1, 2, 1000]),
        "max_failure_rate": st.sampled_from([0.0, 0.5, 1, 1]),
        "on_damage": st.sampled_from(["record", "record", "fail"]),
    }
)


class Inputs:
    """Draws become files below `folder`, and what is expected of them.

    An id that begins with a mark is what such an image of its file is called without one.
    """

    def __init__(self, folder: Path, id_key: str | None):
        self.folder = folder
        self.id_key = id_key
        self.patterns: list[Path] = []
        self.images: list[Expected] = []
        self.damaged = False  # so that --on_damage fail would end the run

    def add(self, kind: str, drawn: list, harm: str) -> None:
        getattr(self, kind)(self.folder / f"{len(self.patterns)}", drawn, harm)

    def expect(self, source: Path, index: int | None, good: bool, key: str | None = None) -> None:
        place = str(source) if index is None else f"{source}#{index}"
        self.images.append(Expected(str(source), index, key or place, good))

    def files(self, path: Path, drawn: list, harm: str) -> None:
        for number, data in enumerate(drawn):
            file = path / f"{number}.jpg"
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(data)
            self.expect(file, None, data in GOOD)
        self.patterns.append(path)

    def tfrecord(self, path: Path, drawn: list, harm: str) -> None:
        # A name tells what an empty or damaged file was.
        path = path.with_suffix(".tfrecord")
        drawn = with_full_ids(path, drawn)
        frames = []
        for data, name in drawn:
            features = {} if data is None else {"image/encoded": data}
            if name and self.id_key:
                features["id"] = name.encode()
            frames.append(io.BytesIO())
            write_record(frames[-1], serialize_example(features))
        raw = [frame.getvalue() for frame in frames]
        at = len(raw) // 2
        reached, places = list(range(len(raw))), []
        if harm == "junk":
            raw.append(b"\x07junk")
            places = [len(drawn)]
        elif raw and harm != "none":
            whole = raw[at]
            if harm == "payload":
                raw[at] = whole[:-1] + bytes([whole[-1] ^ 1])
                reached.remove(at)
            else:
                raw[at] = whole[:9] + bytes([whole[9] ^ 1]) + whole[10:]
                if harm == "cut":
                    raw[at:] = [whole[:-3]]
                reached = reached[:at]
            places = [at]
        path.write_bytes(b"".join(raw))
        self.patterns.append(path)
        for index in reached:
            data, name = drawn[index]
            self.expect(path, index, data in GOOD, name if self.id_key else None)
        for index in places:
            offset = sum(map(len, raw[:index]))
            self.expect(path, index, False, f"{path}@{offset}")
            self.damaged = True

    def parquet(self, path: Path, drawn: list, harm: str) -> None:
        path = path.with_suffix(".parquet")
        drawn = with_full_ids(path, drawn)
        columns = {"image/encoded": pa.array([data for data, _ in drawn], pa.binary())}
        if self.id_key:
            columns["id"] = pa.array([name for _, name in drawn], pa.string())
        pq.write_table(pa.table(columns), path)
        self.patterns.append(path)
        for index, (data, name) in enumerate(drawn):
            self.expect(path, index, data in GOOD, name if self.id_key else None)

    def tar(self, path: Path, drawn: list, harm: str) -> None:
        path = path.with_suffix(".tar")
        with tarfile.open(path, "w") as archive:
            for number, data in enumerate(drawn):
                member = tarfile.TarInfo(f"{number}.jpg")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        self.patterns.append(path)
        for index, data in enumerate(drawn):
            self.expect(path, index, data in GOOD)

    def listing(self, path: Path, drawn: list, harm: str) -> None:
        pictures = self.folder / "_listed"  # which no other input finds
        pictures.mkdir(exist_ok=True)
        for number, data in enumerate([*GOOD, BAD[1]]):
            (pictures / f"{number}").write_bytes(data)
        path = path.with_suffix(".csv")
        with path.open("w", newline="") as stream:
            csv.writer(stream).writerows([["uri"], *([f"_listed/{name}"] for name in drawn)])
        self.patterns.append(path)
        for row, name in enumerate(drawn):
            again = name in drawn[:row]
            good = name not in "x5"
            self.expect(pictures / name, row if again else None, good, f"_listed/{name}")

    def outcome(self) -> tuple[set[tuple[str, int | None]], set[str]]:
        """Every place, and the keys of those that have features."""
        first: dict[str, Expected] = {}
        order = sorted(
            self.images, key=lambda one: (one.source, -1 if one.index is None else one.index)
        )
        for image in order:
            first.setdefault(image.key, image)
        places = {(image.source, image.index) for image in self.images}
        assert len(places) == len(self.images)
        return places, {key for key, image in first.items() if image.good}


def with_full_ids(path: Path, drawn: list) -> list:
    return [(data, f"{path}{name}" if name and name[0] in "#@" else name) for data, name in drawn]


# --- the law -----------------------------------------------------------------------------------


def run(found: Inputs, output: Path, **flags) -> Ran:
    flags |= {"id_key": found.id_key} if found.id_key else {}
    ran = call(
        input=found.patterns,
        model=exports.exported("saved_model", "classification"),
        output=output,
        max_image_bytes=MOST_BYTES,
        allow_empty=True,
        **flags,
    )
    if currently_in_test_context():
        note(f"{flags} {ran}")
    return ran


def assert_whole(output: Path, before: set[str] = frozenset()) -> list[dict]:
    """The manifest is true, each key stands once, and nothing lies there but what did `before`."""
    assert verify.main([str(output)]) == 0
    assert set(leftovers(output)) <= before
    rows = published(output)
    assert len({row["key"] for row in rows}) == len(rows)
    counts = manifest(output)["counts"]
    assert counts["images"] == counts["features"] + counts["failures"] == len(rows)
    return rows


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(inputs, options, how, st.data())
def test_every_image_ends_in_exactly_one_place_and_the_manifest_is_true(drawn, flags, how, data):
    id_key, sources = drawn
    with tempfile.TemporaryDirectory() as folder:
        found = Inputs(Path(folder), id_key)
        output = Path(folder) / "_out"
        for kind, content, harm in sources[:-1]:
            found.add(kind, content, harm)
        ran = run(found, output, **flags, **how)
        check_first(found, output, ran, how)
        if ran.code == 3:
            return
        if manifest(output) and data.draw(st.booleans(), "killed"):
            kill(output, data.draw(st.integers(0, 9), "file that was not written"))
        killed = {name for name in files_below(output) if not manifest(output)}
        found.add(*sources[-1])
        then = data.draw(st.sampled_from(["resume", "overwrite"]), "then")
        how = {**how, "on_damage": "record", "max_failure_rate": 1}
        ran = run(found, output, **flags, **how, if_exists=then)
        assert ran.code == 0, ran.stderr
        assert_counts(ran, len(found.images))
        # Overwriting deletes what the old manifest named; other files may be of a run that goes on.
        rows = assert_whole(output, killed if then == "overwrite" else frozenset())
        places, _ = found.outcome()
        seen = [(row["source"], row["record_index"]) for row in rows]
        assert len(seen) == len(set(seen))
        if then == "overwrite":
            check_rows(found, rows)
        else:  # an id that was published keeps its image, and later ones are skipped
            assert set(seen) <= places
            assert {image.key for image in found.images} <= {row["key"] for row in rows}
        again = run(found, output, **flags, **how, if_exists="resume")
        assert (again.code, again.line["skipped"]) == (0, len(found.images))
        assert sorted(row["key"] for row in assert_whole(output)) == sorted(r["key"] for r in rows)


def check_first(found: Inputs, output: Path, ran: Ran, how: dict) -> None:
    places, features = found.outcome()
    failures = len(places) - len(features)
    if found.damaged and how["on_damage"] == "fail":
        assert ran.code == 1
        assert ran.short
        assert manifest(output) is None
    elif failures > how["max_failure_rate"] * len(places):
        assert ran.code == 3
        assert manifest(output) is None
        assert_counts(ran, len(places))
        assert (ran.line["features"], ran.line["failures"]) == (len(features), failures)
    else:
        assert ran.code == 0, ran.stderr
        assert_counts(ran, len(places))
        check_rows(found, assert_whole(output))


def check_rows(found: Inputs, rows: list[dict]) -> None:
    places, features = found.outcome()
    assert {(row["source"], row["record_index"]) for row in rows} == places
    assert len(rows) == len(places)
    assert {row["key"] for row in rows if row["kind"] == "features"} == features


def assert_counts(ran: Ran, images: int) -> None:
    line = ran.line
    assert line["images"] == line["features"] + line["failures"] + line["skipped"] == images


def kill(output: Path, number: int) -> None:
    """As if the run had been killed before its commit, one file not yet written."""
    for name in ("manifest.json", "_SUCCESS"):
        (output / name).unlink()
    parts = sorted(output.rglob("*.parquet"))
    if parts:
        parts[number % len(parts)].unlink()


HOSTILE = [
    "../../../up",
    "/absolute/path",
    "a/b",
    "..",
    "con\\x",
    "-rf",
    "line\nbreak",
    "\u202e",
    "a" * 999,
]


def test_an_id_may_be_what_another_image_is_called(tmp_path):
    """Those that lose their id to another get a key of their own, and are known by the next run."""
    names = ["#1", None, "#1", "#0", "#0", "#4#2", "@0", "#1#2"]
    found = Inputs(tmp_path, "id")
    found.add("parquet", [(GOOD[n % 4], name) for n, name in enumerate(names)], "")
    found.add("tfrecord", [(GOOD[n % 4], name) for n, name in enumerate(["@0", *names])], "junk")
    how = {"max_failure_rate": 1, "if_exists": "resume"}
    for skipped in (0, len(found.images)):
        ran = run(found, tmp_path / "_out", **how)
        assert (ran.code, ran.line["skipped"]) == (0, skipped), ran.stderr
        check_rows(found, assert_whole(tmp_path / "_out"))


def test_keys_never_become_paths(tmp_path):
    """Whatever an id is, files lie where they always do, and the row holds the id as it is."""
    folder = tmp_path / "far" / "below"
    folder.mkdir(parents=True)
    found = Inputs(folder, "id")
    found.add("parquet", [(GOOD[n % 4] + bytes([n]), name) for n, name in enumerate(HOSTILE)], "")
    before = set(tmp_path.rglob("*"))
    ran = run(found, folder / "_out", rows_per_file=1)
    assert ran.code == 0, ran.stderr
    assert {row["key"] for row in assert_whole(folder / "_out")} == set(HOSTILE)
    for path in set(tmp_path.rglob("*")) - before:
        assert re.fullmatch(
            r"(manifest\.json|_SUCCESS|features|part-[0-9TZa-f-]+\.parquet|_out)", path.name
        )
