"""Teacher rows as flat position arrays, and aligned rows as Parquet bytes. Called by `workers/aligner.py`.

No Python runs per position: the lists of a shard are taken as they lie in Arrow's memory. Letters: N positions, K top-k.
"""

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from fusion_ray.alignment.methods import Aligned
from fusion_ray.alignment.positions import Positions
from fusion_ray.records import aligned_schema, top_k_of

ZSTD_LEVEL = 3  # half the time of level 9 for 2 to 4% more bytes (SentencePiece against Tekken, K = 10)
ENCODINGS = {"position": "DELTA_BINARY_PACKED", "topk_logprobs": "BYTE_STREAM_SPLIT"}


@dataclass(frozen=True)
class TeacherRows:
    """The rows of one side of a shard: their ids, token lists and positions (numbered by row)."""

    names: list[str]
    tokens: npt.NDArray[np.int32]  # all rows' ids, one after another
    token_offsets: npt.NDArray[np.int64]  # (rows + 1,)
    position: npt.NDArray[np.int32]  # (N,) within the row
    positions: Positions
    top_k: int

    def of_rows(self, keep: npt.NDArray[np.bool_]) -> "TeacherRows":
        """The rows with `keep`, numbered anew."""
        if keep.all():
            return self
        lengths = np.diff(self.token_offsets)
        return TeacherRows(
            [name for name, kept in zip(self.names, keep.tolist(), strict=True) if kept],
            self.tokens[np.repeat(keep, lengths)],
            _offsets(lengths[keep]),
            self.position[keep[self.positions.row]],
            self.positions.of_rows(keep),
            self.top_k,
        )


def teacher_rows(table: pa.Table, rows: Sequence[int] | None = None) -> TeacherRows:
    """The rows `rows` of a table of records.teacher_schema, in that order; all of them by default.

    Raises ValueError naming the row whose lists do not fit together or whose positions leave it.
    """
    top_k = top_k_of(table.schema)
    if rows is not None and list(rows) != list(range(table.num_rows)):
        table = table.take(pa.array(rows, pa.int64()))
    table = table.combine_chunks()
    names = table["id"].to_pylist()
    tokens, token_offsets = _flat(table, "ids")
    position, offsets = _flat(table, "position")
    counts = np.diff(offsets)
    columns: dict[str, np.ndarray] = {}
    for name, width, kind in (
        ("byte_start", 1, np.int32),
        ("byte_end", 1, np.int32),
        ("message", 1, np.int64),
        ("topk_ids", top_k, np.int32),
        ("topk_logprobs", top_k, np.float32),
        ("label_logprob", 1, np.float32),
    ):
        values, own = _flat(table, name)
        uneven = np.flatnonzero(np.diff(own) != counts * width)
        if uneven.size:
            row = int(uneven[0])
            raise ValueError(
                f"row {names[row]!r} has {counts[row]} positions, but {np.diff(own)[row]} values of {name}, expected {counts[row] * width}: "
                "the shard was not written by the teach stage; remove its artefact and teach again"
            )
        # A copy also where the type is the same: Arrow's memory is read-only, which compiled code would take for another type.
        columns[name] = values.astype(kind)
    row_of = np.repeat(np.arange(len(names)), counts)
    lengths = np.diff(token_offsets)
    outside = np.flatnonzero((position < 0) | (position + 1 >= lengths[row_of]))
    if outside.size:
        row = int(row_of[outside[0]])
        raise ValueError(
            f"row {names[row]!r} predicts from position {position[outside[0]]}, but it has {lengths[row]} tokens: "
            "the shard was not written by the teach stage; remove its artefact and teach again"
        )
    return TeacherRows(
        names,
        tokens,
        token_offsets,
        position,
        Positions(
            row_of,
            columns["message"],
            columns["byte_start"],
            columns["byte_end"],
            tokens[token_offsets[row_of] + position + 1],
            columns["label_logprob"],
            columns["topk_ids"].reshape(-1, top_k),
            columns["topk_logprobs"].reshape(-1, top_k),
        ),
        top_k,
    )


