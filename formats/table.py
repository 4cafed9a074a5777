"""Features and failures as Arrow tables, and the Parquet files that hold them.

Vectors go from numpy to Arrow by buffers, never as Python lists of floats.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from formats.records import Failure, Features, utf8

# Arrow's own allocator keeps what a row group took: 30 of a job's 1,050 MiB.
pa.set_memory_pool(pa.system_memory_pool())

FAILURE_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("record_index", pa.int64()),
        pa.field("sha256", pa.string()),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("error_class", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
        pa.field("bytes", pa.int64()),
    ]
)
_FIXED = (
    "key",
    "source",
    "record_index",
    "sha256",
    "width",
    "height",
    "label",
    "embedding",
    "logits",
    "top_classes",
    "top_scores",
    "top_labels",
)


@dataclass(frozen=True)
class TableSpec:
    """What a features file holds besides the fixed columns.

    `widths`: vector name ("embedding", "logits") to its length, for those that are written.
    `dtype`: "float32" or "float16"; `vector_type`: "list" or "fixed_size_list". `top_k`: number of
    top classes, with `class_names` by class index where given. `label`: int64 or string; `columns`:
    carried column to its type. `metadata`: provenance, text to text.
    """

    widths: Mapping[str, int]
    dtype: str = "float32"
    vector_type: str = "list"
    top_k: int = 0
    class_names: tuple[str, ...] = ()
    label: pa.DataType = field(default_factory=pa.int64)
    columns: Mapping[str, pa.DataType] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    def schema(self) -> pa.Schema:
        """The Arrow schema of the features files. ValueError for a column with a taken name."""
        taken = sorted(set(self.columns) & set(_FIXED))
        if taken:
            raise ValueError(f"column {', '.join(taken)}: the output has one of this name already")
        fields = [
            pa.field("key", pa.string(), nullable=False),
            pa.field("source", pa.string(), nullable=False),
            pa.field("record_index", pa.int64()),
            pa.field("sha256", pa.string(), nullable=False),
            pa.field("width", pa.int32(), nullable=False),
            pa.field("height", pa.int32(), nullable=False),
            pa.field("label", self.label),
            *(pa.field(name, self._vector(width)) for name, width in self.widths.items()),
        ]
        if self.top_k:
            fields.append(pa.field("top_classes", _list_of(pa.int32())))
            fields.append(pa.field("top_scores", _list_of(pa.float32())))
            if self.class_names:
                fields.append(pa.field("top_labels", _list_of(pa.string())))
        fields += [pa.field(name, kind) for name, kind in self.columns.items()]
        return pa.schema(fields, metadata=dict(self.metadata))

    def _vector(self, width: int) -> pa.DataType:
        element = pa.float16() if self.dtype == "float16" else pa.float32()
        return _list_of(element, width if self.vector_type == "fixed_size_list" else -1)


def _list_of(element: pa.DataType, width: int = -1) -> pa.DataType:
    return pa.list_(pa.field("element", element), width)


def failure_schema(metadata: Mapping[str, str]) -> pa.Schema:
    """The Arrow schema of the failures files, with `metadata`."""
    return FAILURE_SCHEMA.with_metadata(dict(metadata))


def failures_table(rows: Sequence[Failure], schema: pa.Schema) -> pa.RecordBatch:
    """`rows` as Arrow, columns as in the contract."""
    columns = [[getattr(row, name) for row in rows] for name in schema.names]
    arrays = [
        pa.array([utf8(value) for value in values] if kind == pa.string() else values, kind)
        for values, kind in zip(columns, schema.types, strict=True)
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def features_table(rows: Sequence[Features], spec: TableSpec, schema: pa.Schema) -> pa.RecordBatch:
    """`rows` as Arrow by `schema` (which is `spec.schema()`, made once).

    Softmax of the top classes is computed in float64 from the float32 logits.
    """
    arrays: dict[str, pa.Array] = {
        "key": pa.array([utf8(row.ref.key) for row in rows], pa.string()),
        "source": pa.array([utf8(row.ref.source) for row in rows], pa.string()),
        "record_index": pa.array([row.ref.record_index for row in rows], pa.int64()),
        "sha256": pa.array([row.sha256 for row in rows], pa.string()),
        "width": pa.array([row.width for row in rows], pa.int32()),
        "height": pa.array([row.height for row in rows], pa.int32()),
        "label": pa.array([row.ref.label for row in rows], spec.label),
    }
    for name in spec.widths:
        stacked = np.stack([row.vectors[name] for row in rows])
        arrays[name] = _rows_array(stacked.astype(spec.dtype, copy=False), schema.field(name).type)
    if spec.top_k:
        logits = np.stack([row.vectors["logits"] for row in rows])
        classes, scores = top_classes(logits, spec.top_k)
        arrays["top_classes"] = _rows_array(classes, schema.field("top_classes").type)
        arrays["top_scores"] = _rows_array(scores, schema.field("top_scores").type)
        if spec.class_names:
            names = np.asarray(spec.class_names, object)[classes]
            arrays["top_labels"] = pa.array(names.tolist(), schema.field("top_labels").type)
    for name, kind in spec.columns.items():
        arrays[name] = pa.array([row.ref.columns.get(name) for row in rows], kind)
    return pa.RecordBatch.from_arrays([arrays[name] for name in schema.names], schema=schema)


def _rows_array(rows: np.ndarray, kind: pa.DataType) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(rows).reshape(-1), kind.value_type)
    if pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(flat, type=kind)
    offsets = pa.array(np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1])
    return pa.ListArray.from_arrays(offsets, flat, type=kind)


def top_classes(logits: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The `k` highest classes of each row, int32 [N, k], and their softmax, float32 [N, k].

    `logits`: float32 [N, C], k <= C. Highest first; of equal logits the lower class first.
    """
    order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    softmax = shifted / shifted.sum(axis=1, keepdims=True)
    return order.astype(np.int32), np.take_along_axis(softmax, order, axis=1).astype(np.float32)


def utf8_within(value: Any) -> Any:
    """`value`, as JSON holds it, with `utf8` done to all text in it."""
    if isinstance(value, Mapping):
        return {utf8_within(name): utf8_within(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [utf8_within(item) for item in value]
    return utf8(value) if isinstance(value, str) else value


def parquet_writer(sink: BinaryIO, schema: pa.Schema, compression: str) -> pq.ParquetWriter:
    """A writer with page checksums. Vectors get neither dictionary nor statistics: both are waste.

    The caller decides row groups by what it gives to one `write_batch`.
    """
    plain = [f.name for f in schema if not pa.types.is_nested(f.type)]
    return pq.ParquetWriter(
        sink,
        schema,
        compression=compression,
        use_dictionary=[name for name in plain if name in ("source", "stage", "error_class")],
        write_statistics=plain,
        write_page_checksum=True,
    )


def metadata_text(values: Mapping[str, Any]) -> dict[str, str]:
    """`values` as schema metadata: text as it is, everything else as JSON with sorted keys."""
    return {
        name: value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        for name, value in utf8_within(values).items()
    }
