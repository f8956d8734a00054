"""Whole merges of model folders against the published programs' outputs and the papers' equations: every `merge` folder of the golden cases."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fusion_ray.checkpoints.plan import natural_order
from fusion_ray.config import ModelConfig
from fusion_ray.merging.methods import METHODS
from fusion_ray.store import Artifact
from fusion_ray.workers.merge_job import merge_locally
from fusion_ray.workers.merge_units import MergeJob

GOLDEN = Path(os.environ.get("FUSION_RAY_GOLDEN", Path(__file__).parents[4] / "shared" / "golden"))
TOLERANCE = 1e-6


def golden_folders() -> list[Path]:
    return [
        path for path in sorted(GOLDEN.rglob("merge")) if path.is_dir() and any(path.glob("expected_*.safetensors"))
    ]


def settings_of(expected: Path) -> tuple[str, dict[str, object], list[str]] | None:
    """(method, parameters, targets) that the name of an expected file, or the YAML beside it, says; None for a method that is not here."""
    name = expected.stem.removeprefix("expected_")
    targets = sorted((path.name for path in expected.parent.glob("target*")), key=natural_order)
    if found := re.fullmatch(r"varm_(parameter|matrix|layer|model)", name):
        return "varm", {"granularity": found[1]}, targets
    if found := re.fullmatch(r"sce_(paper|fusechat_release)_tau([\d.]+)", name):
        return "sce", {"variant": found[1], "select_topk": float(found[2])}, targets
    recipe = yaml.safe_load((expected.parent / f"{name}.yml").read_text()) if name.startswith("mergekit_") else {}
    method = recipe.get("merge_method")
    if method not in METHODS:
        return None
    targets = [model["model"] for model in recipe["models"]]
    if method == "sce":
        return "sce", {"variant": "mergekit", "select_topk": recipe["parameters"]["select_topk"]}, targets
    return method, {"weight": [model["parameters"]["weight"] for model in recipe["models"]]}, targets


def cases() -> Iterator[Path]:
    for folder in golden_folders():
        yield from (path for path in sorted(folder.glob("expected_*.safetensors")) if settings_of(path) is not None)


def merge_folders(
    folder: Path, out: Path, method: str, parameters: dict[str, object], targets: list[str]
) -> dict[str, torch.Tensor]:
    models = tuple((name, ModelConfig(name=name, path=str(folder / name))) for name in ("base", *targets))
    # Shards and blocks smaller than the tensors, so that the borders are crossed.
    job = MergeJob(models, method, parameters, dtype="float32", max_bytes_in_flight=1 << 18, max_shard_bytes=40_000)
    merge_locally(Artifact(str(out), "merge", "golden"), job, report=lambda progress: None)
    return {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.golden
@pytest.mark.skipif(not golden_folders(), reason=f"no merge folder under {GOLDEN}")
@pytest.mark.parametrize("expected", list(cases()), ids=lambda path: str(path.relative_to(GOLDEN)))
def test_equals_the_expected_tensors(expected, tmp_path):
    settings = settings_of(expected)
    assert settings is not None
    method, parameters, targets = settings
    got = merge_folders(expected.parent, tmp_path / "out", method, parameters, targets)
    want = load_file(expected)
    assert got.keys() == want.keys()
    worst = max((float((got[name] - want[name]).abs().max()), name) for name in want)
    assert worst[0] <= TOLERANCE, worst


@pytest.mark.golden
@pytest.mark.skipif(not golden_folders(), reason=f"no merge folder under {GOLDEN}")
@pytest.mark.parametrize("granularity", ["matrix", "layer", "model"])
def test_report_has_the_expected_weights(granularity, tmp_path):
    for number, folder in enumerate(golden_folders()):
        if not (folder / "varm_weights.json").exists():
            continue
        targets = sorted((path.name for path in folder.glob("target*")), key=natural_order)
        merge_folders(folder, tmp_path / str(number), "varm", {"granularity": granularity}, targets)
        report = json.loads((tmp_path / str(number) / "merge_report.json").read_text())
        expected = json.loads((folder / "varm_weights.json").read_text())[granularity]
        for name, tensor in report["tensors"].items():
            wanted = expected[name] if isinstance(expected, dict) else expected
            assert tensor["weights"] == pytest.approx(wanted, abs=1e-6), name
