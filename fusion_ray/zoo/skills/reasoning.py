"""Reasoning: put three people in order from two comparisons, given in either order, then name another place in that order."""

import random

from fusion_ray.zoo.skills.item import Item
from fusion_ray.zoo.skills.words import NAMES

# (comparative, superlative of the first, superlative of the last)
RELATIONS = (
    ("taller", "tallest", "shortest"),
    ("older", "oldest", "youngest"),
    ("faster", "fastest", "slowest"),
    ("richer", "richest", "poorest"),
    ("louder", "loudest", "quietest"),
)


def draw(rng: random.Random) -> Item:
    people = rng.sample(NAMES, 3)
    more, most, least = rng.choice(RELATIONS)
    premises = [f"{people[0]} is {more} than {people[1]}.", f"{people[1]} is {more} than {people[2]}."]
    if rng.random() < 0.5:
        premises.reverse()
    places = [(people[0], f"the {most}"), (people[1], "in the middle"), (people[2], f"the {least}")]
    first, second = rng.sample(places, 2)
    return Item(
        skill="reasoning",
        questions=(f"{' '.join(premises)} Who is {first[1]}?", f"And who is {second[1]}?"),
        answers=(f"{first[0]} is {first[1]}.", f"{second[0]} is {second[1]}."),
    )
