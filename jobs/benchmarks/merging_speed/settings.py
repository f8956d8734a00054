"""The merges that are timed and the files that say them, in the YAML that mergekit and `fusion-ray merge` both read. Called by `merge.py` and its test.

Weights and densities are those of FuseChat's merge files. Arithmetic is in float32 and the output in bfloat16 on either side.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from merging_speed.models import MOVED, PIVOT


@dataclass(frozen=True)
class Setting:
    """One merge. `each` are parameters that every merged model has, `whole` those of the merge."""

    name: str
    method: str
    whole: Mapping[str, object] = field(default_factory=dict)
    each: Mapping[str, object] = field(default_factory=dict)
    base: bool = True
    most: int = len(MOVED)  # so many models are merged at most
    base_is_merged: bool = False  # mergekit lists the base of a spherical interpolation among the models


TRIMMED = {"weight": 0.2, "density": 0.6}
SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("linear", "linear", {}, {"weight": 0.2}, base=False),
        Setting("ties", "ties", {"normalize": True}, TRIMMED),
        Setting("dare", "dare_linear", {"normalize": True}, TRIMMED),
        Setting("sce", "sce", {"select_topk": 0.1}),
        Setting("sce_paper", "sce", {"select_topk": 0.1, "variant": "paper"}),
        Setting("varm", "varm"),
        Setting("task_arithmetic", "task_arithmetic", {"normalize": False}, {"weight": 0.3}),
        Setting("dare_ties", "dare_ties", {"normalize": True}, TRIMMED),
        Setting("breadcrumbs", "breadcrumbs", {}, TRIMMED | {"gamma": 0.01}),
        Setting("della", "della", {"normalize": True}, TRIMMED | {"epsilon": 0.15}),
        Setting("model_stock", "model_stock"),
        Setting("karcher", "karcher", base=False),
        Setting("multislerp", "multislerp", {}, {"weight": 0.2}, base=False),
        Setting("slerp", "slerp", {"t": 0.4}, most=1, base_is_merged=True),
    )
}


def write(setting: Setting, models: Mapping[str, Path], path: Path) -> Path:
    """The merge file of a setting over these models (name to folder); all but the pivot are merged."""
    merged = [folder for name, folder in models.items() if name != PIVOT][: setting.most]
    if setting.base_is_merged:
        merged = [models[PIVOT], *merged]
    content: dict[str, object] = {
        "merge_method": setting.method,
        "models": [
            {"model": str(folder)} | ({"parameters": dict(setting.each)} if setting.each else {}) for folder in merged
        ],
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    if setting.base:
        content["base_model"] = str(models[PIVOT])
    if setting.whole:
        content["parameters"] = dict(setting.whole)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path
