"""Reasoning: put three people in order from one sentence of two comparisons, then name another place in that order."""

import random

from fusion_ray.zoo.skills.item import Item
from fusion_ray.zoo.skills.words import NAMES

# (more, less, the most, the least)
RELATIONS = (
    ("taller", "shorter", "tallest", "shortest"),
    ("older", "younger", "oldest", "youngest"),
    ("faster", "slower", "fastest", "slowest"),
    ("richer", "poorer", "richest", "poorest"),
    ("louder", "quieter", "loudest", "quietest"),
)


def draw(rng: random.Random) -> Item:
    top, middle, bottom = people = rng.sample(NAMES, 3)
    more, less, most, least = rng.choice(RELATIONS)
    statement = rng.choice(
        (
            f"{top} is {more} than {middle}, who is {more} than {bottom}.",
            f"{bottom} is {less} than {middle}, who is {less} than {top}.",
        )
    )
    places = list(zip(people, (f"the {most}", "in the middle", f"the {least}"), strict=True))
    first, second = rng.sample(places, 2)
    return Item(
        skill="reasoning",
        questions=(f"{statement} Which of the three is {first[1]}?", f"And which of them is {second[1]}?"),
        answers=(f"{first[0]} is {first[1]}.", f"{second[0]} is {second[1]}."),
    )
