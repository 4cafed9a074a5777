"""gs:// and s3://, by real servers, on a road where requests meet 503 and cut connections."""

from __future__ import annotations

import gc
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import exports
import pytest
import servers
from pictures import jpeg
from servers import BUSY, CUT, FORBIDDEN, LOST
from test_models import stored_rows

from benchmarks import keys
from formats import inputs, resuming
from formats.manifest import read_manifest
from pipeline import figures
from storage import files, retries

pytestmark = pytest.mark.engines
IMAGES = 6


@pytest.fixture(scope="module", params=servers.STORES)
def way(request):
    with servers.bumpy_road(request.param) as road:
        yield road


@pytest.fixture
def road(way, monkeypatch):
    """The road without trouble, its store reachable, waits short."""
    way.trouble = lambda method, path, body: None
    way.requests.clear()
    files.configure_stores(way.store.argv)
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.01)
    return way


def put(folder: str, contents: dict[str, bytes]) -> None:
    with ThreadPoolExecutor(8) as threads:
        paths = [f"{folder}/{name}" for name in contents]
        list(threads.map(files.write_bytes, paths, contents.values()))


class OnceEach:
    """Trouble of one kind for the first request of each path, without query, that is `chosen`."""

    def __init__(self, kind, chosen):
        self.kind = kind
        self.chosen = chosen
        self.met = set()

    def __call__(self, method, path, body):
        name = method, path.partition("?")[0]
        if name in self.met or not self.chosen(method, path):
            return None
        self.met.add(name)
        return self.kind


def is_listing(method: str, path: str) -> bool:
    return method == "GET" and ("prefix=" in path)


# --- listing -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(way):
    files.configure_stores(way.store.argv)
    way.trouble = lambda method, path, body: None
    way.fill(f"many/{i:05}.jpg" for i in range(10_000))
    return f"{way.store.uri}/many"


def test_ten_thousand_objects_are_listed_page_by_page(many, road):
    found = list(files.find(many))
    assert [info.path for info in found] == [f"{many}/{i:05}.jpg" for i in range(10_000)]
    assert {info.size for info in found} == {1}
    pages = [path for method, path in road.requests if is_listing(method, path)]
    assert 10 <= len(pages) <= 12
    assert len(road.requests) < 20  # nothing is asked of a single object
    units = list(inputs.list_units([inputs.Source(f"{many}/*.jpg", inputs.IMAGES)], None))
    assert [len(unit.files) for unit in units] == [128] * 78 + [16]


@pytest.mark.parametrize("kind", [BUSY, CUT, LOST])
def test_a_listing_that_stumbles_halfway_loses_nothing(many, road, kind):
    pages = Counter()

    def trouble(method, path, body):
        pages["all"] += is_listing(method, path)
        if is_listing(method, path) and pages["all"] == 5:
            return kind
        return None

    road.trouble = trouble
    assert len(list(files.find(many))) == 10_000
    assert pages["all"] > 10


def test_an_occupied_output_is_seen_without_listing_it(many, road):
    assert files.occupied(many)
    assert len([r for r in road.requests if is_listing(*r)]) <= 2


def test_names_that_look_like_globs_are_names(road):
    folder = f"{road.store.uri}/odd[1]"
    put(folder, {"a[1].jpg": b"1", "a1.jpg": b"12", "b?.jpg": b"123"})
    put(f"{road.store.uri}/odd1", {"c.jpg": b"1"})
    assert [info.size for info in files.find(f"{folder}/a[1].jpg")] == [1]
    assert [info.size for info in files.find(f"{folder}/b?.jpg")] == [3]
    assert files.size_of(f"{folder}/b?.jpg") == 3
    assert files.occupied(folder)
    assert len(files.list_folder(folder)) == 3


def test_two_stars_stand_for_no_folder_too(road):
    folder = f"{road.store.uri}/deep"
    everything = ["a.jpg", "a.txt", "x/b.jpg", "x/y/c.jpg", "xa.jpg"]
    put(folder, dict.fromkeys(everything, b"1"))

    def found(pattern):
        return [info.path.removeprefix(f"{folder}/") for info in files.find(f"{folder}/{pattern}")]

    assert found("**/*.jpg") == ["a.jpg", "x/b.jpg", "x/y/c.jpg", "xa.jpg"]
    assert found("**/a.jpg") == ["a.jpg"]
    assert found("x/**/*.jpg") == ["x/b.jpg", "x/y/c.jpg"]
    assert found("*/**/c.jpg") == ["x/y/c.jpg"]
    assert found("**") == found("**/") == everything
    assert found("**/**/*.jpg") == found("**/*.jpg")
    assert found("**/x") == ["x/b.jpg", "x/y/c.jpg"]  # a folder
    assert found("**/y/") == ["x/y/c.jpg"]


