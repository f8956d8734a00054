"""The shipped data files: the same bytes from the seeds, the formats of ShareGPT and FastChat, and splits that share nothing."""

import json
from collections import Counter
from pathlib import Path

from fusion_ray.zoo import catalogue, dataset
from fusion_ray.zoo.skills.item import split_of


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_seeds_give_the_shipped_bytes() -> None:
    for path, text in dataset.files().items():
        assert path.read_bytes() == text.encode(), (
            f"{path.name} is not what the seeds give: run python jobs/zoo.py --data"
        )
    assert dataset.stale() == []


def test_every_file_has_its_count_of_each_skill() -> None:
    wanted = {
        catalogue.CORPUS: dataset.CORPUS_PER_SKILL,
        catalogue.VALIDATION: dataset.VALIDATION_PER_SKILL,
        catalogue.VALIDATION_QUESTIONS: dataset.VALIDATION_PER_SKILL,
        catalogue.HELDOUT: dataset.HELDOUT_PER_SKILL,
        catalogue.QUESTIONS: dataset.HELDOUT_PER_SKILL,
    }
    for path, count in wanted.items():
        assert Counter(row["category"] for row in rows(path)) == dict.fromkeys(catalogue.SKILL_NAMES, count)


def test_conversations_are_sharegpt_and_questions_are_the_same_items() -> None:
    pairs = ((catalogue.HELDOUT, catalogue.QUESTIONS), (catalogue.VALIDATION, catalogue.VALIDATION_QUESTIONS))
    for conversations, questions in pairs:
        for chat, question in zip(rows(conversations), rows(questions), strict=True):
            assert [turn["from"] for turn in chat["conversations"]] == ["human", "gpt", "human", "gpt"]
            values = [turn["value"] for turn in chat["conversations"]]
            assert values[0::2] == question["turns"]
            assert values[1::2] == question["reference"]
            assert chat["category"] == question["category"]


def test_ids_are_unique() -> None:
    for path in (catalogue.CORPUS, catalogue.VALIDATION, catalogue.HELDOUT):
        ids = [row["id"] for row in rows(path)]
        assert len(ids) == len(set(ids))
    numbers = [
        row["question_id"] for path in (catalogue.QUESTIONS, catalogue.VALIDATION_QUESTIONS) for row in rows(path)
    ]
    assert len(numbers) == len(set(numbers))


def test_no_first_question_crosses_a_split() -> None:
    firsts = {
        path: {row["conversations"][0]["value"] for row in rows(path)}
        for path in (catalogue.CORPUS, catalogue.VALIDATION, catalogue.HELDOUT)
    }
    assert {split_of(text) for text in firsts[catalogue.CORPUS]} == {"train"}
    assert {split_of(text) for text in firsts[catalogue.VALIDATION]} == {"validation"}
    assert {split_of(text) for text in firsts[catalogue.HELDOUT]} == {"heldout"}
    assert not firsts[catalogue.CORPUS] & (firsts[catalogue.VALIDATION] | firsts[catalogue.HELDOUT])
