"""Aligned shards of made-up rows, all of one length, for timing what reads them. Called by the parts of `distill.py` and its test.

The schema is that of the align stage. Every token after the prompt is predicted; nine positions in ten have a target, of which half are the source's; in
four targets of five the label is among the K ids; one in ten knows two ids fewer than K. Values follow from the seed alone.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fusion_ray.records import aligned_schema


@dataclass(frozen=True)
class Shape:
    """T tokens a row, of which `prompt` are read only, top-k targets in a vocabulary."""

    tokens: int = 1024
    prompt: int = 128
    vocabulary: int = 32_000
    top_k: int = 10

    @property
    def positions(self) -> int:
        """Predicting positions of a row."""
        return self.tokens - self.prompt


def write_shard(path: Path, shape: Shape, *, rows: int, seed: int = 0) -> Path:
    """The shard as Parquet, made anew."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(aligned_table(shape, rows=rows, seed=seed), path, compression="zstd")
    return path


def aligned_table(shape: Shape, *, rows: int, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    count, K, V = rows * shape.positions, shape.top_k, shape.vocabulary
    ids = rng.integers(0, V, (rows, shape.tokens), np.int32)
    position = np.tile(np.arange(shape.prompt - 1, shape.tokens - 1, dtype=np.int32), rows)
    first = np.where(rng.random(count) < 0.8, ids[:, shape.prompt :].ravel(), rng.integers(0, V, count))
    steps = rng.integers(1, (V - 1) // K + 1, (count, K))
    steps[:, 0] = 0
    topk_ids = (first[:, None] + np.cumsum(steps, axis=1)) % V  # (N, K), K different ids
    logits = 2 * np.sort(rng.standard_normal((count, K + 6)), axis=1)[:, ::-1]
    topk_logprobs = (logits - np.log(np.exp(logits).sum(1, keepdims=True)))[:, :K]
    fewer = rng.random(count) < 0.1
    topk_ids[fewer, K - 2 :] = 0
    topk_logprobs[fewer, K - 2 :] = -np.inf
    has_target = rng.random(count) < 0.9
    ce = rng.random((4, rows), np.float32)
    columns: dict[str, pa.Array] = {
        "id": pa.array([f"row-{seed}-{number}" for number in range(rows)]),
        "ids": _lists(ids, rows),
        "position": _lists(position, rows),
        "kind": _lists(np.zeros(count, np.int8), rows),
        "has_target": _lists(has_target, rows),
        "from_source": _lists(has_target & (rng.random(count) < 0.5), rows),
        "topk_ids": _lists(topk_ids.astype(np.int32), rows),
        "topk_logprobs": _lists(topk_logprobs.astype(np.float16), rows),
        "bytes": pa.array(np.full(rows, 4 * shape.positions, np.int32)),
        "source_won": pa.array(rng.random(rows) < 0.5),
        "source_ce_token": pa.array(ce[0]),
        "pivot_ce_token": pa.array(ce[1]),
        "source_ce_byte": pa.array(ce[2]),
        "pivot_ce_byte": pa.array(ce[3]),
    }
    schema = aligned_schema(K)
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)


def _lists(values: np.ndarray, rows: int) -> pa.Array:
    """`rows` lists of equal length."""
    each = values.size // rows
    return pa.ListArray.from_arrays(pa.array(np.arange(rows + 1, dtype=np.int32) * each), pa.array(values.ravel()))
