"""python -m pipeline.report: one page about an output, true, whole and harmless."""

from __future__ import annotations

import html.parser
import json
import os
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from pictures import good, jpeg
from test_extract import write_pictures, write_tfrecord

from formats import page
from pipeline import report, verify
from storage import files


class Page(html.parser.HTMLParser):
    """Its text and tags; fails where tags do not close as they opened."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            assert name not in ("src", "href")
            assert "url(" not in (value or "")
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += f"{data} "


@pytest.fixture
def write(capsys):
    """Calls `main`: exit code, the JSON line, stderr and the page."""

    def call(output, *flags):
        capsys.readouterr()
        code = report.main([str(output), *flags])
        out, err = capsys.readouterr()
        line = json.loads(out.splitlines()[-1]) if out else None
        text = (output / "report.html").read_text() if line else None
        return code, line, err, Page(text) if text else None

    return call


def test_a_page_of_a_true_run(tmp_path, job, write):
    records = [
        {
            "image/encoded": jpeg(40 + n, 30),
            "image/class/label": [b"cat", b"dog"][n % 2 : n % 2 + 1],
        }
        for n in range(8)
    ]
    records.append({"image/encoded": b"<script>alert(1)</script>"})
    ran = job(write_tfrecord(tmp_path / "a<b>&c.tfrecord", records), max_failure_rate=1)
    code, line, err, shown = write(ran.output)
    assert (code, err) == (0, "")
    assert line["report"] == str(ran.output / "report.html")
    assert "script" not in shown.tags
    assert len([tag for tag in shown.tags if tag == "circle"]) == 8
    for told in (
        "9 images", "8 features", "1 failures", "11.11% failed",
        "decode/UnsupportedFormat", "a<b>&c.tfrecord#8", "looks like html",
        "Where the time went", "the model ran", "Pictures", "megapixels", "cat", "dog",
        "Embedding", "width 48", "Logits", "width 11", "Highest class", "Map", "Most alike",
        ran.manifest["model"]["fingerprint"], "tensorflow",
    ):  # fmt: skip
        assert told in re.sub(r"\s+", " ", shown.text), told
    assert verify.main([str(ran.output)]) == 0  # it is no data


def test_the_page_is_no_input_of_a_later_run(tmp_path, job, write):
    folder = write_pictures(tmp_path / "in", {"a.jpg": jpeg(), "b.jpg": jpeg(50, 50)})
    ran = job(folder, output=folder / "out")
    assert write(ran.output)[0] == 0
    again = job(folder, output=folder / "out", if_exists="resume")
    assert again.manifest["counts"] == {"images": 2, "features": 2, "failures": 0}
    assert "report.html" not in str(again.rows("failures"))


def test_what_was_not_published_has_a_page_too(tmp_path, job, write):
    ran = job(write_pictures(tmp_path / "in", {**good(), "bad.jpg": b"bad"}), max_failure_rate=0)
    assert ran.code == 3
    (folder,) = (ran.output / "_failed").iterdir()
    code, _, _, shown = write(folder)
    assert code == 0
    assert "too_many_failures" in shown.text
    assert "bad.jpg" in shown.text
    judged = json.loads((folder / "manifest.json").read_text())["judged"]
    assert f"{judged['failures'] / judged['images']:.2%} failed" in " ".join(shown.text.split())


def test_an_empty_output(tmp_path, job, write):
    (tmp_path / "in").mkdir()
    ran = job(tmp_path / "in", allow_empty=True)
    code, _, _, shown = write(ran.output)
    assert code == 0
    assert "0 images" in re.sub(r"\s+", " ", shown.text)


def test_a_damaged_output_is_told_of(tmp_path, job, write):
    ran = job(write_pictures(tmp_path / "in", {"a.jpg": jpeg()}))
    (path,) = (ran.output / "features").iterdir()
    start = pq.read_metadata(path).row_group(0).column(7).data_page_offset
    data = bytearray(path.read_bytes())
    data[start + 60] ^= 1
    path.write_bytes(data)
    code, line, err, _ = write(ran.output)
    assert (code, line) == (1, None)
    assert len(err.splitlines()) == 1
    assert "pipeline.verify tells of all damage" in err


@pytest.mark.parametrize("text", ["{", '{"format_version": 1}'])
def test_a_damaged_manifest_is_told_of(tmp_path, write, text):
    (tmp_path / "manifest.json").write_text(text)
    code, line, err, _ = write(tmp_path)
    assert (code, line, len(err.splitlines())) == (1, None, 1)
    assert "not a manifest" in err


def test_a_manifest_without_what_the_page_shows(tmp_path, job, write):
    ran = job(write_pictures(tmp_path / "in", {"a.jpg": jpeg()}))
    manifest = ran.manifest
    del manifest["failures_by"]
    (ran.output / "manifest.json").write_text(json.dumps(manifest))
    code, line, err, _ = write(ran.output)
    assert (code, line, len(err.splitlines())) == (1, None, 1)
    assert "KeyError: 'failures_by'" in err


def test_a_place_that_cannot_be_written_to_is_a_wrong_request(tmp_path, job, write, monkeypatch):
    def refuse(path, data):
        raise PermissionError(f"{path}: read-only")

    ran = job(write_pictures(tmp_path / "in", {"a.jpg": jpeg()}))
    monkeypatch.setattr(files, "write_bytes", refuse)
    code, line, err, _ = write(ran.output)
    assert (code, line) == (2, None)
    assert "report.html: read-only" in err


def test_a_path_that_is_no_utf8(tmp_path, job, write):
    name = os.fsdecode(b"out\xff")
    ran = job(write_pictures(tmp_path / "in", {"a.jpg": jpeg()}), output=tmp_path / name)
    code, _, _, shown = write(ran.output)
    assert code == 0
    assert r"out\udcff" in shown.text


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "no output of this program"),
        (["--rows", "0"], "--rows 0"),
        (["--rows", "100000"], "--rows 100000"),
        (["--rosw", "3"], "no such flag"),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_2(tmp_path, write, flags, told):
    code, line, err, _ = write(tmp_path, *flags)
    assert (code, line, len(err.splitlines())) == (2, None, 1)
    assert told in err


def test_histograms():
    """One value is no histogram, and what spans powers is shown by powers."""
    assert page._histogram(np.full(9, 0.25)) == "<p>all of them 0.25</p>"
    even, wide = page._histogram(np.arange(1.0, 17)), page._histogram(np.geomspace(1, 4096, 16))
    for drawn, by_powers in ((even, False), (wide, True)):
        counts = [int(text) for text in re.findall(r"(\d+)</title>", drawn)]
        assert counts == [4] * 4
        assert ("by powers" in drawn) == by_powers
