"""The align stage: shards of two teach artefacts spread over Ray tasks, each committing its own (design.md section 6). The work is in workers/aligner.py."""

import json
import logging
import time
from collections.abc import Iterator, Sequence

import ray

from fusion_ray.alignment.coverage import Coverage
from fusion_ray.config import AlignConfig, ModelConfig, WorkerResources
from fusion_ray.corpus.readers import Rejected
from fusion_ray.corpus.shards import decode_rejected, encode_rejected
from fusion_ray.records import Report
from fusion_ray.store import Artifact, Json, Manifest, Unit
from fusion_ray.workers.align_setup import check_supported, load_vocabulary
from fusion_ray.workers.aligner import Aligner

logger = logging.getLogger(__name__)

EXAMPLES = 8  # rows that the report shows in both tokenizations
REJECTED = "rejected.parquet"
TASK_RETRIES = 3


def align(
    out: Artifact,
    pivot_rows: Artifact,
    source_rows: Artifact,
    *,
    pivot: ModelConfig,
    source: ModelConfig,
    config: AlignConfig,
    resources: WorkerResources,
    max_rejected: float = 0.01,
    report: Report,
) -> Manifest:
    """Align every shard that both artefacts hold into `out` and seal it; committed shards are not made again.

    `manifest.info` holds the coverage report (alignment/coverage.py). Raises ConfigError for a method that is not built, ValueError past `max_rejected`.
    """
    check_supported(config)
    started = time.monotonic()
    theirs = {unit.name for unit in source_rows.manifest().units}
    names = [
        unit.name for unit in pivot_rows.manifest().units if unit.name.startswith("shard-") and unit.name in theirs
    ]
    todo = [name for name in names if out.unit(name) is None]
    report({"done": len(names) - len(todo), "total": len(names), "unit": "shards"})
    chunks = [todo[n :: resources.max_workers] for n in range(resources.max_workers)]
    task = ray.remote(_align_shards).options(
        name=f"align:{source.name}",
        num_cpus=resources.cpus,
        num_gpus=0,
        memory=None if resources.memory_gb is None else int(resources.memory_gb * (1 << 30)),
        max_retries=TASK_RETRIES,
        num_returns="streaming",
        scheduling_strategy="SPREAD",
    )
    streams = [task.remote(out, pivot_rows, source_rows, pivot, source, config, chunk) for chunk in chunks if chunk]
    done = len(names) - len(todo)
    while streams:
        ready, _ = ray.wait(streams, num_returns=1, fetch_local=False)
        for stream in ready:
            try:
                ray.get(next(stream))
            except StopIteration:
                streams.remove(stream)
                continue
            done += 1
            report({"done": done, "total": len(names), "unit": "shards"})
    manifest = _seal(out, names, (pivot_rows, source_rows), (pivot, source), config, max_rejected)
    logger.info("align %s: %d rows in %.1f s", source.name, manifest.info["rows"], time.monotonic() - started)
    return manifest


def _align_shards(
    out: Artifact,
    pivot_rows: Artifact,
    source_rows: Artifact,
    pivot: ModelConfig,
    source: ModelConfig,
    config: AlignConfig,
    names: Sequence[str],
) -> Iterator[str]:
    """Commit each shard and tell its name; a retried task skips what its predecessor committed."""
    aligner = Aligner.of_models(pivot, source, config)
    for name in names:
        if out.unit(name) is None:
            shard = aligner.align(pivot_rows.read_bytes(name), source_rows.read_bytes(name))
            if shard.rejected:
                left_out = f"_rejected/{name}"
                out.commit_bytes(left_out, encode_rejected(shard.rejected), rows=len(shard.rejected))
            info: dict[str, Json] = {"coverage": shard.coverage.to_dict(), "rejected": len(shard.rejected)}
            out.commit_bytes(name, shard.data, rows=shard.rows, info=info)
        yield name


def _seal(
    out: Artifact,
    names: Sequence[str],
    rows: tuple[Artifact, Artifact],
    models: tuple[ModelConfig, ModelConfig],
    config: AlignConfig,
    max_rejected: float,
) -> Manifest:
    units: list[Unit] = []
    total = Coverage()
    rejected: list[Rejected] = []
    for name in names:
        unit = out.unit(name)
        assert unit is not None, name
        total = total + Coverage(**unit.info["coverage"])
        if unit.info["rejected"]:
            rejected += decode_rejected(out.read_bytes(f"_rejected/{name}"))
        units.append(unit)
    seen = total.rows + len(rejected)
    if not total.rows or len(rejected) > max_rejected * seen:
        why = f"; the first: row {rejected[0].id!r}: {rejected[0].reason}" if rejected else ""
        raise ValueError(
            f"align: {len(rejected)} of {seen} rows of {models[1].name!r} cannot be aligned, more than corpus.max_rejected ({max_rejected:g}){why}"
        )
    if rejected:
        units.append(out.commit_bytes(REJECTED, encode_rejected(rejected), rows=len(rejected)))
    examples = Aligner.of_models(*models, config).examples(
        rows[0].read_bytes(names[0]), rows[1].read_bytes(names[0]), None, EXAMPLES
    )
    units.append(
        out.commit_bytes("examples.json", json.dumps(examples, ensure_ascii=False).encode(), rows=len(examples))
    )
    vocabularies = load_vocabulary(models[0]), load_vocabulary(models[1])
    return out.seal(units, total.summary(*vocabularies) | {"rejected": len(rejected)})
