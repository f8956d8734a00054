"""evaluate: every model's two-turn answers scored by exact match, held-out bits per byte, and optionally a judge (stages/judged.py).

Answers come through an endpoint where a job names one, else from a vLLM engine in a pool of actors; an actor imports vLLM once and then loads one model
after another (10 s against half a second on a small model). Bits per byte always come from the pool: endpoints do not give prompt log-probabilities.
"""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import fsspec
import numpy as np
import ray

from fusion_ray.config import EngineArgs, EvaluateConfig, WorkerResources
from fusion_ray.corpus.readers import Rejected, read_conversations
from fusion_ray.judging.questions import Answer, Question, dump_jsonl, make_answer, parse_jsonl, parse_questions
from fusion_ray.judging.scores import summarise, turn_scores
from fusion_ray.records import Conversation, Report
from fusion_ray.stages.judged import judge_answers
from fusion_ray.store import Artifact, Json, Manifest, Unit
from fusion_ray.workers.judge import answers as endpoint_answers

logger = logging.getLogger(__name__)

SCORES, BITS = "scores.json", "bits_per_byte.json"
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


def evaluate(
    out: Artifact,
    *,
    name: str,
    folder: str,
    endpoint: tuple[str, str] | None,
    config: EvaluateConfig,
    seed: int,
    resources: WorkerResources,
    report: Report,
    trust_remote_code: bool = False,
) -> Manifest:
    """`evaluate_many` for one model."""
    job = EvaluateJob(out, name, folder, endpoint, trust_remote_code, report)
    return evaluate_many([job], config=config, seed=seed, resources=resources)[0]


def evaluate_many(
    jobs: Sequence[EvaluateJob], *, config: EvaluateConfig, seed: int, resources: WorkerResources
) -> list[Manifest]:
    """Score every job's model and seal its artefact, in the order of `jobs`; committed units are not made again.

    Units: `model_answer/<name>.jsonl` (FastChat's), `scores.json` ({"categories": {name: {mean, low, high, n}}, "overall": {...}, "items": [{question_id,
    category, score, turns}], "scoring", "bootstrap", "seed"}), `bits_per_byte.json` ({bits_per_byte, bits, bytes, conversations}), and with `config.judge`
    for a job with an endpoint what stages/judged.py says. Raises ValueError naming `evaluate.questions` or `evaluate.heldout` for a file that cannot be used.
    """
    todo = [job for job in jobs if not job.out.sealed]
    if todo:
        started = time.monotonic()
        questions = _exact_questions(config.questions) if config.questions else []
        heldout, rejected = _heldout(config.heldout) if config.heldout else ([], 0)
        logger.info("evaluate: %d models, %d questions, %d held-out rows", len(todo), len(questions), len(heldout))
        _run_pool(todo, questions, heldout, rejected, config, seed, resources)
        for job in todo:
            manifest = _finish(job, questions, config, seed)
            logger.info("evaluate: %s overall %s", job.name, manifest.info.get("overall"))
        logger.info("evaluate: %d models in %.0f s", len(todo), time.monotonic() - started)
    return [job.out.manifest() for job in jobs]


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


def _run_pool(
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
                [] if job.endpoint or not turns or job.out.unit(_answer_file(job)) else turns,
                [] if job.out.unit(BITS) else heldout,
            )
        ).turns
        or batch.heldout
    ]
    asked = [job for job in jobs if job.endpoint and questions and not job.out.unit(_answer_file(job))]
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
            except ray.exceptions.RayActorError as error:
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
    env = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in the actor, so that one model after another may
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if not resources.gpus:
        env |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(max(1, int(resources.cpus)))}
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
            engine=dict(resources.engine),
        )
    )


def _commit_answers(job: EvaluateJob, given: Sequence[Answer]) -> None:
    job.out.commit_bytes(_answer_file(job), dump_jsonl(given).encode(), rows=len(given))


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
        job.out.commit_bytes(BITS, _json(rows), rows=len(batch.heldout))
    job.report({"done": 1, "total": 1, "unit": "models"})


