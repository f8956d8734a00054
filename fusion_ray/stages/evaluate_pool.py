"""The work of evaluate: one job a model, a pool of actors that load one model after another, and endpoints asked meanwhile from this thread.

Every unit is committed as it arrives; a model whose actor died goes to a fresh one once. Called by stages/evaluate.py.
"""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import ray

from fusion_ray.config import EngineArgs, EvaluateConfig, WorkerResources
from fusion_ray.judging.questions import Answer, Question, dump_jsonl, make_answer
from fusion_ray.records import Conversation, Report
from fusion_ray.stages.vllm_environment import vllm_environment
from fusion_ray.store import Artifact, Json
from fusion_ray.workers.engine_sizes import parallel
from fusion_ray.workers.judge import answers as endpoint_answers

logger = logging.getLogger(__name__)

BITS = "bits_per_byte.json"
ACTOR_TRIES = 2


@dataclass(frozen=True)
class EvaluateJob:
    """One model to score. `endpoint` is (base URL, API key), `name` the model's id there; None answers in a batch from `folder`."""

    out: Artifact
    name: str
    folder: str
    endpoint: tuple[str, str] | None = None
    trust_remote_code: bool = False
    report: Report = lambda _: None


@dataclass(frozen=True)
class _Batch:
    """What an actor does with one model: the turns to answer, the conversations to measure; empty where a unit exists or an endpoint answers."""

    job: EvaluateJob
    turns: list[list[str]]
    heldout: list[Conversation]


class _Evaluator:
    """One actor: models come and go, vLLM is imported once."""

    def __init__(self, *, max_length: int, dtype: str, seed: int, engine: EngineArgs) -> None:
        from fusion_ray.workers.chat import ChatModel  # vLLM: in the actor, never in the driver

        self._load = partial(ChatModel, max_length=max_length, dtype=dtype, seed=seed, engine=engine)

    def run(
        self,
        name: str,
        folder: str,
        *,
        trust_remote_code: bool,
        turns: list[list[str]],
        heldout: list[Conversation],
        max_tokens: int,
    ) -> tuple[list[list[str]], tuple[float, int] | None]:
        """The answers to `turns` and (bits, bytes) over `heldout`."""
        model = self._load(folder, trust_remote_code=trust_remote_code, name=name)
        try:
            said = model.answer(turns, max_tokens=max_tokens) if turns else []
            return said, model.bits_per_byte(heldout) if heldout else None
        finally:
            model.close()


def run_pool(
    jobs: Sequence[EvaluateJob],
    questions: Sequence[Question],
    heldout: list[Conversation],
    rejected: int,
    config: EvaluateConfig,
    seed: int,
    resources: WorkerResources,
) -> None:
    """Batches run in the actors while this thread asks the endpoints; every unit is committed as it arrives."""
    turns = [list(question.turns) for question in questions]
    waiting = [
        batch
        for job in jobs
        if (
            batch := _Batch(
                job,
                [] if job.endpoint or not turns or job.out.unit(answer_file(job)) else turns,
                [] if job.out.unit(BITS) else heldout,
            )
        ).turns
        or batch.heldout
    ]
    asked = [job for job in jobs if job.endpoint and questions and not job.out.unit(answer_file(job))]
    pool = [_actor(config, seed, resources) for _ in range(min(resources.max_workers, len(waiting)))]
    running: dict[ray.ObjectRef, tuple[_Batch, ray.actor.ActorHandle, int]] = {}

    def submit(batch: _Batch, actor: ray.actor.ActorHandle, tries: int) -> None:
        job = batch.job
        reference = actor.run.remote(
            job.name,
            job.folder,
            trust_remote_code=job.trust_remote_code,
            turns=batch.turns,
            heldout=batch.heldout,
            max_tokens=config.max_tokens,
        )
        running[reference] = (batch, actor, tries)
        job.report({"done": 0, "total": 1, "unit": "models"})

    try:
        for actor in pool:
            submit(waiting.pop(0), actor, 1)
        for job in asked:
            assert job.endpoint is not None
            url, key = job.endpoint
            said = endpoint_answers(
                url,
                key,
                job.name,
                questions,
                max_tokens=config.max_tokens,
                concurrency=config.concurrency,
                temperature=0.0,
                report=job.report,
            )
            _commit_answers(job, said)
        while running:
            (ready,), _ = ray.wait(list(running), num_returns=1)
            batch, actor, tries = running.pop(ready)
            try:
                said_turns, measured = ray.get(ready)
            except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
                if tries == ACTOR_TRIES:
                    raise RuntimeError(
                        f"the engine of {batch.job.name!r} died {tries} times while it was evaluated (out of memory? see resources.evaluate): {error}"
                    ) from error
                logger.warning("evaluate: the actor with %s died and is replaced: %s", batch.job.name, error)
                submit(batch, _actor(config, seed, resources), tries + 1)
                continue
            _commit_batch(batch, questions, said_turns, measured, rejected)
            if waiting:
                submit(waiting.pop(0), actor, 1)
            else:
                ray.kill(actor)
    finally:
        for _, actor, _ in running.values():
            ray.kill(actor)


def _actor(config: EvaluateConfig, seed: int, resources: WorkerResources) -> "ray.actor.ActorHandle":
    env = vllm_environment(resources) | {"VLLM_LOGGING_LEVEL": "WARNING"}
    options: dict[str, object] = {
        "num_cpus": resources.cpus,
        "num_gpus": resources.gpus,
        "runtime_env": {"env_vars": env},
    }
    if resources.memory_gb is not None:
        options["memory"] = int(resources.memory_gb * (1 << 30))
    # vLLM's CPU kernels want float32; the endpoint serves it too, so that the two ways of answering agree.
    return (
        ray.remote(_Evaluator)
        .options(**options)
        .remote(
            max_length=config.max_length,
            dtype="auto" if resources.gpus else "float32",
            seed=seed,
            engine=resources.engine | parallel(resources.gpus, resources.engine, key="resources.evaluate"),
        )
    )


def _commit_answers(job: EvaluateJob, given: Sequence[Answer]) -> None:
    job.out.commit_bytes(answer_file(job), dump_jsonl(given).encode(), rows=len(given))


def _commit_batch(
    batch: _Batch,
    questions: Sequence[Question],
    said: list[list[str]],
    measured: tuple[float, int] | None,
    rejected: int,
) -> None:
    job = batch.job
    if batch.turns:
        now = time.time()
        pairs = zip(questions, said, strict=True)
        _commit_answers(job, [make_answer(question.question_id, job.name, turns, now) for question, turns in pairs])
    if measured is not None:
        bits, count = measured
        if not count:
            raise ValueError(f"evaluate.heldout: no assistant byte of it could be measured under {job.name!r}")
        rows: dict[str, Json] = {
            "bits_per_byte": bits / count,
            "bits": bits,
            "bytes": count,
            "conversations": len(batch.heldout),
            "rejected": rejected,
        }
        job.out.commit_bytes(BITS, to_json(rows), rows=len(batch.heldout))
    job.report({"done": 1, "total": 1, "unit": "models"})


def answer_file(job: EvaluateJob) -> str:
    return f"model_answer/{job.name}.jsonl"


def to_json(value: dict[str, Json]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
