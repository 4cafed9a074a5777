"""What of an output is finished already: the manifest's files, and whole ones of killed runs."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from formats import table
from formats.digests import Bytes, image_digests, key_digest, key_digests, place_digests
from formats.parts import (
    FAILURES,
    FEATURES,
    PLACE,
    column_batches,
    is_damage,
    is_data,
    list_parts,
    of_each,
    open_part,
)
from storage import files
from storage.errors import RequestError

ROW_META = "image_features.rows"  # schema metadata: JSON of all that decides what a row holds
_ADMITTING = {"formats", "max_pixels"}  # of pixels: whether there is a row at all
_TOLD, _SHORT = 5, 40  # differences that are told of, and characters of a value in them
_DERIVED = re.compile(r"-((settled|retried)-\d+|duplicates-\w+)\.parquet$")  # made of others
_BEGAN = re.compile(r"-(\d{8}T\d{6}Z)-")  # in a run's id
_PART = re.compile(r"(features|failures)/part-[^/]*\.parquet")
_RUN = r"\d{8}T\d{6}Z-[0-9a-f]{8}"
# What a killed run leaves. Another program's file may lie there too, or the user's input.
_LEFTOVER = re.compile(
    rf"(features|failures)/part-{_RUN}-[^/]*|_run-{_RUN}\.finished"
    r"|(_failed/[^/]+/)?((features|failures)/)?\.tmp-(probe-)?[0-9a-f]{8}(-[^/]*)?"
)


def features_schema(output: str, manifest: Mapping[str, Any] | None) -> pa.Schema | None:
    """The schema that features have in `output`, None where there are none, or none that is whole.

    Of those that `manifest` names, else of those that a killed run has left. Raises OSError.
    """
    named = [entry["path"] for entry in manifest["files"]] if manifest else []
    for path in [*named, *sorted(filter(is_data, list_parts(output)))]:
        if not path.startswith(f"{FEATURES}/"):
            continue
        with contextlib.suppress(pa.ArrowInvalid, FileNotFoundError):
            with open_part(output, path) as part:
                schema = part.schema_arrow
            if ROW_META.encode() in (schema.metadata or {}):  # else another program's
                return schema
    return None


@dataclass(frozen=True)
class Resumed:
    """What a resumed run starts from.

    `kept`: files that stay; `retried`: failures that stay where they are not read again; `retired`:
    files to delete at the commit. `finished`: digests of the keys that are published, of the other
    kept rows' key and place together, and of the places of damage and of files that are listed by
    another name. `reread`: of the sources of `retried` that are read whole again. `counts`: records
    that each container is known to have had, by source.
    """

    kept: tuple[str, ...] = ()
    retried: tuple[str, ...] = ()
    retired: tuple[str, ...] = ()
    finished: Bytes = b""
    reread: bytes = b""
    counts: Mapping[str, int] = field(default_factory=dict)


def resume(
    output: str,
    manifest: Mapping[str, Any] | None,
    rows: Mapping[str, Any],
    retry: Iterable[str] | None = None,
) -> Resumed:
    """What of `output` is finished: the manifest's files, and whole ones that a killed run left.

    `rows` is all that decides what a row holds; RequestError, naming the difference, where the
    files there were made otherwise (beside a manifest only its own files count: what a killed run
    left is retired then). Where `retry` is given failures count as not finished: it names the
    sources of many images that the run will read whole, in which each failure is tried again.

    Of each file only footer, keys and places are read: its size tells a file that was cut or
    replaced, page checksums what is read here, and `python -m pipeline.verify` all the rest.
    Memory: 16 bytes a row, twice that for files that a list names by another name.
    """
    listed = {entry["path"]: entry for entry in manifest["files"]} if manifest else {}
    superseded = set(manifest.get("superseded", ())) if manifest else set()
    below = len(files.join(output, ""))
    present = {info.path[below:]: info.size for info in files.list_folder(output)}
    if not files.is_remote(output):  # into folders that are links no listing goes by itself
        present.update(list_parts(output))
    sizes = {path: size for path, size in present.items() if _PART.fullmatch(path)}

    def again(path: str) -> bool:
        return retry is not None and path.startswith(f"{FAILURES}/")

    def may_stay(path: str) -> bool:
        if path in superseded:
            return False
        # What a file was made of is still there; a killed run that was overwritten since may have
        # had other pictures.
        made_anew = _DERIVED.search(path) or (manifest and _is_older(path, manifest["run_id"]))
        return path in listed or not (made_anew or again(path))

    def look(path: str) -> _Look | None:
        return _look(output, path, sizes[path], rows, path in listed, again(path))

    seen = sorted(filter(may_stay, filter(is_data, sizes)))
    looks = {
        path: found for path, found in zip(seen, of_each(output, look, seen), strict=True) if found
    }
    lost = set(listed).difference(looks)
    if lost:
        raise RequestError(
            f"--output {output}: {min(lost)} is named by the manifest and missing or damaged; "
            "resuming would lose its rows; restore it, or use --if_exists overwrite"
        )
    for path, entry in listed.items():
        if sizes[path] != entry["bytes"]:
            raise RequestError(
                f"--output {output}: {path} is not what the manifest tells of; resuming "
                "would publish altered rows; restore it, or use --if_exists overwrite"
            )
    kept: list[str] = []
    finished = bytearray()
    retried: list[str] = []
    sources: set[str] = set()  # of these
    counts: dict[str, int] = {}
    for path in seen:
        found = looks.pop(path, None)  # let go of, so that nothing is held twice
        if found is None or (found.other and path not in listed and manifest):
            continue
        if found.other:
            raise RequestError(
                f"--if_exists resume: {files.join(output, path)} was made with another "
                f"{found.other}; one output would hold two kinds of rows; use the earlier options, "
                "another --output or --if_exists overwrite"
            )
        if found.sources is not None:
            retried.append(path)
            sources |= found.sources
        else:
            kept.append(path)
            finished += found.finished
        for name, count in found.counts.items():
            counts[name] = max(counts.get(name, 0), count)
    retired = sorted(
        path
        for path in present.keys() - {*kept, *retried}
        if (path in superseded or _LEFTOVER.fullmatch(path))
        and files.abandoned(files.join(output, path))
    )
    reread = b"".join(map(key_digest, sorted(sources.intersection(retry or ()))))
    return Resumed(tuple(kept), tuple(retried), tuple(retired), finished, reread, counts)


@dataclass(frozen=True)
class _Look:
    """What resuming learns of a whole file: what is `other` in how its rows were made, else of its
    rows what `Resumed` has of all; of failures to be tried again `sources` and `counts` alone.
    """

    other: str | None = None
    sources: set[str] | None = None
    finished: Bytes = b""
    counts: Mapping[str, int] = field(default_factory=dict)


def _look(
    output: str, path: str, size: int, rows: Mapping[str, Any], is_listed: bool, again: bool
) -> _Look | None:
    """What there is to know of a file, by opening it once; None where it is not whole."""
    try:
        part = open_part(output, path, size)
    except pa.ArrowInvalid:
        return None
    with part:
        if path.startswith(FAILURES):  # they have no such values
            rows = {name: v for name, v in rows.items() if name not in ("label", "columns")}
        other = None if again else _other_rows(part.schema_arrow.metadata or {}, rows)
        if other:
            return _Look(other)
        sources: set[str] | None = set() if again else None
        finished = bytearray()
        counts: dict[str, int] = {}
        for batch in column_batches(part, ["key", *PLACE]):
            key, source, index = batch.columns
            if sources is not None:
                sources.update(source.unique().to_pylist())
            elif is_listed:
                finished += key_digests(key)
            else:  # another image of this id may yet come first
                finished += image_digests(key, source, index)
            # Not of a record with an id: it may have moved, and another stand in its place.
            known = pc.and_(pc.is_null(index), pc.not_equal(key, source.cast(pa.string())))
            records = pa.table({"source": source, "index": index})
            if path.startswith(FAILURES):
                damage = is_damage(key, source)
                known = pc.xor(known, damage)  # of damage, where it has a record's place
                records = records.filter(pc.invert(damage))  # which may lie behind the last one
            if sources is None:
                finished += place_digests(source.filter(known), index.filter(known))
            most = records.group_by("source").aggregate([("index", "max")])
            for name, last in zip(*most.columns, strict=True):
                if last.is_valid:
                    text = name.as_py()
                    counts[text] = max(counts.get(text, 0), last.as_py() + 1)
    return _Look(None, sources, finished, counts)


def _is_older(path: str, run_id: str) -> bool:
    """Whether the run that wrote the data file `path` began before the run `run_id`, or with it."""
    began, published = (_BEGAN.search(name) for name in (path, f"-{run_id}"))
    return bool(began and published and began[1] <= published[1])


def _other_rows(metadata: Mapping[bytes, bytes], rows: Mapping[str, Any]) -> str | None:
    """What was different when a file with `metadata` was made: each name, then and now."""
    there = json.loads(metadata.get(ROW_META.encode(), b"{}"))
    now = json.loads(json.dumps(table.utf8_within(rows)))
    for made in (there, now):
        if isinstance(keys := made.get("keys"), list):  # by the flags that tell them
            made["keys"] = dict(zip(("image_key", "id_key", "label_key"), keys, strict=False))
        if isinstance(pixels := made.get("preprocessing"), dict):
            made["preprocessing"] = {k: v for k, v in pixels.items() if k not in _ADMITTING}
    told = [
        f"{name[:_SHORT]} ({_short(old)}, now {_short(new)})"
        for part, value in now.items()
        for name, old, new in _differences(part, there.get(part), value)
    ]
    more = [f"{len(told) - _TOLD} more"] if len(told) > _TOLD else []
    return ", ".join(told[:_TOLD] + more) or None


def _differences(name: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """What differs between two values as JSON holds them, down to the leaves: name, old, new."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _differences(f"{name}.{key}", old.get(key), new.get(key))
    elif isinstance(old, list) and isinstance(new, list) and len(f"{old}{new}") > _SHORT:
        for at, (one, other) in enumerate(itertools.zip_longest(old, new)):
            yield from _differences(f"{name}[{at}]", one, other)
    elif old != new:
        yield name, old, new


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHORT else text[: _SHORT - 3] + "..."