def _finish(job: EvaluateJob, questions: Sequence[Question], config: EvaluateConfig, seed: int) -> Manifest:
    """Score what was answered, ask the judge, seal."""
    out, info = job.out, dict[str, Json]()
    units: list[Unit] = []
    if questions:
        given = parse_jsonl(out.read_bytes(_answer_file(job)).decode(), Answer, where=f"{out.url}/{_answer_file(job)}")
        scores = _scores(questions, given, samples=config.bootstrap, seed=seed)
        units += [_committed(out, _answer_file(job)), out.commit_bytes(SCORES, _json(scores), rows=len(given))]
        info |= {"scores": scores["categories"], "overall": scores["overall"]}
    if config.heldout:
        units.append(_committed(out, BITS))
        info["bits_per_byte"] = out.read_json(BITS)["bits_per_byte"]
    if config.judge is not None and job.endpoint is not None:
        judged, summary = judge_answers(
            out,
            name=job.name,
            endpoint=job.endpoint,
            config=config.judge,
            max_tokens=config.max_tokens,
            answer_concurrency=config.concurrency,
            bootstrap=config.bootstrap,
            seed=seed,
            report=job.report,
        )
        units += judged
        info["judge"] = summary
    if job.endpoint is not None:
        info["served_by"] = f"ray serve {version('ray')}, {_vllm()}"
    else:
        info["engine"] = _vllm()
    return out.seal(units, info)


def _scores(questions: Sequence[Question], given: Sequence[Answer], *, samples: int, seed: int) -> dict[str, Json]:
    by_id = {answer.question_id: answer.turns for answer in given}
    turns = [turn_scores(by_id[question.question_id], question.reference) for question in questions]
    values = [sum(scores) / len(scores) for scores in turns]
    categories = [question.category for question in questions]
    by_category, overall = summarise(categories, values, np.random.default_rng(seed), samples=samples)
    return {
        "scoring": "exact_match",
        "bootstrap": samples,
        "seed": seed,
        "categories": {name: dict(interval.to_dict()) for name, interval in by_category.items()},
        "overall": dict(overall.to_dict()),
        "items": [
            {"question_id": question.question_id, "category": question.category, "score": value, "turns": list(scores)}
            for question, value, scores in zip(questions, values, turns, strict=True)
        ],
    }


def _exact_questions(path: str) -> list[Question]:
    questions = parse_questions(read_text(path, "evaluate.questions"), where=f"evaluate.questions {path}")
    for question in questions:
        if len(question.reference) != len(question.turns):
            raise ValueError(
                f"evaluate.questions {path}: question {question.question_id} has {len(question.turns)} turns and {len(question.reference)} references; exact "
                "match needs one `reference` a turn. Questions for a judge belong under evaluate.judge.questions"
            )
    return questions


def _heldout(path: str) -> tuple[list[Conversation], int]:
    """The conversations and the number of malformed rows."""
    rows = list(read_conversations([path]))
    kept = [row for row in rows if isinstance(row, Conversation)]
    refused = [row for row in rows if isinstance(row, Rejected)]
    if not kept:
        why = f"row {refused[0].row}: {refused[0].reason}" if refused else "it is empty"
        raise ValueError(f"evaluate.heldout {path} holds no conversation: {why}")
    if refused:
        logger.warning(
            "evaluate: %d malformed rows of %s left out, the first: %s", len(refused), path, refused[0].reason
        )
    return kept, len(refused)


def read_text(path: str, key: str) -> str:
    """The text of a local file or URL. Raises ValueError naming the config key where it cannot be read."""
    try:
        with fsspec.open(path, "rt", encoding="utf-8", compression="infer") as file:
            return str(file.read())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{key}: cannot read {path!r}: {error}") from error


def _answer_file(job: EvaluateJob) -> str:
    return f"model_answer/{job.name}.jsonl"


def _committed(out: Artifact, name: str) -> Unit:
    unit = out.unit(name)
    assert unit is not None, name
    return unit


def _json(value: dict[str, Json]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _vllm() -> str:
    for name in ("vllm-cpu", "vllm"):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return "vllm"
