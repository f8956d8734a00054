"""The counts of all shards added up by Ray Data: the pairs of ids that `map: statistics` and `map: shares` go by. Called by `stages/align.py`.

Each shard's own counts are committed before (workers/align_counts.py), so the sum is made again after a kill: it reads megabytes.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import ray.data
from ray.data.aggregate import Sum

from fusion_ray.alignment.counts import PairCounts
from fusion_ray.config import WorkerResources
from fusion_ray.store import Artifact, Unit
from fusion_ray.workers.align_counts import (
    COUNTS_SCHEMA,
    COUNTS_UNIT,
    decode_counts,
    encode_counts,
    of_table,
    part_name,
    to_table,
)

MAX_BLOCKS = 1_000  # a block of Ray Data is one task; past this many shards, several share a task


def sum_counts(out: Artifact, shards: Sequence[str], resources: WorkerResources) -> Unit:
    """Commit the sum over the shards' counts, which are all there; the same bytes whatever the order of tasks."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    *keys, count = COUNTS_SCHEMA.names
    parts = ray.data.from_items(
        [{"part": part_name(shard)} for shard in shards], override_num_blocks=min(len(shards), MAX_BLOCKS)
    ).map_batches(_read, batch_size=1, fn_kwargs={"out": out}, num_cpus=resources.cpus)
    workers = max(1, min(resources.max_workers, len(shards)))
    summed = parts.groupby(keys, num_partitions=workers).aggregate(Sum(on=count, alias_name=count))
    batches = [
        batch.select(COUNTS_SCHEMA.names) for batch in summed.iter_batches(batch_size=None, batch_format="pyarrow")
    ]
    total = of_table(pa.concat_tables(batches)) if any(batch.num_rows for batch in batches) else PairCounts.none()
    return out.commit_bytes(COUNTS_UNIT, encode_counts(total), rows=int(total.keys.size))


def _read(batch: Mapping[str, np.ndarray], out: Artifact) -> pa.Table:
    return to_table(decode_counts(out.read_bytes(str(batch["part"][0]))))
