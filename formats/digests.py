"""Keys and places as 16 bytes each: made, sorted, looked up, found twice, millions of them at once.

A place is an image's source and record index.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

DIGEST_BYTES = 16
_HALVES = np.dtype("<u8")

Bytes = bytes | bytearray | memoryview


def key_digest(key: str) -> bytes:
    """`DIGEST_BYTES` that stand for `key` where millions of keys are held at once."""
    return _digest(key.encode("utf-8", "surrogatepass"))


def place_digest(source: str, index: int | None) -> bytes:
    """`DIGEST_BYTES` that stand for a place, an image's source and record index."""
    return key_digest(f"{source}\n{index}")


def image_digest(key: str, source: str, index: int | None) -> bytes:
    """`DIGEST_BYTES` that stand for the image of this key at this place."""
    return key_digest(f"{source}\n{index}\n{key}")


def key_digests(keys: pa.Array) -> bytes:
    """The digests of a column of strings, in order."""
    return b"".join(map(_digest, keys.cast(pa.binary()).to_pylist()))


def place_digests(sources: pa.Array, indices: pa.Array) -> bytes:
    """The digests of the places in two columns, in order."""
    return key_digests(_joined(sources, indices))


def image_digests(keys: pa.Array, sources: pa.Array, indices: pa.Array) -> bytes:
    """The digests of the images in three columns, in order."""
    return key_digests(pc.binary_join_element_wise(_joined(sources, indices), keys, "\n"))


def _joined(sources: pa.Array, indices: pa.Array) -> pa.Array:
    numbers = pc.coalesce(indices.cast(pa.string()), pa.scalar("None"))
    return pc.binary_join_element_wise(sources.cast(pa.string()), numbers, "\n")


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


class DigestSet:
    """Digests to be asked whether they hold one: by bisection, 16 bytes each."""

    def __init__(self, firsts: np.ndarray, seconds: np.ndarray):
        self._firsts = firsts  # uint64 [N], sorted; apart from the second halves, since numpy
        self._seconds = seconds  # would copy a column of pairs at every search

    @classmethod
    def of(cls, digests: Bytes) -> DigestSet:
        """The set of `digests`, one after the other."""
        pairs = _halves(digests).reshape(-1, 2)
        order = np.argsort(pairs[:, 0])
        return cls(pairs[order, 0], pairs[order, 1])

    @classmethod
    def stored(cls, data: Bytes | np.ndarray) -> DigestSet:
        """The set whose `store` is `data`, of which nothing is copied."""
        halves = _halves(data).reshape(2, -1)
        return cls(halves[0], halves[1])

    def store(self) -> Iterator[bytes]:
        """The set as bytes, in two pieces, for `stored`."""
        yield self._firsts.tobytes()
        yield self._seconds.tobytes()

    def __len__(self) -> int:
        return len(self._firsts)

    def __contains__(self, digest: bytes) -> bool:
        first, second = _halves(digest)
        at = int(np.searchsorted(self._firsts, first))
        while at < len(self._firsts) and self._firsts[at] == first:
            if self._seconds[at] == second:
                return True
            at += 1
        return False


def _halves(data: Bytes | np.ndarray) -> np.ndarray:
    return np.frombuffer(data, _HALVES)  # type: ignore[arg-type]  # any buffer


def repeated_rows(files: Sequence[Bytes]) -> dict[int, list[int]]:
    """Rows whose digest stands more than once in all `files` together, each the digests of a file.

    Returns index into `files` -> row numbers. Memory: 9 bytes a row beside `files`.
    """
    pairs = [_halves(digests).reshape(-1, 2) for digests in files]
    if not pairs:
        return {}
    firsts = np.concatenate([pair[:, 0] for pair in pairs])
    firsts.sort()
    suspects = np.unique(firsts[1:][firsts[1:] == firsts[:-1]])
    del firsts
    if not len(suspects):
        return {}
    seen: dict[bytes, list[tuple[int, int]]] = {}
    for index, (pair, digests) in enumerate(zip(pairs, files, strict=True)):
        for row in np.flatnonzero(_among(pair[:, 0], suspects)).tolist():
            digest = bytes(digests[row * DIGEST_BYTES : (row + 1) * DIGEST_BYTES])
            seen.setdefault(digest, []).append((index, row))
    found: dict[int, list[int]] = {}
    for index, row in sorted(
        place for places in seen.values() if len(places) > 1 for place in places
    ):
        found.setdefault(index, []).append(row)
    return found


def standing(wanted: Collection[bytes], files: Sequence[Bytes]) -> set[bytes]:
    """Which of the digests `wanted` stand in `files`, each the digests of a file."""
    wanted = set(wanted)
    if not wanted:
        return wanted
    firsts = np.unique(_halves(b"".join(wanted)).reshape(-1, 2)[:, 0])
    found = set()
    for digests in files:
        for row in np.flatnonzero(_among(_halves(digests)[::2], firsts)).tolist():
            found.add(bytes(digests[row * DIGEST_BYTES : (row + 1) * DIGEST_BYTES]))
    return found & wanted


def _among(values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Which of `values` are in `wanted`, which is sorted and not empty."""
    at = np.minimum(np.searchsorted(wanted, values), len(wanted) - 1)
    return np.asarray(wanted[at] == values)
