"""One served model as the mapping that `ray.serve.llm.LLMConfig` takes, from the config's plain values. Imports no Ray.

Called by stages/serve.py; the same keys stand in a RayService's YAML.
"""

import os

from fusion_ray.config import ServeConfig, WorkerResources
from fusion_ray.stages.vllm_environment import vllm_environment

CPU_KV_CACHE_BYTES = 1 << 30


def llm_config(model_id: str, folder: str, *, config: ServeConfig, resources: WorkerResources) -> dict[str, object]:
    """One model as the mapping that `ray.serve.llm.LLMConfig` takes: a replica of `resources.cpus` and `resources.gpus`."""
    engine: dict[str, object] = {"max_model_len": config.max_model_len}
    bundle: dict[str, float] = {"CPU": resources.cpus}
    if resources.memory_gb is not None:
        bundle["memory"] = resources.memory_gb * (1 << 30)
    model: dict[str, object] = {
        "model_loading_config": {"model_id": model_id, "model_source": folder},
        "callback_config": {"callback_class": "fusion_ray.stages.serve_app:SkipDownload"},
        "deployment_config": {
            "max_ongoing_requests": config.max_ongoing_requests,
            "autoscaling_config": {
                "min_replicas": config.min_replicas,
                "max_replicas": config.max_replicas,
                "target_ongoing_requests": config.target_ongoing_requests,
            },
            "ray_actor_options": {"num_cpus": 0},  # the bundle holds what the replica and its engine use
            "health_check_timeout_s": 60,
            "graceful_shutdown_wait_loop_s": 0.1,
            "max_constructor_retry_count": 2,  # a model that does not load will not load the third time either
        },
    }
    env = vllm_environment(resources, in_process=False)
    if resources.gpus:
        bundle["GPU"] = resources.gpus
        model["accelerator_config"] = {"kind": "gpu"}
    else:
        engine |= {
            "dtype": "float32",
            "enforce_eager": True,
            "kv_cache_memory_bytes": CPU_KV_CACHE_BYTES,
            "disable_log_stats": True,
        }
        model |= {
            "accelerator_config": {"kind": "cpu"},
            "server_cls": "fusion_ray.stages.serve_app:CpuServer",
            "log_engine_metrics": False,
        }
        # vLLM lets the variable outrank the engine argument; a user's own value stands.
        if os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
            env["VLLM_CPU_KVCACHE_SPACE"] = os.environ["VLLM_CPU_KVCACHE_SPACE"]
    model["placement_group_config"] = {"bundle_per_worker": bundle}
    model["runtime_env"] = {"env_vars": env}
    model["engine_kwargs"] = engine | config.engine | resources.engine
    return model
