"""The teach stage: Ray Data hands the shards of the corpus to a pool of vLLM actors, and each actor commits its shards itself.

What a shard goes through is in workers/teach_shard.py and knows no Ray. Ray Data only schedules: a shard counts once its unit is committed, so that Ray's
own retries, a killed driver and a second run are all harmless; a node that is about to be taken gets no further shard. Ray restarts dead actors without end;
the markers of workers/attempts.py bound that.
"""

import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta

import numpy as np
import ray
import ray.data
from ray.exceptions import ActorDiedError

from fusion_ray.config import EndpointConfig, EngineArgs, ModelConfig, TeachConfig, TeachResources
from fusion_ray.corpus.readers import Rejected
from fusion_ray.corpus.shards import REJECTED, encode_rejected
from fusion_ray.logprobs.served import ENDPOINT
from fusion_ray.records import Report
from fusion_ray.stages.gauges import Gauges
from fusion_ray.stages.teach_groups import died, taught_by_groups
from fusion_ray.stages.vllm_environment import vllm_environment, vllm_version
from fusion_ray.store import Artifact, Manifest, Unit
from fusion_ray.workers.api_key import read_key
from fusion_ray.workers.attempts import FOLDER as ATTEMPTS
from fusion_ray.workers.attempts import TeachError
from fusion_ray.workers.engine_sizes import merged, parallel

logger = logging.getLogger(__name__)

COUNTS = ("rows", "positions", "tokens", "bytes", "cut_rows", "cut_turns", "rejected", "quarantined", "unreached")
MISSING = ("rejected", "quarantined", "unreached")
WATCHED = ("rows", "tokens", *MISSING)
MISSING_SHOWN = 3
WINDOW_SECONDS = 300.0
# Errors that a user can mend travel from the actors as data: Ray would give back its own wrapper and their text within a traceback.
FAILURES: dict[str, type[Exception]] = {"value": ValueError, "storage": OSError, "teach": TeachError}
MAX_BLOCKS = 10_000  # a block of Ray Data is one task; past this many shards, several share a task
NO_PROGRESS_SECONDS = 3 * 3600  # a cluster that starts GPU nodes and loads large models first


def teach(
    out: Artifact,
    corpus: Artifact,
    *,
    model: ModelConfig,
    template: ModelConfig | None,
    config: TeachConfig,
    max_rejected: float,
    seed: int,
    resources: TeachResources,
    report: Report,
) -> Manifest:
    """Teacher rows of every shard of `corpus` under `model`, rendered by its own chat template or by that of `template`, and seal.

    manifest.info: COUNTS over all shards, `bits_per_byte` of the labels, `bytes_per_position` on disk, `engine`. Raises ValueError naming the model and the
    first row when more than `max_rejected` (a share) of the rows are missing, and whatever the engine's own start raises.
    """
    if out.sealed:
        return out.manifest()
    shards = [unit for unit in corpus.manifest().units if unit.name != REJECTED]
    units = out.units([unit.name for unit in shards])
    todo = [unit.name for unit in shards if unit.name not in units]
    logger.info("teach %s: %d of %d shards to do", model.name, len(todo), len(shards))
    tally = _Tally(model, sum(unit.rows for unit in shards), max_rejected)
    for unit in units.values():
        tally.add(unit)
    watch, gauges = Watch(total=len(shards), done=list(units.values())), Gauges("teach", key=out.key)
    for name, actor in _pool(out, corpus, todo, model, template, config, seed, resources):
        taught = out.unit(name)
        if taught is None:
            raise OSError(f"{out.url}/{name} was committed and is gone: the storage lost it; run again")
        units[name] = taught
        tally.add(taught)
        figures = watch.add(taught, actor, time.monotonic())
        gauges.set(figures)
        report(figures)
    return _seal(out, [units[unit.name] for unit in shards], model)


