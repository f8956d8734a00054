"""The MT-Bench path of evaluate: FastChat's question file in, two-turn answers from the endpoint, single-answer grading by a judge, FastChat's files out.

Below `mt_bench/` in the artefact lies what FastChat keeps in `data/mt_bench/`: `model_answer/<model>.jsonl` and `model_judgment/<judge>_single.jsonl`, so that
its `show_result` and `qa_browser` read them; and `scores.json`, by category and turn. Called by stages/evaluate.py. No Ray: the endpoint is somewhere else.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np

from fusion_ray.config import JudgeConfig
from fusion_ray.corpus.readers import read_text
from fusion_ray.judging.prompts import JudgePrompt, parse_prompts
from fusion_ray.judging.questions import Answer, Judgement, Question, dump_jsonl, parse_jsonl, parse_questions
from fusion_ray.judging.scores import summarise_ratings
from fusion_ray.judging.verdicts import ERROR_OUTPUT
from fusion_ray.records import Report
from fusion_ray.store import Artifact, Json, Unit
from fusion_ray.workers.judge import Retry, answers, judge

logger = logging.getLogger(__name__)

FOLDER = "mt_bench"
_PARTS = f"{FOLDER}/parts"
_QUESTIONS_A_PART = 16


def judge_answers(
    out: Artifact,
    *,
    name: str,
    endpoint: tuple[str, str],
    config: JudgeConfig,
    max_tokens: int,
    answer_concurrency: int,
    bootstrap: int,
    seed: int,
    report: Report,
    retry: Retry | None = None,
) -> tuple[list[Unit], dict[str, Json]]:
    """The units of `name`'s answers, judgements and scores, and a summary for the manifest; judgements already committed are kept.

    `endpoint` is (base URL, key) of the model, `config.url` the judge, whose key is in the environment variable `config.api_key_env`. `scores.json`:
    {"judge", "categories": {name: {mean, low, high, n, dropped}}, "turns": {"1": ..., "2": ...}, "overall": ..., "failed"}; ratings that cannot be read
    are dropped and counted in `dropped`, those of a judge that could not be reached among them in `failed`. The summary: {"model", "turn 1", "turn 2", "both",
    "dropped", "failed"}, mean ratings. Raises ValueError naming the key of a file that cannot be used, EndpointError when an endpoint refuses.
    """
    key = os.environ.get(config.api_key_env)
    if not key:
        raise ValueError(
            f"the judge needs a key: set the environment variable {config.api_key_env} (evaluate.judge.api_key_env), "
            f"to any text where {config.url} asks for none"
        )
    questions = parse_questions(
        read_text(config.questions, "evaluate.judge.questions"), where=f"evaluate.judge.questions {config.questions}"
    )
    prompts = parse_prompts(
        read_text(config.prompts, "evaluate.judge.prompts"), where=f"evaluate.judge.prompts {config.prompts}"
    )
    references = _references(questions, config)

    answer_unit = _answer(out, questions, name, endpoint, max_tokens, answer_concurrency, seed, report, retry)
    given = {row.question_id: row for row in _rows(out, answer_unit.name, Answer)}
    file = f"{FOLDER}/model_judgment/{config.model.replace('/', '--')}_single.jsonl"
    verdict_unit = out.unit(file)
    if verdict_unit is None:
        rows = _grade(out, questions, given, prompts, references, config, key, report, retry)
        verdict_unit = out.commit_bytes(file, dump_jsonl(rows).encode(), rows=len(rows))
        out.remove(_PARTS)
        out.remove(f"_units/{_PARTS}")
    scores = _scores(questions, _rows(out, file, Judgement), config.model, bootstrap, seed)
    score_unit = out.commit_bytes(f"{FOLDER}/scores.json", (json.dumps(scores, indent=1) + "\n").encode())
    return [answer_unit, verdict_unit, score_unit], _summary(scores)


def _answer(
    out: Artifact,
    questions: Sequence[Question],
    name: str,
    endpoint: tuple[str, str],
    max_tokens: int,
    concurrency: int,
    seed: int,
    report: Report,
    retry: Retry | None,
) -> Unit:
    file = f"{FOLDER}/model_answer/{name}.jsonl"
    unit = out.unit(file)
    if unit is not None:
        return unit
    url, key = endpoint
    rows = answers(
        url,
        key,
        name,
        questions,
        max_tokens=max_tokens,
        concurrency=concurrency,
        seed=seed,
        retry=retry,
        report=report,
    )
    return out.commit_bytes(file, dump_jsonl(rows).encode(), rows=len(rows))


def _grade(
    out: Artifact,
    questions: Sequence[Question],
    given: Mapping[int, Answer],
    prompts: Mapping[str, JudgePrompt],
    references: Mapping[int, Sequence[str]],
    config: JudgeConfig,
    key: str,
    report: Report,
    retry: Retry | None,
) -> list[Judgement]:
    """Part by part, each committed: paid judgements survive a killed run. A part whose judge could not be reached for some is asked again for those."""
    rows: list[Judgement] = []
    for number, part in enumerate(_chunks(questions, _QUESTIONS_A_PART)):
        file = f"{_PARTS}/{number:05d}.jsonl"
        kept = list(_rows(out, file, Judgement)) if out.unit(file) else []
        kept = [row for row in kept if row.judgment != ERROR_OUTPUT]
        fresh = judge(
            config.url,
            key,
            config.model,
            part,
            given,
            prompts=prompts,
            references=references,
            max_tokens=config.max_tokens,
            concurrency=config.concurrency,
            done={(row.question_id, row.turn) for row in kept},
            retry=retry,
        )
        part_rows = sorted([*kept, *fresh], key=lambda row: (row.question_id, row.turn))
        if fresh:
            out.commit_bytes(file, dump_jsonl(part_rows).encode(), rows=len(part_rows))
        rows += part_rows
        report({"done": len(rows), "total": sum(len(q.turns[:2]) for q in questions), "unit": "judgements"})
    return sorted(rows, key=lambda row: (row.question_id, row.turn))


def _references(questions: Sequence[Question], config: JudgeConfig) -> dict[int, tuple[str, ...]]:
    """FastChat's reference answers; a question's own `reference` where the file has none for it."""
    own = {question.question_id: question.reference for question in questions if question.reference}
    if config.references is None:
        return own
    where = f"evaluate.judge.references {config.references}"
    rows = parse_jsonl(read_text(config.references, "evaluate.judge.references"), Answer, where=where)
    return own | {row.question_id: row.turns for row in rows}


def _scores(
    questions: Sequence[Question], rows: Sequence[Judgement], judge_model: str, bootstrap: int, seed: int
) -> dict[str, Json]:
    category = {question.question_id: question.category for question in questions}
    table = summarise_ratings(
        [category[row.question_id] for row in rows],
        [row.turn for row in rows],
        [row.score for row in rows],
        np.random.default_rng(seed),
        samples=bootstrap,
    )
    failed = sum(row.judgment == ERROR_OUTPUT for row in rows)
    if dropped := table["overall"]["dropped"]:
        logger.warning("judge: %s of %d ratings dropped, %d of them never answered", dropped, len(rows), failed)
    return {"judge": judge_model, "bootstrap": bootstrap, "seed": seed, "failed": failed} | table  # type: ignore[return-value]  # plain JSON


def _summary(scores: Mapping[str, Json]) -> dict[str, Json]:
    turns, overall = scores["turns"], scores["overall"]
    assert isinstance(turns, dict)
    assert isinstance(overall, dict)
    summary: dict[str, Json] = {"model": scores["judge"]}
    for turn, entry in turns.items():
        assert isinstance(entry, dict)
        summary[f"turn {turn}"] = entry["mean"]
    return summary | {"both": overall["mean"], "dropped": overall["dropped"], "failed": scores["failed"]}


def _chunks(questions: Sequence[Question], size: int) -> Iterator[Sequence[Question]]:
    for start in range(0, len(questions), size):
        yield questions[start : start + size]


RowT = TypeVar("RowT", Answer, Judgement)


def _rows(out: Artifact, name: str, kind: type[RowT]) -> list[RowT]:
    return parse_jsonl(out.read_bytes(name).decode(), kind, where=f"{out.url}/{name}")
