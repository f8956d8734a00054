"""Extraction: pull two named fields out of one of three records of job, name and city, then out of another one."""

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


ORDINALS = ("first", "second", "third")


def draw(rng: random.Random) -> Item:
    jobs, names, cities = rng.sample(JOBS, 3), rng.sample(NAMES, 3), rng.sample(CITIES, 3)
    records = "; ".join(" ".join(fields) for fields in zip(jobs, names, cities, strict=True))
    one, two = rng.sample(range(3), 2)
    return Item(
        skill="extraction",
        questions=(
            f"Here are three records: {records}. Extract the name and the city of the {ORDINALS[one]} record.",
            f"Do the same for the {ORDINALS[two]} record.",
        ),
        answers=(f"name: {names[one]}, city: {cities[one]}", f"name: {names[two]}, city: {cities[two]}"),
    )
