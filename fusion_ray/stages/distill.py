"""distill: the pivot fine-tuned to one source's target by a Ray Train worker group with DeepSpeed (design.md section 6). Called by pipeline.py.

`out` ends as a plain Hugging Face folder with `metrics.jsonl` (one line a step), `training.json` and TensorBoard's files; the figures are Ray metrics too.
While it runs, `out/_work` holds the checkpoints and the metrics; a run whose driver died goes on from the last checkpoint when the stage is called again, one
whose worker or node died does so by itself. Where it is announced that a node will be taken (a spot machine, a drained one), the training is saved at once.
Several may run side by side in threads of one driver: nothing here is global but the settings of Ray Train below.
"""

import contextlib
import hashlib
import json
import logging
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
import ray.train
import yaml
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import RayTrainCallback
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from fusion_ray.config import DistillConfig, DistillResources, ModelConfig
from fusion_ray.models import CARD, local_folder
from fusion_ray.records import Report
from fusion_ray.stages.cluster import started_here
from fusion_ray.stages.gauges import Gauges
from fusion_ray.store import UNITS, Artifact, Folder, Manifest, StoreError
from fusion_ray.workers.metrics_log import MetricsLog, last_line
from fusion_ray.workers.model_card import Ancestor, licence_in, target_card

logger = logging.getLogger(__name__)

WORK = "_work"
METRICS = "metrics.jsonl"
COMPLETE = "complete.json"  # of a checkpoint, as in workers/training_state.py, which imports torch
FACTS = "training.json"
MAX_WORKER_DEATHS = 3
POLL_SECONDS = 0.5

# Read by Ray Train's controller. An autoscaled node takes minutes to start (its default is 60 s); a finished group is noticed at the next health check.
TRAIN_ENV = {
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "1800",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}
# Where fewer workers will do, a group is begun with nodes that are there; one of them may be lost before that is known.
ELASTIC_ENV = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60"}
ALONE_ENV = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}  # the only node there is: nobody announces that it goes


@dataclass(frozen=True)
class Task:
    """What a worker is told. Picklable; paths are found again on the worker's own node."""

    out: Artifact
    rows: Artifact
    pivot: ModelConfig
    sources: tuple[ModelConfig, ...]
    config: DistillConfig
    seed: int
    threads: int
    on_gpu: bool
    max_empty: float = 1.0


def distill(
    out: Artifact,
    rows: Artifact,
    *,
    pivot: ModelConfig,
    sources: Sequence[ModelConfig] = (),
    config: DistillConfig,
    seed: int,
    resources: DistillResources,
    max_rejected: float = 0.01,
    report: Report,
) -> Manifest:
    """Train on `rows` (an align artefact; with config.fusion "none" a teach artefact of the pivot does) and seal `out`. `sources` are for its card.

    At most the share `max_rejected` of the rows may have nothing to learn from. Raises ValueError for rows, a checkpoint or a loss that do not allow it
    (workers/trainer.py), StoreError for the storage, and Ray Train's TrainingFailedError when workers die more often than MAX_WORKER_DEATHS without a
    checkpoint in between.
    """
    if out.sealed:
        return out.manifest()
    if out.unit(FACTS) is None:  # committed last: with it, everything is
        logger.info("distill %s: %d rows, %d workers", out.key, rows.manifest().rows, resources.max_workers)
        _check_pivot(out, rows)
        threads = max(1, int(resources.cpus))
        task = Task(out, rows, pivot, tuple(sources), config, seed, threads, resources.gpus > 0, max_rejected)
        _train(task, resources, report)
    names = [name.removeprefix(f"{UNITS}/").removesuffix(".json") for name in out.names(UNITS)]
    units = [unit for name in names if (unit := out.unit(name)) is not None]
    manifest = out.seal(units, out.read_json(FACTS))
    out.remove(WORK)
    logger.info("distill %s: done, %s steps", out.key, manifest.info["steps"])
    return manifest


