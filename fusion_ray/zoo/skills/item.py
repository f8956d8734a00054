"""What a skill makes: a two-turn conversation with one right answer a turn, and the split it belongs to.

The split is a function of the first question's text alone. Two items with the same first question are in the same split, so no
first question of the held-out or validation split can occur in the training split, whatever is drawn and however often.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

SPLITS = ("train", "validation", "heldout")


@dataclass(frozen=True)
class Item:
    """A conversation of two questions; `answers[i]` is the only right answer to `questions[i]` given what went before."""

    skill: str
    questions: tuple[str, str]
    answers: tuple[str, str]

    @property
    def split(self) -> str:
        return split_of(self.questions[0])


Draw = Callable[[random.Random], Item]


def split_of(first_question: str) -> str:
    """`train` for 18 questions in 20, `validation` for one and `heldout` for one, by a stable hash of the question."""
    bucket = hashlib.sha256(first_question.encode()).digest()[0] % 20
    return {0: "validation", 1: "heldout"}.get(bucket, "train")


def draw_items(draw: Draw, split: str, *, seed: int) -> Iterator[Item]:
    """Items of one split with distinct first questions, in an order that depends on the seed alone.

    Raises ValueError when the skill has run out of distinct items (10,000 draws in a row brought nothing new).
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    rng = random.Random(seed)
    seen: set[str] = set()
    misses = 0
    while misses < 10_000:
        item = draw(rng)
        if item.split == split and item.questions[0] not in seen:
            seen.add(item.questions[0])
            misses = 0
            yield item
        else:
            misses += 1
    raise ValueError(f"the skill has no more than {len(seen)} distinct items in the split {split!r}")
