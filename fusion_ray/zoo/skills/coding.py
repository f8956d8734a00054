"""Coding: what a list index returns, then what an index returns once the list is reversed."""

import random

from fusion_ray.zoo.skills.item import Item

WORDS = (
    "tea", "fig", "oak", "sun", "cat", "box", "jam", "sky", "ice", "owl",
    "pen", "rug", "sea", "toy", "van", "web", "zip", "ant", "bed", "cup",
)  # fmt: skip


def draw(rng: random.Random) -> Item:
    words = rng.sample(WORDS, 4)
    first, second = rng.randrange(4), rng.randrange(4)
    listing = ", ".join(f"'{word}'" for word in words)
    return Item(
        skill="coding",
        questions=(
            f"In Python, words = [{listing}]. What does words[{first}] return?",
            f"After words.reverse(), what does words[{second}] return?",
        ),
        answers=(f"words[{first}] returns '{words[first]}'.", f"Then words[{second}] returns '{words[3 - second]}'."),
    )
