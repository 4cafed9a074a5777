"""gs:// and s3:// as output, on real servers: publish, resume, overwrite, verify."""

from __future__ import annotations

import json

import exports
import pytest
import servers
from pictures import jpeg
from test_dataset import commit, images, publication, write_part

from formats import dataset
from formats.manifest import read_manifest, write_manifest
from formats.parts import open_part
from pipeline import extract, verify
from storage import files
from storage.errors import RunError


@pytest.fixture(scope="module", params=servers.STORES)
def store(request):
    with servers.STORES[request.param]() as running:
        files.configure_stores(running.argv)
        yield running


def below(output):
    start = len(output) + 1
    return sorted(info.path[start:] for info in files.list_folder(output))


def keys(output):
    """The keys of the rows that the manifest names."""
    found = []
    for entry in read_manifest(output)["files"]:
        with open_part(output, entry["path"]) as part:
            found += part.read(["key"])["key"].to_pylist()
    return sorted(found)


@pytest.mark.engines  # a minute or two each
def test_a_store_is_written_gone_on_with_replaced_and_verified(tmp_path, store, capsys):
    folder, output = tmp_path / "in", f"{store.uri}/job"
    folder.mkdir()
    model = str(exports.exported("saved_model", "classification"))
    for number, how in enumerate(("error", "resume", "overwrite")):
        (folder / f"{number}.jpg").write_bytes(jpeg(40 + number, 30))
        argv = ["--input", str(folder), "--model", model, "--output", output, "--if_exists", how]
        assert extract.main([*argv, *store.argv]) == 0
        line = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert line["skipped"] == (1 if how == "resume" else 0)
        assert len(keys(output)) == number + 1
        named = [entry["path"] for entry in read_manifest(output)["files"]]
        assert below(output) == sorted([*named, "_SUCCESS", "manifest.json"])
        assert verify.main([output, *store.argv]) == 0
    capsys.readouterr()
    path = read_manifest(output)["files"][0]["path"]
    data = files.read_bytes(f"{output}/{path}")
    files.write_bytes(f"{output}/{path}", data[:-1])
    assert verify.main([output, *store.argv]) == 1
    assert path in capsys.readouterr().err


def test_of_two_runs_into_a_store_the_first_or_the_second_is_whole(store):
    output = f"{store.uri}/two"
    first = [write_part(output, "features", "r1-a", images(0))]
    second = [write_part(output, "features", "r2-a", images(1))]
    commit(publication(output, "r1"), first)
    with pytest.raises(RunError, match="has published here since"):
        commit(publication(output, "r2"), second)
    assert keys(output) == ["/in/a#0"]
    assert below(output) == ["_SUCCESS", first[0].path, "manifest.json"]


def test_a_file_that_another_run_took_while_the_manifest_was_on_its_way_is_told(store, monkeypatch):
    output = f"{store.uri}/race"
    kept = [write_part(output, "features", "r1-a", images(0))]
    commit(publication(output, "r1"), kept)
    again = publication(output, "r2", if_exists="resume", replaces="r1", kept=(kept[0].path,))
    second = [write_part(output, "features", "r2-a", images(1))]
    third = [write_part(output, "features", "r3-a", images(2))]
    upload = write_manifest

    def overtaken(folder, manifest):
        monkeypatch.setattr(dataset, "write_manifest", upload)
        commit(publication(output, "r3", if_exists="overwrite", replaces="r1"), third)
        upload(folder, manifest)

    monkeypatch.setattr(dataset, "write_manifest", overtaken)
    with pytest.raises(RunError, match=r"part-r1-a.parquet is gone, which another run replaced"):
        commit(again, second)


def test_names_that_look_like_globs_take_nothing_else_along(store):
    for run in ("1", "[1]"):
        output = f"{store.uri}/run{run}"
        commit(publication(output, "r1"), [write_part(output, "features", "r1-a", images(0))])
    files.check_writable(output)
    commit(
        publication(output, "r2", if_exists="overwrite", replaces="r1"),
        [write_part(output, "features", "r2-a", images(1))],
    )
    assert below(output) == ["_SUCCESS", "features/part-r2-a.parquet", "manifest.json"]
    assert keys(f"{store.uri}/run1") == ["/in/a#0"]
    assert below(f"{store.uri}/run1") == ["_SUCCESS", "features/part-r1-a.parquet", "manifest.json"]
