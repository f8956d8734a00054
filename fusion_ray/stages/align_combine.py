"""Several sources' aligned rows made into one target's, shard by shard in Ray tasks (`distill.branches: all`). The work is in workers/align_combine.py."""

import io
import logging
from collections.abc import Iterator, Mapping, Sequence

import pyarrow.parquet as pq
import ray

from fusion_ray.config import AlignConfig, WorkerResources
from fusion_ray.records import Report
from fusion_ray.store import Artifact, Manifest, Unit
from fusion_ray.workers.align_combine import combine
from fusion_ray.workers.align_rows import encode_aligned

logger = logging.getLogger(__name__)

TASK_RETRIES = 3


def combine_all(
    out: Artifact, *, sources: Mapping[str, Artifact], config: AlignConfig, resources: WorkerResources, report: Report
) -> Manifest:
    """The best source's row of every conversation, into `out`; committed shards are not made again.

    manifest.info: `rows`, and `won`, how many of them each source won (the others are the pivot's). Raises ValueError for artefacts of different
    corpora or pivots.
    """
    if out.sealed:
        return out.manifest()
    names = _shards(sources)
    committed = out.units(names)
    todo = [name for name in names if name not in committed]
    done = len(names) - len(todo)
    task = ray.remote(_combine_shards).options(
        name="align:all", num_cpus=resources.cpus, max_retries=TASK_RETRIES, num_returns="streaming"
    )
    chunks = [todo[first :: resources.max_workers] for first in range(resources.max_workers)]
    streams = [task.remote(out, sources, config.unit, chunk) for chunk in chunks if chunk]
    try:
        while streams:
            ready, _ = ray.wait(streams, num_returns=1, fetch_local=False)
            for stream in ready:
                try:
                    problem = ray.get(next(stream))
                except StopIteration:
                    streams.remove(stream)
                    continue
                if problem:
                    raise ValueError(problem)
                done += 1
                report({"done": done, "total": len(names), "unit": "shards"})
    finally:
        for stream in streams:
            ray.cancel(stream)
    units = list(out.units(names).values())
    won = {source: sum(_won(unit, source) for unit in units) for source in sources}
    rows = sum(unit.rows for unit in units)
    logger.info("align all: %d rows of %d sources; won: %s", rows, len(sources), won)
    return out.seal(units, {"rows": rows, "won": won})


def _shards(sources: Mapping[str, Artifact]) -> list[str]:
    held = {
        name: {unit.name for unit in artifact.manifest().units if unit.name.startswith("shard-")}
        for name, artifact in sources.items()
    }
    everywhere = set.intersection(*held.values())
    for name, shards in held.items():
        if shards != everywhere:
            missing = min(set.union(*held.values()) - everywhere)
            raise ValueError(
                f"the sources were aligned over different corpora: not all hold {missing} ({name} has {len(shards)} shards); align again"
            )
    return sorted(everywhere)


def _combine_shards(out: Artifact, sources: Mapping[str, Artifact], unit: str, names: Sequence[str]) -> Iterator[str]:
    """Commit each shard and tell "", or what the user must mend; a retried task skips what its predecessor committed."""
    for name in names:
        try:
            if out.unit(name) is None:
                tables = {
                    source: pq.read_table(io.BytesIO(artifact.read_bytes(name))) for source, artifact in sources.items()
                }
                found = combine(tables, unit=unit)
                info = {"won": dict(found.won)}
                out.commit_bytes(name, encode_aligned(found.table), rows=found.table.num_rows, info=info)  # type: ignore[arg-type]  # numbers
            yield ""
        except ValueError as error:
            yield f"{name}: {error}"
            return


def _won(unit: Unit, source: str) -> int:
    won = unit.info["won"]
    assert isinstance(won, dict)
    return int(str(won[source]))
