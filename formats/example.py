"""Serialized tf.Example messages -> ImageRecord, parsed batch by batch into Arrow in C++."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from formats.records import Failure, ImageError, ImageRecord, ImageRef, digest, place_key
from formats.tfrecord import Record

_KINDS = {int: "int64", float: "float", bytes: "bytes"}  # a feature's values as Arrow gives them


@dataclass(frozen=True, slots=True)
class ExampleKeys:
    """Which features are read: the encoded image, its id, its label and what is carried along."""

    image: str = "image/encoded"
    id: str | None = None
    label: str | None = "image/class/label"
    columns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ExampleTypes:
    """The one type that each output has in a run.

    `label` is int64 or string; each column int64, float32, string, binary or a list of one of them.
    """

    label: pa.DataType
    columns: Mapping[str, pa.DataType]


def no_label(name: str, what: str) -> str:
    """Why `name`, whose values are `what`, cannot be the label."""
    return (
        f"--label_key {name}: its values are {what}, and a label is one int64 or string; give "
        "another one's name, or '' for none"
    )


def infer_types(examples: Sequence[bytes], keys: ExampleKeys) -> ExampleTypes:
    """The types of the label and of the columns as a sample of serialized examples shows them.

    A label that the sample lacks is null. A column is a scalar where no sampled example holds more
    than one value, else a list; bytes are string where all are UTF-8, else binary. Where examples
    differ, the wider of int64, float and bytes counts, and `parse_examples` refuses what does not
    convert. What does not parse is passed over, and so are floats and several values where one
    label should be. Raises ValueError, one line, where the label is nothing else, and for a column
    of which no sampled example has a value.
    """
    names = [*keys.columns, *([keys.label] if keys.label else [])]
    values: dict[str, list[list[Any]]] = {name: [] for name in names}
    for row in _rows(examples, names):
        for name, found in (row or {}).items():
            if found:
                values[name].append(found)

    label: pa.DataType = pa.null()
    if keys.label and (given := values[keys.label]):
        fitting = [found for found in given if len(found) == 1 and type(found[0]) is not float]
        if not fitting:
            raise ValueError(no_label(keys.label, _describe(max(given, key=len))))
        label = _scalar_type(fitting)
        if label == pa.binary():
            label = pa.string()
    columns = {}
    for name in keys.columns:
        if not values[name]:
            raise ValueError(_no_such_feature(name, examples))
        scalar = _scalar_type(values[name])
        many = any(len(found) > 1 for found in values[name])
        columns[name] = pa.list_(scalar) if many else scalar
    return ExampleTypes(label, columns)


def names_there(examples: Sequence[bytes], names: Sequence[str]) -> set[str]:
    """Those of the features `names` that any of the serialized examples has a value of."""
    rows = _rows(examples, names)
    return {name for row in rows if row for name, found in row.items() if found}


def names_instead(examples: Sequence[bytes], name: str) -> str | None:
    """The features of the first of the serialized examples, where none of them has a value of
    `name`; None where one has, and where one is no tf.Example.
    """
    rows = _rows(examples, [name])
    if not rows or any(row is None or row[name] for row in rows):
        return None
    return _features(examples[0])


def parse_examples(
    records: Sequence[Record], source: str, keys: ExampleKeys, types: ExampleTypes
) -> list[ImageRecord | Failure]:
    """One result a record, in order: the image with key, label and columns, or why there is none.

    `source` is the file's URI. The key is the id feature (int64 as decimal, bytes that are not
    UTF-8 with backslash escapes), else `source#index`. Failures are of stage "read" and class
    NotAnExample, MissingFeature (no image), ImageType, IdType, LabelType or ColumnType (a feature
    of another type or count than `types` says, which converts only where nothing is lost); they
    carry the image's digest and size where it was found, else the record's size.
    """
    names = [keys.image, *filter(None, (keys.id, keys.label)), *keys.columns]
    rows = _rows([record.data for record in records], names)
    return [
        _parse(record, row, source, keys, types) for record, row in zip(records, rows, strict=True)
    ]


def _rows(examples: Sequence[bytes], names: Sequence[str]) -> list[dict[str, Any] | None]:
    """The values of each example's features `names`: a list, None where absent.

    None in a row's place for what is no tf.Example.
    """
    try:
        batch = _decode(examples)
    except RuntimeError:
        # The decoder gives up on the whole batch for one bad message, and for one feature of two
        # types: by themselves only the bad ones fail.
        if len(examples) == 1:
            return [None]
        return [row for example in examples for row in _rows([example], names)]
    features = set(batch.schema.names)
    absent = [None] * len(examples)
    columns = [batch.column(n).to_pylist() if n in features else absent for n in names]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _decode(examples: Sequence[bytes]) -> pa.RecordBatch:
    # Imported here: 0.17 s that --help does not need. A decoder that has raised keeps what it had
    # read so far (tfx-bsl 1.21, with a schema), so that each batch gets a new one.
    from tfx_bsl.coders.example_coder import ExamplesToRecordBatchDecoder

    return ExamplesToRecordBatchDecoder().DecodeBatch(examples)


def _parse(
    record: Record,
    row: dict[str, Any] | None,
    source: str,
    keys: ExampleKeys,
    types: ExampleTypes,
) -> ImageRecord | Failure:
    key = place_key(source, record.index)
    image = label = None
    try:
        if row is None:
            raise ImageError("NotAnExample", "the record does not parse as a tf.Example")
        if keys.id:
            key = _id(row[keys.id], keys.id) or key
        image = _image(row[keys.image], keys.image, record.data)
        if keys.label:
            label = _value(row[keys.label], keys.label, types.label, "LabelType")
        columns = {
            name: _value(row[name], name, types.columns[name], "ColumnType")
            for name in keys.columns
        }
    except ImageError as error:
        ref = ImageRef(key, source, record.index)
        sha256, size = (digest(image), len(image)) if image else (None, len(record.data))
        return Failure.of(ref, "read", error, sha256, size)
    return ImageRecord(ImageRef(key, source, record.index, label, columns), image)


def _id(values: list[Any] | None, name: str) -> str:
    """The id as text, empty where there is none."""
    if not values:
        return ""
    if len(values) > 1 or type(values[0]) is float:
        found = _describe(values)
        raise ImageError("IdType", f"id feature {name!r}: one string or int64 wanted, not {found}")
    value = values[0]
    return value.decode("utf-8", "backslashreplace") if type(value) is bytes else str(value)


def _image(values: list[Any] | None, name: str, example: bytes) -> bytes:
    if not values:
        there = _features(example)
        state = "missing" if values is None else "empty"
        message = f"image feature {name!r} is {state}; the example has {there}"
        raise ImageError("MissingFeature", message)
    if len(values) > 1 or type(values[0]) is not bytes:
        found = _describe(values)
        raise ImageError("ImageType", f"image feature {name!r}: one bytes wanted, not {found}")
    if not values[0]:
        raise ImageError("MissingFeature", f"image feature {name!r} holds zero bytes")
    return values[0]


def _features(example: bytes) -> str:
    return ", ".join(sorted(_decode([example]).schema.names)) or "nothing"


def _value(values: list[Any] | None, name: str, to: pa.DataType, error_class: str) -> Any:
    """A feature as the type `to`: None where absent, and for a scalar where it is empty."""
    if values is None:
        return None
    try:
        if pa.types.is_list(to):
            return [_convert(value, to.value_type) for value in values]
        if len(values) > 1:
            raise ValueError
        return _convert(values[0], to) if values else None
    except ValueError:
        message = f"feature {name!r}: {_describe(values)}, which is no {to}"
        raise ImageError(error_class, message) from None


def _convert(value: int | float | bytes, to: pa.DataType) -> int | float | str | bytes:
    """`value` as the scalar type `to`; ValueError where that would lose something."""
    if type(value) is bytes:
        if to == pa.string():
            return value.decode()
        if to == pa.binary():
            return value
        # Back and forth: "007" and " 7" are names, not numbers.
        if to == pa.int64() and b"%d" % (number := int(value)) == value and abs(number) < 2**63:
            return number
    elif type(value) is int:
        if to == pa.int64():
            return value
        if to == pa.string():
            return str(value)
        if to == pa.binary():
            return b"%d" % value
        held = float(value) if to == pa.float64() else np.float32(value)
        if int(held) == value:
            return float(value)
    elif pa.types.is_floating(to):
        return value
    raise ValueError


def _scalar_type(found: Sequence[list[Any]]) -> pa.DataType:
    """The narrowest of int64, float32, string and binary that the values call for."""
    kinds = {type(value) for values in found for value in values}
    if bytes in kinds:
        texts = (value for values in found for value in values if type(value) is bytes)
        return pa.string() if all(map(_is_utf8, texts)) else pa.binary()
    return pa.float32() if float in kinds else pa.int64()


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _describe(values: list[Any]) -> str:
    """What a feature holds, by kind and count, and its number where it is one."""
    kind = _KINDS[type(values[0])] if values else "no value"
    return f"{len(values)} values of {kind}" if len(values) > 1 else f"one {kind}"


def _no_such_feature(name: str, examples: Sequence[bytes]) -> str:
    there: set[str] = set()
    for example in examples:
        try:
            there.update(_decode([example]).schema.names)
        except RuntimeError:
            continue
    nearest = difflib.get_close_matches(name, sorted(there - {name}), n=3, cutoff=0) or ["none"]
    return f"no sampled example has a value of feature {name!r}; nearest: {', '.join(nearest)}"


def serialize_example(features: Mapping[str, bytes | int | float | Sequence[Any]]) -> bytes:
    """A serialized tf.Example with `features`: bytes, int or float, one value or several."""
    from tensorflow.core.example import example_pb2  # slow to import, and only writers need it

    example = example_pb2.Example()
    for name, given in features.items():
        values = [given] if isinstance(given, bytes | int | float) else list(given)
        feature = example.features.feature[name]
        if all(isinstance(value, bytes) for value in values):
            feature.bytes_list.value.extend(values)
        elif all(isinstance(value, int) for value in values):
            feature.int64_list.value.extend(values)
        else:
            feature.float_list.value.extend(values)
    return example.SerializeToString()
