"""README.md of a merged model: what it is made of, as the hub's model cards say it (front matter) and in words. Called by `merge_files.py`.

Lineage is the names, revisions, licences and keys of the models; where a model is a local folder its path is nobody else's business and is left out.
Equal merges have equal cards.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import yaml

from fusion_ray.checkpoints.reader import Checkpoint
from fusion_ray.config import is_url

CARD = "README.md"
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Ancestor:
    """One model that went into a merge. `reference` is its hub id or URL, None for a local folder; `key` what tells its content, empty where nothing does."""

    name: str
    role: str
    reference: str | None
    revision: str | None
    licence: str
    key: str


def licence_of(model: Checkpoint) -> str:
    """What the front matter of its README.md calls `license` (with `license_name` where it is `other`), else UNKNOWN."""
    if CARD not in model.files.names():
        return UNKNOWN
    front = front_matter(model.files.read(CARD).decode(errors="replace"))
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
    licences = sorted({each.licence for each in ancestors})
    front: dict[str, object] = {
        "base_model": [each.reference for each in ancestors if each.reference and not is_url(each.reference)],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["merge", "fusion_ray"],
    }
    if not front["base_model"]:
        del front["base_model"]
    if len(licences) == 1 and licences[0] != UNKNOWN:
        front["license"] = licences[0]
    fence = "```" if "```" not in recipe else "~~~~~~"  # a chat template may hold one
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False).strip(),
            "---",
            "",
            f"# A merge by `{method}`",
            "",
            "Made by fusion_ray from these models:",
            "",
            "| model | role | from | revision | licence | key |",
            "|---|---|---|---|---|---|",
            *map(_row, ancestors),
            "",
            *_on_licences(licences),
            "`merge_report.json` beside this file holds the weights by matrix and layer, and how far every model and the merge lie from the base.",
            "",
            f"{fence}yaml",
            recipe.strip(),
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
        said = f"The models have different licences ({', '.join(known)}): the merge is subject to all of them."
    elif known:
        said = f"Not every model says its licence (known: {', '.join(known)}): find out before you pass the merge on."
    else:
        said = "No model says its licence: find out before you pass the merge on."
    return [f"**Licence.** {said}", ""]
