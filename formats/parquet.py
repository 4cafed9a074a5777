"""Images in Parquet files: a column of bytes, or the {bytes, path} struct of Hugging Face.

Only the columns that are asked for are read, a few rows at a time; what must be held is a page,
into which writers put up to 1,024 rows unless told otherwise.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from formats import fields
from formats.example import ExampleKeys, ExampleTypes, no_label
from formats.fields import Found
from formats.records import ImageError
from formats.tfrecord import Damage

ENDINGS = (".parquet", ".parq", ".pq")
MAGIC = b"PAR1"
DAMAGE = "ParquetDamage"  # its offset is a row's
DEFAULT_IMAGE, DEFAULT_LABEL = ExampleKeys().image, ExampleKeys().label
_ROWS = 16  # rows held at once
_BUFFER = 1 << 20  # bytes of a column chunk read at once; without it a whole chunk is
# What Python cannot hold of an Arrow value: the year 10,000, text that is no UTF-8, a strange zone.
_NO_PYTHON = (OverflowError, ValueError, LookupError)


def open_file(stream: BinaryIO) -> pq.ParquetFile:
    """The file that `stream` holds. Raises pa.ArrowInvalid or OSError where it holds none."""
    try:
        return pq.ParquetFile(
            stream, buffer_size=_BUFFER, pre_buffer=False, page_checksum_verification=True
        )
    except UnicodeDecodeError as error:
        raise pa.ArrowInvalid(f"a column's name is no UTF-8: {error}") from None


def read_schema(stream: BinaryIO) -> pa.Schema | None:
    """The schema of the file that `stream` holds, None where it holds no Parquet file."""
    try:
        return open_file(stream).schema_arrow
    except (pa.ArrowException, OSError):
        if getattr(stream, "error", None):
            raise
        return None


def infer_types(schema: pa.Schema, path: str, keys: ExampleKeys) -> ExampleTypes:
    """The types of label and columns as the file at `path` with `schema` gives them.

    Raises ValueError, one line, for a column that is not there (but the default label, which is
    null then), and for one whose type cannot be used.
    """
    _check_image(schema, path, keys.image)
    for flag, name in (("id_key", keys.id), ("label_key", keys.label)):
        if name and name not in schema.names and (flag, name) != ("label_key", DEFAULT_LABEL):
            raise ValueError(_absent(flag, name, schema, path))
    if keys.id:
        kind = _plain(schema.field(keys.id).type)
        if kind not in (pa.string(), pa.binary(), pa.int64(), pa.uint64()):
            raise ValueError(f"--id_key {keys.id}: the column is {kind}, not string or int64")
    label = pa.null()
    if keys.label and keys.label in schema.names:
        label = _label(keys.label, _plain(schema.field(keys.label).type))
    columns = {}
    for name in keys.columns:
        if name not in schema.names:
            raise ValueError(_absent("columns", name, schema, path))
        columns[name] = _plain(schema.field(name).type)
        inner = columns[name].value_type if pa.types.is_list(columns[name]) else columns[name]
        if pa.types.is_nested(inner):
            raise ValueError(
                f"--columns {name}: the column is {inner}; scalars and lists of them can be carried"
            )
    return ExampleTypes(label, columns)


def check_once(schema: pa.Schema, path: str, keys: ExampleKeys) -> None:
    """Raise ValueError, one line, where a name that is asked for stands twice: rows would be of
    either column.
    """
    for column in filter(None, (keys.image, keys.id, keys.label, *keys.columns)):
        if (times := schema.names.count(column)) > 1:
            raise ValueError(f"{path}: has {times} columns {column!r}; which is meant?")


def _check_image(schema: pa.Schema, path: str, name: str) -> None:
    if name in schema.names:
        kind = schema.field(name).type
        if not (_is_bytes(kind) or _is_struct(kind)):
            raise ValueError(
                f"--image_key {name}: the column is {kind} in {path}, not bytes or a struct of "
                "bytes and path"
            )
        return
    likely = [f.name for f in schema if _is_bytes(f.type) or _is_struct(f.type)]
    if "image" in likely:
        hint = "pass --image_key image"
    elif likely:
        hint = f"columns of bytes are {', '.join(likely)}"
    else:
        hint = f"it has {', '.join(schema.names)}"
    raise ValueError(f"--image_key {name}: no such column in {path}; {hint}")


def _absent(flag: str, name: str, schema: pa.Schema, path: str) -> str:
    near = difflib.get_close_matches(name, schema.names, n=3, cutoff=0) or ["none"]
    return f"--{flag} {name}: no such column in {path}; nearest: {', '.join(near)}"


def _is_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    views = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return any(is_a(kind) for is_a in views)


def _is_struct(kind: pa.DataType) -> bool:
    """Whether it is a struct whose `bytes` are bytes; of null type where every row has a path."""
    at = kind.get_field_index("bytes") if pa.types.is_struct(kind) else -1
    return at >= 0 and (_is_bytes(kind.field(at).type) or pa.types.is_null(kind.field(at).type))


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type that a column's values are carried in: integers as int64, half floats as float32."""
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return pa.list_(_plain(kind.value_type))
    if pa.types.is_integer(kind):
        return pa.uint64() if kind == pa.uint64() else pa.int64()
    if kind == pa.float16():
        return pa.float32()
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    return pa.binary() if _is_bytes(kind) else kind