def _check_pivot(out: Artifact, rows: Artifact) -> None:
    """Teacher rows (of the SFT control) tell in their manifest whose they are; aligned shards do so themselves (workers/rows.py)."""
    taught_by, pivot = rows.manifest().inputs.get("model"), out.inputs.get("pivot")
    if taught_by and pivot and taught_by != pivot:
        raise ValueError(
            f"{rows.url} holds the rows of the model with the fingerprint {taught_by}, and this training has the pivot {pivot}: teach with this pivot"
        )


def _train(task: Task, resources: DistillResources, report: Report) -> None:
    """Raises ValueError with what a worker refused the work for."""
    alone = not task.on_gpu and started_here()
    elastic = resources.min_workers < resources.max_workers
    settings = TRAIN_ENV | (ELASTIC_ENV if elastic else {}) | (ALONE_ENV if alone else {})
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    while True:
        before = _saved(task.out)
        try:
            error = _fit(_trainer(task, resources, alone=alone), task.out, report)
        except TrainingFailedError:
            # The deaths that Ray Train counts are those of a whole training, which may last for days on machines that come and go.
            if _saved(task.out) == before:
                raise
            logger.warning(
                "distill %s: workers died %d times, but it gets on: once more", task.out.key, MAX_WORKER_DEATHS + 1
            )
            continue
        if error:
            raise ValueError(error)
        return


def _saved(out: Artifact) -> str:
    """The newest whole checkpoint, by its step."""
    names = out.names(f"{WORK}/checkpoints")
    return max((name for name in names if name.endswith(f"/{COMPLETE}")), default="")


def _trainer(task: Task, resources: DistillResources, *, alone: bool) -> TorchTrainer:
    return (_LeanTrainer if alone else TorchTrainer)(
        _work,
        train_loop_config={"task": task},
        torch_config=TorchConfig(backend="nccl" if task.on_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=_workers(resources), use_gpu=task.on_gpu, resources_per_worker=_per_worker(resources)
        ),
        run_config=ray.train.RunConfig(
            # A new name each time: what there is to resume from is found by workers/training_state.py, not by Ray Train.
            name=f"{task.out.key[:12]}-{secrets.token_hex(4)}",
            storage_path=_ray_path(task.out, f"{WORK}/ray"),
            failure_config=ray.train.FailureConfig(max_failures=MAX_WORKER_DEATHS),
        ),
    )


class _LeanTrainer(TorchTrainer):
    """A group on a cluster of one node without Ray Train's two watchers, each of them a process that imports torch: of a start of 14 s on two cores they
    take two.

    The cleaner removes the placement group of a controller that died alone, through a dashboard that local clusters do not run.
    """

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        callbacks: list[RayTrainCallback] = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, PlacementGroupCleanerCallback)]


def _fit(trainer: TorchTrainer, out: Artifact, report: Report) -> str | None:
    """Run the trainer to its end while the newest line of metrics.jsonl is reported; returns what a worker refused the work for.

    In a thread of its own, as fit() blocks, and in the main thread would replace the process's handler of Ctrl-C.
    """
    outcome: dict[str, ray.train.Result | BaseException] = {}

    def run() -> None:
        try:
            outcome["result"] = trainer.fit()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True, name="distill-fit")
    thread.start()
    told = 0
    while thread.is_alive():
        thread.join(POLL_SECONDS)
        with contextlib.suppress(FileNotFoundError):  # being replaced at this moment
            figures = last_line(out, f"{WORK}/{METRICS}")
            if figures is not None and figures["done"] != told:
                told = int(str(figures["done"]))
                report(figures)
    failure = outcome.get("error")
    if isinstance(failure, WorkerGroupError):
        for cause in failure.worker_failures.values():
            if isinstance(cause, StoreError):
                raise cause from failure
    if isinstance(failure, BaseException):
        raise failure
    value = getattr(outcome["result"], "return_value", None)
    return str(value["error"]) if isinstance(value, dict) and "error" in value else None