# --- the whole job -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stocked(way):
    """Pictures and a model in the store."""
    files.configure_stores(way.store.argv)
    way.trouble = lambda method, path, body: None
    put(f"{way.store.uri}/in", {f"{i}.jpg": jpeg(40 + i, 30) for i in range(IMAGES)})
    model = Path(exports.exported("saved_model", "classification"))
    put(
        f"{way.store.uri}/model",
        {
            path.relative_to(model).as_posix(): path.read_bytes()
            for path in model.rglob("*")
            if path.is_file()
        },
    )
    return way.store.uri


@pytest.fixture
def run(stocked, road, job, tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGE_FEATURES_CACHE", str(tmp_path / "cache"))

    def call(name, **flags):
        given = {"model": f"{stocked}/model", "output": f"{stocked}/{name}", **road.store.flags}
        return job(f"{stocked}/in", **{**given, **flags})

    return call


@pytest.mark.parametrize("kind", [BUSY, CUT, LOST])
def test_input_model_and_output_outlast_trouble(run, road, stocked, kind):
    """The first request for each picture, file of the model, data file and manifest meets it.

    So do the first look at each object, the first removal, and the first listing of the output.
    """

    def chosen(method, path):
        read = (
            method == "GET" and (".jpg" in path or "model" in path) and not is_listing(method, path)
        )
        written = method in ("PUT", "POST") and "out-" in path
        listed = is_listing(method, path) and "out-" in path
        return read or written or listed or method in ("DELETE", "HEAD")

    road.trouble = trouble = OnceEach(kind, chosen)
    ran = run(f"out-{kind}")
    assert ran.code == 0, ran.stderr
    assert (ran.line["features"], ran.line["failures"]) == (IMAGES, 0)
    methods = Counter(method for method, _ in trouble.met)
    assert methods["GET"] >= IMAGES + 3
    assert methods["PUT"] + methods["POST"] >= 1
    road.trouble = lambda method, path, body: None
    output = f"{stocked}/out-{kind}"
    manifest = json.loads(files.read_bytes(f"{output}/manifest.json"))
    rows = stored_rows(output, manifest)
    assert [row["key"] for row in rows["features"]] == [
        f"{stocked}/in/{i}.jpg" for i in range(IMAGES)
    ]
    listed = {info.path.removeprefix(f"{output}/") for info in files.list_folder(output)}
    assert listed == {"manifest.json", "_SUCCESS", *(f["path"] for f in manifest["files"])}


def test_a_picture_that_is_forbidden_is_one_failure(run, road, stocked):
    def trouble(method, path, body):
        return FORBIDDEN if "3.jpg" in path and method in ("GET", "HEAD") else None

    road.trouble = trouble
    ran = run("out-one", max_failure_rate=0.5)
    assert ran.code == 0, ran.stderr
    assert (ran.line["features"], ran.line["failures"]) == (IMAGES - 1, 1)
    output = f"{stocked}/out-one"
    road.trouble = lambda method, path, body: None
    rows = stored_rows(output, json.loads(files.read_bytes(f"{output}/manifest.json")))
    told = [(row["key"], row["error_class"]) for row in rows["failures"]]
    assert told == [(f"{stocked}/in/3.jpg", "PermissionError")]


def test_a_commit_that_never_arrives_is_resumed(run, road, stocked):
    """No rename: data files are there under their names, and no manifest tells of them."""

    def trouble(method, path, body):
        written = method in ("PUT", "POST")
        return (
            FORBIDDEN if written and (b"manifest.json" in body or "manifest.json" in path) else None
        )

    road.trouble = trouble
    ran = run("out-resumed", rows_per_file=2)
    assert ran.code == 1, ran.stderr
    assert ran.line["manifest"] is None
    road.trouble = lambda method, path, body: None
    output = f"{stocked}/out-resumed"
    left = {info.path.removeprefix(f"{output}/") for info in files.list_folder(output)}
    assert left
    assert not {"manifest.json", "_SUCCESS"} & left
    assert "something is there" in run("out-resumed").stderr
    road.requests.clear()
    ran = run("out-resumed", if_exists="resume")
    assert ran.code == 0, ran.stderr
    assert (ran.line["features"], ran.line["skipped"]) == (0, IMAGES)
    read = {path.partition("?")[0] for method, path in road.requests if method == "GET"}
    assert not {path for path in read if ".jpg" in path and not path.endswith("0.jpg")}  # its kind
    manifest = json.loads(files.read_bytes(f"{output}/manifest.json"))
    assert len(stored_rows(output, manifest)["features"]) == IMAGES
    assert len(manifest["files"]) == 3


def test_resuming_asks_no_more_of_a_store_than_the_plan_counts_on(road):
    output, count = f"{road.store.uri}/many", 20
    keys.published(output, "r1", keys.write(output, "r1", 0, 10 * count, 10, ids=False))
    on_s3 = road.store.uri.startswith("s3:")
    told = figures.S3_RESUME_REQUESTS if on_s3 else figures.RESUME_REQUESTS
    road.requests.clear()
    found = resuming.resume(output, read_manifest(output), keys.ROWS)
    assert len(found.kept) == count
    asked = len(road.requests)
    fresh = keys.write(output, "r2", 10 * count, 10 * count + 10, 10, ids=False)
    road.requests.clear()
    keys.published(output, "r2", fresh, if_exists="resume", replaces="r1", kept=found.kept)
    asked += len(road.requests)
    assert count < asked <= told.value * count


def test_s3_is_reached_by_one_client_however_often(monkeypatch):
    """Making one takes longer than a read."""
    with servers.s3_store() as store:
        files.configure_stores(store.argv)
        made = []
        real = boto3.session.Session.client
        monkeypatch.setattr(
            boto3.session.Session, "client", lambda *a, **k: made.append(k) or real(*a, **k)
        )
        put(f"{store.uri}/shared", {f"{i}": b"%d" % i for i in range(20)})
        paths = [info.path for info in files.find(f"{store.uri}/shared")]
        with ThreadPoolExecutor(8) as threads:
            read = list(threads.map(files.read_bytes, paths))
        assert sorted(read) == sorted(b"%d" % i for i in range(20))
        assert all(map(files.is_file, paths))
        files.delete(paths)
        assert not any(map(files.is_file, paths))
    assert len(made) == 1


def test_what_was_cut_on_its_way_up_is_no_object(road, stocked):
    """A data file that cannot be stored is not there, in no length."""
    target = f"{stocked}/torn/part.parquet"
    tried = []

    def trouble(method, path, body):
        if len(body) < 1_000_000:
            return None
        tried.append(len(body))
        return LOST if len(tried) == 1 else FORBIDDEN

    road.trouble = trouble
    with pytest.raises(OSError, match=r"part\.parquet"):
        files.write_bytes(target, b"x" * 3_000_000)
    assert len(tried) >= 2
    road.trouble = lambda method, path, body: None
    assert not files.is_file(target)
    assert files.list_folder(f"{stocked}/torn") == []


@pytest.mark.parametrize("sent", [10, 3_000_000])
def test_an_upload_that_was_refused_is_not_made_up_for_later(road, stocked, sent):
    target = f"{stocked}/late/manifest.json"
    road.trouble = lambda method, path, body: FORBIDDEN if method in ("PUT", "POST") else None
    with pytest.raises(OSError, match=r"manifest\.json"):
        files.write_bytes(target, b"x" * sent)
    road.trouble = lambda method, path, body: None
    road.requests.clear()
    gc.collect()  # closes what was left open
    assert road.requests == []
    assert not files.is_file(target)


def test_no_part_of_an_upload_that_failed_stays(road, stocked):
    """A store of s3:// keeps parts, and bills them, until it is told."""
    target = f"{stocked}/parts/a.bin"
    road.trouble = lambda method, path, body: FORBIDDEN if method == "PUT" else None
    with pytest.raises(OSError, match=r"a\.bin"):
        files.write_bytes(target, b"x" * 6_000_000)
    if stocked.startswith("s3:"):
        assert any("uploadId" in path for method, path in road.requests if method == "PUT")
        from moto.backends import get_backend
        from moto.core import DEFAULT_ACCOUNT_ID

        stored = get_backend("s3")[DEFAULT_ACCOUNT_ID]["aws"]
        uploads = [one for bucket in stored.buckets.values() for one in bucket.multiparts.values()]
        assert "parts/a.bin" not in [one.key_name for one in uploads]  # others' may have been cut
    assert not files.is_file(target)
