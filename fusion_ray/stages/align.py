"""The align stage: shards of two teach artefacts spread over Ray tasks, each committing its own (design.md section 6). The work is in workers/aligner.py."""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace

import ray

from fusion_ray.alignment.coverage import Coverage
from fusion_ray.alignment.explain import ExplainedRow
from fusion_ray.config import AlignConfig, ConfigError, ModelConfig, WorkerResources
from fusion_ray.corpus.readers import Rejected
from fusion_ray.corpus.shards import REJECTED, encode_rejected
from fusion_ray.records import Report
from fusion_ray.stages.align_counts import sum_counts
from fusion_ray.store import Artifact, Json, Manifest, Unit
from fusion_ray.workers.align_counts import (
    COUNTS_UNIT,
    encode_counts,
    needs_counts,
    part_name,
    read_counts,
    remove_parts,
)
from fusion_ray.workers.align_setup import check_supported
from fusion_ray.workers.aligner import Aligner

logger = logging.getLogger(__name__)

EXAMPLES = 8  # rows that the report shows in both tokenizations
EXAMPLES_UNIT = "examples.json"
TASK_RETRIES = 3
REASONS_SHOWN = 3
COUNTS = ("rows", "rejected", "missing_pivot", "missing_source")
# Errors that a user can mend travel from the tasks as data: Ray would give back its own wrapper with their text within a traceback.
FAILURES: Mapping[str, type[Exception]] = {"config": ConfigError, "value": ValueError, "storage": OSError}
Failure = tuple[str, str]  # a key of FAILURES and the error's text, both empty when all went well


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
    """Align every shard of both artefacts into `out` and seal it; committed shards are not made again.

    The maps `statistics` and `shares` have a first pass over all shards, which counts the pairs of ids that meet; the sum is a unit of the artefact.
    manifest.info: COUNTS over all shards and the figures of alignment/coverage.py. Raises ConfigError for a method that cannot run, ValueError for
    artefacts that hold different shards, naming the model whose tokenizer cannot be aligned, or past `max_rejected` (a share of the rows), naming
    the first ones.
    """
    if out.sealed:
        return out.manifest()
    check_supported(config)
    started = time.monotonic()
    names = _shards(pivot_rows, source_rows)
    units = out.units(names)
    todo = [name for name in names if name not in units]
    logger.info("align %s: %d of %d shards to do", source.name, len(todo), len(names))
    models = (pivot, source, config)
    inputs = (out, pivot_rows, source_rows, *models)
    if needs_counts(config) and out.unit(COUNTS_UNIT) is None:
        counted = out.units([part_name(name) for name in names])
        uncounted = [name for name in names if part_name(name) not in counted]
        for name in _spread(_count_shards, inputs, uncounted, resources, source.name):
            uncounted.remove(name)
            done = len(names) - len(uncounted)
            report({"done": done, "total": len(names), "unit": "shards", "phase": "count"})
        pairs = sum_counts(out, names, resources).rows
        logger.info("align %s: %d pairs of ids counted", source.name, pairs)
    for name in _spread(_align_shards, inputs, todo, resources, source.name):
        unit = out.unit(name)
        if unit is None:
            raise OSError(f"{out.url}/{name} was committed and is gone: the storage lost it; run again")
        units[name] = unit
        report({"done": len(units), "total": len(names), "unit": "shards"})
    _check_rejected([units[name] for name in names], source, max_rejected)
    manifest = _seal(out, [units[name] for name in names], (pivot_rows, source_rows), models, resources)
    logger.info(
        "align %s: %d rows, %d positions in %.1f s",
        source.name,
        manifest.info["rows"],
        manifest.info["positions"],
        time.monotonic() - started,
    )
    return manifest


def _shards(pivot_rows: Artifact, source_rows: Artifact) -> list[str]:
    mine, theirs = (
        {unit.name for unit in rows.manifest().units if unit.name.startswith("shard-")}
        for rows in (pivot_rows, source_rows)
    )
    if mine != theirs:
        name = min(mine ^ theirs)
        with_it, without = (pivot_rows, source_rows) if name in mine else (source_rows, pivot_rows)
        raise ValueError(
            f"{with_it.url} holds {name} and {without.url} does not: both must be taught from the same corpus; run the teach stage again"
        )
    return sorted(mine)


def _spread(
    work: Callable[..., Iterator[tuple[str, Failure]]],
    inputs: tuple[object, ...],
    todo: Sequence[str],
    resources: WorkerResources,
    label: str,
) -> Iterator[str]:
    """Names of shards as they are committed, by at most `max_workers` tasks side by side, each with every n-th shard."""
    chunks = [todo[first :: resources.max_workers] for first in range(resources.max_workers)]
    task = ray.remote(work).options(**_options(resources, label), num_returns="streaming")
    streams = [task.remote(*inputs, chunk) for chunk in chunks if chunk]
    try:
        while streams:
            ready, _ = ray.wait(streams, num_returns=1, fetch_local=False)
            for stream in ready:
                try:
                    name, failure = ray.get(next(stream))
                except StopIteration:
                    streams.remove(stream)
                    continue
                _raise(failure)
                yield name
    finally:
        for stream in streams:
            ray.cancel(stream)


def _options(resources: WorkerResources, label: str) -> dict[str, object]:
    return {
        "name": f"align:{label}",
        "num_cpus": resources.cpus,
        "memory": None if resources.memory_gb is None else int(resources.memory_gb * (1 << 30)),
        "max_retries": TASK_RETRIES,
        "scheduling_strategy": "SPREAD",
    }