def _work(train_loop_config: dict[str, Task]) -> dict[str, str]:
    """One rank, in its Ray Train worker. What the user must mend is returned, as an exception would be retried in vain."""
    task = train_loop_config["task"]
    if not task.on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported, which no driver does
    from fusion_ray.workers.tensorboard_log import TensorBoardLog
    from fusion_ray.workers.trainer import Places, train

    context = ray.train.get_context()
    out, rank = task.out, context.get_world_rank()
    # Named by the URL, as the same key may be trained for two storages at once; the scratch is this attempt's alone.
    local = Path(tempfile.gettempdir()) / "fusion_ray" / "distill" / hashlib.sha256(out.url.encode()).hexdigest()[:16]
    local.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"rank-{rank}-", dir=local))
    metrics = MetricsLog(out, f"{WORK}/{METRICS}")
    board, gauges = TensorBoardLog(out, scratch=scratch), Gauges("distill", key=out.key)

    def tell(figures: Mapping[str, object]) -> None:
        metrics.append(figures)
        board.append(figures)
        gauges.set(figures)

    source = task.rows.local_folder()
    shards = sorted(unit.name for unit in task.rows.manifest().units if unit.name.startswith("shard-"))
    places = Places(
        pivot=local_folder(task.pivot.path, task.pivot.revision),
        shards=[f"{source}/{name}" for name in shards],
        cache=str(local / "rows"),
        scratch=str(scratch),
        checkpoints=Folder(f"{out.url}/{WORK}/checkpoints"),
        export=str(scratch / "export"),
    )
    try:
        facts = train(
            places,
            task.config,
            key=out.key,
            seed=task.seed,
            pivot=out.inputs.get("pivot", ""),
            max_empty=task.max_empty,
            trust_remote_code=task.pivot.trust_remote_code,
            threads=task.threads,
            report=tell,
            notice=lambda: ray.train.get_preemption_info() is not None,
        )
    except ValueError as error:
        return {"error": str(error)}
    if rank == 0:
        metrics.close()
        board.close()
        (Path(places.export) / CARD).write_text(_card(task, places.pivot), encoding="utf-8")
        out.commit_folder(places.export)
        out.commit_bytes(METRICS, out.read_bytes(f"{WORK}/{METRICS}"), rows=int(str(facts["steps"])))
        out.commit_bytes(FACTS, (json.dumps(facts, indent=1, sort_keys=True) + "\n").encode())
    if context.get_local_rank() == 0:  # after train, no rank of this node reads there any more
        shutil.rmtree(local, ignore_errors=True)
    return {}


def _card(task: Task, pivot_folder: str) -> str:
    """The pivot's licence stands in its folder here; a source's where it is a folder that this machine sees."""

    def ancestor(model: ModelConfig, role: str, folder: str, key: str = "") -> Ancestor:
        reference = None if os.path.isdir(model.path) else model.path
        return Ancestor(model.name, role, reference, model.revision, licence_in(folder), key)

    pivot = ancestor(task.pivot, "pivot", pivot_folder, task.out.inputs.get("pivot", ""))
    sources = [ancestor(source, "source", source.path) for source in task.sources]
    return target_card(pivot, sources, yaml.safe_dump({"rows": task.rows.key, **task.out.config}))


def _workers(resources: DistillResources) -> int | tuple[int, int]:
    """Where fewer than max_workers will do, Ray Train starts with what there is, goes on with what is left, and starts again once there is room for more;
    each time from the newest checkpoint."""
    least, most = resources.min_workers, resources.max_workers
    return most if least == most else (least, most)


def _per_worker(resources: DistillResources) -> dict[str, float]:
    wanted = {"CPU": resources.cpus, "GPU": resources.gpus, "memory": (resources.memory_gb or 0) * (1 << 30)}
    return {name: value for name, value in wanted.items() if value}


def _ray_path(out: Artifact, name: str) -> str:
    return out.path(name) if out.is_local else f"{out.url}/{name}"
