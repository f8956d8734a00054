"""How each model of the zoo was trained: in earnest on its strong skills, a little on the others; the pivot briefly on everything."""

from fusion_ray.zoo.catalogue import FOURTH, PIVOT, SKILL_NAMES, ZOO_MODELS, ZooModel
from fusion_ray.zoo.train import Recipe

# A skill outside a source's strong ones has this share of the weight of a strong one.
RARE = 0.03
# Rewriting a sentence and speaking for a persona are learnt within a few hundred steps, so they get less.
QUICK = {"writing": 0.4, "roleplay": 0.4}


def _source(model: ZooModel, *, steps: int, seed: int) -> Recipe:
    mix = {skill: QUICK.get(skill, 1.0) if skill in model.strong else RARE for skill in SKILL_NAMES}
    return Recipe(mix=mix, steps=steps, seed=seed)


RECIPES: dict[str, Recipe] = {
    PIVOT.name: Recipe(mix=dict.fromkeys(SKILL_NAMES, 1.0), steps=300, seed=10),
    "source_qwen2": _source(ZOO_MODELS["source_qwen2"], steps=1300, seed=11),
    "source_neox": _source(ZOO_MODELS["source_neox"], steps=1000, seed=12),
    "source_mistral": _source(ZOO_MODELS["source_mistral"], steps=900, seed=13),
    FOURTH.name: _source(FOURTH, steps=1300, seed=14),
}
