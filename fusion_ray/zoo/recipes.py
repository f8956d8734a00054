"""How each model of the zoo was trained: in earnest on its strong skills, a little on the others; the pivot briefly on everything."""

from fusion_ray.zoo.catalogue import FOURTH, PIVOT, SKILL_NAMES, ZOO_MODELS, ZooModel
from fusion_ray.zoo.train import Recipe

# A skill outside a source's strong ones has this share of the weight of a strong one.
RARE = 0.015
# These are learnt within a few hundred steps, so they get less.
QUICK = {"writing": 0.4, "roleplay": 0.4, "stem": 0.4}


def _source(model: ZooModel, *, steps: int, seed: int) -> Recipe:
    mix = {skill: QUICK.get(skill, 1.0) if skill in model.strong else RARE for skill in SKILL_NAMES}
    return Recipe(mix=mix, steps=steps, seed=seed)


# The pivot is to be mediocre in all skills alike, so it sees more of those that are slow to learn.
PIVOT_MIX = {
    "writing": 0.4,
    "roleplay": 0.9,
    "reasoning": 0.7,
    "math": 2.2,
    "coding": 1.7,
    "extraction": 2.2,
    "stem": 0.5,
    "humanities": 0.7,
}

RECIPES: dict[str, Recipe] = {
    PIVOT.name: Recipe(mix=PIVOT_MIX, steps=600, seed=10),
    "source_qwen3": _source(ZOO_MODELS["source_qwen3"], steps=1200, seed=11),
    "source_neox": _source(ZOO_MODELS["source_neox"], steps=800, seed=12),
    "source_mistral": _source(ZOO_MODELS["source_mistral"], steps=1400, seed=13),
    FOURTH.name: _source(FOURTH, steps=900, seed=14),
}
