"""What `plan` says before anything starts: room for the state of training."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fusion_ray.config import FusionConfig, parse_config
from fusion_ray.graph import build_graph
from fusion_ray.plan import ModelSize, model_size, problems, training_state

PARAMETERS = 10_000_000_000


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, object]:
    for name in ("pivot", "a"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"vocab_size": 8}))
        (folder / "chat_template.jinja").write_text("x")
        save_file({"weight": np.zeros((8, 4), np.float32)}, folder / "model.safetensors")
    (tmp_path / "corpus.jsonl").write_text("{}")
    return {
        "run": {"storage": str(tmp_path / "runs")},
        "pivot": {"path": str(tmp_path / "pivot")},
        "sources": [{"name": "a", "path": str(tmp_path / "a")}],
        "corpus": {"path": "corpus.jsonl"},
    }


def found(config: FusionConfig, *, parameters: int = PARAMETERS) -> list[str]:
    sizes = {model.name: model_size(model.path) for model in (config.pivot, *config.sources)}
    sizes[config.pivot.name] = ModelSize(parameters, 4 * parameters, 8)
    return [each for each in problems(config, build_graph(config), sizes, 0.0) if each.startswith("distill: a worker")]


def config_of(raw: dict[str, object], tmp_path: Path, *, distill: object = None, **resources: object) -> FusionConfig:
    return parse_config(raw | {"distill": distill or {}, "resources": {"distill": resources}}, folder=tmp_path)


def test_the_state_of_training_is_what_zero_leaves_of_it(raw: dict[str, object], tmp_path: Path) -> None:
    two = config_of(raw, tmp_path, max_workers=2)
    pivot = ModelSize(100, 400, 8)
    assert training_state(two, pivot) == 100 * (4 + 6)
    assert training_state(config_of(raw, tmp_path, distill={"zero_stage": 3}, max_workers=2), pivot) == 100 * 8


@pytest.mark.parametrize(("targets", "adapters"), [("all-linear", 2 * (6 + 4) + 2 * (4 + 6)), (["up"], 2 * (6 + 4))])
def test_with_lora_only_the_adapters_have_gradients_and_moments(
    raw: dict[str, object], tmp_path: Path, targets: object, adapters: int
) -> None:
    lora = {"rank": 2, "targets": targets}
    tensors = {"embed.weight": (8, 4), "x.up.weight": (6, 4), "x.down.weight": (4, 6), "x.norm.weight": (4,)}
    arrays = {name: np.zeros(shape, np.float32) for name, shape in tensors.items()}
    save_file(arrays, tmp_path / "pivot" / "model.safetensors")
    pivot = model_size(str(tmp_path / "pivot"))
    assert pivot is not None
    assert pivot.parameters == 84
    two = config_of(raw, tmp_path, distill={"lora": lora}, max_workers=2)
    assert training_state(two, pivot) == 84 * 4 + adapters * (4 + 6)
    sharded = config_of(raw, tmp_path, distill={"lora": lora, "zero_stage": 3}, max_workers=2)
    assert training_state(sharded, pivot) == 84 * 2 + adapters * 8


def test_lora_has_room_where_training_every_weight_has_none(raw: dict[str, object], tmp_path: Path) -> None:
    assert len(found(config_of(raw, tmp_path, memory_gb=64))) == 1
    assert found(config_of(raw, tmp_path, distill={"lora": {}}, memory_gb=64)) == []


def test_no_room_is_said_with_the_setting_to_change(raw: dict[str, object], tmp_path: Path) -> None:
    config = config_of(raw, tmp_path, max_workers=4, memory_gb=64)
    assert found(config) == [
        "distill: a worker holds 70.0 GB of weights, gradients and optimizer state at distill.zero_stage 2, and resources.distill.memory_gb is 64: "
        "set zero_stage to 3 and raise resources.distill.max_workers over more machines, train adapters alone (distill.lora), or take a smaller pivot"
    ]
    assert found(config, parameters=PARAMETERS // 2) == []
    assert found(config_of(raw, tmp_path, distill={"zero_stage": 3}, max_workers=4, memory_gb=64)) == []


def test_this_machine_is_asked_where_nothing_is_said(raw: dict[str, object], tmp_path: Path) -> None:
    (said,) = found(config_of(raw, tmp_path), parameters=10**13)
    assert "this machine has" in said
    assert "for each of 1 workers" in said
    assert found(config_of(raw, tmp_path), parameters=1000) == []


def test_accelerators_and_offload_are_not_judged_by_this_machine(raw: dict[str, object], tmp_path: Path) -> None:
    assert found(config_of(raw, tmp_path, gpus=1), parameters=10**13) == []
    offload = {"deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}}
    assert found(config_of(raw, tmp_path, distill=offload), parameters=10**13) == []
