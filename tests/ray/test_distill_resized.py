"""The distill stage with adapters and packed lines, resumed by more workers than it began with, as a cluster that grew would. Ends with the same training."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fusion_ray.config import DistillConfig, DistillResources, ModelConfig, ResourcesConfig
from fusion_ray.stages.cluster import connected
from fusion_ray.stages.distill import distill
from fusion_ray.store import Artifact
from tests import tiny
from tests.ray import training
from tests.ray.distilling import kill_a_driver, rows_of

pytestmark = [pytest.mark.ray, pytest.mark.slow]  # three starts of a worker group: a minute


def settings() -> DistillConfig:
    """40 steps."""
    return training.config(
        epochs=10, checkpoint_every=5, learning_rate=3e-3, packing=True, lora={"rank": 4, "alpha": 8}, zero_stage=2
    )


def run(out: Artifact, work: Path, workers: int) -> tuple[list[dict[str, object]], int]:
    """Train to the end; the lines of metrics.jsonl and the first step that was reported."""
    seen: list[Mapping[str, object]] = []
    distill(
        out,
        Artifact(str(work / "rows"), "align", "rows"),
        pivot=ModelConfig(name="pivot", path=str(work / "pivot")),
        config=settings(),
        seed=7,
        max_rejected=0.1,
        resources=DistillResources(max_workers=workers),
        report=seen.append,
    )
    return [json.loads(line) for line in out.read_bytes("metrics.jsonl").splitlines()], int(str(seen[0]["done"]))


def test_adapters_on_packed_lines_go_on_with_more_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    tiny.make_tiny_model(tmp_path / "pivot", "llama", dtype="bfloat16")
    rows_of(tmp_path)
    whole, resized = (Artifact(str(tmp_path / name), "distill", "the-task") for name in ("whole", "resized"))
    kill_a_driver(resized, tmp_path, settings(), after=12, workers=1)
    with connected(ResourcesConfig(num_cpus=4, object_store_gb=0.2)):
        undisturbed, _ = run(whole, tmp_path, 1)
        grown, first = run(resized, tmp_path, 2)
    assert first > 10  # from a checkpoint of one worker
    assert [line["step"] for line in grown] == [line["step"] for line in undisturbed] == list(range(1, 41))
    for line, other in zip(grown, undisturbed, strict=True):
        assert line["sft"] == pytest.approx(other["sft"], rel=1e-3)
        assert line["fusion"] == pytest.approx(other["fusion"], rel=1e-3)
    assert undisturbed[-1]["fusion"] < 0.99 * undisturbed[0]["fusion"]  # adapters learn
    got, want, pivot = (
        load_file(Path(folder) / "model.safetensors") for folder in (resized.url, whole.url, tmp_path / "pivot")
    )
    assert got.keys() == want.keys()
    moved = [name for name in want if (want[name] != pivot[name]).any()]
    assert 0 < len(moved) < len(want)  # adapters are merged; what has none is the pivot's
    for name in want:
        assert (got[name].float() - want[name].float()).abs().max() <= 2e-2 * want[name].float().abs().max()
