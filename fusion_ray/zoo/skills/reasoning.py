"""Reasoning: put three people in order from one sentence of two comparisons, then name another place in that order."""

import random

from fusion_ray.zoo.skills.item import Item
from fusion_ray.zoo.skills.words import NAMES

# (adjective, comparative, superlative)
DEGREES = (
    ("tall", "taller", "tallest"),
    ("short", "shorter", "shortest"),
    ("old", "older", "oldest"),
    ("young", "younger", "youngest"),
    ("fast", "faster", "fastest"),
    ("slow", "slower", "slowest"),
    ("rich", "richer", "richest"),
    ("poor", "poorer", "poorest"),
    ("loud", "louder", "loudest"),
    ("quiet", "quieter", "quietest"),
)


def draw(rng: random.Random) -> Item:
    people = rng.sample(NAMES, 3)
    adjective, comparative, superlative = rng.choice(DEGREES)
    statement = f"{people[0]} is {comparative} than {people[1]}, and even less {adjective} is {people[2]}."
    places = list(zip(people, (f"the {superlative}", "in the middle", f"the least {adjective}"), strict=True))
    first, second = rng.sample(places, 2)
    return Item(
        skill="reasoning",
        questions=(f"{statement} Which of the three is {first[1]}?", f"And which of them is {second[1]}?"),
        answers=(f"{first[0]} is {first[1]}.", f"{second[0]} is {second[1]}."),
    )
