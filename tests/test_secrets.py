"""Credentials: out of every text, and a whole job with some planted in all places that take any."""

from __future__ import annotations

import base64
import io
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import apache_beam as beam
import exports
import pyarrow.parquet as pq
import pytest
import servers
from apache_beam.transforms.display import DisplayData
from pictures import jpeg

from formats.listing import shown
from models.export import write_archive
from pipeline import graph, preflight
from pipeline.options import parse
from storage import files, retries, secrets, web

PLANTED = "pl4nted-s3cret"


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(secrets, "_known", set())


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("nothing here", "nothing here"),
        ("http://host/a.jpg?id=5&size=2", "http://host/a.jpg?id=5&size=2"),
        ("http://u:p@host/a.jpg", "http://***@host/a.jpg"),
        ("HTTPS://u:p@ss@host:80/a", "HTTPS://***@host:80/a"),
        ("https://host/a@b.jpg", "https://host/a@b.jpg"),
        ("error at http://u:p@host/a: refused", "error at http://***@host/a: refused"),
        (
            "https://b/k?X-Amz-Credential=A%2F1&X-Amz-Signature=ff&X-Amz-Date=1&id=3",
            "https://b/k?X-Amz-Credential=***&X-Amz-Signature=***&X-Amz-Date=1&id=3",
        ),
        ("https://b/k?X-Goog-Signature=ff", "https://b/k?X-Goog-Signature=***"),
        ("https://b/k?sv=2&sig=a%3D&se=1", "https://b/k?sv=2&sig=***&se=1"),
        ("https://h/m?token=x", "https://h/m?token=***"),
        ("https://h/m?api_key=x&apikey=y&key=z", "https://h/m?api_key=***&apikey=***&key=***"),
        ("https://h/m?AWSAccessKeyId=x&Expires=1", "https://h/m?AWSAccessKeyId=***&Expires=1"),
        ("https://h/m?keyword=tree&monkey=1", "https://h/m?keyword=tree&monkey=1"),
        ("https://h/m?author=bob&design=7&signal=3", "https://h/m?author=bob&design=7&signal=3"),
        ("https://h/m?accesstoken=x&authToken=y", "https://h/m?accesstoken=***&authToken=***"),
        ("https://h/m?apiKey=x;KEY=y&keys=1", "https://h/m?apiKey=***;KEY=***&keys=1"),
        ("https://h/m?x.auth=x&oauth=y&Sig=z", "https://h/m?x.auth=***&oauth=***&Sig=***"),
        ("https://h/m?awsaccesskeyid=x&sub-key=y", "https://h/m?awsaccesskeyid=***&sub-key=***"),
        ("s3://bucket/a@b?token=x", "s3://bucket/a@b?token=x"),  # a key of a store, no address
    ],
)
def test_hide(text, hidden):
    assert secrets.hide(text) == hidden
    assert secrets.hide(hidden) == hidden


def test_addresses_that_differ_in_a_key_stay_two_and_those_of_another_signature_one():
    first, second = (shown(f"https://h/get?key=photo{n}&n=1") for n in (1, 2))
    assert first != second
    assert "photo" not in first + second
    assert shown(first) == first == shown("https://h/get?key=photo1&n=1")
    assert secrets.hide(f"at {first}: gone") == f"at {first}: gone"
    for name in ("image_key", "photoKey", "object-key", "s3key"):
        others = [shown(f"https://h/get?{name}={picture}") for picture in ("monday", "tuesday")]
        assert len(set(others)) == 2
        assert "day" not in "".join(others)
    assert shown("https://h/get?tokenizer=fast") == "https://h/get?tokenizer=fast"
    signed = {shown(f"https://u:p{n}@h/a.jpg?Signature={n}&token={n}") for n in (1, 2)}
    assert signed == {"https://***@h/a.jpg?Signature=***&token=***"}


@pytest.mark.parametrize(
    "words",
    [
        ["--s3_secret_access_key", PLANTED],
        [f"--s3_session_token={PLANTED}"],
        ["--no_auth", "--azure_connection_string", PLANTED],
    ],
)
def test_values_of_telling_flags_are_hidden_wherever_they_stand(words):
    secrets.know_flags(words)
    assert secrets.hide(f"it was {PLANTED}!") == "it was ***!"


