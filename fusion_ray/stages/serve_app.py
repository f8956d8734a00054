"""The Serve application: `ray.serve.llm` model servers behind an OpenAI-compatible ingress that asks for an API key.

Ray's own `OpenAiIngress` ignores the Authorization header, and Ray's token auth does not cover Serve's HTTP port; `BearerKey` stands in front of every
route instead. Built by stages/serve.py (which imports this file late: `ray.serve.llm` costs seconds) and loaded by Serve's replicas.

`CpuServer` exists for start-up: a stock CPU replica imports vLLM in four processes one after the other (replica, model download task, engine, worker);
with a folder on disk and the in-process executor two remain.
"""

import os
from collections.abc import Mapping, Sequence

from fastapi import FastAPI
from ray import serve
from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.llm._internal.serve.core.configs.openai_api_models import to_model_metadata
from ray.llm._internal.serve.core.ingress.ingress import init as stock_fastapi_app
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from ray.serve.deployment import Application
from ray.serve.llm import LLMConfig, build_llm_deployment
from ray.serve.llm.deployment import LLMServer
from ray.serve.llm.ingress import OpenAiIngress, make_fastapi_ingress

from fusion_ray.workers.api_key import BearerKey, KeyDigest

MAX_ONGOING_REQUESTS = 128
TARGET_ONGOING_REQUESTS = 32


class SkipDownload(CallbackBase):
    """A model folder on disk needs no download task, which would start a process and import vLLM to find that out."""

    async def on_before_node_init(self) -> None:
        source = self.llm_config.model_loading_config.model_source
        self.ctx.run_init_node = not (isinstance(source, str) and os.path.isdir(source))


class CpuEngine(VLLMEngine):
    """The engine process runs the model itself. Needs VLLM_ENABLE_V1_MULTIPROCESSING=0, else vLLM turns `uni` back into `mp` on CPU."""

    def _prepare_engine_config(self, callback_ctx):  # type: ignore[no-untyped-def]  # vLLM's classes, as in the method it extends
        engine_args, frontend_args, config = super()._prepare_engine_config(callback_ctx)
        if config.parallel_config.world_size == 1:
            config.parallel_config.distributed_executor_backend = "uni"
        return engine_args, frontend_args, config


class CpuServer(LLMServer):
    """Starts `CpuEngine`, and no telemetry actor."""

    _default_engine_cls = CpuEngine

    async def _start_engine(self) -> None:
        await self.engine.start()


def build(
    llm_configs: Sequence[LLMConfig],
    *,
    key: KeyDigest | None,
    api_key_env: str,
    insecure: bool,
    ingress_options: Mapping[str, object],
) -> Application:
    """The application of `llm_configs` behind the key. `key` None: the ingress replica reads it from its own environment.

    Raises ValueError for no model or two of one id.
    """
    ids = [config.model_id for config in llm_configs]
    if not ids or len(set(ids)) != len(ids):
        raise ValueError(f"llm_configs must hold one or more models with different ids, given {ids}")
    app: FastAPI = stock_fastapi_app()
    if not insecure:
        app.add_middleware(BearerKey, key=key, api_key_env=api_key_env)  # added last, so it is asked first
    options: dict[str, object] = {
        "name": "OpenAiIngress",
        "max_ongoing_requests": MAX_ONGOING_REQUESTS * 8,
        "autoscaling_config": {
            "min_replicas": 1,
            "max_replicas": 4,
            "target_ongoing_requests": MAX_ONGOING_REQUESTS * 2,
        },
        "health_check_timeout_s": 60,
    }
    ingress = serve.deployment(make_fastapi_ingress(OpenAiIngress, app=app), **(options | dict(ingress_options)))
    return ingress.bind(
        llm_deployments={config.model_id: build_llm_deployment(config) for config in llm_configs},
        model_cards={config.model_id: to_model_metadata(config.model_id, config) for config in llm_configs},
        lora_paths={
            config.model_id: config.lora_config.dynamic_lora_loading_path
            for config in llm_configs
            if config.lora_config is not None
        },
    )