def _label(name: str, kind: pa.DataType) -> pa.DataType:
    if kind in (pa.int64(), pa.uint64(), pa.bool_()):
        return pa.int64()
    if kind in (pa.string(), pa.binary()):
        return pa.string()
    if pa.types.is_null(kind):
        return kind
    raise ValueError(no_label(name, f"of type {kind}"))


def count_rows(stream: BinaryIO) -> int:
    """How many rows the file tells of; 1 (its damage) where it cannot be opened."""
    try:
        return int(open_file(stream).metadata.num_rows)
    except (pa.ArrowException, OSError):
        if getattr(stream, "error", None):
            raise
        return 1


def read_images(stream: BinaryIO, size: int, keys: ExampleKeys) -> Iterator[Found | Damage]:
    """The rows of a Parquet file of `size` bytes in order, and a Damage for what cannot be read.

    A row's image is None, with the reason, where it is null or of another kind; a value beside it
    that Python cannot hold is a reason too. Damage costs what
    is left of its row group (the message tells how many rows); reading goes on with the next one.
    No row comes twice. Raises only errors of `stream` that last (its `error`).
    """
    try:
        file = open_file(stream)
    except (pa.ArrowException, OSError) as error:
        if getattr(stream, "error", None):
            raise
        yield Damage(0, 0, "NotParquet", f"cannot be opened as Parquet: {error}", size)
        return
    groups = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    if min(groups, default=0) < 0 or sum(groups) != file.metadata.num_rows:
        told = f"its row groups tell of {sum(groups)} rows, and itself of {file.metadata.num_rows}"
        yield Damage(0, 0, "NotParquet", told, size)
        return
    names = set(file.schema_arrow.names)
    wanted = [n for n in dict.fromkeys((keys.image, *fields.names_of(keys))) if n in names]
    start = 0
    for group, rows in enumerate(groups):
        index = start
        start += rows
        try:
            # Rows that the footer does not tell of would have the places of others.
            for row in itertools.islice(_group(file, group, wanted), rows):
                yield _found(row, index, keys)
                index += 1
            if index < start:
                raise pa.ArrowInvalid("the columns end before")
        except (pa.ArrowException, OSError) as error:
            if getattr(stream, "error", None):
                raise
            lost = f"rows {index} to {start - 1} ({start - index} of them) cannot be read: {error}"
            size = file.metadata.row_group(group).total_byte_size
            # Its row stands for its offset: of a damaged column Arrow's library may abort when it
            # is asked where that lies.
            yield Damage(index, index, DAMAGE, lost, size)


def _group(file: pq.ParquetFile, group: int, wanted: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of a group; an error instead of the values of a column that Arrow cannot give.

    It writes nulls in lists of a fixed size, and does not read them.
    """
    done = 0
    try:
        for row in _rows(file, group, wanted):
            yield row
            done += 1
    except pa.ArrowInvalid as error:
        schema = file.schema_arrow
        sized = [n for n in wanted if pa.types.is_fixed_size_list(schema.field(n).type)]
        others = [name for name in wanted if name not in sized]
        if not sized or not others:
            raise
        for row in itertools.islice(_rows(file, group, others), done, None):
            yield row | dict.fromkeys(sized, error)


def _rows(file: pq.ParquetFile, group: int, wanted: list[str]) -> Iterator[dict[str, Any]]:
    if not wanted:  # the file has none of the columns, and still as many rows
        yield from itertools.repeat({}, file.metadata.row_group(group).num_rows)
        return
    for batch in file.iter_batches(_ROWS, row_groups=[group], columns=wanted, use_threads=False):
        try:
            yield from batch.to_pylist()
        except _NO_PYTHON:
            names = batch.schema.names
            for n in range(batch.num_rows):
                yield {name: _value(batch.column(name)[n]) for name in names}


def _value(scalar: pa.Scalar) -> Any:
    """`scalar` as Python has it, else the reason why it has not."""
    try:
        return scalar.as_py()
    except _NO_PYTHON as error:
        return error


def _found(row: dict[str, Any], index: int, keys: ExampleKeys) -> Found:
    wrong = None
    for name in [name for name, value in row.items() if isinstance(value, Exception)]:
        kinds = {keys.image: "ImageType", keys.id: "IdType", keys.label: "LabelType"}
        reason = f"column {name!r}: a value that cannot be read: {row.pop(name)}"
        wrong = ImageError(kinds.get(name, "ColumnType"), reason)
    image = row.get(keys.image)
    values = {name: row.get(name) for name in fields.names_of(keys)}
    data = image.get("bytes") if isinstance(image, dict) else image
    found = isinstance(data, bytes) and data
    if found or wrong:
        return Found(index, data if found else None, values, wrong)
    if keys.image not in row:
        error = ImageError("MissingFeature", f"there is no column {keys.image!r} in this file")
    elif isinstance(image, dict) and data is None and image.get("path"):
        error = ImageError(
            "MissingFeature",
            f"the struct {keys.image!r} holds the path {str(image['path'])[:200]!r} and no bytes; "
            "embed the files' bytes, or list the files in a manifest",
        )
    elif data is None:
        error = ImageError("MissingFeature", f"column {keys.image!r} is null")
    elif data == b"":
        error = ImageError("MissingFeature", f"column {keys.image!r} holds zero bytes")
    else:
        kind = type(data).__name__
        error = ImageError("ImageType", f"column {keys.image!r}: bytes wanted, not {kind}")
    return Found(index, None, values, error)