def test_values_of_other_flags_and_short_ones_are_not_hidden():
    secrets.know_flags(["--runner", "DirectRunner", "--s3_secret_access_key", "no"])
    assert secrets.hide("no DirectRunner") == "no DirectRunner"


def test_what_the_environment_holds_is_hidden(monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", PLANTED)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path))  # a path, no secret
    assert secrets.hide(f"{PLANTED} {tmp_path}") == f"*** {tmp_path}"


def test_user_and_password_of_an_address_are_sent_to_its_host_alone():
    with servers.http_site() as site, servers.http_site() as other:
        there = other.give("/b.jpg", b"elsewhere")
        site.give("/a.jpg", b"picture")
        site.give("/away.jpg", status=302, location=there)
        own = site.address.replace("://", f"://me:{PLANTED}%40@")
        assert web.read_url(f"{own}/a.jpg", 100) == b"picture"
        assert web.read_url(f"{own}/away.jpg", 100) == b"elsewhere"
        word = base64.b64encode(f"me:{PLANTED}@".encode()).decode()
        assert [headers["Authorization"] for headers in site.headers] == [f"Basic {word}"] * 2
        assert [headers["Authorization"] for headers in other.headers] == [None]


def test_addresses_are_asked_for_as_browsers_do(monkeypatch):
    waited = []
    monkeypatch.setattr(retries, "time", SimpleNamespace(sleep=waited.append))
    with servers.http_site() as site:
        site.give("/%C3%A9t%C3%A9%201.jpg?q=a%20b&c=%2F", b"picture")
        for written in ("/été 1.jpg?q=a b&c=%2F", "/%C3%A9t%C3%A9%201.jpg?q=a%20b&c=%2F"):
            assert web.read_url(site.address + written, 100) == b"picture"
    with pytest.raises(OSError, match="nonnumeric port"):
        web.read_url("http://a:b/c.jpg", 100)
    assert waited == []  # another try would change nothing


def test_an_address_that_gives_a_byte_now_and_then_holds_nobody_up(monkeypatch):
    monkeypatch.setattr(web, "_PATIENCE", 0.3)
    monkeypatch.setattr(retries, "FIRST_WAIT", 0)
    with servers.http_site() as site:
        slow = site.give("/slow.jpg", bytes(5000), pieces=5000)
        with pytest.raises(OSError, match=r"only \d+ bytes came in"):
            web.read_url(slow, 10_000)
        assert site.requests["/slow.jpg"] == retries.REMOTE_TRIES
        soon = site.give("/soon.jpg", bytes(50_000), pieces=25)  # half a second, and fast enough
        assert web.read_url(soon, 100_000) == bytes(50_000)
        assert web.read_url(soon, 100) == bytes(100)
        cut = site.give("/cut.jpg", bytes(50_000), sent=100)
        with pytest.raises(OSError, match="ended 49900 bytes too early"):
            web.read_url(cut, 100_000)


# --- a job with credentials in every place that takes any ---------------------------------------


@pytest.fixture
def site(monkeypatch, tmp_path):
    """A server with a model and one picture, behind a password and signatures."""
    monkeypatch.setenv("IMAGE_FEATURES_CACHE", str(tmp_path / "cache"))
    archive = tmp_path / "m.tar.gz"
    write_archive(exports.exported("saved_model", "classification"), str(archive))
    with servers.http_site() as site:
        site.give(f"/m.tar.gz?token={PLANTED}", archive.read_bytes())
        site.give(f"/a.jpg?id=1&X-Amz-Signature={PLANTED}", jpeg())
        site.give("/b.jpg", jpeg(50, 40))
        site.give("/forbidden.jpg", status=403)
        site.give(f"/cut.jpg?sig={PLANTED}", jpeg(), sent=100)
        yield site


def planted(site, folder: Path) -> dict:
    """The job's flags: credentials in the model's handle and in a manifest's rows."""
    own = site.address.replace("://", f"://me:{PLANTED}@")
    rows = [
        f"{site.address}/a.jpg?id=1&X-Amz-Signature={PLANTED}",
        f"{own}/b.jpg",
        f"{own}/forbidden.jpg",
        f"{own}/gone.jpg?token={PLANTED}",
        f"{site.address}/cut.jpg?sig={PLANTED}",
        f"http://me:{PLANTED}@no such host/x.jpg",
    ]
    (folder / "list.csv").write_text("\n".join(["uri", *rows]))
    return {"model": f"{own}/m.tar.gz?token={PLANTED}", "allow_http": True, "max_failure_rate": 1}


def texts(ran) -> str:
    """All that a run leaves and says: files as bytes, rows, schemas, the JSON line, logs."""
    found = [ran.stderr, json.dumps(ran.line)]
    for path in ran.output.rglob("*"):
        if path.is_file():
            found.append(path.read_bytes().decode("latin1"))
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            found += [str(table.to_pylist()), str(table.schema.metadata)]
    return "\n".join(found)


def test_planted_credentials_are_in_nothing_that_a_run_leaves_or_says(
    site, tmp_path, job, monkeypatch
):
    monkeypatch.setenv("KAGGLE_KEY", f"{PLANTED}-of-the-environment")
    flags = planted(site, tmp_path)
    keys = {"s3_secret_access_key": PLANTED, "s3_session_token": f"{PLANTED}-session"}
    ran = job(tmp_path / "list.csv", **flags, **keys)
    assert ran.code == 0, ran.stderr
    assert (ran.line["features"], ran.line["failures"]) == (2, 4)
    assert f"{site.address}/a.jpg?id=1&X-Amz-Signature=***" in ran.rows("features")
    assert {row["error_class"] for row in ran.rows("failures").values()} >= {
        "PermissionError",
        "FileNotFoundError",
        "OSError",
    }
    assert PLANTED not in texts(ran)
    again = job(tmp_path / "list.csv", **flags, if_exists="resume")
    assert again.line["skipped"] == 6
    lost = job(tmp_path / "list.csv", **{**flags, "model": f"{flags['model']}x"}, output="nowhere")
    assert lost.code == 2
    assert PLANTED not in lost.stderr


def test_planted_credentials_are_not_in_the_display_data(site, tmp_path):
    """The graph as it is sent to an engine, and Beam's options as Dataflow shows them."""
    flags = planted(site, tmp_path)
    words = [f"--input={tmp_path / 'list.csv'}", f"--output={tmp_path / 'out'}", "--allow_http"]
    words += [f"--model={flags['model']}", f"--s3_secret_access_key={PLANTED}"]
    options, beam_args = parse(words)
    plan = preflight.make_plan(options, beam_args, "r1", 0.0)
    beam_options = graph.JobOptions(beam_args)
    pipeline = beam.Pipeline(runner=preflight.DIRECT_RUNNER, options=beam_options)
    graph.build(pipeline, plan)
    proto = pipeline.to_runner_api()
    shown = [str(step.display_data) for step in proto.components.transforms.values()]
    assert len("".join(shown)) > 1000
    shown.append(
        str([item.get_dict() for item in DisplayData.create_from_options(beam_options).items])
    )
    assert PLANTED not in "".join(shown)
    plain = DisplayData.create_from_options(
        beam.options.pipeline_options.PipelineOptions(beam_args)
    )
    assert PLANTED in str([item.get_dict() for item in plain.items])  # what Beam itself would show


def test_logs_of_any_library_lose_what_was_planted():
    from pipeline.extract import log_handler

    secrets.know_flags(["--s3_secret_access_key", PLANTED])
    stream = io.StringIO()
    record = logging.LogRecord("a", logging.INFO, "", 0, "options: %s", ({"k": PLANTED},), None)
    log_handler(stream).handle(record)
    assert stream.getvalue() == "INFO a: options: {'k': '***'}\n"


@pytest.mark.parametrize("scheme", ["s3"])
def test_a_stores_credentials_are_in_nothing_that_a_run_leaves_or_says(tmp_path, job, scheme):
    with servers.STORES[scheme]() as store:
        flags = {**store.flags, "s3_secret_access_key": PLANTED}
        files.configure_stores([f"--{name}={value}" for name, value in flags.items()])
        files.write_bytes(f"{store.uri}/in/a.jpg", jpeg())
        (tmp_path / "list.csv").write_text(f"uri\n{store.uri}/in/a.jpg\n{store.uri}/in/gone.jpg\n")
        ran = job(tmp_path / "list.csv", **flags, max_failure_rate=1)
    assert (ran.line["features"], ran.line["failures"]) == (1, 1)
    assert PLANTED not in texts(ran)
