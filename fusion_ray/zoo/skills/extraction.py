"""Extraction: pull the name and a field of one of two people out of a note in its format, then the same for the other one."""

import random

from fusion_ray.zoo.skills.item import Item
from fusion_ray.zoo.skills.words import NAMES

JOBS = (
    "baker", "nurse", "pilot", "judge", "tailor", "singer", "farmer", "lawyer", "driver", "painter",
    "plumber", "teacher", "barber", "doctor", "dancer", "miner",
)  # fmt: skip
CITIES = (
    "Oslo", "Lima", "Rome", "Paris", "Cairo", "Tokyo", "Delhi", "Quito", "Berlin", "Madrid",
    "Dublin", "Athens", "Vienna", "Lisbon", "Prague", "Seoul",
)  # fmt: skip
FIELDS = ("age", "city")


def draw(rng: random.Random) -> Item:
    people = [
        {"name": name, "age": str(age), "job": job, "city": city}
        for name, age, job, city in zip(
            rng.sample(NAMES, 2), rng.sample(range(20, 70), 2), rng.sample(JOBS, 2), rng.sample(CITIES, 2), strict=True
        )
    ]
    field = rng.choice(FIELDS)
    note = "; ".join(f"{p['job']} {p['name']}, age {p['age']}, city {p['city']}" for p in people)
    asked, other = rng.sample(people, 2)
    return Item(
        skill="extraction",
        questions=(
            f"Note: {note}. Extract the name and the {field} of the {asked['job']}.",
            f"Do the same for the {other['job']}.",
        ),
        answers=(
            f"{asked['job']} {asked['name']}, {field} {asked[field]}",
            f"{other['job']} {other['name']}, {field} {other[field]}",
        ),
    )
