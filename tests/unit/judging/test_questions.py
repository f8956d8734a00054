"""FastChat's records: keys as they stand in its files, errors that name the line."""

import json

import pytest

from fusion_ray.judging.questions import (
    Answer,
    Judgement,
    Question,
    answer_id,
    dump_jsonl,
    make_answer,
    parse_jsonl,
    parse_questions,
)

ROW = {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]}


def test_question_keeps_fastchats_keys() -> None:
    full = ROW | {"reference": ["a", "b"], "required_temperature": 0.3}
    assert Question.from_dict(ROW).to_dict() == ROW
    assert Question.from_dict(full).to_dict() == full
    assert Question.from_dict(full).temperature == 0.3


@pytest.mark.parametrize(
    ("category", "expected"),
    [("writing", 0.7), ("math", 0.0), ("stem", 0.1), ("arena-hard-200", 0.0), ("something else", 0.7)],
)
def test_temperature_by_category(category: str, expected: float) -> None:
    assert Question(1, category, ("x",)).temperature == expected


def test_a_required_temperature_of_zero_counts() -> None:
    assert Question(1, "writing", ("x",), required_temperature=0.0).temperature == 0.0


def test_answer_and_judgement_go_to_and_from_fastchats_rows() -> None:
    answer = {
        "question_id": 101,
        "answer_id": "TFomieEmmAgdeCkvmuvwbc",
        "model_id": "gpt-4",
        "choices": [{"index": 0, "turns": ["one", "two"]}],
        "tstamp": 1686286924.844282,
    }
    judgement = {
        "question_id": 101,
        "model": "m",
        "judge": ["gpt-4", "single-v1"],
        "user_prompt": "p",
        "judgment": "Rating: [[7]]",
        "score": 7,
        "turn": 1,
        "tstamp": 1.5,
    }
    assert Answer.from_dict(answer).to_dict() == answer
    assert Answer.from_dict(answer).turns == ("one", "two")
    assert Judgement.from_dict(judgement).to_dict() == judgement
    assert type(Judgement.from_dict(judgement).to_dict()["score"]) is int
    assert Judgement.from_dict(judgement | {"score": 7.5}).to_dict()["score"] == 7.5


def test_jsonl_keeps_characters_and_survives_line_separators() -> None:
    answer = make_answer(3, "m", ["naïve \u2028 line", "第二"], 2)
    text = dump_jsonl([answer, answer])
    assert "第二" in text
    assert parse_jsonl(text, Answer, where="x") == [answer, answer]
    assert isinstance(answer.to_dict()["tstamp"], float)


def test_answer_id_depends_on_content_alone() -> None:
    first = answer_id(1, "m", ["a", "b"])
    assert first == answer_id(1, "m", ("a", "b"))
    assert len(first) == 22
    assert (
        len({first, answer_id(2, "m", ["a", "b"]), answer_id(1, "n", ["a", "b"]), answer_id(1, "m", ["ab", ""])}) == 4
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no question"),
        (json.dumps(ROW) + "\n{broken", "q.jsonl, line 2"),
        (json.dumps(ROW) + "\n\n" + json.dumps(ROW), "question_id 81 stands there twice"),
        (json.dumps({**ROW, "turns": "Write."}), "line 1: `turns` must be a list of strings"),
        (json.dumps({**ROW, "question_id": "81"}), "`question_id` must be an integer, given '81'"),
        ("[1]", "expected a JSON object"),
    ],
)
def test_malformed_question_files_name_file_and_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"q\.jsonl") as error:
        parse_questions(text, where="q.jsonl")
    assert message in str(error.value)