def _count_shards(
    out: Artifact,
    pivot_rows: Artifact,
    source_rows: Artifact,
    pivot: ModelConfig,
    source: ModelConfig,
    config: AlignConfig,
    names: Sequence[str],
) -> Iterator[tuple[str, Failure]]:
    """Commit which ids meet in each shard and tell its name; a retried task skips what its predecessor committed."""
    name = ""
    try:
        aligner = Aligner.of_models(pivot, source, config)
        for name in names:
            if out.unit(part_name(name)) is None:
                counts = aligner.count(pivot_rows.read_bytes(name), source_rows.read_bytes(name))
                out.commit_bytes(part_name(name), encode_counts(counts), rows=int(counts.keys.size))
            yield name, ("", "")
    except (ValueError, OSError) as error:
        where = f"{name} of {pivot_rows.url} and {source_rows.url}: " if name else ""
        yield name, _failure(error, where)


def _align_shards(
    out: Artifact,
    pivot_rows: Artifact,
    source_rows: Artifact,
    pivot: ModelConfig,
    source: ModelConfig,
    config: AlignConfig,
    names: Sequence[str],
) -> Iterator[tuple[str, Failure]]:
    """Commit each shard and tell its name; a retried task skips what its predecessor committed."""
    name = ""
    try:
        aligner = Aligner.of_models(pivot, source, config, read_counts(out, config))
        made_for = pivot_rows.manifest().inputs.get("model", "")
        for name in names:
            if out.unit(name) is None:
                shard = aligner.align(pivot_rows.read_bytes(name), source_rows.read_bytes(name))
                info: dict[str, Json] = {
                    "rows": shard.rows,
                    "rejected": len(shard.rejected),
                    "missing_pivot": shard.missing_pivot,
                    "missing_source": shard.missing_source,
                    "left_out": [asdict(row) for row in shard.rejected],
                    "coverage": shard.coverage.to_dict(),  # type: ignore[dict-item]  # numbers and lists of numbers
                }
                out.commit_bytes(name, shard.encoded(made_for), rows=shard.rows, info=info)
            yield name, ("", "")
    except (ValueError, OSError) as error:
        where = f"{name} of {pivot_rows.url} and {source_rows.url}: " if name else ""
        yield name, _failure(error, where)


def _examples(
    out: Artifact,
    pivot_rows: Artifact,
    source_rows: Artifact,
    pivot: ModelConfig,
    source: ModelConfig,
    config: AlignConfig,
    names: Sequence[str],
    total: Coverage,
) -> tuple[list[ExplainedRow], dict[str, object], Failure]:
    """A few rows in both tokenizations, from the first shards that have any, and the figures of the whole run."""
    try:
        aligner = Aligner.of_models(pivot, source, config, read_counts(out, config))
        rows: list[ExplainedRow] = []
        for name in names:
            if len(rows) >= EXAMPLES:
                break
            data = pivot_rows.read_bytes(name), source_rows.read_bytes(name)
            rows += aligner.examples(*data, None, EXAMPLES - len(rows))
        return rows, total.summary(aligner.pivot, aligner.source), ("", "")
    except (ValueError, OSError) as error:
        return [], {}, _failure(error, "")


def _check_rejected(units: Sequence[Unit], source: ModelConfig, max_rejected: float) -> None:
    rows, rejected = _count(units, "rows"), _count(units, "rejected")
    if rows and rejected <= max_rejected * (rows + rejected):
        return
    first = [f"row {row.id}: {row.reason}" for row in _left_out(units)[:REASONS_SHOWN]]
    why = f"; the first: {'; '.join(first)}" if first else ": the two teach artefacts hold no conversation in common"
    raise ValueError(
        f"{rejected} of {rows + rejected} rows cannot be aligned with the source {source.name}, more than corpus.max_rejected = {max_rejected:g} allows{why}"
    )


def _seal(
    out: Artifact,
    units: Sequence[Unit],
    rows: tuple[Artifact, Artifact],
    models: tuple[ModelConfig, ModelConfig, AlignConfig],
    resources: WorkerResources,
) -> Manifest:
    total = Coverage()
    for unit in units:
        total = total + Coverage(**unit.info["coverage"])  # type: ignore[arg-type]  # what to_dict gave
    task = ray.remote(_examples).options(**_options(resources, models[1].name))
    examples, figures, failure = ray.get(
        task.remote(out, *rows, *models, [unit.name for unit in units if unit.rows], total)
    )
    _raise(failure)
    left_out = _left_out(units)
    kept = [replace(unit, info={name: unit.info[name] for name in COUNTS}) for unit in units]
    kept.append(out.commit_bytes(EXAMPLES_UNIT, json.dumps(examples, ensure_ascii=False).encode(), rows=len(examples)))
    kept.append(out.commit_bytes(REJECTED, encode_rejected(left_out), rows=len(left_out)))
    counts = out.unit(COUNTS_UNIT)
    if counts is not None:
        kept.append(counts)
        remove_parts(out)
    return out.seal(kept, figures | {name: _count(units, name) for name in COUNTS})


def _count(units: Sequence[Unit], name: str) -> int:
    return sum(int(unit.info[name]) for unit in units)  # type: ignore[arg-type, misc]


def _left_out(units: Sequence[Unit]) -> list[Rejected]:
    return [Rejected(**row) for unit in units for row in unit.info["left_out"]]  # type: ignore[union-attr, arg-type]


def _failure(error: Exception, where: str) -> Failure:
    kind = next(kind for kind, family in FAILURES.items() if isinstance(error, family))
    return kind, f"{where}{error}"


def _raise(failure: Failure) -> None:
    kind, text = failure
    if kind:
        raise FAILURES[kind](text)