def join_rows(pivot: pa.Table, source: pa.Table) -> tuple[list[int], list[int]]:
    """The row numbers of both tables that hold the same conversation, in the pivot's order. Of rows with one id the n-th meets the n-th."""
    place = {key: row for row, key in enumerate(numbered(source["id"].to_pylist()))}
    pairs = [(row, place[key]) for row, key in enumerate(numbered(pivot["id"].to_pylist())) if key in place]
    return [mine for mine, _ in pairs], [theirs for _, theirs in pairs]


def aligned_table(rows: TeacherRows, aligned: Aligned) -> pa.Table:
    """The targets as a table of records.aligned_schema. `rows` are the pivot's."""
    top_k = aligned.topk_ids.shape[1]
    schema = aligned_schema(top_k)
    mine, count = rows.positions, len(rows.names)
    positions = _offsets(np.bincount(mine.row, minlength=count))
    lists = {
        "ids": (rows.token_offsets, rows.tokens),
        "position": (positions, rows.position),
        "kind": (positions, aligned.kind),
        "has_target": (positions, aligned.has_target),
        "from_source": (positions, aligned.from_source),
        "topk_ids": (positions * top_k, aligned.topk_ids.reshape(-1)),
        "topk_logprobs": (positions * top_k, aligned.topk_logprobs.astype(np.float16).reshape(-1)),
    }
    figures = {
        "bytes": np.bincount(mine.row, mine.end - mine.start, count).astype(np.int32),
        "source_won": aligned.source_won,
        "source_ce_token": aligned.ce_source.per_token.astype(np.float32),
        "pivot_ce_token": aligned.ce_pivot.per_token.astype(np.float32),
        "source_ce_byte": aligned.ce_source.per_byte.astype(np.float32),
        "pivot_ce_byte": aligned.ce_pivot.per_byte.astype(np.float32),
    }
    columns = []
    for entry in schema:
        if entry.name == "id":
            columns.append(pa.array(rows.names, entry.type))
        elif entry.name in lists:
            offsets, values = lists[entry.name]
            flat = pa.array(values, entry.type.value_type)
            columns.append(pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), flat, type=entry.type))
        else:
            columns.append(pa.array(figures[entry.name], entry.type))
    return pa.table(columns, schema=schema)


def encode_aligned(table: pa.Table, *, pivot: str = "") -> bytes:
    """A table of records.aligned_schema as Parquet bytes that depend on the table and on the pivot's fingerprint alone."""
    if pivot:
        table = table.replace_schema_metadata(aligned_schema(top_k_of(table.schema), pivot=pivot).metadata)
    sink = io.BytesIO()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        compression_level=ZSTD_LEVEL,
        use_dictionary=["topk_ids.list.element", "kind.list.element"],
        column_encoding={f"{name}.list.element": encoding for name, encoding in ENCODINGS.items()},
        write_statistics=False,
        row_group_size=max(1, table.num_rows),
    )
    return sink.getvalue()


def _flat(table: pa.Table, name: str) -> tuple[np.ndarray, npt.NDArray[np.int64]]:
    """All values of a list column, and (rows + 1,) where each row's begin."""
    column = table[name]
    if not column.num_chunks:
        return np.zeros(0, column.type.value_type.to_pandas_dtype()), np.zeros(1, np.int64)
    array = column.chunk(0)
    offsets = array.offsets.to_numpy().astype(np.int64)
    return array.values.to_numpy(zero_copy_only=False)[offsets[0] : offsets[-1]], offsets - offsets[0]


def _offsets(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])


def numbered(names: Sequence[str]) -> list[tuple[str, int]]:
    """Of rows with one id the n-th of one table is the n-th of another."""
    seen: Counter[str] = Counter()
    keys = []
    for name in names:
        keys.append((name, seen[name]))
        seen[name] += 1
    return keys
