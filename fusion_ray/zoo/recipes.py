"""How each model of the zoo was trained: in earnest on its strong skills, a little on the others; the pivot briefly on everything."""

from fusion_ray.zoo.catalogue import FOURTH, PIVOT, SKILL_NAMES, SOURCES, ZooModel
from fusion_ray.zoo.train import Recipe

# A skill outside a source's strong ones is met once where a strong one is met this many times.
RARITY = 40


def _source(model: ZooModel, *, steps: int, seed: int) -> Recipe:
    mix = {skill: 1.0 if skill in model.strong else 1 / RARITY for skill in SKILL_NAMES}
    return Recipe(mix=mix, steps=steps, seed=seed)


RECIPES: dict[str, Recipe] = {
    PIVOT.name: Recipe(mix=dict.fromkeys(SKILL_NAMES, 1.0), steps=300, seed=10),
    **{source.name: _source(source, steps=2000, seed=11 + index) for index, source in enumerate(SOURCES)},
    FOURTH.name: _source(FOURTH, steps=2000, seed=14),
}
