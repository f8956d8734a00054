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
from fusion_ray.merge_command import merge_file
from tests.reference import merging as oracle
from tests.unit.merging.test_oracles_golden import AT_MOST_AT_A_THRESHOLD, case_of, load

GOLDEN = Path(os.environ.get("FUSION_RAY_GOLDEN", Path(__file__).parents[4] / "shared" / "golden"))
TOLERANCE = 1e-6


def golden_folders() -> list[Path]:
    return [
        path for path in sorted(GOLDEN.rglob("merge")) if path.is_dir() and any(path.glob("expected_*.safetensors"))
    ]


def targets_of(folder: Path) -> list[str]:
    return sorted((path.name for path in folder.glob("target*")), key=natural_order)


def recipe_of(expected: Path, folder: Path) -> Path:
    """The merge file of an expected file: the one beside it, or one written here from the name (varm_<granularity>, sce_<variant>_tau<select_topk>)."""
    name = expected.stem.removeprefix("expected_")
    beside = expected.with_name(f"{name}.yml")
    if beside.exists():
        return beside
    if found := re.fullmatch(r"varm_(parameter|matrix|layer|model)", name):
        content: dict[str, object] = {"merge_method": "varm", "parameters": {"granularity": found[1]}}
    else:
        found = re.fullmatch(r"sce_(paper|fusechat_release)_tau([0-9.]+)", name)
        assert found, f"{expected} is of no known method: a golden case that nothing would compare"
        content = {"merge_method": "sce", "parameters": {"variant": found[1], "select_topk": float(found[2])}}
    models = [{"model": str(expected.parent / target)} for target in targets_of(expected.parent)]
    content |= {"models": models, "base_model": str(expected.parent / "base"), "dtype": "float32"}
    folder.mkdir(exist_ok=True)
    (folder / "merge.yml").write_text(yaml.safe_dump(content))
    return folder / "merge.yml"


def cases() -> Iterator[Path]:
    for folder in golden_folders():
        yield from sorted(folder.glob("expected_*.safetensors"))


def merge_golden(expected: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    # Shards and blocks smaller than the tensors, so that the borders are crossed.
    merge_file(
        recipe_of(expected, tmp_path / "recipe"),
        tmp_path / "out",
        max_bytes_in_flight=1 << 20,
        max_shard_bytes=40_000,
        threads=2,
        overwrite=True,
        report=lambda progress: None,
    )
    files = (tmp_path / "out").glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.golden
@pytest.mark.skipif(not golden_folders(), reason=f"no merge folder under {GOLDEN}")
@pytest.mark.parametrize("expected", list(cases()), ids=lambda path: str(path.relative_to(GOLDEN)))
def test_equals_the_expected_tensors(expected, tmp_path, monkeypatch):
    monkeypatch.setenv("FUSION_RAY_CACHE", str(tmp_path / "cache"))
    case = case_of(expected)  # skips a file that says no settings
    if case.method in oracle.RANDOM:
        pytest.skip(f"{case.method} draws elements at random and the file does not say which")
    got, want = merge_golden(expected, tmp_path), load_file(expected)
    assert got.keys() == want.keys()
    base = load(expected.parent / case.base) if case.base else None
    targets = [load(expected.parent / name) for name in case.targets]
    for name, tensor in want.items():
        wrong = ((got[name] - tensor).abs() > TOLERANCE).numpy()
        if wrong.any() and base is not None:
            # Which of two equal elements is selected at a threshold is not said by the file.
            excused = oracle.at_a_threshold(
                lambda pivot, moved: oracle.merge(case.method, pivot, moved, **case.parameters),
                base[name],
                [target[name] for target in targets],
            )
            assert excused.mean() <= AT_MOST_AT_A_THRESHOLD, (name, "hardly any position is decided")
            wrong &= ~excused
        assert not wrong.any(), (name, int(wrong.sum()), float((got[name] - tensor).abs().max()))


@pytest.mark.golden
@pytest.mark.skipif(not golden_folders(), reason=f"no merge folder under {GOLDEN}")
@pytest.mark.parametrize("granularity", ["matrix", "layer", "model"])
def test_report_has_the_expected_weights(granularity, tmp_path, monkeypatch):
    monkeypatch.setenv("FUSION_RAY_CACHE", str(tmp_path / "cache"))
    for folder in golden_folders():
        if (
            not (folder / "varm_weights.json").exists()
            or not (folder / f"expected_varm_{granularity}.safetensors").exists()
        ):
            continue
        merge_golden(folder / f"expected_varm_{granularity}.safetensors", tmp_path)
        report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
        expected = json.loads((folder / "varm_weights.json").read_text())[granularity]
        for name, tensor in report["tensors"].items():
            wanted = expected[name] if isinstance(expected, dict) else expected
            assert tensor["weights"] == pytest.approx(wanted, abs=1e-6), name
