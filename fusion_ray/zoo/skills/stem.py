"""Stem: which of three elements has the highest or lowest atomic number, then that element's symbol and number."""

import random

from fusion_ray.zoo.skills.item import Item

# element: (symbol, atomic number)
ELEMENTS = {
    "hydrogen": ("H", 1),
    "helium": ("He", 2),
    "lithium": ("Li", 3),
    "carbon": ("C", 6),
    "nitrogen": ("N", 7),
    "oxygen": ("O", 8),
    "neon": ("Ne", 10),
    "sodium": ("Na", 11),
    "aluminium": ("Al", 13),
    "sulfur": ("S", 16),
    "chlorine": ("Cl", 17),
    "calcium": ("Ca", 20),
    "titanium": ("Ti", 22),
    "iron": ("Fe", 26),
    "nickel": ("Ni", 28),
    "copper": ("Cu", 29),
    "zinc": ("Zn", 30),
    "silver": ("Ag", 47),
    "tin": ("Sn", 50),
    "iodine": ("I", 53),
    "barium": ("Ba", 56),
    "gold": ("Au", 79),
    "mercury": ("Hg", 80),
    "lead": ("Pb", 82),
}


def draw(rng: random.Random) -> Item:
    names = rng.sample(tuple(ELEMENTS), 3)
    extreme = rng.choice(("highest", "lowest"))
    ranked = sorted(names, key=lambda name: ELEMENTS[name][1])
    found = ranked[-1] if extreme == "highest" else ranked[0]
    symbol, number = ELEMENTS[found]
    return Item(
        skill="stem",
        questions=(
            f"Which element has the {extreme} atomic number: {names[0]}, {names[1]} or {names[2]}?",
            "What are its chemical symbol and its atomic number?",
        ),
        answers=(
            f"That is {found}.",
            f"The symbol of {found} is {symbol} and its number is {number}.",
        ),
    )
