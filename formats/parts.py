"""Data files of an output: Parquet of features or failures, written whole, read with checksums."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from formats import table
from formats.digests import DIGEST_BYTES, key_digests
from storage import files
from storage.errors import RunError
from storage.steady import SteadyStream

FEATURES, FAILURES = "features", "failures"
PLACE = ["source", "record_index"]  # the columns that tell where an image lies
_READERS = 16  # files of a store that are read at once
_BATCH_ROWS = 1 << 14  # rows whose key is held as text at once, for each of them
_COPY_BYTES = 1 << 20

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class PartFile:
    """A data file that is closed: `path` relative to the output, `bytes` and `sha256` of the file.

    `keys` holds the digest of each row's key (see `formats.digests`), row after row; `reasons`
    counts "stage/error_class" of a failures file.
    """

    path: str
    rows: int
    sha256: str
    keys: bytes
    bytes: int
    reasons: Mapping[str, int] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """`features` or `failures`."""
        return self.path.partition("/")[0]

    def listed(self) -> dict[str, Any]:
        """The file's entry in the manifest."""
        return {"path": self.path, "rows": self.rows, "bytes": self.bytes, "sha256": self.sha256}


class PartWriter:
    """Writes one data file, batch by batch. Nothing appears before `close`."""

    def __init__(self, output: str, kind: str, name: str, schema: pa.Schema, compression: str):
        self.path = f"{kind}/{name}.parquet"
        self._file = files.NewFile(files.join(output, self.path))
        try:
            self._writer = table.parquet_writer(self._file, schema, compression)  # type: ignore[arg-type]
        except BaseException:  # it has begun to write
            self._file.abort()
            raise
        self._keys = bytearray()
        self.rows = 0  # written so far
        self._reasons: Counter[str] = Counter()

    @property
    def bytes(self) -> int:
        """Bytes written so far, without the footer."""
        return self._file.size

    def write(self, batch: pa.RecordBatch) -> None:
        """`batch` as one row group. Raises OSError."""
        self._writer.write_batch(batch, row_group_size=batch.num_rows)
        self._keys += key_digests(batch.column("key"))
        self.rows += batch.num_rows
        if self.path.startswith(f"{FAILURES}/"):  # a carried column may be named `stage`
            stages, classes = (batch.column(name).to_pylist() for name in ("stage", "error_class"))
            self._reasons.update(f"{s}/{c}" for s, c in zip(stages, classes, strict=True))

    def close(self) -> PartFile:
        """The file as it now stands under its name. Raises OSError, and then nothing does."""
        try:
            self._writer.close()
            self._file.close()
        except BaseException:
            self.abort()
            raise
        return PartFile(
            self.path,
            self.rows,
            self._file.sha256,
            bytes(self._keys),
            self._file.size,
            dict(self._reasons),
        )

    def abort(self) -> None:
        """Drop what was written."""
        self._writer.is_open = False  # else its finalizer would write on
        self._file.abort()


def open_part(output: str, path: str, size: int | None = None) -> pq.ParquetFile:
    """The data file at `path` below `output`, of `size` bytes, page checksums verified on reading.

    Reads are tried again as `storage.steady` has it. Raises OSError, and pa.ArrowInvalid for a file
    that is not whole: one without its footer, of a killed writer, is refused.
    """
    full = files.join(output, path)
    stream = SteadyStream(full, files.size_of(full) if size is None else size)
    try:
        return pq.ParquetFile(stream, page_checksum_verification=True)
    except UnicodeDecodeError as error:  # in the names of a damaged footer
        raise pa.ArrowInvalid(f"{full}: {error}") from None


def list_parts(output: str) -> dict[str, int]:
    """Everything right below the folders of `output` that hold data files, with its size."""
    found = {}
    for kind in (FEATURES, FAILURES):
        folder = files.join(output, kind, "")
        for info in files.list_folder(folder):
            name = info.path[len(folder) :]
            if "/" not in name:
                found[f"{kind}/{name}"] = info.size
    return found


def is_data(path: str) -> bool:
    """Whether `path`, relative to an output, is the name of a data file."""
    name = path.rpartition("/")[2]
    return name.startswith("part-") and name.endswith(".parquet")


def describe_part(
    output: str, path: str, size: int, entry: Mapping[str, Any] | None = None
) -> PartFile:
    """The PartFile of a data file of `size` bytes that an earlier run wrote.

    `entry`: what its manifest tells of it, which then stands: the file's size and rows are held
    against it, and its digest is carried on, so that damage stays as visible as it was. Without it
    the whole file is read. Raises RunError where the two differ.
    """
    keys, reasons = bytearray(), Counter[str]()
    failures = path.startswith(f"{FAILURES}/")
    names = ["key", "stage", "error_class"] if failures else ["key"]
    with open_part(output, path, size) as part:
        for batch in column_batches(part, names):
            keys += key_digests(batch.column("key"))
            if failures:
                pairs = (batch.column(name).to_pylist() for name in names[1:])
                reasons.update(f"{s}/{c}" for s, c in zip(*pairs, strict=True))
    rows = len(keys) // DIGEST_BYTES
    if entry is not None and (entry["bytes"], entry["rows"]) != (size, rows):
        raise RunError(
            f"{output}: {path} is not what the manifest tells of; resuming would "
            "vouch for damaged rows; restore it, or use --if_exists overwrite"
        )
    sha256 = entry["sha256"] if entry else sha256_of(output, path, size)
    return PartFile(path, rows, sha256, bytes(keys), size, dict(reasons))


def column_batches(part: pq.ParquetFile, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The columns `names` of `part`, some rows at a time. Raises as `open_part` does."""
    return part.iter_batches(_BATCH_ROWS, columns=list(names), use_threads=False)


def of_each(
    output: str, function: Callable[[Item], Result], items: Sequence[Item]
) -> Iterator[Result]:
    """`function` of each of `items`, in order; some at once on a store, which takes its time."""
    if not files.is_remote(output):
        yield from map(function, items)
        return
    with ThreadPoolExecutor(_READERS) as threads:
        yield from threads.map(function, items)


def sha256_of(output: str, path: str, size: int) -> str:
    """SHA-256 of the file `path` of `output`, which has `size` bytes. Raises OSError."""
    found = hashlib.sha256()
    with SteadyStream(files.join(output, path), size) as stream:
        while block := stream.read(_COPY_BYTES):
            found.update(block)
    return found.hexdigest()


def is_damage(key: pa.Array, source: pa.Array) -> pa.Array:
    """Which failures tell of damage to their source, by their keys: `source@offset`."""
    without_offset = pc.replace_substring_regex(key, r"@\d+$", "@")
    return pc.equal(without_offset, pc.binary_join_element_wise(source.cast(pa.string()), "", "@"))
