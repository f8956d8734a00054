"""The merge stage: the units of a merge job spread over Ray tasks. Everything that is not Ray is in workers/merge_job.py.

A task reads its models from the storage itself and commits its own shard, so nothing large crosses a process border; a killed worker's task is run again
by Ray, and a committed shard is never redone.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import ray

from fusion_ray.checkpoints.errors import MergeError
from fusion_ray.checkpoints.plan import WorkUnit
from fusion_ray.config import MergeConfig, MergeMethod, ModelConfig, WorkerResources
from fusion_ray.records import Report
from fusion_ray.store import Artifact, Manifest
from fusion_ray.workers.merge_job import run_merge
from fusion_ray.workers.merge_plan import MergeJob

logger = logging.getLogger(__name__)

TASK_RETRIES = 3  # after a worker or node died; an error of the work itself is final


def merge(
    out: Artifact,
    *,
    pivot: ModelConfig,
    targets: Mapping[str, Artifact],
    method: MergeMethod,
    config: MergeConfig,
    resources: WorkerResources,
    report: Report,
    statistics: Mapping[str, Artifact] | None = None,
) -> Manifest:
    """Merge the targets (name to sealed distill artefact, in the order of the weights) into `out`, a Hugging Face model folder, and seal it.

    `statistics` are artefacts of the targets' statistics against this pivot, by target: read where they are sealed, else measured and sealed.
    Raises MergeError for models that do not merge, before anything is written, and ValueError for parameters that the method does not take.
    """
    job = MergeJob(
        models=((pivot.name, pivot), *targets.items()),
        method=method.method,
        parameters=method.parameters,
        dtype=config.dtype,
        max_bytes_in_flight=config.max_bytes_in_flight,
        max_shard_bytes=config.max_shard_bytes,
        threads=max(1, round(resources.cpus)),
        device="cuda" if resources.gpus else "cpu",
    )
    started = time.monotonic()
    logger.info("merge %s: %d targets with %s", method.label, len(targets), method.method)
    known = statistics or {}
    manifest = run_merge(
        out,
        job,
        spread=lambda work, units: _spread(work, units, resources),
        report=report,
        statistics=lambda reference, target: known.get(target),
    )
    logger.info(
        "merge %s: %d shards, %.1f MB in %.1f s",
        method.label,
        manifest.info["shards"],
        manifest.bytes / 1e6,
        time.monotonic() - started,
    )
    return manifest


@ray.remote
def _do_unit(work: Callable[[WorkUnit], None], unit: WorkUnit) -> None:
    work(unit)


def _spread(work: Callable[[WorkUnit], None], units: Sequence[WorkUnit], resources: WorkerResources) -> Iterator[None]:
    """At most `max_workers` units at a time; the first error stops the rest before it travels."""
    task = _do_unit.options(
        name=f"merge:{type(work).__name__}",
        num_cpus=resources.cpus,
        num_gpus=resources.gpus,
        memory=None if resources.memory_gb is None else int(resources.memory_gb * 2**30),
        max_retries=TASK_RETRIES,
        retry_exceptions=False,
        scheduling_strategy="SPREAD",
    )
    shared = ray.put(work)  # holds the weights of every tensor: once in the object store, not once a task
    waiting = list(reversed(units))
    running: list[ray.ObjectRef] = []
    try:
        while waiting or running:
            while waiting and len(running) < resources.max_workers:
                running.append(task.remote(shared, waiting.pop()))
            finished, running = ray.wait(running, num_returns=1)
            ray.get(finished)
            yield None
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
        raise MergeError(
            f"a merge worker died {TASK_RETRIES + 1} times on one shard, most likely for lack of memory: lower merge.max_bytes_in_flight, or give "
            "resources.merge fewer workers or more memory_gb"
        ) from error
    finally:
        for reference in running:
            ray.cancel(reference, force=False)
        if running:
            ray.wait(running, num_returns=len(running), timeout=60)
