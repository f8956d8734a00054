"""Extraction: pull two fields of one of two people out of a note in a fixed format, then the same for the other one."""

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
FIELDS = (("name", "city"), ("name", "age"), ("city", "age"))


def draw(rng: random.Random) -> Item:
    jobs = rng.sample(JOBS, 2)
    people = [
        {"name": name, "age": str(age), "job": job, "city": city}
        for name, age, job, city in zip(
            rng.sample(NAMES, 2), rng.sample(range(20, 70), 2), jobs, rng.sample(CITIES, 2), strict=True
        )
    ]
    wanted = rng.choice(FIELDS)
    asked, other = rng.sample(people, 2)
    note = " ".join(f"{p['name']}, aged {p['age']}, is a {p['job']} in {p['city']}." for p in people)
    return Item(
        skill="extraction",
        questions=(
            f"Note: {note} Extract the {wanted[0]} and {wanted[1]} of the {asked['job']}.",
            f"Do the same for the {other['job']}.",
        ),
        answers=(
            f"{wanted[0]}: {asked[wanted[0]]}, {wanted[1]}: {asked[wanted[1]]}",
            f"{wanted[0]}: {other[wanted[0]]}, {wanted[1]}: {other[wanted[1]]}",
        ),
    )
