"""The skills' items: disjoint splits, determinism, unique answers, and answers solved again by other means from the question's text."""

import itertools
import random
import re
from collections.abc import Callable

import pytest

from fusion_ray.zoo.catalogue import SKILL_NAMES
from fusion_ray.zoo.skills.humanities import COUNTRIES
from fusion_ray.zoo.skills.item import Item, draw_items, split_of
from fusion_ray.zoo.skills.roleplay import PERSONAS
from fusion_ray.zoo.skills.stem import ELEMENTS
from fusion_ray.zoo.skills.table import SKILLS
from fusion_ray.zoo.skills.writing import VERBS

Solver = Callable[[str, str], tuple[str, str]]


def solve_writing(first: str, second: str) -> tuple[str, str]:
    sentence = first.split(": ")[1]
    base, _, past, thing = next(verb for verb in VERBS if f" {verb[1]} {verb[3]} " in sentence)
    subject, when = re.fullmatch(rf"(The \w+) \w+ {thing} (.*)\.", sentence).groups()
    if second.endswith("question."):
        return f"{subject} {past} {thing} {when}.", f"Did {subject.lower()} {base} {thing} {when}?"
    return f"{subject} {past} {thing} {when}.", f"{subject} did not {base} {thing} {when}."


def solve_roleplay(first: str, second: str) -> tuple[str, str]:
    persona, name, gift = re.match(
        r"Play the part of a (\w+)\. Your friend (\w+) brings you (?:a )?(\w+)\.", first
    ).groups()
    greeting, call, farewell, place = PERSONAS[persona]
    return f"{greeting}, {call} {name}! Thanks for the {gift}.", f"{farewell}, {name}! I go back to {place}."


def solve_reasoning(first: str, second: str) -> tuple[str, str]:
    most, middle, least = re.match(r"(\w+) is \w+ than (\w+), and even less \w+ is (\w+)\.", first).groups()

    def answer(question: str) -> str:
        place = re.search(r"hich of (?:the three|them) is (.*)\?", question)[1]
        return f"{middle if place == 'in the middle' else least if 'least' in place else most} is {place}."

    return answer(first), answer(second)


def solve_math(first: str, second: str) -> tuple[str, str]:
    owner, things = re.match(r"(\w+) has \d+ (\w+)", first).groups()
    start, more = map(int, re.findall(r"\d+", first))
    less = int(re.search(r"\d+", second)[0])
    return f"{owner} has {start + more} {things} now.", f"{owner} has {start + more - less} {things} left."


def solve_coding(first: str, second: str) -> tuple[str, str]:
    word, number = re.search(r"s = '(\w+)' and n = (\d+)", first).groups()

    def answer(question: str) -> str:
        shown = eval(re.search(r"print(\(.*\)) show", question)[1], {"__builtins__": {}}, {"s": word, "n": int(number)})
        return f"It shows {shown[0]} {shown[1]}."

    return answer(first), answer(second)


def solve_extraction(first: str, second: str) -> tuple[str, str]:
    records = [record.split() for record in re.search(r"records: (.*)\. Extract", first)[1].split("; ")]

    def answer(question: str) -> str:
        record = records[["first", "second", "third"].index(re.search(r"(\w+) record\.", question)[1])]
        return f"name: {record[1]}, city: {record[2]}"

    return answer(first), answer(second)


def solve_stem(first: str, second: str) -> tuple[str, str]:
    three = re.search(r": (\w+), (\w+) or (\w+)\?", first).groups()
    found = (max if "highest" in first else min)(three, key=lambda name: ELEMENTS[name][1])
    return f"That is {found}.", "The symbol of {} is {} and its number is {}.".format(found, *ELEMENTS[found])


def solve_humanities(first: str, second: str) -> tuple[str, str]:
    born, home = re.search(r"comes from (\w+) and \w+ lives in (\w+)\.", first).groups()
    wanted = re.search(r"Name the (capital|continent) of the country", first)[1]
    asked, other = (born, home) if first.endswith("comes from.") else (home, born)
    return f"The {wanted} is {COUNTRIES[asked][wanted == 'continent']}.", f"They speak {COUNTRIES[other][2]} there."


SOLVERS: dict[str, Solver] = {
    "writing": solve_writing,
    "roleplay": solve_roleplay,
    "reasoning": solve_reasoning,
    "math": solve_math,
    "coding": solve_coding,
    "extraction": solve_extraction,
    "stem": solve_stem,
    "humanities": solve_humanities,
}


def some(skill: str, split: str, count: int, seed: int = 5) -> list[Item]:
    return list(itertools.islice(draw_items(SKILLS[skill], split, seed=seed), count))


def test_the_skills_are_mt_benchs_categories() -> None:
    assert tuple(SKILLS) == SKILL_NAMES == tuple(SOLVERS)


@pytest.mark.parametrize("skill", SKILL_NAMES)
def test_there_are_enough_items_and_no_split_shares_a_first_question(skill: str) -> None:
    train = {item.questions[0] for item in some(skill, "train", 5000)}
    assert len(train) == 5000
    others = [{item.questions[0] for item in some(skill, split, 60)} for split in ("validation", "heldout")]
    assert [len(questions) for questions in others] == [60, 60]
    assert not train & others[0]
    assert not train & others[1]
    assert not others[0] & others[1]


@pytest.mark.parametrize("skill", SKILL_NAMES)
def test_the_split_is_a_function_of_the_first_question_alone(skill: str) -> None:
    rng = random.Random(9)
    drawn = [SKILLS[skill](rng) for _ in range(400)]
    assert all(item.split == split_of(item.questions[0]) for item in drawn)
    assert {item.split for item in drawn} == {"train", "validation", "heldout"}
    assert all(item.split == "heldout" for item in some(skill, "heldout", 40))


@pytest.mark.parametrize("skill", SKILL_NAMES)
def test_equal_seeds_give_equal_items_and_other_seeds_others(skill: str) -> None:
    assert some(skill, "train", 50, seed=3) == some(skill, "train", 50, seed=3)
    assert some(skill, "train", 50, seed=3) != some(skill, "train", 50, seed=4)


@pytest.mark.parametrize("skill", SKILL_NAMES)
def test_an_independent_solver_gives_the_same_answers(skill: str) -> None:
    for split in ("train", "heldout"):
        for item in some(skill, split, 200):
            assert SOLVERS[skill](*item.questions) == item.answers


@pytest.mark.parametrize("skill", SKILL_NAMES)
def test_items_are_short_ascii_sentences(skill: str) -> None:
    for item in some(skill, "train", 300):
        assert item.skill == skill
        texts = [*item.questions, *item.answers]
        assert all(text.isascii() and text == text.strip() for text in texts)
        assert all(10 <= len(answer) <= 64 for answer in item.answers)
        assert 120 <= sum(map(len, texts)) <= 450


def test_an_unknown_split_and_an_exhausted_skill_are_named() -> None:
    with pytest.raises(ValueError, match="'test' is not one of train, validation, heldout"):
        next(draw_items(SKILLS["math"], "test", seed=0))
    only = Item("math", ("What is one and one?", "And one more?"), ("It is two.", "It is three."))
    with pytest.raises(ValueError, match="no more than 1 distinct items"):
        list(draw_items(lambda rng: only, only.split, seed=0))
