"""The zoo's data files, made from the skills and a seed: the fusion corpus, and the validation and held-out conversations and questions.

Conversations are ShareGPT lines with a `category`; questions are FastChat's question file with both reference answers.
"""

import itertools
import json
import random
from collections.abc import Iterable
from pathlib import Path

from fusion_ray.zoo import catalogue
from fusion_ray.zoo.skills.item import Item, draw_items
from fusion_ray.zoo.skills.table import SKILLS

CORPUS_PER_SKILL, VALIDATION_PER_SKILL, HELDOUT_PER_SKILL = 250, 30, 50
# FastChat's own questions end at 160.
FIRST_QUESTION_ID = {"validation": 1001, "heldout": 2001}
SEEDS = {"train": 1, "validation": 2, "heldout": 3}


def items(split: str, per_skill: int) -> list[Item]:
    """`per_skill` items of each skill in MT-Bench's order, the skills' blocks one after another."""
    seed = SEEDS[split]
    return [
        item for draw in SKILLS.values() for item in itertools.islice(draw_items(draw, split, seed=seed), per_skill)
    ]


def sharegpt(item: Item, row_id: str) -> dict:
    turns = [
        {"from": speaker, "value": text}
        for question, answer in zip(item.questions, item.answers, strict=True)
        for speaker, text in (("human", question), ("gpt", answer))
    ]
    return {"id": row_id, "conversations": turns, "category": item.skill}


def question(item: Item, question_id: int) -> dict:
    return {
        "question_id": question_id,
        "category": item.skill,
        "turns": list(item.questions),
        "reference": list(item.answers),
    }


def _lines(rows: Iterable[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def files() -> dict[Path, str]:
    """The text of every data file by its path; the same text on every call."""
    corpus = items("train", CORPUS_PER_SKILL)
    random.Random(SEEDS["train"]).shuffle(corpus)
    validation, heldout = items("validation", VALIDATION_PER_SKILL), items("heldout", HELDOUT_PER_SKILL)

    def conversations(rows: list[Item], name: str) -> str:
        return _lines(sharegpt(item, f"zoo-{name}-{position:04d}") for position, item in enumerate(rows))

    def questions(rows: list[Item], split: str) -> str:
        return _lines(question(item, FIRST_QUESTION_ID[split] + position) for position, item in enumerate(rows))

    return {
        catalogue.CORPUS: conversations(corpus, "corpus"),
        catalogue.VALIDATION: conversations(validation, "validation"),
        catalogue.HELDOUT: conversations(heldout, "heldout"),
        catalogue.VALIDATION_QUESTIONS: questions(validation, "validation"),
        catalogue.QUESTIONS: questions(heldout, "heldout"),
    }


def write() -> None:
    catalogue.DATA.mkdir(exist_ok=True)
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")


def stale() -> list[Path]:
    """The data files on disk that are missing or differ from what the seeds give."""
    return [path for path, text in files().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
