"""README.md of a target or a merged model: what it is made of, as the hub's model cards say it (front matter) and in words. Called by `merge_files.py` and
`stages/distill.py`.

Lineage is the names, revisions, licences and keys of the models; where a model is a local folder its path is nobody else's business and is left out.
Equal models have equal cards.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from fusion_ray.checkpoints.reader import Checkpoint
from fusion_ray.config import is_url
from fusion_ray.models import CARD

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Ancestor:
    """One model that went into another. `reference` is its hub id or URL, None for a local folder; `key` what tells its content, empty where nothing does."""

    name: str
    role: str
    reference: str | None
    revision: str | None
    licence: str
    key: str


def licence_of(model: Checkpoint) -> str:
    """What the front matter of its README.md calls `license` (with `license_name` where it is `other`), else UNKNOWN."""
    return _licence(model.files.read(CARD)) if CARD in model.files.names() else UNKNOWN


def licence_in(folder: str) -> str:
    """Likewise of a folder on this machine; UNKNOWN where there is none."""
    card = Path(folder) / CARD
    return _licence(card.read_bytes()) if card.is_file() else UNKNOWN


def _licence(card: bytes) -> str:
    front = front_matter(card.decode(errors="replace"))
    licence, name = front.get("license"), front.get("license_name")
    if licence == "other" and name:
        licence = name
    return str(licence) if licence else UNKNOWN


def front_matter(text: str) -> Mapping[str, object]:
    """The YAML between the two lines of dashes that a card begins with; empty where there is none."""
    text = text.replace("\r\n", "\n")
    if not text.startswith("---\n"):
        return {}
    head, _, _ = text[4:].partition("\n---")
    try:
        found = yaml.safe_load(head)
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def merge_card(method: str, ancestors: Sequence[Ancestor], recipe: str) -> str:
    """`recipe` is the text of the settings, as YAML."""
    beside = "`merge_report.json` beside this file holds the weights by matrix and layer, and how far every model and the merge lie from the base."
    return _card(f"A merge by `{method}`", "merge", ancestors, ancestors, beside, recipe)


def target_card(pivot: Ancestor, sources: Sequence[Ancestor], settings: str) -> str:
    """A pivot that was trained; without sources on the text alone. `settings` as YAML."""
    title = " and ".join(each.name for each in sources)
    title = f"{pivot.name}, distilled from {title}" if sources else f"{pivot.name}, fine-tuned"
    beside = (
        "`metrics.jsonl` beside this file holds the loss and its parts step by step, `training.json` what was read."
    )
    return _card(title, "finetune", [pivot], [pivot, *sources], beside, settings)


def _card(
    title: str, relation: str, bases: Sequence[Ancestor], ancestors: Sequence[Ancestor], beside: str, settings: str
) -> str:
    licences = sorted({each.licence for each in ancestors})
    front: dict[str, object] = {
        "base_model": [each.reference for each in bases if each.reference and not is_url(each.reference)],
        "base_model_relation": relation,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["merge", "fusion_ray"] if relation == "merge" else ["fusion_ray"],
    }
    if not front["base_model"]:
        del front["base_model"]
    if len(licences) == 1 and licences[0] != UNKNOWN:
        front["license"] = licences[0]
    fence = "```" if "```" not in settings else "~~~~~~"  # a chat template may hold one
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False).strip(),
            "---",
            "",
            f"# {title}",
            "",
            "Made by fusion_ray from these models:",
            "",
            "| model | role | from | revision | licence | key |",
            "|---|---|---|---|---|---|",
            *map(_row, ancestors),
            "",
            *_on_licences(licences),
            beside,
            "",
            f"{fence}yaml",
            settings.strip(),
            fence,
            "",
        ]
    )


def _row(each: Ancestor) -> str:
    key = f"`{each.key[:12]}`" if each.key else ""
    cells = (each.name, each.role, each.reference or "a local folder", each.revision or "", each.licence, key)
    return f"| {' | '.join(cells)} |"


def _on_licences(licences: Sequence[str]) -> list[str]:
    if len(licences) == 1 and licences[0] != UNKNOWN:
        return []
    known = [licence for licence in licences if licence != UNKNOWN]
    if UNKNOWN not in licences:
        said = f"The models have different licences ({', '.join(known)}): this one is subject to all of them."
    elif known:
        said = f"Not every model says its licence (known: {', '.join(known)}): find out before you pass this one on."
    else:
        said = "No model says its licence: find out before you pass this one on."
    return [f"**Licence.** {said}", ""]
