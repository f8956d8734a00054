"""What `plan` says before anything starts: room for the state of training."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fusion_ray import plan
from fusion_ray.config import FusionConfig, parse_config
from fusion_ray.graph import build_graph
from fusion_ray.plan import ModelSize, TrainingState, estimate, model_size, problems, training_state

PARAMETERS = 10_000_000_000
GIB = 1 << 30
TO_CPU = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name in ("pivot", "a"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"vocab_size": 8}))
        (folder / "chat_template.jinja").write_text("x")
        (folder / "tokenizer.json").write_text("{}")
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


@pytest.mark.parametrize(
    ("stage", "precision", "state"),
    [
        (1, "bfloat16", TrainingState(200, 200, 600)),
        (2, "bfloat16", TrainingState(200, 200, 600)),
        (3, "bfloat16", TrainingState(100, 200, 600)),
        (1, "float32", TrainingState(400, 400, 600)),
        (2, "float32", TrainingState(400, 200, 600)),
        (3, "float32", TrainingState(200, 200, 400)),  # the weights are the master weights
    ],
)
def test_the_state_of_training_is_what_zero_leaves_of_it(
    raw: dict[str, object], tmp_path: Path, stage: int, precision: str, state: TrainingState
) -> None:
    config = config_of(raw, tmp_path, distill={"zero_stage": stage, "precision": precision}, max_workers=2)
    assert training_state(config, ModelSize(100, 400, 8)) == state


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
    assert training_state(two, pivot) == TrainingState((84 + adapters) * 2, adapters * 2, adapters * 6)
    sharded = config_of(raw, tmp_path, distill={"lora": lora, "zero_stage": 3}, max_workers=2)
    assert training_state(sharded, pivot) == TrainingState(84 + adapters, adapters * 2, adapters * 6)


def test_lora_has_room_where_training_every_weight_has_none(raw: dict[str, object], tmp_path: Path) -> None:
    assert len(found(config_of(raw, tmp_path, memory_gb=64))) == 1
    assert found(config_of(raw, tmp_path, distill={"lora": {}}, memory_gb=64)) == []


def test_no_room_is_said_with_the_setting_to_change(raw: dict[str, object], tmp_path: Path) -> None:
    assert found(config_of(raw, tmp_path, max_workers=4, memory_gb=48)) == [
        "distill: a worker holds 60.0 GB of the state of training (weights, gradients, optimizer) at distill.zero_stage 2, "
        "and resources.distill.memory_gb is 48: set distill.zero_stage to 3, raise resources.distill.max_workers from 4, "
        "train adapters alone (distill.lora), or take a smaller pivot"
    ]
    assert found(config_of(raw, tmp_path, max_workers=4, memory_gb=48), parameters=PARAMETERS // 2) == []
    assert found(config_of(raw, tmp_path, distill={"zero_stage": 3}, max_workers=4, memory_gb=48)) == []


ZERO, WORKERS, OFFLOAD, LORA = "zero_stage to 3", "raise resources", "offload_optimizer to {device: cpu}", "lora"


@pytest.mark.parametrize(
    ("distill", "workers", "advised"),
    [
        ({"zero_stage": 1}, 2, {ZERO, OFFLOAD, LORA}),
        ({"zero_stage": 2}, 2, {ZERO, WORKERS, OFFLOAD, LORA}),
        ({"zero_stage": 2}, 1, {ZERO, WORKERS, OFFLOAD, LORA}),
        ({"zero_stage": 3}, 2, {WORKERS, OFFLOAD, LORA}),
        ({"zero_stage": 3, "lora": {}}, 2, {WORKERS, OFFLOAD}),
        ({"zero_stage": 3, "lora": {}, "deepspeed": TO_CPU}, 2, {WORKERS}),
        ({"zero_stage": 2, "deepspeed": {"note": "offload_optimizer"}}, 2, {ZERO, WORKERS, OFFLOAD, LORA}),
    ],
)
def test_what_is_set_already_is_not_advised(
    raw: dict[str, object], tmp_path: Path, distill: dict[str, object], workers: int, advised: set[str]
) -> None:
    config = config_of(raw, tmp_path, distill=distill, gpus=1, max_workers=workers, gpu_memory_gb=1, memory_gb=10**6)
    (said,) = found(config)
    _, _, advice = said.partition("gpu_memory_gb is 1: ")
    assert {way for way in (ZERO, WORKERS, OFFLOAD, LORA) if way in advice} == advised
    assert advice.endswith("take a smaller pivot")


def test_a_gpu_is_judged_by_the_memory_that_is_said(raw: dict[str, object], tmp_path: Path) -> None:
    assert found(config_of(raw, tmp_path, gpus=1)) == []
    (said,) = found(config_of(raw, tmp_path, gpus=1, gpu_memory_gb=80))
    assert "holds 180.0 GB on its GPU" in said
    assert "resources.distill.gpu_memory_gb is 80: " in said
    assert found(config_of(raw, tmp_path, gpus=1, gpu_memory_gb=80), parameters=PARAMETERS // 3) == []
    (said,) = found(config_of(raw, tmp_path, gpus=0.5, gpu_memory_gb=80), parameters=PARAMETERS // 3)
    assert "gpu_memory_gb is 80, of which a worker has 0.5" in said


def test_what_is_offloaded_is_on_the_host(raw: dict[str, object], tmp_path: Path) -> None:
    """10e9 parameters: weights and gradients of 60 GB stay, master weights and moments of 120 GB go."""
    gpu = {"gpus": 1, "gpu_memory_gb": 80}
    to_cpu = {"deepspeed": TO_CPU}
    assert found(config_of(raw, tmp_path, distill=to_cpu, **gpu, memory_gb=120)) == []
    (said,) = found(config_of(raw, tmp_path, distill=to_cpu, **gpu, memory_gb=100))
    assert "holds 120.0 GB offloaded to its host" in said
    assert "memory_gb is 100: raise resources.distill.max_workers from 1, train adapters" in said
    (said,) = found(config_of(raw, tmp_path, distill=to_cpu, gpus=1, gpu_memory_gb=40, memory_gb=120))
    assert "holds 60.0 GB on its GPU" in said
    nvme = {"deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}}
    assert found(config_of(raw, tmp_path, distill=nvme, **gpu, memory_gb=1)) == []
    none = {"deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "none"}}}}
    assert len(found(config_of(raw, tmp_path, distill=none, **gpu, memory_gb=120))) == 1
    both = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    stage_3 = {"zero_stage": 3, "deepspeed": {"zero_optimization": both}}
    (said,) = found(config_of(raw, tmp_path, distill=stage_3, gpus=1, gpu_memory_gb=40, memory_gb=100))
    assert "holds 140.0 GB offloaded to its host" in said


def test_a_machine_without_gpus_gains_nothing_by_offloading_to_itself(raw: dict[str, object], tmp_path: Path) -> None:
    (said,) = found(config_of(raw, tmp_path, distill={"deepspeed": TO_CPU}, memory_gb=120))
    assert "holds 180.0 GB of the state" in said
    assert "offload_optimizer" not in said


def test_this_machine_is_asked_where_nothing_is_said(
    raw: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (said,) = found(config_of(raw, tmp_path), parameters=10**13)
    assert "this machine has" in said
    assert "for each of 1 workers: " in said
    assert "over more machines (resources.address)" in said
    assert found(config_of(raw, tmp_path), parameters=1000) == []
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # a submitted job: another machine trains
    assert found(config_of(raw, tmp_path), parameters=10**13) == []


def test_branches_side_by_side_share_this_machine(
    raw: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = {"SC_PHYS_PAGES": 100, "SC_PAGE_SIZE": GIB}
    monkeypatch.setattr(plan.os, "sysconf", lambda name: memory[name])
    three = raw | {"sources": [{"name": name, "path": str(tmp_path / "a")} for name in "abc"]}

    def said(branches: int, given: dict[str, object] = raw) -> list[str]:
        resources = {"branches": branches, "distill": {"max_workers": 2}}
        return found(parse_config(given | {"resources": resources}, folder=tmp_path), parameters=3_000_000_000)

    # 30 GB a worker: 2 + (4 + 12) / 2 bytes a parameter
    assert said(1) == []
    assert said(8) == []  # one source, one target
    (problem,) = said(2, three)
    assert "this machine has 26.8 GB for each of 4 workers (2 branches side by side): " in problem
    assert "set resources.branches to 1" in problem
    assert "this machine has 17.9 GB for each of 6 workers (3 branches side by side): " in said(8, three)[0]
    assert said(1, three) == []


def test_the_peak_of_a_worker_is_what_its_gpu_holds(raw: dict[str, object], tmp_path: Path) -> None:
    def peak(**resources: object) -> float:
        config = config_of(raw, tmp_path, distill={"head_chunk": 1, "deepspeed": TO_CPU}, **resources)
        graph = build_graph(config)
        sizes = dict.fromkeys(config.models, ModelSize(100, 400, 8))
        found = estimate(config, graph, graph.distill["a"], sizes).peak_bytes
        assert found is not None
        return found

    assert peak(gpus=1) == 100 * 6 + 8 * 12
    assert peak() == 100 * 18 + 8 * 12


def test_the_memory_of_a_gpu_is_no_part_of_a_key(raw: dict[str, object], tmp_path: Path) -> None:
    plain, told = (build_graph(config_of(raw, tmp_path, **given)) for given in ({}, {"gpu_memory_gb": 80}))
    assert {node.id: node.key for node in plain} == {node.id: node.key for node in told}
