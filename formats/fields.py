"""What stands beside an image in a container: named values, their types, and an image's reference.

Types are one a run, found from a sample; values are made to fit them where nothing is lost.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from formats.example import ExampleKeys, ExampleTypes, no_label
from formats.records import Failure, ImageError, ImageRecord, ImageRef, digest, place_key
from storage.secrets import hide

_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,18}")
_FLOAT = re.compile(r"[+-]?((0|[1-9][0-9]*)([.][0-9]*)?|[.][0-9]+)([eE][+-]?[0-9]+)?")
_WHOLE = re.compile(r"[+-]?[0-9]+")
_LONGEST = 300  # characters of a number; a float holds none of more digits
_TOLD = 60  # characters of a value
_DESCRIBED: dict[type, str] = {
    bool: "bool",
    int: "int64",
    float: "double",
    str: "string",
    bytes: "binary",
    dict: "object",
}


@dataclass(frozen=True, slots=True)
class Found:
    """An image as found in a container: its position, encoded bytes, and named values beside it.

    `data` is None where there is none, and `error` tells why; `size` is the image's in bytes then,
    where known.
    """

    index: int
    data: bytes | None
    values: Mapping[str, Any] = field(default_factory=dict)
    error: ImageError | None = None
    size: int | None = None


def names_of(keys: ExampleKeys) -> tuple[str, ...]:
    """The names of the values that `keys` asks for beside the image, each once."""
    return tuple(dict.fromkeys(filter(None, (keys.id, keys.label, *keys.columns))))


def too_many_bytes(size: int, limit: int) -> ImageError:
    """The reason to refuse an encoded image of `size` bytes."""
    return ImageError("TooManyBytes", f"{size} bytes, more than --max_image_bytes {limit}")


def integer(text: str) -> int | str:
    """`text` as a number where it is written as one is: "7", but not "007", " 7" or "7.0"."""
    return int(text) if _INTEGER.fullmatch(text) else text


def numbers(texts: Sequence[Any]) -> list[Any]:
    """Cells of CSV as integers or floats where all that hold something are, else as they are.

    As they are, too, where a float would lose digits of a whole number, as of 64-bit hashes.
    """
    found = [text for text in texts if text]
    if not all(isinstance(text, str) for text in found):
        return list(texts)
    if found and all(_INTEGER.fullmatch(text) for text in found):
        return [int(text) if text else None for text in texts]
    read = [_number(text) if len(text) < _LONGEST else None for text in found]
    if found and all(number is not None and float(number) == number for number in read):
        return [float(text) if text else None for text in texts]
    return list(texts)


# --- types -------------------------------------------------------------------------------------


def label_type(values: Iterable[Any], name: str) -> pa.DataType:
    """int64 where all `values` are integers (or bools), null where there are none, else string.

    Floats and whatever is no scalar are passed over: they will be failures of their own. Raises
    ValueError, one line, where there is nothing else.
    """
    kinds = {type(value) for value in values if value is not None}
    if not kinds:
        return pa.null()
    wrong = kinds - {bool, int, str, bytes}
    if wrong == kinds:
        raise ValueError(no_label(name, f"of type {_kind_name(min(wrong, key=str))}"))
    kinds -= wrong
    return pa.int64() if kinds <= {bool, int} else pa.string()


def column_type(values: Iterable[Any], name: str) -> pa.DataType:
    """The narrowest type that holds all `values`: null, bool, int64, double, string, binary or a
    list of one of these. Raises ValueError, one line, where none does.
    """
    scalars: list[Any] = []
    many = False
    for value in values:
        many |= isinstance(value, list)
        scalars += value if isinstance(value, list) else [value]
    kinds = {type(value) for value in scalars if value is not None}
    if not kinds:
        kind = pa.null()
    elif kinds == {bool}:
        kind = pa.bool_()
    elif kinds == {int}:
        kind = pa.int64()
    elif kinds <= {int, float}:
        kind = pa.float64()
    elif kinds == {str}:
        kind = pa.string()
    elif kinds <= {str, bytes}:
        kind = pa.binary()
    else:
        told = ", ".join(sorted(map(_kind_name, kinds)))
        raise ValueError(f"--columns {name}: cannot carry values of type {told} in one column")
    return pa.list_(kind) if many else kind


def infer_types(found: Sequence[Found], keys: ExampleKeys) -> ExampleTypes:
    """The types of label and columns that the values beside a sample of images show.

    A label that the sample lacks is null. Raises ValueError, one line, for a column of which no
    sampled image has a value, and for values that no label or column can hold.
    """
    label = pa.null()
    if keys.label:
        label = label_type((item.values.get(keys.label) for item in found), keys.label)
    columns = {}
    for name in keys.columns:
        columns[name] = column_type((item.values.get(name) for item in found), name)
        if pa.types.is_null(columns[name]):
            raise ValueError(f"--columns {name}: none of the first {len(found)} images has it")
    return ExampleTypes(label, columns)


def _kind_name(kind: type) -> str:
    return _DESCRIBED.get(kind, kind.__name__)


def unify(
    found: Sequence[ExampleTypes], columns: Sequence[str], known: ExampleTypes | None = None
) -> ExampleTypes:
    """The one type of each value that several inputs give. Raises ValueError where there is none.

    What is `known` of an earlier run stands where it holds all that is seen, of which a sample may
    be narrower; what no input has a value of is else an int64 as a label and a string as a column.
    """
    known = known or ExampleTypes(pa.int64(), {})
    labels = {types.label for types in found} - {pa.null()} or {known.label}
    label = pa.string() if pa.string() in labels | {known.label} else pa.int64()
    unified = {}
    for name in columns:
        kind = pa.null()
        for types in found:
            kind = _wider(name, kind, types.columns.get(name, pa.null()))
        before = known.columns.get(name)
        unified[name] = before if before and _holds(before, kind) else _no_null(kind)
    return ExampleTypes(label, unified)


def _holds(known: pa.DataType, seen: pa.DataType) -> bool:
    """Whether every value of type `seen` fits into `known` without loss."""
    try:
        return _wider("", known, seen) == known
    except ValueError:
        return False


def _wider(name: str, one: pa.DataType, other: pa.DataType) -> pa.DataType:
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if pa.types.is_list(one) or pa.types.is_list(other):
        inner = (kind.value_type if pa.types.is_list(kind) else kind for kind in (one, other))
        return pa.list_(_wider(name, *inner))
    numbers = {pa.int64(), pa.float32(), pa.float64()}
    if {one, other} <= numbers:
        return pa.float64()
    if {one, other} == {pa.string(), pa.binary()}:
        return pa.binary()
    try:  # times of two units, say
        pair = [pa.schema([(name, kind)]) for kind in (one, other)]
        return pa.unify_schemas(pair, promote_options="permissive").field(name).type
    except pa.ArrowTypeError:
        pass
    raise ValueError(f"--columns {name}: {one} in one input and {other} in another")


def _no_null(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_list(kind):
        return pa.list_(_no_null(kind.value_type))
    return pa.string() if pa.types.is_null(kind) else kind


def fit(value: Any, kind: pa.DataType) -> Any:
    """`value` as `kind` holds it; ValueError where that would lose something."""
    if value is None:
        return None
    if pa.types.is_list(kind):
        items = value if isinstance(value, list) else [value]
        return [fit(item, kind.value_type) for item in items]
    if kind == pa.string():
        return _text(value)
    if kind == pa.binary():
        return value if isinstance(value, bytes) else _text(value).encode()
    if kind == pa.int64():
        number = integer(value) if isinstance(value, str) else value
        if isinstance(number, int) and -(2**63) <= number < 2**63:
            return int(number)
    elif pa.types.is_floating(kind):
        number = _number(value) if isinstance(value, str) else value
        if isinstance(number, int | float) and not isinstance(number, bool):
            try:
                held = float(np.float32(number)) if kind == pa.float32() else float(number)
            except OverflowError:
                raise ValueError(value) from None
            if held == number or number != number:
                return held
    elif kind != pa.bool_() or isinstance(value, bool):
        try:
            pa.scalar(value, kind)
        except (pa.ArrowException, TypeError, OverflowError) as error:
            raise ValueError(str(error)) from None
        return value
    raise ValueError(value)


def _number(text: str) -> int | float | None:
    """The number that a cell of CSV spells, whole ones exact; None where it spells none."""
    if not _FLOAT.fullmatch(text):
        return None
    number = int(text) if _WHOLE.fullmatch(text) else float(text)
    return None if number in (math.inf, -math.inf) else number


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(value)
    value.encode()  # half a surrogate pair, which JSON can spell, is no text
    return value


# --- records -----------------------------------------------------------------------------------


def refer(
    key: str,
    source: str,
    index: int | None,
    values: Mapping[str, Any],
    keys: ExampleKeys,
    types: ExampleTypes,
) -> tuple[ImageRef, ImageError | None]:
    """What names an image and travels with it; beside a bare reference the reason why it cannot.

    `key` is taken where `values` hold no id. The reason is of class IdType, LabelType or
    ColumnType.
    """
    try:
        if keys.id:
            key = _id(values.get(keys.id), keys.id) or key
        label = None
        if keys.label:
            label = _fitted(values.get(keys.label), keys.label, types.label, "LabelType")
        columns = {
            name: _fitted(values.get(name), name, types.columns[name], "ColumnType")
            for name in keys.columns
        }
    except ImageError as error:
        return ImageRef(key, source, index), error
    return ImageRef(key, source, index, label, columns), None


def _id(value: Any, name: str) -> str:
    """The id as text, empty where there is none."""
    if value is None:
        return ""
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    found = _kind_name(type(value))
    raise ImageError("IdType", f"id {name!r}: one string or int64 wanted, not {found}")


def _fitted(value: Any, name: str, kind: pa.DataType, error_class: str) -> Any:
    try:
        return fit(value, kind)
    except ValueError:
        told = f"{hide(repr(value))[:_TOLD]} ({_kind_name(type(value))})"
        raise ImageError(error_class, f"{name!r}: {told} cannot be {kind} unchanged") from None


def parse_found(
    found: Sequence[Found], source: str, keys: ExampleKeys, types: ExampleTypes
) -> list[ImageRecord | Failure]:
    """One result for each image, in order: it with key, label and columns, or why there is none.

    `source` is the container's URI. The key is the id, else `source#index`.
    """
    results: list[ImageRecord | Failure] = []
    for item in found:
        key = place_key(source, item.index)
        ref, error = refer(key, source, item.index, item.values, keys, types)
        error = item.error or error
        if error is None and item.data is not None:
            results.append(ImageRecord(ref, item.data))
            continue
        data = item.data
        known = (None, item.size) if data is None else (digest(data), len(data))
        why = error or ImageError("MissingFeature", "there is no image")
        results.append(Failure.of(ref, "read", why, *known))
    return results
