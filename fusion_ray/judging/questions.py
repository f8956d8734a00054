"""The records of a question-and-answer evaluation, with FastChat's keys (its llm_judge files), to and from plain dicts.

`question.jsonl`, `model_answer/<model>.jsonl`, `reference_answer/<judge>.jsonl` and `model_judgment/<judge>_single.jsonl` keep exactly these shapes, so
FastChat's own `show_result` and `qa_browser` read them. Text in, dataclasses out; reading files is the caller's work (workers, stages).
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

# FastChat's sampling temperatures by category; 0.7 for a category it does not name.
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
    "arena-hard-200": 0.0,
}
DEFAULT_TEMPERATURE = 0.7

_ID_ALPHABET = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_ID_LENGTH = 22


@dataclass(frozen=True)
class Question:
    """One question of one or more turns. `reference` holds one exact or model-written answer a turn where the file has them."""

    question_id: int
    category: str
    turns: tuple[str, ...]
    reference: tuple[str, ...] = ()
    required_temperature: float | None = None

    @classmethod
    def from_dict(cls, row: Mapping[str, object]) -> "Question":
        """Raises ValueError naming the key that is missing or of another type."""
        temperature = row.get("required_temperature")
        return cls(
            question_id=_integer(row, "question_id"),
            category=_string(row, "category"),
            turns=_strings(row, "turns"),
            reference=_strings(row, "reference") if row.get("reference") else (),
            required_temperature=None if temperature is None else _number(row, "required_temperature"),
        )

    def to_dict(self) -> dict[str, object]:
        row: dict[str, object] = {
            "question_id": self.question_id,
            "category": self.category,
            "turns": list(self.turns),
        }
        if self.reference:
            row["reference"] = list(self.reference)
        if self.required_temperature is not None:
            row["required_temperature"] = self.required_temperature
        return row

    @property
    def temperature(self) -> float:
        """FastChat's: the question's own, else its category's."""
        if self.required_temperature is not None:
            return self.required_temperature
        return TEMPERATURES.get(self.category, DEFAULT_TEMPERATURE)


@dataclass(frozen=True)
class Choice:
    index: int
    turns: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """One model's answer to every turn of a question. `tstamp` is seconds since the epoch."""

    question_id: int
    answer_id: str
    model_id: str
    choices: tuple[Choice, ...]
    tstamp: float

    @classmethod
    def from_dict(cls, row: Mapping[str, object]) -> "Answer":
        """Raises ValueError naming the key that is missing or of another type."""
        choices = row.get("choices")
        if not isinstance(choices, list) or not choices or not all(isinstance(choice, dict) for choice in choices):
            raise ValueError(f"`choices` must be a list of {{index, turns}}, given {choices!r}")
        return cls(
            question_id=_integer(row, "question_id"),
            answer_id=_string(row, "answer_id"),
            model_id=_string(row, "model_id"),
            choices=tuple(Choice(_integer(choice, "index"), _strings(choice, "turns")) for choice in choices),
            tstamp=_number(row, "tstamp"),
        )

    def to_dict(self) -> dict[str, object]:
        return {
            "question_id": self.question_id,
            "answer_id": self.answer_id,
            "model_id": self.model_id,
            "choices": [{"index": choice.index, "turns": list(choice.turns)} for choice in self.choices],
            "tstamp": self.tstamp,
        }

    @property
    def turns(self) -> tuple[str, ...]:
        """The first choice, the one that is graded."""
        return self.choices[0].turns


@dataclass(frozen=True)
class Judgement:
    """One single-answer verdict. `judge` is (judge model, prompt name); `score` -1 where no rating could be read; `turn` is 1 or 2."""

    question_id: int
    model: str
    judge: tuple[str, str]
    user_prompt: str
    judgment: str
    score: float
    turn: int
    tstamp: float

    @classmethod
    def from_dict(cls, row: Mapping[str, object]) -> "Judgement":
        """Raises ValueError naming the key that is missing or of another type."""
        judge = _strings(row, "judge")
        if len(judge) != 2:
            raise ValueError(f"`judge` must be [judge model, prompt name], given {list(judge)!r}")
        return cls(
            question_id=_integer(row, "question_id"),
            model=_string(row, "model"),
            judge=(judge[0], judge[1]),
            user_prompt=_string(row, "user_prompt"),
            judgment=_string(row, "judgment"),
            score=_number(row, "score"),
            turn=_integer(row, "turn"),
            tstamp=_number(row, "tstamp"),
        )

    def to_dict(self) -> dict[str, object]:
        return {
            "question_id": self.question_id,
            "model": self.model,
            "judge": list(self.judge),
            "user_prompt": self.user_prompt,
            "judgment": self.judgment,
            "score": int(self.score) if float(self.score).is_integer() else self.score,
            "turn": self.turn,
            "tstamp": self.tstamp,
        }


def answer_id(question_id: int, model_id: str, turns: Sequence[str]) -> str:
    """An id in shortuuid's alphabet and length, made from the content, so that the same answer has the same id in every run."""
    digest = hashlib.sha256(json.dumps([question_id, model_id, list(turns)]).encode()).digest()
    number, letters = int.from_bytes(digest, "big"), []
    for _ in range(_ID_LENGTH):
        number, index = divmod(number, len(_ID_ALPHABET))
        letters.append(_ID_ALPHABET[index])
    return "".join(letters)


def make_answer(question_id: int, model_id: str, turns: Sequence[str], tstamp: float) -> Answer:
    """The answer record of one choice."""
    return Answer(
        question_id, answer_id(question_id, model_id, turns), model_id, (Choice(0, tuple(turns)),), float(tstamp)
    )


class _Record(Protocol):
    def to_dict(self) -> dict[str, object]: ...


def dump_jsonl(records: Iterable[_Record]) -> str:
    """One JSON object a line, characters beyond ASCII as they are."""
    return "".join(json.dumps(record.to_dict(), ensure_ascii=False) + "\n" for record in records)


def parse_questions(text: str, *, where: str = "question file") -> list[Question]:
    """The questions of a `question.jsonl`. Raises ValueError naming file and line for a malformed row, a repeated id or an empty file."""
    questions = parse_jsonl(text, Question, where=where)
    if not questions:
        raise ValueError(f"{where} holds no question: give a FastChat question file, one JSON object a line")
    seen: set[int] = set()
    for question in questions:
        if question.question_id in seen:
            raise ValueError(f"{where}: question_id {question.question_id} stands there twice; ids must differ")
        seen.add(question.question_id)
    return questions


RecordT = TypeVar("RecordT", Question, Answer, Judgement)


def parse_jsonl(text: str, kind: type[RecordT], *, where: str) -> list[RecordT]:
    """One record a non-empty line. Raises ValueError naming `where` and the line."""
    records: list[RecordT] = []
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would cut at U+2028 inside a JSON string
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"expected a JSON object, given {type(row).__name__}")
            records.append(kind.from_dict(row))
        except ValueError as error:
            raise ValueError(f"{where}, line {number}: {error}") from error
    return records


def _integer(row: Mapping[str, object], key: str) -> int:
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"`{key}` must be an integer, given {value!r}")
    return value


def _number(row: Mapping[str, object], key: str) -> float:
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"`{key}` must be a number, given {value!r}")
    return float(value)


def _string(row: Mapping[str, object], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise ValueError(f"`{key}` must be a string, given {value!r}")
    return value


def _strings(row: Mapping[str, object], key: str) -> tuple[str, ...]:
    value = row.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise ValueError(f"`{key}` must be a list of strings, given {value!r}")
    return tuple(value)
