"""What vLLM reads from the environment when it is imported, and which version it is. Called by the stages that start actors with engines; imports no vLLM."""

import os
from importlib.metadata import PackageNotFoundError, version

from fusion_ray.config import WorkerResources

PASSED = ("HF_HUB_OFFLINE", "HF_HOME", "HF_ENDPOINT")


def vllm_environment(resources: WorkerResources, *, in_process: bool = True) -> dict[str, str]:
    """The variables of an actor with `resources`. `in_process`: the engine lives in the actor's own process, as it always does on a CPU."""
    values = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"}
    if in_process or not resources.gpus:
        values["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if not resources.gpus:
        values["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # two engines on one host would be bound to the same cores
        values["OMP_NUM_THREADS"] = str(max(1, int(resources.cpus)))
    return values | {name: os.environ[name] for name in PASSED if name in os.environ}


def vllm_version() -> str:
    """As workers/engine.ENGINE has it, from the package's metadata: the driver must not import vLLM."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"vllm {version(name)}"
        except PackageNotFoundError:
            continue
    return "vllm"
