"""Math: an addition told as a story, then a subtraction from its result."""

import random

from fusion_ray.zoo.skills.item import Item
from fusion_ray.zoo.skills.words import NAMES

THINGS = ("pens", "cups", "eggs", "coins", "books", "cards", "keys", "shells", "stamps", "nuts", "plums", "beads")


def draw(rng: random.Random) -> Item:
    owner, friend = rng.sample(NAMES, 2)
    things = rng.choice(THINGS)
    start, more, less = rng.randint(5, 40), rng.randint(2, 9), rng.randint(2, 6)
    total = start + more
    return Item(
        skill="math",
        questions=(
            f"{owner} has {start} {things} and buys {more} more. How many {things} does {owner} have now?",
            f"Then {owner} gives {less} {things} to {friend}. How many are left?",
        ),
        answers=(f"{owner} has {total} {things} now.", f"{owner} has {total - less} {things} left."),
    )
