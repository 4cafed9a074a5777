"""Manifests: CSV or JSON lines that name an image by `uri` in each row, with what belongs to it."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

import pyarrow as pa

from formats import fields
from formats.example import ExampleKeys, ExampleTypes
from formats.records import utf8
from storage.secrets import hide_in_url

URI = "uri"
CSV_ENDINGS, JSON_ENDINGS = (".csv",), (".jsonl", ".ndjson")
ENDINGS = CSV_ENDINGS + JSON_ENDINGS
WEB = ("http://", "https://")
DEFAULT_LABEL = ExampleKeys().label
LINE_BYTES = 16 << 20  # longest line of JSON
_Wrong = tuple[str, str]  # class and message of what is wrong with a row


@dataclass(frozen=True, slots=True)
class Entry:
    """An image that a list names.

    `path` is the local path or URI to read, `key` the `uri` as written, `index` the row where the
    row itself is to be told of (it is wrong, or a repetition), `values` what else the row holds,
    all text where they are `cells` of CSV. `wrong` is why there is nothing to read: a class and a
    message.
    """

    key: str
    path: str
    index: int | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    wrong: _Wrong | None = None
    cells: bool = False


def read_entries(stream: BinaryIO, path: str, names: Sequence[str]) -> Iterator[Entry]:
    """The rows of the manifest at `path`, with those of their values that `names` tells.

    It is CSV unless it is named .jsonl or .ndjson or begins with a brace. A `uri` without a scheme
    is relative to the manifest. Raises ValueError, one line, for CSV whose header has no
    `uri` or two, and errors of `stream`.
    """
    buffered = io.BufferedReader(cast(io.RawIOBase, stream), 1 << 20)
    as_json = path.lower().endswith(JSON_ENDINGS) or (
        not path.lower().endswith(CSV_ENDINGS) and buffered.peek(1).lstrip()[:1] == b"{"
    )
    folder, slash, _ = path.rpartition("/")
    base = folder or slash
    lines = cast(BinaryIO, buffered)
    rows = _json_rows(lines) if as_json else _csv_rows(lines, path)
    for index, row in enumerate(rows):
        wrong = row if isinstance(row, tuple) else None
        uri = row.get(URI) if isinstance(row, dict) else None
        if wrong is None and (not isinstance(uri, str) or not uri):
            wrong = ("MissingFeature", f"the row has no {URI!r}")
        elif uri is not None and not _can_be_path(uri):
            wrong = ("BadRow", f"the {URI!r} holds a zero byte or half a surrogate pair")
        if wrong:
            yield Entry(f"{shown(path)}#{index}", path, index, {}, wrong)
        else:
            assert isinstance(row, dict)
            assert isinstance(uri, str)
            values = {name: row[name] for name in names if name in row}
            yield Entry(shown(uri), resolve(uri, base), None, values, cells=not as_json)


def _can_be_path(uri: str) -> bool:
    try:
        return b"\0" not in os.fsencode(uri)
    except UnicodeEncodeError:
        return False


def shown(path: str) -> str:
    """`path` as text that any file can hold, without the credentials of an http(s) address."""
    path = hide_in_url(path, apart=True)
    try:
        return utf8(path) or ""
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell
        return path.encode("utf-8", "backslashreplace").decode()


def resolve(uri: str, base: str) -> str:
    """Where the image lies that a manifest in the folder `base` calls `uri`."""
    if uri.startswith("file://"):
        return uri.removeprefix("file://")
    if "://" in uri or os.path.isabs(uri):
        return uri
    scheme, found, rest = base.partition("://")
    if found:
        bucket, *names = f"{rest}/{uri}".split("/")
        steps: list[str] = []  # an empty one is a folder's name there, as any
        for name in names:
            if name == "..":
                del steps[-1:]
            elif name != ".":
                steps.append(name)
        return f"{scheme}://{bucket}/{'/'.join(steps)}"
    return os.path.normpath(os.path.join(base, uri))


def _csv_rows(stream: BinaryIO, path: str) -> Iterator[dict[str, Any] | _Wrong]:
    text = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
    reader = csv.reader(text, strict=True)
    try:
        header = next(reader, None)
    except csv.Error as error:
        raise ValueError(f"{path}: its header is no CSV ({error})") from None
    if header is None:
        return
    header = [name.strip() for name in header]
    if header.count(URI) > 1:
        raise ValueError(f"{path}: has {header.count(URI)} columns {URI!r}; which is meant?")
    if URI not in header:
        told = ", ".join(header)[:200]
        raise ValueError(f"{path}: a manifest names images in a column {URI!r}; it has {told}")
    while True:
        before = reader.line_num
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            lines = reader.line_num - before
            lost = f"; {lines} lines from {before + 1} on are lost" if lines > 1 else ""
            yield "BadRow", f"line {reader.line_num}: {error}{lost}"
            continue
        if len(cells) == len(header):
            yield {n: None if c == "" and n != URI else c for n, c in zip(header, cells)}  # noqa: B905
        elif cells:
            yield "BadRow", f"{len(cells)} cells under a header of {len(header)}"


def _json_rows(stream: BinaryIO) -> Iterator[dict[str, Any] | _Wrong]:
    number = 0
    while line := stream.readline(LINE_BYTES):
        number += 1
        if len(line) == LINE_BYTES and not line.endswith(b"\n"):
            while (rest := stream.readline(LINE_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield "BadRow", f"line {number} is over {LINE_BYTES} bytes"
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield "BadRow", f"line {number} is no JSON: {error}"
            continue
        yield row if isinstance(row, dict) else ("BadRow", f"line {number} is no JSON object")


def infer_types(entries: Sequence[Entry], pattern: str, keys: ExampleKeys) -> ExampleTypes:
    """The types of label and columns as a sample of the rows of `pattern` shows them.

    Cells of CSV are numbers where all of the sample are. Raises ValueError, one line, for a name
    that no sampled row has (but the default label, which is null then), and where all labels are
    floats.
    """
    rows = [entry for entry in entries if not entry.wrong]
    if not rows:
        return ExampleTypes(pa.null(), dict.fromkeys(keys.columns, pa.null()))
    there = {name for entry in rows for name in entry.values}
    for name in fields.names_of(keys):
        if name not in there and not (name == keys.label == DEFAULT_LABEL):
            raise ValueError(f"{name!r} is in none of the first {len(rows)} rows of {pattern}")

    def sampled(name: str, typed: Callable[[Sequence[Any]], list[Any]]) -> list[Any]:
        cells = typed([entry.values.get(name) for entry in rows if entry.cells])
        return [*cells, *(entry.values.get(name) for entry in rows if not entry.cells)]

    def label(cells: Sequence[Any]) -> list[Any]:
        return [fields.integer(cell) if cell else None for cell in cells]

    columns = {
        name: fields.column_type(sampled(name, fields.numbers), name) for name in keys.columns
    }
    kind = fields.label_type(sampled(keys.label, label), keys.label) if keys.label else pa.null()
    return ExampleTypes(kind, columns)
