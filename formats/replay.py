"""What failed in an earlier run, as work to be done again: the rows of an output's failures."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from formats.manifest import read_manifest
from formats.parts import FAILURES, FEATURES, open_part
from formats.records import DUPLICATE
from storage import files
from storage.errors import RequestError

_SHOWN = re.compile(r"\\x([89a-f][0-9a-f])")  # as `formats.records.utf8` escapes a byte
_DATA = re.compile(rf"({FEATURES}|{FAILURES})/part-[^/]*\.parquet")


@dataclass(slots=True)
class Failed:
    """What failed of one source: keys by record index, of images and of damaged places.

    `images`: keys of failures without a record index, and whether each stands for a source that
    could not be opened, which may hold many. `done`: the indices that the output has, where
    something else may hide more of the source than itself. `lacking`: whether records were missing
    at its end.
    """

    source: str
    keys: dict[int, str] = field(default_factory=dict)
    images: dict[str, bool] = field(default_factory=dict)
    damage: dict[int, str] = field(default_factory=dict)
    done: set[int] = field(default_factory=set)
    lacking: bool = False


def manifest_of(output: str) -> Mapping[str, Any]:
    """The manifest of the output whose failures are asked for. Raises RequestError."""
    manifest = read_manifest(output)
    if manifest is None:
        raise RequestError(
            f"--input {output}: no output of this program (it has no manifest.json); "
            "--input_format failures takes the directory that a run wrote to"
        )
    for entry in manifest["files"]:
        if not _DATA.fullmatch(entry["path"]):  # which could lead out of the output
            raise RequestError(
                f"--input {output}: its manifest names {entry['path'][:200]!r}, which is no data "
                "file of an output, so that nothing in it can be trusted"
            )
    return manifest


def count_failures(output: str) -> int:
    """How many failures of `output` can be tried again, by its manifest. Raises RequestError."""
    reasons = manifest_of(output)["failures_by"].items()
    return sum(count for reason, count in reasons if not reason.endswith(f"/{DUPLICATE}"))


def failed_sources(output: str) -> Iterator[Failed]:
    """The failures of `output` by source, in the order of their names. Raises OSError.

    Without images whose id is another's: the output has that one, and trying changes nothing of it.
    """
    manifest = manifest_of(output)
    found: dict[str, Failed] = {}
    settled: list[tuple[str, int]] = []
    columns = "key", "source", "record_index", "stage", "error_class"
    for key, source, index, stage, error_class in _rows(output, manifest, FAILURES, *columns):
        if error_class == DUPLICATE:
            if index is not None:
                settled.append((source, index))
            continue
        at = found.setdefault(source, Failed(source))
        at.lacking |= error_class == "MissingRecords" and index is None
        if index is None:  # too many bytes are a file's that was read as one image
            at.images[key] = stage == "read" and error_class != "TooManyBytes"
        elif key.startswith(f"{source}@"):
            at.damage[index] = key
        else:
            at.keys[index] = key
    # A failure in opening may stand for a whole container, of which another run has read a part.
    hidden = {s for s, at in found.items() if at.damage or any(at.images.values())}
    if hidden:
        for source, index in _rows(output, manifest, FEATURES, "source", "record_index"):
            if source in hidden and index is not None:
                found[source].done.add(index)
        for source, index in settled:
            if source in hidden:
                found[source].done.add(index)
    for source in sorted(found):
        yield found[source]


def _rows(
    output: str, manifest: Mapping[str, Any], kind: str, *columns: str
) -> Iterator[tuple[Any, ...]]:
    for entry in manifest["files"]:
        if not entry["path"].startswith(f"{kind}/"):
            continue
        with open_part(output, entry["path"]) as part:
            for batch in part.iter_batches(columns=list(columns)):
                yield from zip(*(batch.column(name).to_pylist() for name in columns), strict=True)


def path_of(source: str) -> str:
    """Where the file lies that rows call `source`, which shows bytes that are no UTF-8."""
    if files.is_remote(source) or not _SHOWN.search(source) or os.path.lexists(source):
        return source
    path = _SHOWN.sub(lambda byte: os.fsdecode(bytes.fromhex(byte[1])), source)
    return path if os.path.lexists(path) else source


def listed(source: str) -> files.FileInfo | None:
    """The file at `source` as it lies there now; None where there is none. Raises OSError."""
    if "://" in source and not source.startswith(("gs://", "s3://")):
        return None
    path = path_of(source)
    found = next(files.find(path), None)
    return found if found and found.path == path else None
