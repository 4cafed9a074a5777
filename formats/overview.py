"""An output to be looked at: its manifest, reasons with examples, and statistics of a sample."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from formats.parts import FAILURES, FEATURES, open_part

_VECTORS = ("embedding", "logits")
_SHOWN = ("key", "sha256", "width", "height", "label", "top_classes", "top_labels")
_RUNS = 32  # of rows that follow each other, in a sample: so many row groups are read, or twice
_FILES = 32  # of failures, in which examples are looked for
_EXAMPLES = 3  # of each reason
_PAIRS = 10


@dataclass(frozen=True)
class Vectors:
    """One output's vectors in the sample.

    `norms`: float64 [N], Euclidean. `mean` and `deviation` of all values. `still`: how many
    dimensions have one and the same value in all rows.
    """

    width: int
    norms: np.ndarray
    mean: float
    deviation: float
    still: int


@dataclass(frozen=True)
class Overview:
    """What a report tells of an output.

    `rows`: the sample without its vectors. `vectors` by name. `classes`: each row's highest class,
    with its name where that is known; empty where classes are not. `places`: float64 [N, 2], the
    rows' first two principal components by `placed_by`, which show the share `shown` of its
    variance. `alike`: cosine and two keys of the most similar rows of other bytes. `examples`: key
    and message of some failures by "stage/error_class".
    """

    manifest: Mapping[str, Any]
    rows: pa.Table
    vectors: Mapping[str, Vectors]
    classes: Sequence[str]
    placed_by: str
    places: np.ndarray
    shown: float
    alike: Sequence[tuple[float, str, str]]
    examples: Mapping[str, Sequence[tuple[str, str]]]


def look(output: str, manifest: Mapping[str, Any], most: int) -> Overview:
    """The overview of `output` by about `most` of its rows, evenly spread over all of them.

    Raises OSError and pa.ArrowException for a file that is not as it was written.
    """
    entries: dict[str, list[Mapping[str, Any]]] = {FEATURES: [], FAILURES: []}
    for entry in manifest["files"]:
        entries[entry["path"].partition("/")[0]].append(entry)
    sample = _sample(output, entries[FEATURES], most)
    arrays = {name: _stacked(sample[name]) for name in _VECTORS if name in sample.column_names}
    rows = sample.drop_columns(list(arrays))
    placed_by = next(iter(arrays), "")
    vectors = arrays[placed_by] if arrays else np.zeros((0, 1), np.float32)
    places, shown = principal_places(vectors)
    return Overview(
        manifest,
        rows,
        {name: _described(array) for name, array in arrays.items()},
        _classes(rows, arrays.get("logits")),
        placed_by,
        places,
        shown,
        most_alike(vectors, *(rows[name].to_pylist() for name in ("key", "sha256"))),
        _examples(output, [entry["path"] for entry in entries[FAILURES]], manifest["failures_by"]),
    )


def _sample(output: str, entries: Sequence[Mapping[str, Any]], most: int) -> pa.Table:
    """About `most` rows of the files of `entries`, in runs that are evenly spread over all rows."""
    chosen = np.array(_chosen(sum(entry["rows"] for entry in entries), most), int)
    found: list[pa.Table] = []
    start = 0
    for entry in entries:
        end = start + entry["rows"]
        wanted = chosen[(chosen >= start) & (chosen < end)] - start
        if len(wanted):
            found += _rows(output, entry["path"], wanted)
        start = end
    return pa.concat_tables(found) if found else pa.table({name: [] for name in _SHOWN})


def _chosen(total: int, most: int) -> list[int]:
    """About `most` of `total` rows, sorted: the middle of each of some equal parts."""
    parts = min(_RUNS, total, most)
    chosen: list[int] = []
    for part in range(parts):
        start, end = total * part // parts, total * (part + 1) // parts
        rows = min(end - start, math.ceil(most / parts))
        first = start + (end - start - rows) // 2
        chosen += range(first, first + rows)
    return chosen


def _rows(output: str, path: str, wanted: np.ndarray) -> Iterator[pa.Table]:
    """The rows `wanted` (sorted) of one file, what the report shows of them."""
    start = 0
    with open_part(output, path) as part:
        shown = [name for name in part.schema_arrow.names if name in (*_SHOWN, *_VECTORS)]
        for group in range(part.num_row_groups):
            end = start + part.metadata.row_group(group).num_rows
            here = wanted[(wanted >= start) & (wanted < end)] - start
            if len(here):
                yield part.read_row_group(group, shown, use_threads=False).take(here)
            start = end


def _evenly(count: int, most: int) -> list[int]:
    """At most `most` of the first `count` numbers, evenly spread."""
    chosen = min(count, most)
    return [(2 * at + 1) * count // (2 * chosen) for at in range(chosen)]


def _stacked(column: pa.ChunkedArray) -> np.ndarray:
    """A column of vectors as float32 [N, width]."""
    values = pa.concat_arrays([chunk.flatten() for chunk in column.chunks])
    return np.asarray(values).astype(np.float32).reshape(len(column), -1)


def _described(array: np.ndarray) -> Vectors:
    return Vectors(
        array.shape[1],
        np.linalg.norm(array.astype(np.float64), axis=1),
        float(array.mean(dtype=np.float64)),
        float(array.std(dtype=np.float64)),
        int((array == array[0]).all(axis=0).sum()) if len(array) > 1 else 0,
    )


def _classes(rows: pa.Table, logits: np.ndarray | None) -> list[str]:
    highest: list[int] = []
    if "top_classes" in rows.column_names:
        highest = [classes[0] for classes in rows["top_classes"].to_pylist()]
    elif logits is not None:
        highest = logits.argmax(axis=1).tolist()
    if "top_labels" not in rows.column_names:
        return [str(number) for number in highest]
    names = (labels[0] for labels in rows["top_labels"].to_pylist())
    return [f"{name} ({number})" for name, number in zip(names, highest, strict=True)]


def principal_places(array: np.ndarray) -> tuple[np.ndarray, float]:
    """The first two principal components of the rows of `array`, float64 [N, 2].

    And their share of the variance, 0 where there is none. By the eigenvectors of the covariance
    or, of few rows, of the Gram matrix of centred rows. The entry furthest from 0 is positive.
    """
    places = np.zeros((len(array), 2))
    if len(array) < 2:
        return places, 0.0
    centred = array.astype(np.float64) - array.mean(axis=0, dtype=np.float64)
    few = len(array) <= array.shape[1]
    values, vectors = np.linalg.eigh(centred @ centred.T if few else centred.T @ centred)
    values, vectors = np.maximum(values, 0), vectors[:, ::-1][:, :2]
    top = vectors * np.sqrt(values[::-1][:2]) if few else centred @ vectors
    largest = np.take_along_axis(top, np.abs(top).argmax(axis=0)[None], axis=0)
    places[:, : top.shape[1]] = top * np.where(largest < 0, -1, 1)
    whole = values.sum()
    return places, float(values[::-1][:2].sum() / whole) if whole else 0.0


def most_alike(
    array: np.ndarray, keys: Sequence[str], digests: Sequence[str], pairs: int = _PAIRS
) -> list[tuple[float, str, str]]:
    """The `pairs` of rows of other digests with the highest cosine: it and their keys.

    A row is in one pair at most, with the one that is nearest to it of those left.
    """
    norms = np.linalg.norm(array, axis=1, keepdims=True)
    unit = array / np.where(norms > 0, norms, 1)
    cosines = unit @ unit.T
    _, same = np.unique(np.asarray(digests, str), return_inverse=True)
    cosines[same[:, None] == same[None, :]] = -np.inf  # itself among them
    found: list[tuple[float, str, str]] = []
    while len(found) < pairs and cosines.size:
        one, other = divmod(int(cosines.argmax()), len(cosines))
        if not np.isfinite(cosines[one, other]):
            break
        found.append((float(cosines[one, other]), keys[one], keys[other]))
        for row in (one, other):
            cosines[row, :] = cosines[:, row] = -np.inf
    return found


def _examples(
    output: str, paths: Sequence[str], reasons: Mapping[str, int]
) -> dict[str, list[tuple[str, str]]]:
    """Some failures of each of `reasons`, as far as a few of the files hold them."""
    found: dict[str, list[tuple[str, str]]] = {}
    for at in _evenly(len(paths), _FILES):
        if all(len(found.get(name, ())) == min(n, _EXAMPLES) for name, n in reasons.items()):
            break
        with open_part(output, paths[at]) as part:
            _gather(part, found)
    return found


def _gather(part: pq.ParquetFile, found: dict[str, list[tuple[str, str]]]) -> None:
    """Add examples of a file of failures to `found`."""
    names = ["stage", "error_class", "key", "message"]
    for batch in part.iter_batches(columns=names, use_threads=False):
        columns = (batch.column(name).to_pylist() for name in names)
        for stage, error_class, key, message in zip(*columns, strict=True):
            kept = found.setdefault(f"{stage}/{error_class}", [])
            if len(kept) < _EXAMPLES:
                kept.append((key, message))
