"""Teacher rows to and from Parquet bytes of records.teacher_schema. Called by the teach stage (write) and align (read). Pure: bytes in memory.

Encodings by measurement on GSM8K answers (25,574 tokens, K = 10, noise on every logprob): split bytes for the floats and a dictionary for
the top-k ids under zstd take 33 bytes a position, Parquet's defaults 39; the limit is 45 (design.md section 5). The bytes depend on the rows alone.

On disk the entries of the lists are required: without a definition level for "this entry is null" a shard is read in 20% less time and takes the same
bytes. `decode` gives records.teacher_schema for these files and for earlier ones, whose entries are optional.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fusion_ray.records import teacher_schema, top_k_of

_SPLIT = ("topk_logprobs", "label_logprob")
_PLAIN = ("ids", "position", "byte_start", "byte_end")
_DICTIONARY = ("topk_ids", "message")
ZSTD_LEVEL = 9


@dataclass(frozen=True)
class TeacherRow:
    """One conversation under one model: T tokens, N predicting positions, K likeliest tokens (records.teacher_schema says what each means)."""

    id: str
    ids: np.ndarray  # (T,) int32
    position: np.ndarray  # (N,) int32
    byte_start: np.ndarray  # (N,) int32
    byte_end: np.ndarray  # (N,) int32
    message: np.ndarray  # (N,) int16
    topk_ids: np.ndarray  # (N, K) int32
    topk_logprobs: np.ndarray  # (N, K) float16
    label_logprob: np.ndarray  # (N,) float32


_COLUMNS = tuple(name for name in TeacherRow.__dataclass_fields__ if name != "id")


def to_table(rows: Sequence[TeacherRow], *, top_k: int) -> pa.Table:
    """Raises ValueError for a row whose arrays do not fit each other or `top_k`, naming its id."""
    schema = teacher_schema(top_k)
    for row in rows:
        _check(row, top_k)
    columns: list[pa.Array] = [pa.array([row.id for row in rows], pa.string())]
    for name in _COLUMNS:
        lists = [getattr(row, name).reshape(-1) for row in rows]
        kind = schema.field(name).type
        flat = np.concatenate(lists) if lists else np.empty(0)
        offsets = np.zeros(len(rows) + 1, np.int32)
        np.cumsum([len(values) for values in lists], out=offsets[1:])
        values = pa.array(flat.astype(kind.value_type.to_pandas_dtype(), copy=False), kind.value_type)
        columns.append(pa.ListArray.from_arrays(pa.array(offsets), values, type=kind))
    return pa.table(columns, schema=schema)


def from_table(table: pa.Table) -> Iterator[TeacherRow]:
    """The rows of a table; arrays are views of the table's memory."""
    top_k = top_k_of(table.schema)
    table = table.combine_chunks()
    names = table["id"].to_pylist()
    columns = {}
    for name in _COLUMNS:
        column = table[name].chunk(0) if table[name].num_chunks else pa.array([], table.schema.field(name).type)
        columns[name] = (column.offsets.to_numpy(), column.values.to_numpy(zero_copy_only=True))
    for number, row_id in enumerate(names):
        arrays = {name: values[offsets[number] : offsets[number + 1]] for name, (offsets, values) in columns.items()}
        arrays["topk_ids"] = arrays["topk_ids"].reshape(-1, top_k)
        arrays["topk_logprobs"] = arrays["topk_logprobs"].reshape(-1, top_k)
        yield TeacherRow(id=row_id, **arrays)


def encode(table: pa.Table) -> bytes:
    """A table of teacher_schema as Parquet bytes."""
    sink = io.BytesIO()
    pq.write_table(
        _with_lists(table, required=True),
        sink,
        compression="zstd",
        compression_level=ZSTD_LEVEL,
        use_dictionary=[_leaf(name) for name in _DICTIONARY],
        column_encoding={_leaf(name): "BYTE_STREAM_SPLIT" for name in _SPLIT}
        | {_leaf(name): "PLAIN" for name in _PLAIN},
        write_statistics=False,
        row_group_size=max(1, table.num_rows),
    )
    return sink.getvalue()


def decode(data: bytes) -> pa.Table:
    """Parquet bytes as a table of teacher_schema. Raises ValueError for bytes that are not whole or were not written by this project."""
    table = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
    top_k_of(table.schema)
    return _with_lists(table, required=False)


def _with_lists(table: pa.Table, *, required: bool) -> pa.Table:
    """The same columns, their lists with entries that may be null or are required; no value is copied."""
    fields, columns = [], []
    for field, column in zip(table.schema, table.columns, strict=True):
        if pa.types.is_list(field.type):
            entry = field.type.value_field
            kind = pa.list_(pa.field("element", entry.type, nullable=False) if required else entry.type)
            pieces = [pa.ListArray.from_arrays(piece.offsets, piece.values, type=kind) for piece in column.chunks]
            column, field = pa.chunked_array(pieces, kind), pa.field(field.name, kind, nullable=False)
        fields.append(field)
        columns.append(column)
    return pa.table(columns, schema=pa.schema(fields, metadata=table.schema.metadata))


def _leaf(name: str) -> str:
    return f"{name}.list.element"


def _check(row: TeacherRow, top_k: int) -> None:
    count = len(row.position)
    for name in ("byte_start", "byte_end", "message", "label_logprob"):
        if getattr(row, name).shape != (count,):
            raise ValueError(f"row {row.id!r}: {name} has the shape {getattr(row, name).shape}, expected ({count},)")
    for name in ("topk_ids", "topk_logprobs"):
        if getattr(row, name).shape != (count, top_k):
            raise ValueError(
                f"row {row.id!r}: {name} has the shape {getattr(row, name).shape}, expected ({count}, {top_k})"
            )
