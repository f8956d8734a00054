"""What a model to serve becomes for Ray Serve LLM, on CPU and on GPU."""

import pytest

from fusion_ray.config import ServeConfig, WorkerResources
from fusion_ray.stages.serve_model import llm_config

CONFIG = ServeConfig(
    max_model_len=512,
    min_replicas=1,
    max_replicas=3,
    target_ongoing_requests=7,
    max_ongoing_requests=21,
    engine={"seed": 5},
)


def test_targets_are_finite_and_the_config_s() -> None:
    deployment = llm_config("m", "/models/m", config=CONFIG, resources=WorkerResources())["deployment_config"]
    assert deployment["max_ongoing_requests"] == 21  # type: ignore[index]
    assert deployment["autoscaling_config"] == {  # type: ignore[index]
        "min_replicas": 1,
        "max_replicas": 3,
        "target_ongoing_requests": 7,
    }


def test_cpu_engine_in_float32_with_a_bounded_cache_and_one_process() -> None:
    model = llm_config("m", "/models/m", config=CONFIG, resources=WorkerResources(cpus=2.5))
    assert model["model_loading_config"] == {"model_id": "m", "model_source": "/models/m"}
    assert model["accelerator_config"] == {"kind": "cpu"}
    assert model["placement_group_config"] == {"bundle_per_worker": {"CPU": 2.5}}
    engine, env = model["engine_kwargs"], model["runtime_env"]["env_vars"]  # type: ignore[index, call-overload]
    assert (engine["dtype"], engine["enforce_eager"], engine["max_model_len"], engine["seed"]) == (
        "float32",
        True,
        512,
        5,
    )  # type: ignore[index, call-overload]
    assert engine["kv_cache_memory_bytes"] > 0  # type: ignore[index, call-overload, operator]
    assert (env["OMP_NUM_THREADS"], env["VLLM_CPU_OMP_THREADS_BIND"], env["VLLM_ENABLE_V1_MULTIPROCESSING"]) == (
        "2",
        "nobind",
        "0",
    )


def test_gpu_leaves_dtype_and_compilation_to_vllm() -> None:
    resources = WorkerResources(cpus=4, gpus=1, memory_gb=2, engine={"gpu_memory_utilization": 0.8})
    model = llm_config("m", "/models/m", config=CONFIG, resources=resources)
    assert model["accelerator_config"] == {"kind": "gpu"}
    assert model["placement_group_config"] == {"bundle_per_worker": {"CPU": 4, "GPU": 1, "memory": 2 * 2**30}}
    assert model["engine_kwargs"] == {"max_model_len": 512, "seed": 5, "gpu_memory_utilization": 0.8}
    assert "server_cls" not in model


def test_the_user_s_engine_arguments_win_and_the_machine_s_over_them() -> None:
    resources = WorkerResources(engine={"kv_cache_memory_bytes": 7, "seed": 6})
    engine = llm_config("m", "/m", config=CONFIG, resources=resources)["engine_kwargs"]
    assert (engine["kv_cache_memory_bytes"], engine["seed"]) == (7, 6)  # type: ignore[index, call-overload]


@pytest.mark.parametrize("value", ["", "2"])
def test_vllm_s_own_cache_variable_is_passed_on_where_it_is_set(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", value)
    env = llm_config("m", "/m", config=CONFIG, resources=WorkerResources())["runtime_env"]["env_vars"]  # type: ignore[index, call-overload]
    assert env.get("VLLM_CPU_KVCACHE_SPACE", "") == value
