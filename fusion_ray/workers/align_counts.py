"""Which ids meet which over a corpus, on disk: what `map: statistics` and `map: shares` need before its first row.

Called by `stages/align.py`, `views.py` and tests.

Shards are counted into parts of their own (`_counts/`, removed when the artefact is sealed), so that a run that was cut off counts none twice; their sum
is the unit `counts.parquet`. Both are Parquet of COUNTS_SCHEMA, sorted by source id, then by pivot id.
"""

import io

import pyarrow as pa
import pyarrow.parquet as pq

from fusion_ray.alignment.counts import PairCounts
from fusion_ray.config import AlignConfig
from fusion_ray.store import UNITS, Artifact

COUNTS_UNIT = "counts.parquet"
PARTS = "_counts"
COUNTS_SCHEMA = pa.schema(
    [
        pa.field("source_id", pa.int32(), nullable=False),
        pa.field("pivot_id", pa.int32(), nullable=False),
        pa.field("count", pa.int64(), nullable=False),
    ]
)


def needs_counts(config: AlignConfig) -> bool:
    return config.map in ("statistics", "shares")


def part_name(shard: str) -> str:
    return f"{PARTS}/{shard}"


def read_counts(artifact: Artifact, config: AlignConfig) -> PairCounts | None:
    """The sum over all shards, None for a map that needs none. Raises StoreError where it was not made yet."""
    return decode_counts(artifact.read_bytes(COUNTS_UNIT)) if needs_counts(config) else None


def remove_parts(artifact: Artifact) -> None:
    artifact.remove(PARTS)
    artifact.remove(f"{UNITS}/{PARTS}")


def encode_counts(counts: PairCounts) -> bytes:
    sink = io.BytesIO()
    pq.write_table(
        to_table(counts),
        sink,
        compression="zstd",
        column_encoding={"source_id": "DELTA_BINARY_PACKED"},
        use_dictionary=False,
    )
    return sink.getvalue()


def decode_counts(data: bytes) -> PairCounts:
    return of_table(pq.read_table(io.BytesIO(data), use_threads=False))


def to_table(counts: PairCounts) -> pa.Table:
    columns = (counts.source_ids, counts.pivot_ids, counts.counts)
    return pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, COUNTS_SCHEMA, strict=True)],
        schema=COUNTS_SCHEMA,
    )


def of_table(table: pa.Table) -> PairCounts:
    """A table of these columns in any order of rows; a pair may come several times."""
    source_ids, pivot_ids, counts = (table[name].to_numpy() for name in COUNTS_SCHEMA.names)
    return PairCounts.of_pairs(source_ids, pivot_ids, counts)
