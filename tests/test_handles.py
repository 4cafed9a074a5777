"""Handles: names mapped to addresses, archives fetched from real servers, and a cache that lasts.

Nothing here leaves the machine: the servers are on loopback.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import servers
from test_archives import FILES, archive_bytes, member_boundaries, read_tree, tar_bytes

from models import handles
from models.handles import archive_url, model_format, resolve
from storage import files
from storage.errors import RequestError

ROOT = Path(__file__).parents[1]
OTHER = {**FILES, "saved_model.pb": b"another model"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of this test's own; a fetch that fails is tried again at once."""
    monkeypatch.setenv("IMAGE_FEATURES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(handles, "_PAUSE_SECONDS", 0.0)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def whole_site():
    with servers.http_site() as site:
        yield site


@pytest.fixture
def site(whole_site):
    whole_site.answers.clear()
    whole_site.requests.clear()
    return whole_site


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def refused(handle: str, digest: str | None = None) -> str:
    """Why `handle` is refused, in one line; nothing of it may be kept."""
    with pytest.raises(RequestError) as caught:
        resolve(handle, digest)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 600
    return text


def kept(cache: Path) -> list[str]:
    return sorted(os.listdir(cache)) if cache.is_dir() else []


# --- names -------------------------------------------------------------------------------------

HUB = "https://tfhub.dev/google/imagenet"
KAGGLE = "https://www.kaggle.com/api/v1/models/google/nasnet/tensorFlow2/imagenet-large/1/download"


@pytest.mark.parametrize(
    ("handle", "url"),
    [
        ("nasnet_large", f"{HUB}/nasnet_large/classification/5?tf-hub-format=compressed"),
        ("nasnet_mobile", f"{HUB}/nasnet_mobile/classification/5?tf-hub-format=compressed"),
        ("pnasnet_large", f"{HUB}/pnasnet_large/classification/5?tf-hub-format=compressed"),
        *(
            (f"{HUB}/{name}{tail}", f"{HUB}/{name}?tf-hub-format=compressed")
            for name in ("nasnet_mobile/feature_vector/3", "pnasnet_large/classification/1")
            for tail in ("", "/", "?tf-hub-format=compressed")
        ),
        (
            "https://storage.googleapis.com/tfhub-test-modules/google/image/imagenet/nasnet_mobile/"
            "classification/1.tar.gz",
        )
        * 2,
        *(
            (handle, KAGGLE)
            for handle in (
                "https://www.kaggle.com/models/google/nasnet/tensorFlow2/imagenet-large/1",
                "https://kaggle.com/models/google/nasnet/tensorFlow2/imagenet-large/1/",
                "https://www.kaggle.com/models/google/nasnet/frameworks/tensorFlow2/variations/"
                "imagenet-large/versions/1",
                "https://www.kaggle.com/models/google/nasnet/tensorFlow2/imagenet-large/1"
                "?tfhub-redirect=true",
                "google/nasnet/tensorFlow2/imagenet-large/1",
                KAGGLE,
            )
        ),
        ("http://127.0.0.1:1/a.tgz?key=1", "http://127.0.0.1:1/a.tgz?key=1"),
        ("models/mine", None),
        ("/models/mine.tar.gz", None),
        ("gs://bucket/model", None),
        ("s3://bucket/model.tar.gz", None),
    ],
)
def test_the_address_of_a_handle(handle, url):
    assert archive_url(handle) == url


def test_a_local_folder_goes_before_a_kaggle_handle(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("google/nasnet/tensorFlow2/imagenet-large/1")
    folder.mkdir(parents=True)
    assert archive_url(str(folder)) is None


@pytest.mark.parametrize(
    ("handle", "message"),
    [
        ("pnasnet_mobile", "never published"),
        (f"{HUB}/nasnet_mobile/classification", "with its version"),
        ("https://www.kaggle.com/models/google/nasnet", "with its version"),
        ("http://127.0.0.1/model", "not a model's address"),
        ("ftp://host/model.tar.gz", "no filesystem for ftp"),
        ("/no/such/folder", "no such directory"),
        ("/no/such/archive.tar.gz", "no such directory"),
        ("http://[::1/m.tar.gz", "cannot be had"),
        ("http://127.0.0.1:port/m.tar.gz", "cannot be had"),
        ("http://127.0.0.1:1/ü.tar.gz", "cannot be had"),
        ("http://127.0.0.1:1/a b.tar.gz", "cannot be had"),
    ],
)
def test_what_names_no_model(handle, message, cache):
    assert message in refused(handle)
    assert kept(cache) == []


def test_the_format_tells_by_the_files(tmp_path):
    for names, kind in (
        (["saved_model.pb"], "saved_model"),
        (["saved_model.pb", "tfhub_module.pb"], "hub_v1"),
        (["prepared.json", "graph.pb"], "prepared"),
    ):
        folder = tmp_path / kind
        folder.mkdir()
        for name in names:
            (folder / name).touch()
        assert model_format(str(folder)) == kind
        assert resolve(str(folder)) == str(folder)
    (tmp_path / "marker").mkdir()
    (tmp_path / "marker" / "tfhub_module.pb").touch()
    assert "holds no saved_model.pb" in refused(str(tmp_path / "marker"))


# --- over HTTP ---------------------------------------------------------------------------------


def test_a_whole_archive_is_fetched_once(site, cache):
    url = site.give("/m.tar.gz", archive_bytes())
    folder = resolve(url)
    assert Path(folder).is_relative_to(cache)
    assert read_tree(Path(folder)) == FILES
    assert resolve(url) == folder
    assert site.requests["/m.tar.gz"] == 1
    assert len(kept(cache)) == 1


@pytest.mark.parametrize(
    ("handle", "path"),
    [
        (
            "nasnet_large",
            "/google/imagenet/nasnet_large/classification/5?tf-hub-format=compressed",
        ),
        (
            f"{HUB}/nasnet_mobile/feature_vector/3",
            "/google/imagenet/nasnet_mobile/feature_vector/3?tf-hub-format=compressed",
        ),
        (
            "google/nasnet/tensorFlow2/imagenet-large/1",
            KAGGLE.removeprefix("https://www.kaggle.com"),
        ),
    ],
)
def test_a_hub_handle_is_fetched_from_its_address(handle, path, site, monkeypatch):
    """All but the host, which is not to be asked here."""
    request = handles.secrets.request

    def here(address: str):
        return request(re.sub("https://(tfhub.dev|www.kaggle.com)", site.address, address))

    site.give(path, archive_bytes())
    monkeypatch.setattr(handles.secrets, "request", here)
    assert read_tree(Path(resolve(handle))) == FILES
    assert site.requests[path] == 1


def test_an_archive_with_one_folder_around_the_model(site):
    url = site.give("/m.tar.gz", archive_bytes({f"top/{n}": data for n, data in FILES.items()}))
    assert read_tree(Path(resolve(url))) == FILES


def test_an_archive_without_a_model(site, cache):
    assert "no saved_model.pb" in refused(site.give("/m.tar.gz", archive_bytes({"a.txt": b"a"})))
    assert kept(cache) == []


def test_a_prepared_model_in_an_archive(site):
    url = site.give("/m.tar.gz", archive_bytes({"prepared.json": b"{}", "graph.pb": b""}))
    assert model_format(resolve(url)) == "prepared"


def cuts() -> list[int]:
    size = len(archive_bytes())
    return sorted({0, 1, 9, 10, size - 9, size - 8, size - 1, *range(0, size, size // 13)})


@pytest.mark.parametrize("length", [True, False], ids=["announced", "not announced"])
def test_an_archive_cut_anywhere(length, site, cache):
    data = archive_bytes()
    assert len(cuts()) >= 20
    for at in cuts():
        refused(site.give("/m.tar.gz", data, sent=at, length=length))
        assert kept(cache) == []
    assert read_tree(Path(resolve(site.give("/m.tar.gz", data)))) == FILES


def test_an_archive_with_one_bit_flipped(site, cache):
    data = archive_bytes()
    rng = random.Random(3)
    for bit in rng.sample(range(len(data) * 8), 40):
        if bit // 8 in range(3, 10):  # gzip's flags, time and system, which nothing protects
            continue
        altered = bytearray(data)
        altered[bit // 8] ^= 1 << bit % 8
        refused(site.give("/m.tar.gz", bytes(altered)))
        assert kept(cache) == []


def test_a_tar_cut_between_members_and_packed_again(site, cache):
    cut = gzip.compress(tar_bytes()[: member_boundaries()[3]])
    assert "cut" in refused(site.give("/m.tar.gz", cut))
    assert kept(cache) == []


def test_a_slow_server(site):
    url = site.give("/m.tar.gz", archive_bytes(), pieces=10)
    assert read_tree(Path(resolve(url))) == FILES


def test_a_server_that_falls_silent(site, cache, monkeypatch):
    monkeypatch.setattr(handles, "_STALL_SECONDS", 0.1)
    url = site.give("/m.tar.gz", archive_bytes(), sent=1000, stall=True)
    assert "timed out" in refused(url)
    assert site.requests["/m.tar.gz"] == 3
    assert kept(cache) == []


def test_a_server_that_trickles(site, cache, monkeypatch):
    monkeypatch.setattr(handles, "_STALL_SECONDS", 1)
    monkeypatch.setattr(handles, "_TRIES", 1)
    url = site.give("/m.tar.gz", b"a" * 100, pieces=100)
    assert "bytes came in" in refused(url)
    assert kept(cache) == []


def test_a_server_that_never_comes_to_an_end(site, cache, monkeypatch):
    monkeypatch.setattr(handles, "_LONGEST_SECONDS", 0.05)
    monkeypatch.setattr(handles, "_TRIES", 1)
    url = site.give("/m.tar.gz", b"a" * 2_000_000, pieces=20)
    assert "bytes came in" in refused(url)
    assert kept(cache) == []


@pytest.mark.parametrize(
    ("how", "message", "requests"),
    [
        ({"status": 404}, "answers 404", 1),
        ({"status": 403}, "answers 403", 1),
        ({"status": 408}, "answers 408", 3),
        ({"status": 429}, "answers 429", 3),
        ({"busy": 100}, "answers 503", 3),
    ],
)
def test_an_answer_that_is_an_error(how, message, requests, site, cache):
    assert message in refused(site.give("/m.tar.gz", archive_bytes(), **how))
    assert site.requests["/m.tar.gz"] == requests
    assert kept(cache) == []


def test_a_server_that_is_busy_once(site):
    assert resolve(site.give("/m.tar.gz", archive_bytes(), busy=1))
    assert site.requests["/m.tar.gz"] == 2


def test_a_redirect(site):
    target = site.give("/there", archive_bytes())
    assert read_tree(Path(resolve(site.give("/m.tar.gz", location=target)))) == FILES


def test_a_redirect_to_a_local_file(site, tmp_path):
    (tmp_path / "m.tar.gz").write_bytes(archive_bytes())
    refused(site.give("/m.tar.gz", location=f"file://{tmp_path}/m.tar.gz"))


def test_nobody_answers(cache):
    assert "cannot be reached" in refused(f"{servers.nobody()}/m.tar.gz")
    assert kept(cache) == []


def test_a_cached_model_needs_no_server(site):
    url = site.give("/m.tar.gz", archive_bytes())
    folder = resolve(url)
    site.answers.clear()
    assert resolve(url) == folder


FETCH = "import sys; from models.handles import resolve; print(resolve(sys.argv[1]))"


def fetching(url: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, url], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


def test_killed_in_mid_download(site, cache):
    url = site.give("/m.tar.gz", archive_bytes(), sent=5000, stall=True)
    site.halfway.clear()
    with fetching(url) as process:
        assert site.halfway.wait(30)
        process.send_signal(signal.SIGKILL)
    (left,) = kept(cache)
    assert left.startswith(".tmp-")
    site.give("/m.tar.gz", archive_bytes())
    assert read_tree(Path(resolve(url))) == FILES
    assert left in kept(cache)

    long_ago = time.time() - handles._STALE_SECONDS - 1
    os.utime(cache / left, (long_ago, long_ago))
    resolve(site.give("/another.tar.gz", archive_bytes()))
    assert left not in kept(cache)
    assert len(kept(cache)) == 2


def test_two_fetch_at_once(site, cache):
    url = site.give("/m.tar.gz", archive_bytes(), pieces=15)
    with fetching(url) as process:
        found = []
        threads = [threading.Thread(target=lambda: found.append(resolve(url))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        told = process.communicate()[0].strip()
    assert site.requests["/m.tar.gz"] >= 2
    assert found == [told] * 3
    assert read_tree(Path(told)) == FILES
    assert len(kept(cache)) == 1


def test_the_one_who_comes_second_takes_the_firsts(site, cache, monkeypatch):
    """The other process finishes between our look into the cache and our rename."""
    url = site.give("/m.tar.gz", archive_bytes())
    fetch = handles._fetch

    def overtaken(address, target):
        monkeypatch.setattr(handles, "_fetch", fetch)
        first.append(resolve(url))
        return fetch(address, target)

    first = []
    monkeypatch.setattr(handles, "_fetch", overtaken)
    assert [resolve(url)] == first
    assert len(kept(cache)) == 1


# --- digests -----------------------------------------------------------------------------------


def test_the_right_digest(site):
    data = archive_bytes()
    url = site.give("/m.tar.gz", data)
    folder = resolve(url, sha256(data))
    assert read_tree(Path(folder)) == FILES
    assert resolve(url, sha256(data)) == resolve(url) == folder
    assert site.requests["/m.tar.gz"] == 1


def test_another_digest(site, cache):
    data = archive_bytes()
    url = site.give("/m.tar.gz", data)
    message = refused(url, "0" * 64)
    assert sha256(data) in message
    assert kept(cache) == []
    resolve(url)
    assert sha256(data) in refused(url, "0" * 64)
    assert len(kept(cache)) == 1


def test_a_digest_of_a_newer_archive_than_the_cached_one(site, cache):
    old, new = archive_bytes(), archive_bytes(OTHER)
    url = site.give("/m.tar.gz", old)
    first = resolve(url)
    site.give("/m.tar.gz", new)
    second = resolve(url, sha256(new))
    assert read_tree(Path(second)) == OTHER
    assert read_tree(Path(first)) == FILES, "somebody may be reading it"
    assert (resolve(url), resolve(url, sha256(old))) == (first, first)
    assert resolve(url, sha256(new)) == second
    assert site.requests["/m.tar.gz"] == 2


def test_a_digest_is_an_archives(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "saved_model.pb").touch()
    assert "is a directory" in refused(str(tmp_path / "model"), "0" * 64)


# --- local archives and the cache --------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["", "file://"])
@pytest.mark.parametrize("ending", [".tar.gz", ".tgz"])
def test_a_local_archive(scheme, ending, tmp_path):
    path = tmp_path / f"m{ending}"
    path.write_bytes(archive_bytes())
    handle = f"{scheme}{path}"
    assert read_tree(Path(resolve(handle))) == FILES
    assert resolve(handle, sha256(archive_bytes())) == resolve(handle)
    refused(handle, "0" * 64)
    path.write_bytes(archive_bytes(OTHER))
    os.utime(path, (1, 1))
    assert read_tree(Path(resolve(handle))) == OTHER


def test_a_local_archive_that_is_cut(tmp_path, cache):
    (tmp_path / "m.tar.gz").write_bytes(archive_bytes()[:-1])
    assert "cut" in refused(str(tmp_path / "m.tar.gz"))
    assert kept(cache) == []


def test_where_the_cache_is(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:  # a user without a home
        patch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError))
        assert handles.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("IMAGE_FEATURES_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert handles.cache_folder() == tmp_path / "xdg" / "image-features"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert handles.cache_folder() == tmp_path / ".cache" / "image-features"


@pytest.mark.parametrize("folder", ["/proc/cache", "{tmp_path}/file/cache"])
def test_a_cache_that_cannot_be_written(folder, site, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("IMAGE_FEATURES_CACHE", folder.format(tmp_path=tmp_path))
    url = site.give("/m.tar.gz", archive_bytes())
    assert "IMAGE_FEATURES_CACHE" in refused(url)
    assert site.requests["/m.tar.gz"] == 0


# --- stores ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=servers.STORES)
def whole_store(request):
    with servers.STORES[request.param]() as store:
        files.configure_stores(store.argv)
        yield store


@pytest.fixture
def store(whole_store, request):
    """A folder of this test's own in the bucket."""
    files.configure_stores(whole_store.argv)
    return f"{whole_store.uri}/{sha256(request.node.name.encode())[:8]}"


def put(folder: str, contents: dict[str, bytes]) -> None:
    for name, data in contents.items():
        files.write_bytes(f"{folder}/{name}", data)


STORED = {name: data for name, data in FILES.items() if data}


@pytest.mark.engines
def test_a_folder_in_a_store(store, cache):
    put(f"{store}/model", STORED)
    folder = resolve(f"{store}/model")
    assert read_tree(Path(folder)) == STORED
    assert resolve(f"{store}/model/") == resolve(f"{store}/model") == folder
    assert len(kept(cache)) == 1
    put(f"{store}/model", {"saved_model.pb": b"longer than the one before" * 200})
    assert read_tree(Path(resolve(f"{store}/model"))) != STORED
    assert read_tree(Path(folder)) == STORED


@pytest.mark.engines
def test_an_archive_in_a_store(store, cache):
    put(store, {"m.tar.gz": archive_bytes(), "cut.tar.gz": archive_bytes()[:-1]})
    assert read_tree(Path(resolve(f"{store}/m.tar.gz"))) == FILES
    assert resolve(f"{store}/m.tar.gz", sha256(archive_bytes()))
    assert "another file" in refused(f"{store}/m.tar.gz", "0" * 64)
    before = kept(cache)
    assert "cut" in refused(f"{store}/cut.tar.gz")
    assert kept(cache) == before


@pytest.mark.engines
def test_what_is_not_in_a_store(store, cache):
    put(store, {"other/a.txt": b"a"})
    assert "nothing is there" in refused(f"{store}/none")
    assert "nothing is there" in refused(f"{store}/none.tar.gz")
    assert "no saved_model.pb" in refused(f"{store}/other")
    assert kept(cache) == []


@pytest.mark.engines
def test_an_object_whose_name_leads_out_of_the_model(store, tmp_path, monkeypatch):
    put(f"{store}/model", STORED)
    listed = [files.FileInfo(f"{store}/model/../../../outside", 1)]
    monkeypatch.setattr(files, "list_folder", lambda uri: listed)
    assert "outside the model" in refused(f"{store}/model")
    assert not (tmp_path / "outside").exists()
