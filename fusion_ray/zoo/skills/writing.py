"""Writing: rewrite a sentence in the past tense, then turn that sentence into a question or its negative."""

import random

from fusion_ray.zoo.skills.item import Item

# (base form, third person, past tense, what it is done to)
VERBS = (
    ("sing", "sings", "sang", "a song"),
    ("write", "writes", "wrote", "a letter"),
    ("buy", "buys", "bought", "a lamp"),
    ("find", "finds", "found", "a coin"),
    ("eat", "eats", "ate", "an apple"),
    ("drink", "drinks", "drank", "some milk"),
    ("draw", "draws", "drew", "a map"),
    ("build", "builds", "built", "a boat"),
    ("break", "breaks", "broke", "a plate"),
    ("catch", "catches", "caught", "a fish"),
    ("sell", "sells", "sold", "a horse"),
    ("wear", "wears", "wore", "a hat"),
    ("hide", "hides", "hid", "a key"),
    ("throw", "throws", "threw", "a ball"),
    ("grow", "grows", "grew", "a rose"),
    ("ride", "rides", "rode", "a bike"),
    ("teach", "teaches", "taught", "a class"),
    ("bake", "bakes", "baked", "a cake"),
    ("paint", "paints", "painted", "a wall"),
    ("cook", "cooks", "cooked", "some soup"),
)
SUBJECTS = (
    "girl", "boy", "farmer", "doctor", "teacher", "king", "queen", "nurse", "painter", "sailor",
    "baker", "judge", "singer", "driver", "soldier", "student", "tailor", "lawyer", "miner", "poet",
)  # fmt: skip
WHEN = (
    "at noon", "at night", "in the park", "in the garden", "near the river", "at school",
    "in the rain", "after lunch", "before dinner", "by the sea", "on the hill", "at the market",
    "in the snow", "on the train", "in the barn", "at dawn", "in the kitchen", "near the church",
    "at the station", "in the tower",
)  # fmt: skip


def draw(rng: random.Random) -> Item:
    base, present, past, thing = rng.choice(VERBS)
    subject, when = rng.choice(SUBJECTS), rng.choice(WHEN)
    if rng.random() < 0.5:
        follow_up, second = "Now turn that into a question.", f"Did the {subject} {base} {thing} {when}?"
    else:
        follow_up, second = "Now make that sentence negative.", f"The {subject} did not {base} {thing} {when}."
    return Item(
        skill="writing",
        questions=(f"Rewrite this sentence in the past tense: The {subject} {present} {thing} {when}.", follow_up),
        answers=(f"The {subject} {past} {thing} {when}.", second),
    )
