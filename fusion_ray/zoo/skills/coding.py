"""Coding: what a small string expression over two variables returns in Python, then another expression over the same variables."""

import random

from fusion_ray.zoo.skills.item import Item

WORDS = (
    "tea", "fig", "oak", "sun", "cat", "box", "jam", "sky", "ice", "owl", "pen", "rug",
    "sea", "toy", "van", "web", "zip", "ant", "bed", "cup", "dog", "egg", "fox", "gem",
)  # fmt: skip
PARTS = ("{}", "{}.upper()", "{}[::-1]")


def value(part: str, word: str) -> str:
    """What `part` of PARTS gives for `word`."""
    return {"{}": word, "{}.upper()": word.upper(), "{}[::-1]": word[::-1]}[part]


def expression(rng: random.Random, words: dict[str, str]) -> tuple[str, str]:
    """An expression that joins both variables by a hyphen, and the string that it returns."""
    names = rng.sample(tuple(words), 2)
    parts = rng.choices(PARTS, k=2)
    code = " + '-' + ".join(part.format(name) for part, name in zip(parts, names, strict=True))
    return code, "-".join(value(part, words[name]) for part, name in zip(parts, names, strict=True))


def draw(rng: random.Random) -> Item:
    words = dict(zip(("a", "b"), rng.sample(WORDS, 2), strict=True))
    first, second = expression(rng, words), expression(rng, words)
    return Item(
        skill="coding",
        questions=(
            f"In Python, a = '{words['a']}' and b = '{words['b']}'. What does {first[0]} return?",
            f"And what does {second[0]} return?",
        ),
        answers=(f"It returns '{first[1]}'.", f"It returns '{second[1]}'."),
    )
