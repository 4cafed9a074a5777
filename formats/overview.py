"""An output to be looked at: its manifest, reasons with examples, and statistics of a sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from formats import dataset
from formats.dataset import FAILURES, FEATURES

VECTORS = ("embedding", "logits")
_FILES = 32  # that a sample comes from, at most
_EXAMPLES = 3  # of each reason
_LOOKED_AT = 100_000  # failures among which they are looked for
_PAIRS = 10


@dataclass(frozen=True)
class Vectors:
    """One output's vectors in the sample.

    `norms`: float64 [N], Euclidean. `mean` and `deviation` of all values. `still`: how many
    dimensions have one and the same value in all rows. `classes`: rows by the place of their
    largest value, most first.
    """

    width: int
    norms: np.ndarray
    mean: float
    deviation: float
    still: int
    classes: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Overview:
    """What a report tells of an output.

    `rows`: the sample without its vectors. `vectors` by name. `places`: float64 [N, 2], the rows'
    first two principal components by `placed_by`, which show the share `shown` of its variance.
    `alike`: cosine and two keys of the most similar rows of other bytes. `examples`: key and
    message of some failures by "stage/error_class".
    """

    manifest: Mapping[str, Any]
    rows: pa.Table
    vectors: Mapping[str, Vectors]
    placed_by: str
    places: np.ndarray
    shown: float
    alike: Sequence[tuple[float, str, str]]
    examples: Mapping[str, Sequence[tuple[str, str]]]


def look(output: str, manifest: Mapping[str, Any], most: int) -> Overview:
    """The overview of `output` by about `most` of its rows, spread over its files.

    Raises OSError and pa.ArrowException for a file that is not as it was written.
    """
    paths = [entry["path"] for entry in manifest["files"]]
    sample = _sample(output, [path for path in paths if path.startswith(f"{FEATURES}/")], most)
    arrays = {name: _stacked(sample[name]) for name in VECTORS if name in sample.column_names}
    rows = sample.drop_columns(list(arrays))
    placed_by = next(iter(arrays), "")
    vectors = arrays[placed_by] if arrays else np.zeros((0, 1), np.float32)
    places, shown = principal_places(vectors)
    return Overview(
        manifest,
        rows,
        {name: _described(array) for name, array in arrays.items()},
        placed_by,
        places,
        shown,
        most_alike(vectors, *(rows[name].to_pylist() for name in ("key", "sha256"))),
        _examples(output, [path for path in paths if path.startswith(f"{FAILURES}/")]),
    )


def _sample(output: str, paths: Sequence[str], most: int) -> pa.Table:
    """About `most` rows of `paths`, evenly of some files, and of some row groups of each."""
    chosen = [paths[at] for at in _evenly(len(paths), _FILES)]
    found = []
    for path in chosen:
        with dataset.open_part(output, path) as part:
            left = max(1, most // len(chosen))
            rows = max(1, part.metadata.num_rows // max(1, part.num_row_groups))
            for group in _evenly(part.num_row_groups, max(1, left // rows)):
                table = part.read_row_group(group, use_threads=False)
                found.append(table.take(_evenly(table.num_rows, left)))
    if not found:
        return pa.table({"key": pa.array([], pa.string()), "sha256": pa.array([], pa.string())})
    table = pa.concat_tables(found)
    return table.take(_evenly(table.num_rows, most))


def _evenly(count: int, most: int) -> list[int]:
    """At most `most` of the first `count` numbers, evenly spread."""
    chosen = min(count, most)
    return [(2 * at + 1) * count // (2 * chosen) for at in range(chosen)]


def _stacked(column: pa.ChunkedArray) -> np.ndarray:
    """A column of vectors as float32 [N, width]."""
    values = pa.concat_arrays([chunk.flatten() for chunk in column.chunks])
    return np.asarray(values).astype(np.float32).reshape(len(column), -1)


def _described(array: np.ndarray) -> Vectors:
    classes = Counter(array.argmax(axis=1).tolist())
    return Vectors(
        array.shape[1],
        np.linalg.norm(array.astype(np.float64), axis=1),
        float(array.mean(dtype=np.float64)),
        float(array.std(dtype=np.float64)),
        int((array == array[0]).all(axis=0).sum()) if len(array) > 1 else 0,
        classes.most_common(),
    )


def principal_places(array: np.ndarray) -> tuple[np.ndarray, float]:
    """The first two principal components of the rows of `array`, float64 [N, 2].

    And their share of the variance, 0 where there is none. By the eigenvectors of the Gram matrix
    of centred rows, whose signs are chosen so that the largest entry is positive.
    """
    places = np.zeros((len(array), 2))
    if len(array) < 2:
        return places, 0.0
    centred = array.astype(np.float64) - array.mean(axis=0, dtype=np.float64)
    values, vectors = np.linalg.eigh(centred @ centred.T)
    values = np.maximum(values, 0)
    top = vectors[:, ::-1][:, :2] * np.sqrt(values[::-1][:2])
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


def _examples(output: str, paths: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    looked_at = 0
    for path in paths:
        with dataset.open_part(output, path) as part:
            looked_at += _gather(part, found)
        if looked_at >= _LOOKED_AT:
            break
    return found


def _gather(part: pq.ParquetFile, found: dict[str, list[tuple[str, str]]]) -> int:
    """Add examples of a file of failures to `found`; its rows."""
    names = ["stage", "error_class", "key", "message"]
    for batch in part.iter_batches(columns=names, use_threads=False):
        columns = (batch.column(name).to_pylist() for name in names)
        for stage, error_class, key, message in zip(*columns, strict=True):
            kept = found.setdefault(f"{stage}/{error_class}", [])
            if len(kept) < _EXAMPLES:
                kept.append((key, message))
    return int(part.metadata.num_rows)
