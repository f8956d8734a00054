"""Prompts for single-answer grading, as in FastChat's `judge_prompts.jsonl`: which prompt a question gets and how it is filled in.

A turn is graded with `single-v1`, or with `single-math-v1` where the category needs a reference answer; the second turn with the `-multi-turn` form,
which shows the whole conversation. Text in, text out.
"""

import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fusion_ray.judging.questions import Question

REFERENCE_CATEGORIES = frozenset({"math", "reasoning", "coding", "arena-hard-200"})
SINGLE_PROMPTS = ("single-v1", "single-math-v1", "single-v1-multi-turn", "single-math-v1-multi-turn")


@dataclass(frozen=True)
class JudgePrompt:
    name: str
    type: str
    system_prompt: str
    prompt_template: str
    description: str = ""
    category: str = ""
    output_format: str = ""


def parse_prompts(text: str, *, where: str = "judge prompts") -> dict[str, JudgePrompt]:
    """Every prompt of the file by name. Raises ValueError naming the line, or the single-answer prompt that is missing."""
    prompts: dict[str, JudgePrompt] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt = JudgePrompt(**{key: row[key] for key in JudgePrompt.__dataclass_fields__ if key in row})
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{where}, line {number}: not a judge prompt with name and prompt_template: {error}"
            ) from error
        prompts[prompt.name] = prompt
    missing = [name for name in SINGLE_PROMPTS if name not in prompts]
    if missing:
        raise ValueError(
            f"{where} lacks the prompt {missing[0]!r}: single-answer grading needs {', '.join(SINGLE_PROMPTS)}"
        )
    return prompts


def needs_reference(question: Question) -> bool:
    return question.category in REFERENCE_CATEGORIES


def prompt_name(question: Question, turn: int) -> str:
    """The prompt that grades turn 1 or 2 of the question."""
    base = "single-math-v1" if needs_reference(question) else "single-v1"
    return base if turn == 1 else f"{base}-multi-turn"


def user_prompt(
    prompt: JudgePrompt, question: Question, answers: Sequence[str], *, turn: int, reference: Sequence[str] = ()
) -> str:
    """The prompt with question, answers and reference filled in.

    Raises ValueError when the template names a field that this question does not have.
    """
    fields: dict[str, str] = {f"ref_answer_{number}": text for number, text in enumerate(reference, start=1)}
    if turn == 1:
        fields |= {"question": question.turns[0], "answer": answers[0]}
    else:
        fields |= {f"question_{number}": text for number, text in enumerate(question.turns[:turn], start=1)}
        fields |= {f"answer_{number}": text for number, text in enumerate(answers[:turn], start=1)}
    try:
        return _fill(prompt.prompt_template, fields)
    except KeyError as error:
        raise ValueError(
            f"judge prompt {prompt.name!r} asks for {{{error.args[0]}}}, which question {question.question_id} ({question.category}) does not have "
            f"at turn {turn}; it has {', '.join(sorted(fields))}"
        ) from error


def _fill(template: str, fields: Mapping[str, str]) -> str:
    """`str.format` for plain field names alone: a template cannot reach into attributes or items."""
    parts: list[str] = []
    for literal, field, _spec, _conversion in string.Formatter().parse(template):
        parts.append(literal)
        if field is not None:
            parts.append(fields[field])
    return "".join(parts)
