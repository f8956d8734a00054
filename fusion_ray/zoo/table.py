"""The README's table of skills by model, from the measured `models/scores.json`."""

import json

from fusion_ray.zoo.catalogue import MODELS, SKILL_NAMES, ZOO_MODELS


def table() -> str:
    """Markdown: one row a model, exact match on the held-out items, strong skills in bold, the seconds of its training."""
    measured = json.loads((MODELS / "scores.json").read_text())
    lines = [
        "| model | family | " + " | ".join(SKILL_NAMES) + " | overall | trained, s |",
        "|---|---|" + "---|" * (len(SKILL_NAMES) + 2),
    ]
    for name, model in ZOO_MODELS.items():
        found = measured[name]
        cells = [
            f"**{found['heldout'][skill]:.2f}**" if skill in model.strong else f"{found['heldout'][skill]:.2f}"
            for skill in SKILL_NAMES
        ]
        lines.append(
            f"| `{name}` | {model.family} | {' | '.join(cells)} | {found['overall']:.2f} | {found['seconds']} |"
        )
    return "\n".join(lines)
