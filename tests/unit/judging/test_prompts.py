"""Which prompt grades which question, and how it is filled in."""

import json

import pytest

from fusion_ray.judging.prompts import SINGLE_PROMPTS, JudgePrompt, parse_prompts, prompt_name, user_prompt
from fusion_ray.judging.questions import Question

WRITING = Question(81, "writing", ("Write.", "Again."))
MATH = Question(111, "math", ("1+1?", "Twice that?"))


def prompt(template: str, name: str = "p") -> JudgePrompt:
    return JudgePrompt(name, "single", "system", template)


def test_prompt_names_by_category_and_turn() -> None:
    assert [prompt_name(WRITING, turn) for turn in (1, 2)] == ["single-v1", "single-v1-multi-turn"]
    assert [prompt_name(MATH, turn) for turn in (1, 2)] == ["single-math-v1", "single-math-v1-multi-turn"]
    for category in ("reasoning", "coding", "arena-hard-200"):
        assert prompt_name(Question(1, category, ("x",)), 1) == "single-math-v1"
    for category in ("roleplay", "extraction", "stem", "humanities"):
        assert prompt_name(Question(1, category, ("x",)), 1) == "single-v1"


def test_first_turn_shows_question_answer_and_reference() -> None:
    text = user_prompt(
        prompt("{question}|{answer}|{ref_answer_1}"), MATH, ["2", "4"], turn=1, reference=["two", "four"]
    )
    assert text == "1+1?|2|two"


def test_second_turn_shows_the_whole_conversation() -> None:
    template = "{question_1}|{ref_answer_1}|{answer_1}|{question_2}|{ref_answer_2}|{answer_2}"
    text = user_prompt(prompt(template), MATH, ["2", "4"], turn=2, reference=["two", "four"])
    assert text == "1+1?|two|2|Twice that?|four|4"


def test_braces_in_an_answer_are_left_alone() -> None:
    assert user_prompt(prompt("{answer}"), WRITING, ["{question} {{x}}"], turn=1) == "{question} {{x}}"


@pytest.mark.parametrize("field", ["ref_answer_1", "answer.__class__", "answer[0]"])
def test_a_field_that_is_not_there_is_an_error_naming_it(field: str) -> None:
    with pytest.raises(ValueError, match="question 81") as error:
        user_prompt(prompt("{" + field + "}"), WRITING, ["a", "b"], turn=1)
    assert field in str(error.value)


def test_parse_prompts_wants_the_four_single_prompts() -> None:
    rows = [
        {"name": name, "type": "single", "system_prompt": "s", "prompt_template": "t", "extra": 1}
        for name in SINGLE_PROMPTS
    ]
    assert set(parse_prompts("\n".join(map(json.dumps, rows)))) == set(SINGLE_PROMPTS)
    with pytest.raises(ValueError, match="lacks the prompt 'single-math-v1'"):
        parse_prompts("\n".join(json.dumps(row) for row in rows if row["name"] != "single-math-v1"))
    with pytest.raises(ValueError, match="line 1"):
        parse_prompts('{"name": "single-v1"}')
