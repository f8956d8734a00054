"""Coding: what a line of Python shows for a string and a number, then another line over the same two."""

import random
from collections.abc import Callable

from fusion_ray.zoo.skills.item import Item

WORDS = (
    "tea", "fig", "oak", "sun", "cat", "box", "jam", "sky", "ice", "owl", "pen", "rug",
    "sea", "toy", "van", "web", "zip", "ant", "bed", "cup", "dog", "egg", "fox", "gem",
)  # fmt: skip
ON_WORDS: dict[str, Callable[[str], str]] = {
    "s": lambda word: word,
    "s.upper()": str.upper,
    "s.title()": str.title,
    "s * 2": lambda word: word * 2,
    "s + 'y'": lambda word: word + "y",
}
ON_NUMBERS: dict[str, Callable[[int], int]] = {
    "n": lambda number: number,
    "n + 1": lambda number: number + 1,
    "n - 1": lambda number: number - 1,
    "n * 2": lambda number: number * 2,
    "n * 10": lambda number: number * 10,
}


def draw(rng: random.Random) -> Item:
    word, number = rng.choice(WORDS), rng.randint(2, 30)
    lines = [(rng.choice(tuple(ON_WORDS)), rng.choice(tuple(ON_NUMBERS))) for _ in range(2)]
    shown = [f"It shows {ON_WORDS[left](word)} {ON_NUMBERS[right](number)}." for left, right in lines]
    return Item(
        skill="coding",
        questions=(
            f"In Python, s = '{word}' and n = {number}. What does print({', '.join(lines[0])}) show?",
            f"And what does print({', '.join(lines[1])}) show?",
        ),
        answers=(shown[0], shown[1]),
    )
