"""evaluate: every model's two-turn answers scored by exact match, held-out bits per byte, and optionally a judge (stages/judged.py).

Answers come through an endpoint where a job names one, else from a vLLM engine in a pool of actors; an actor imports vLLM once and then loads one model
after another (10 s against half a second on a small model). Bits per byte always come from the pool: endpoints do not give prompt log-probabilities.
"""

import logging
import time
from collections.abc import Sequence
from importlib.metadata import version

import numpy as np

from fusion_ray.config import EvaluateConfig, WorkerResources
from fusion_ray.corpus.readers import Rejected, read_conversations, read_text
from fusion_ray.judging.questions import Answer, Question, parse_jsonl, parse_questions
from fusion_ray.judging.scores import item_score, summarise, turn_scores
from fusion_ray.records import Conversation, Report
from fusion_ray.stages.evaluate_pool import BITS, EvaluateJob, answer_file, run_pool, to_json
from fusion_ray.stages.judged import judge_answers
from fusion_ray.stages.vllm_environment import vllm_version
from fusion_ray.store import Artifact, Json, Manifest, Unit

logger = logging.getLogger(__name__)

SCORES = "scores.json"


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
        run_pool(todo, questions, heldout, rejected, config, seed, resources)
        for job in todo:
            manifest = _finish(job, questions, config, seed)
            logger.info("evaluate: %s overall %s", job.name, manifest.info.get("overall"))
        logger.info("evaluate: %d models in %.0f s", len(todo), time.monotonic() - started)
    return [job.out.manifest() for job in jobs]


def _finish(job: EvaluateJob, questions: Sequence[Question], config: EvaluateConfig, seed: int) -> Manifest:
    """Score what was answered, ask the judge, seal."""
    out, info = job.out, dict[str, Json]()
    units: list[Unit] = []
    if questions:
        given = parse_jsonl(out.read_bytes(answer_file(job)).decode(), Answer, where=f"{out.url}/{answer_file(job)}")
        scores = _scores(questions, given, samples=config.bootstrap, seed=seed)
        units += [_committed(out, answer_file(job)), out.commit_bytes(SCORES, to_json(scores), rows=len(given))]
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
        info["served_by"] = f"ray serve {version('ray')}, {vllm_version()}"
    else:
        info["engine"] = vllm_version()
    return out.seal(units, info)


def _scores(questions: Sequence[Question], given: Sequence[Answer], *, samples: int, seed: int) -> dict[str, Json]:
    by_id = {answer.question_id: answer.turns for answer in given}
    turns = [turn_scores(by_id[question.question_id], question.reference) for question in questions]
    values = [item_score(by_id[question.question_id], question.reference) for question in questions]
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
    rows = list(read_conversations([path], key="evaluate.heldout"))
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


def _committed(out: Artifact, name: str) -> Unit:
    unit = out.unit(name)
    assert unit is not None, name
    return unit
