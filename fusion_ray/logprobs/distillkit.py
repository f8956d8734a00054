"""Top-k rows in the Parquet layout of DistillKit (github.com/arcee-ai/DistillKit, distillkit/compression) and back. Called by exchange.py. Pure.

One row is a conversation of T tokens: `input_ids` (T) uint64, `compressed_logprobs` (T - 1, b) uint8 and `bytepacked_indices` (T - 1, c) uint8; entry i
predicts token i + 1, likeliest first. Of DistillKit's compressions the exact one is written (`exact_k` = `k`, no polynomial, no residual bins, no deltas):
b bytes are K little-endian floats of `exact_dtype`, c = ceil(K * w / 8) bytes hold K ids of w = ceil(log2 d) bits, highest bit first. The approximate ones
are not read. `labels` (T) int64 is -100 but at the tokens that a position with a distribution predicts.

Their trainer reads an entry at every position, so a position without a distribution holds its next token with probability 1 (the others at FILL).
Letters: T tokens, N positions with a distribution, K top-k, d the vocabulary's size.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

Dtype = Literal["float16", "float32"]
DTYPES: dict[str, str] = {"float16": "<f2", "float32": "<f4", "float64": "<f8"}
FILL = -1e4  # a finite logprob of probability 0: with -inf their 0 * log 0 is NaN; a float16 holds it exactly
UNLABELLED = -100


@dataclass(frozen=True)
class SparseRow:
    """One conversation: at each of N positions of its T tokens the K likeliest next tokens."""

    id: str
    ids: np.ndarray  # (T,) int32
    position: np.ndarray  # (N,) int32
    topk_ids: np.ndarray  # (N, K) int32
    topk_logprobs: np.ndarray  # (N, K) float16 or float32; -inf where fewer than K are known


def index_bits(vocabulary: int) -> int:
    """ceil(log2 d), the bits of one id."""
    return max(1, (vocabulary - 1).bit_length())


def configuration(vocabulary: int, top_k: int, dtype: Dtype) -> dict[str, object]:
    """The content of compression_config.yaml, which is also what a DistillKit run takes as `teacher.logprob_compressor`."""
    return {
        "d": vocabulary,
        "k": top_k,
        "exact_k": top_k,
        "exact_dtype": dtype,
        "polynomial_terms": None,
        "term_dtype": "float32",
        "residual_bins": [],
        "delta_encoding": False,
        "error_diffusion": False,
        "normalize_t": False,
    }


def to_table(rows: Sequence[SparseRow], *, vocabulary: int, top_k: int, dtype: Dtype) -> pa.Table:
    """Raises ValueError naming the row with an id outside the vocabulary."""
    if top_k > vocabulary:
        raise ValueError(
            f"top {top_k} of a vocabulary of {vocabulary} tokens: expected a vocabulary of at least {top_k}"
        )
    bits = index_bits(vocabulary)
    packed, values, labels = [], [], []
    for row in rows:
        highest = max(int(row.ids.max(initial=0)), int(row.topk_ids.max(initial=0)))
        if highest >= vocabulary:
            raise ValueError(
                f"row {row.id!r} has the token id {highest}, the vocabulary {vocabulary} entries: give the model that the rows are of"
            )
        ids, logprobs = _dense(row, top_k, vocabulary)
        packed.append(pack(ids, bits))
        values.append(np.ascontiguousarray(logprobs, DTYPES[dtype]).view(np.uint8).reshape(len(ids), -1))
        known = np.full(len(row.ids), UNLABELLED, np.int64)
        known[row.position + 1] = row.ids[row.position + 1]
        labels.append(known)
    return pa.table(
        {
            "input_ids": _lists([row.ids for row in rows], pa.uint64()),
            "compressed_logprobs": _byte_lists(values, top_k * np.dtype(DTYPES[dtype]).itemsize),
            "bytepacked_indices": _byte_lists(packed, -(-top_k * bits // 8)),
            "labels": _lists(labels, pa.int64()),
        }
    )


def read_table(table: pa.Table, config: Mapping[str, object]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(ids (T,) int32, topk_ids (E, K) int32, topk_logprobs (E, K) float32) of every row, E entries from position 0 on (T - 1, or T with a last one unused).

    Raises ValueError for a compression that is not exact, and for bytes that are not what `config` says.
    """
    vocabulary, top_k, dtype = _exact(config)
    bits = index_bits(vocabulary)
    for name in ("input_ids", "compressed_logprobs", "bytepacked_indices"):
        if name not in table.column_names:
            raise ValueError(
                f"there is no column {name!r}, the columns are {', '.join(table.column_names)}: expected DistillKit's layout"
            )
    for number in range(table.num_rows):
        ids = np.asarray(table["input_ids"][number].as_py(), np.int64).astype(np.int32)
        values = _bytes_of(table["compressed_logprobs"][number], top_k * np.dtype(dtype).itemsize, number)
        packed = _bytes_of(table["bytepacked_indices"][number], -(-top_k * bits // 8), number)
        if len(values) != len(packed) or not len(ids) - 1 <= len(values) <= len(ids):
            raise ValueError(
                f"row {number} has {len(ids)} tokens, {len(values)} entries of logprobs and {len(packed)} of ids: expected one for each token but the last"
            )
        logprobs = values.reshape(-1).view(dtype).reshape(-1, top_k).astype(np.float32)
        if config.get("delta_encoding", True):
            logprobs = np.cumsum(logprobs, axis=1, dtype=np.float32)
        yield ids, unpack(packed, bits, top_k), logprobs


def pack(ids: np.ndarray, bits: int) -> np.ndarray:
    """(N, K) to (N, ceil(K * bits / 8)) uint8: the ids as one stream of bits a row, highest bit first, zeros at the end."""
    spread = np.unpackbits(ids.astype(">u4").reshape(len(ids), -1, 1).view(np.uint8), axis=-1)  # (N, K, 32)
    return np.packbits(spread[..., 32 - bits :].reshape(len(ids), -1), axis=-1)


def unpack(packed: np.ndarray, bits: int, top_k: int) -> np.ndarray:
    """(N, ceil(K * bits / 8)) uint8 to (N, K) int32."""
    stream = np.unpackbits(packed, axis=-1)[:, : top_k * bits].reshape(len(packed), top_k, bits)
    spread = np.zeros((len(packed), top_k, 32), np.uint8)
    spread[..., 32 - bits :] = stream
    return np.packbits(spread, axis=-1).view(">u4")[..., 0].astype(np.int32)


def _dense(row: SparseRow, top_k: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """(T - 1, K) ids, different within a position, and float32 logprobs that are all finite."""
    count = max(0, len(row.ids) - 1)
    ids = np.zeros((count, top_k), np.int32)
    logprobs = np.full((count, top_k), -np.inf, np.float32)
    ids[:, 0], logprobs[:, 0] = row.ids[1:], 0
    ids[row.position], logprobs[row.position] = row.topk_ids, row.topk_logprobs
    empty = ~np.isfinite(logprobs)  # (T - 1, K)
    # Unused ids for the empty places: of the first 2K of the vocabulary at most K are taken.
    spare = min(2 * top_k, vocabulary)
    taken = np.zeros((count, spare), bool)
    at, which = np.nonzero(~empty & (ids < spare))
    taken[at, ids[at, which]] = True
    free = np.argsort(taken, axis=1, kind="stable")  # (T - 1, spare), free ids first
    rank = np.cumsum(empty, axis=1) - 1
    at, which = np.nonzero(empty)
    ids[at, which] = free[at, rank[at, which]]
    logprobs[at, which] = FILL
    return ids, logprobs


def _exact(config: Mapping[str, object]) -> tuple[int, int, str]:
    """(d, K, numpy's name of the floats). Raises ValueError for what is not exact."""
    try:
        vocabulary, top_k, exact = (int(str(config[name])) for name in ("d", "k", "exact_k"))
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"a DistillKit compression needs whole numbers d, k and exact_k; given {dict(config)}"
        ) from error
    dtype = str(config.get("exact_dtype", "float32"))
    if exact != top_k or config.get("polynomial_terms") or config.get("residual_bins"):
        raise ValueError(
            f"this compression stores {exact} of {top_k} logprobs exactly and approximates the rest; only exact ones are read (exact_k equal to k, "
            "no polynomial_terms, no residual_bins): decompress the file with DistillKit and write it again with such a configuration"
        )
    if dtype not in DTYPES:
        raise ValueError(f"exact_dtype {dtype!r} is not read, expected one of {', '.join(DTYPES)}")
    return vocabulary, top_k, DTYPES[dtype]


def _lists(rows: Sequence[np.ndarray], kind: pa.DataType) -> pa.Array:
    flat = np.concatenate(rows) if rows else np.empty(0)
    values = pa.array(flat.astype(kind.to_pandas_dtype()), kind)
    return pa.ListArray.from_arrays(pa.array(_offsets(rows)), values, type=pa.list_(kind))


def _byte_lists(rows: Sequence[np.ndarray], width: int) -> pa.Array:
    """Rows of (entries, width) uint8 as list<list<uint8>>."""
    flat = np.concatenate(rows) if rows else np.empty((0, width), np.uint8)
    inner = pa.ListArray.from_arrays(
        pa.array(np.arange(len(flat) + 1, dtype=np.int32) * width), pa.array(flat.reshape(-1), pa.uint8())
    )
    return pa.ListArray.from_arrays(pa.array(_offsets(rows)), inner, type=pa.list_(pa.list_(pa.uint8())))


def _offsets(rows: Sequence[np.ndarray]) -> np.ndarray:
    return np.cumsum([0, *(len(row) for row in rows)]).astype(np.int32)


def _bytes_of(scalar: pa.Scalar, width: int, number: int) -> np.ndarray:
    """(entries, width) uint8 of one list<list<uint8>>. Raises ValueError where a list has another length."""
    lists = scalar.values
    lengths = np.asarray(lists.value_lengths())
    if (lengths != width).any():
        raise ValueError(
            f"row {number} has an entry of {lengths[lengths != width][0]} bytes, its compression_config.yaml says {width}"
        )
    return lists.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
