"""The eight skills by MT-Bench's category names, in MT-Bench's order."""

from fusion_ray.zoo.skills import coding, extraction, humanities, math, reasoning, roleplay, stem, writing
from fusion_ray.zoo.skills.item import Draw

SKILLS: dict[str, Draw] = {
    "writing": writing.draw,
    "roleplay": roleplay.draw,
    "reasoning": reasoning.draw,
    "math": math.draw,
    "coding": coding.draw,
    "extraction": extraction.draw,
    "stem": stem.draw,
    "humanities": humanities.draw,
}