class TeachShards:
    """One actor: a Teacher that lives as long as the actor. Called by Ray Data with the names of shards."""

    def __init__(
        self,
        out: Artifact,
        corpus: Artifact,
        model: ModelConfig,
        template: ModelConfig | None,
        config: TeachConfig,
        seed: int,
        engine: EngineArgs,
        key: "ray.ObjectRef | None",
    ) -> None:
        # Here, as the driver must import neither vLLM nor torch.
        from fusion_ray.models import local_folder
        from fusion_ray.workers.teacher import Teacher

        self._out, self._corpus = out, corpus
        self._gauges = Gauges("teach_actor", key=out.key)
        self._unfit: ValueError | OSError | None = None
        try:
            self._teacher = Teacher(
                local_folder(model.path, model.revision),
                top_k=config.top_k,
                max_length=config.max_length,
                template_folder=None if template is None else local_folder(template.path, template.revision),
                dtype=model.dtype,
                trust_remote_code=model.trust_remote_code,
                seed=seed,
                engine=engine,
                name=model.name,
                endpoint=model.endpoint,
                api_key=None if key is None else str(ray.get(key)),
            )
        except (ValueError, OSError) as error:
            # Told by the first shard: a constructor's own error reaches the driver only as the text of an actor's death, after retries.
            self._unfit = error

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The name of the shard and why it was not taught: the kind of the error and its text, both empty when it was."""
        from fusion_ray.workers.teach_shard import EngineBrokenError, teach_shard

        name, started = str(batch["shard"][0]), time.monotonic()
        failed: Exception | None = self._unfit
        if failed is None:
            try:
                unit = teach_shard(self._teacher, self._corpus, self._out, name)
                seconds = max(time.monotonic() - started, 1e-9)
                rates = {f"{what}_per_second": _count(unit, what) / seconds for what in ("rows", "tokens")}
                self._gauges.set({"rows": unit.rows, **rates})
            except (ValueError, OSError, TeachError) as error:
                failed = error
            except EngineBrokenError:
                # Ray moves a task to a fresh actor for a dead process only; a raised error would come back to this broken engine.
                logger.exception("the engine is given up")
                os._exit(1)
        kind = next((kind for kind, family in FAILURES.items() if isinstance(failed, family)), "")
        told = {"kind": kind, "error": str(failed or ""), "actor": ray.get_runtime_context().get_actor_id() or ""}
        return {"shard": batch["shard"]} | {column: np.array([value]) for column, value in told.items()}


def _pool(
    out: Artifact,
    corpus: Artifact,
    todo: Sequence[str],
    model: ModelConfig,
    template: ModelConfig | None,
    config: TeachConfig,
    seed: int,
    resources: TeachResources,
) -> Iterator[tuple[str, str]]:
    """Names of shards as they are committed, each with the id of the actor that did it. Raises ValueError for settings that do not go together."""
    if not todo:
        return
    engine, key, gpus = config.engine, None, resources.gpus
    if model.endpoint is None:
        given = merged(config.engine, resources.engine)
        engine = given | parallel(gpus, given, nodes=resources.nodes)
    else:
        # By reference: what is an argument of an actor's may stand in Ray's logs and on its dashboard. An actor's node need not have the variable.
        key, gpus = _key(model.name, model.endpoint), 0
    settings = {
        "out": out,
        "corpus": corpus,
        "model": model,
        "template": template,
        "config": config,
        "seed": seed,
        "engine": engine,
        "key": key,
    }
    environment = vllm_environment(resources)
    if resources.nodes > 1 and model.endpoint is None:
        rows = taught_by_groups(
            TeachShards, settings, todo, resources=resources, environment=environment, patience=NO_PROGRESS_SECONDS
        )
    else:
        rows = _taught_by_pool(settings, todo, gpus, resources, environment)
    with contextlib.closing(rows):
        for row in rows:
            if row["kind"]:
                raise FAILURES[str(row["kind"])](str(row["error"]))
            yield str(row["shard"]), str(row["actor"])


def _taught_by_pool(
    settings: Mapping[str, object],
    todo: Sequence[str],
    gpus: float,
    resources: TeachResources,
    environment: Mapping[str, str],
) -> Generator[dict[str, object]]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    context.max_errored_blocks = 0
    context.max_consecutive_actor_init_deaths = 3
    context.execution_no_progress_timeout_s = NO_PROGRESS_SECONDS
    context.wait_for_min_actors_s = -1
    most = min(resources.max_workers, len(todo))
    dataset = ray.data.from_items(
        [{"shard": name} for name in todo], override_num_blocks=min(len(todo), MAX_BLOCKS)
    ).map_batches(
        TeachShards,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=min(resources.min_workers, most), max_size=most),
        fn_constructor_kwargs=dict(settings),
        num_cpus=resources.cpus,
        num_gpus=gpus or None,
        memory=None if resources.memory_gb is None else resources.memory_gb * 2**30,
        runtime_env={"env_vars": dict(environment)},
    )
    try:
        yield from dataset.iter_rows()
    except ActorDiedError as error:
        raise TeachError(died(error)) from error


def _key(name: str, endpoint: EndpointConfig) -> "ray.ObjectRef | None":
    """The key of the server of the model `name`. Raises ValueError where its variable is not set."""
    if endpoint.api_key_env is None:
        return None
    value = read_key(endpoint.api_key_env)
    if value is None:
        raise ValueError(
            f"`endpoint.api_key_env` of {name} is {endpoint.api_key_env}, which is not set: set it (or {endpoint.api_key_env}_FILE to a file) to the key of "
            f"{endpoint.url}, or leave api_key_env out for a server without one"
        )
    return ray.put(value)


class Watch:
    """The figures of a stage at work: counts over all shards; rates, ETA and actors over the last WINDOW_SECONDS of this run, or over the last commits of all
    actors where those take longer, so that they follow a pool that grows, shrinks and is replaced."""

    def __init__(self, *, total: int, done: Sequence[Unit]) -> None:
        self._total, self._done = total, len(done)
        self._sums = {name: sum(_count(unit, name) for unit in done) for name in WATCHED}
        self._recent: deque[tuple[float, str, int, int]] = deque()  # when, actor, rows and tokens of a commit
        self._seen: dict[str, float] = {}  # when each actor committed last
        self._longest = 0.0  # seconds between two commits of one actor

    def add(self, unit: Unit, actor: str, now: float) -> dict[str, object]:
        """What to report once `actor` has committed `unit`; `now` in seconds. Rates count from the first shard: before it, engines start."""
        self._done += 1
        for name in WATCHED:
            self._sums[name] += _count(unit, name)
        self._longest = max(self._longest, now - self._seen.get(actor, now))
        self._seen[actor] = now
        self._recent.append((now, actor, _count(unit, "rows"), _count(unit, "tokens")))
        window = max(WINDOW_SECONDS, 2 * self._longest)
        while self._recent[0][0] < now - window:
            self._recent.popleft()
        actors = len({actor for _, actor, _, _ in self._recent})
        missing = sum(self._sums[name] for name in MISSING)
        figures: dict[str, object] = {"done": self._done, "total": self._total, "unit": "shards"}
        figures |= {"queued": self._total - self._done, "actors": actors, "errors": missing, **self._sums}
        words = [f"{missing} rows missing"] if missing else []
        if len(self._recent) > 1:
            _, *since = self._recent  # what the first took is not known
            seconds = max(now - self._recent[0][0], 1e-9)
            rows = sum(commit[2] for commit in since) / seconds
            tokens = sum(commit[3] for commit in since) / seconds
            left = (self._total - self._done) * seconds / len(since)
            figures |= {"rows_per_second": rows, "tokens_per_second": tokens}
            figures |= {"tokens_per_second_of_an_actor": tokens / actors, "eta_seconds": left}
            if actors > 1:
                words.append(f"{actors} actors of {tokens / actors:,.0f} tok/s")
            if self._done < self._total:
                words.append(f"ETA {timedelta(seconds=round(left))}")
        return figures | ({"message": ", ".join(words)} if words else {})


class _Tally:
    """The rows that are missing so far. `add` raises ValueError, naming the model and the first rows, once they are too many."""

    def __init__(self, model: ModelConfig, total: int, max_rejected: float) -> None:
        self._model, self._total, self._allowed = model, total, max_rejected
        self._counted = 0
        self._first: list[str] = []

    def add(self, unit: Unit) -> None:
        self._counted += sum(_count(unit, name) for name in MISSING)
        self._first += [f"row {row.id}: {row.reason}" for row in _missing(unit)[: MISSING_SHOWN - len(self._first)]]
        if self._counted > self._allowed * self._total:
            raise ValueError(
                f"{self._counted} of {self._total} rows cannot be taught by the model {self._model.name}, more than corpus.max_rejected = "
                f"{self._allowed} allows. The first: {'; '.join(self._first)}"
            )


def _count(unit: Unit, name: str) -> int:
    return int(unit.info[name])  # type: ignore[arg-type]


def _missing(unit: Unit) -> list[Rejected]:
    return [Rejected(**row) for row in unit.info["missing"]]  # type: ignore[union-attr, arg-type]


def _seal(out: Artifact, units: Sequence[Unit], model: ModelConfig) -> Manifest:
    missing = [row for unit in units for row in _missing(unit)]
    info: dict[str, int | float | str] = {name: sum(_count(unit, name) for unit in units) for name in COUNTS}
    rows, positions, size = (sum(_count(unit, name) for unit in units) for name in ("rows", "positions", "bytes"))
    if not rows:
        why = f"; the first: row {missing[0].id}: {missing[0].reason}" if missing else ""
        raise ValueError(f"the model {model.name} can teach none of the {len(missing)} rows{why}")
    bits = float(sum(float(unit.info["bits"]) for unit in units))  # type: ignore[arg-type, misc]
    info |= {"bits_per_byte": bits / size, "bytes_per_position": sum(unit.bytes for unit in units) / positions}
    info["engine"] = vllm_version() if model.endpoint is None else ENDPOINT
    kept = [replace(unit, info={name: unit.info[name] for name in (*COUNTS, "bits")}) for unit in units]
    rejected = out.commit_bytes(REJECTED, encode_rejected(missing), rows=len(missing))
    manifest = out.seal([*kept, rejected], info)
    out.remove(ATTEMPTS)
    logger.info("teach %s: %d rows, %d positions, %.3f bits per byte", model.name, rows, positions, bits / size)
    return manifest
