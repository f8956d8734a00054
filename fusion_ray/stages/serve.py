"""serve: models behind one OpenAI-compatible endpoint of Ray Serve, with an API key and finite autoscaling targets.

`serving(...)` is the endpoint for the length of a block (evaluate uses it), `serve_forever(...)` the command line's `serve`, and `build_app` what
`serve deploy` and KubeRay's RayService import: `import_path: fusion_ray.stages.serve:build_app`. What the application is made of: stages/serve_app.py.
"""

import contextlib
import ipaddress
import json
import logging
import os
import secrets
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus

from fusion_ray.config import ServeConfig, WorkerResources
from fusion_ray.stages.serve_model import llm_config
from fusion_ray.workers.api_key import KeyDigest, missing_key

if TYPE_CHECKING:
    from ray.serve.deployment import Application

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 1800.0
_POLL_S = 0.25
_QUIET = {"log_level": "WARNING", "enable_access_log": False}


class ServeError(RuntimeError):
    """The endpoint did not come up; the message carries Serve's own."""


def build_app(args: dict[str, object]) -> "Application":
    """The application for `serve deploy` and RayService: the arguments of `ray.serve.llm:build_openai_app`, and the key.

    `args`: `llm_configs` (a list of LLMConfig mappings), `ingress_deployment_config` (options of the ingress deployment), `api_key_env` (the environment
    variable, default FUSION_RAY_API_KEY, that the ingress replica reads the key from; `<name>_FILE` may name a mounted file instead). A model without
    autoscaling targets gets finite ones. There is no insecure form: an application cannot know whom its proxies listen to. Raises ValueError naming the key.
    """
    with _root_logging_kept():
        from ray.serve.llm import LLMServingArgs  # imports vLLM

        from fusion_ray.stages import serve_app

    known = ("llm_configs", "ingress_deployment_config", "api_key_env")
    unknown = sorted(set(args) - set(known))
    if unknown:
        raise ValueError(f"unknown argument {unknown[0]!r} of build_app: expected {', '.join(known)}")
    parsed = LLMServingArgs.model_validate({"llm_configs": args.get("llm_configs") or []})
    for config in parsed.llm_configs:
        options = config.deployment_config
        options.setdefault("max_ongoing_requests", serve_app.MAX_ONGOING_REQUESTS)
        options.setdefault("health_check_timeout_s", 60)
        scaling = dict(options.get("autoscaling_config") or {})
        if "num_replicas" not in options:
            options["autoscaling_config"] = {
                "min_replicas": 1,
                "target_ongoing_requests": serve_app.TARGET_ONGOING_REQUESTS,
            } | scaling
    ingress_options = args.get("ingress_deployment_config") or {}
    if not isinstance(ingress_options, dict):
        raise ValueError(
            f"`ingress_deployment_config` must be a mapping of deployment options, given {ingress_options!r}"
        )
    return serve_app.build(
        parsed.llm_configs,
        key=None,
        api_key_env=str(args.get("api_key_env") or ServeConfig().api_key_env),
        insecure=False,
        ingress_options=ingress_options,
    )


@contextlib.contextmanager
def serving(
    models: Mapping[str, str],
    *,
    config: ServeConfig,
    resources: WorkerResources,
    api_key: str | None,
    insecure: bool = False,
    start_timeout_s: float = START_TIMEOUT_S,
) -> Iterator[str]:
    """The base URL (`http://host:port/v1`) of `models` (id to local folder) for the length of the block; they start side by side.

    Ray must be initialised. Serve is started, and shut down at the end, unless it was running: then the application alone comes and goes, at the running
    proxies' address. Raises ValueError without a key unless `insecure` on a loopback host, ServeError when a model does not start.
    """
    if not models:
        raise ValueError("no model to serve: give at least one id with its folder")
    if not api_key and not insecure:
        raise ValueError(missing_key(config.api_key_env))
    proxies = _find_proxies(config)
    if not api_key and not is_loopback(proxies.host):
        raise ValueError(
            f"insecure serving is for loopback hosts only and serve.host is {proxies.host!r}: set a key in {config.api_key_env}, or serve.host: 127.0.0.1"
        )
    started = time.monotonic()
    logger.info("serve: starting %s at %s:%d", ", ".join(models), proxies.host, proxies.port)
    name = "fusion-ray" if proxies.owned else f"fusion-ray-{secrets.token_hex(4)}"
    prefix = "" if proxies.owned else f"/{name}"
    url = f"http://{proxies.reachable_host()}:{proxies.port}{prefix}/v1"
    try:
        if proxies.owned:
            options = {"host": proxies.host, "port": proxies.port, "request_timeout_s": 600}
            serve.start(proxy_location="EveryNode", http_options=options, logging_config=_QUIET)
        app = _application(models, config=config, resources=resources, api_key=api_key)
        target = serve.RunTarget(app, name=name, route_prefix=prefix or "/", logging_config=_QUIET)
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        _wait(name, url, set(models), api_key=api_key, deadline=time.monotonic() + start_timeout_s)
        logger.info("serve: %d model(s) answer at %s after %.0f s", len(models), url, time.monotonic() - started)
        yield url
    finally:
        if proxies.owned:
            serve.shutdown()
        else:
            serve.delete(name)


def serve_forever(
    models: Mapping[str, str],
    *,
    config: ServeConfig,
    resources: WorkerResources,
    api_key: str | None,
    insecure: bool = False,
    stop: threading.Event | None = None,
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """The endpoint until `stop` is set or the process is interrupted; `ready` gets its base URL once it answers. Raises as `serving`."""
    with serving(models, config=config, resources=resources, api_key=api_key, insecure=insecure) as url:
        ready(url)
        with contextlib.suppress(KeyboardInterrupt):
            (stop or threading.Event()).wait()
    logger.info("serve: stopped")


def is_loopback(host: str) -> bool:
    """True for localhost and the addresses that only this machine reaches."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class _Proxies:
    """Where Serve's proxies listen; `owned` when this process starts and stops them."""

    host: str
    port: int
    owned: bool

    def reachable_host(self) -> str:
        if self.host not in ("0.0.0.0", "::"):
            return self.host
        heads = [node for node in ray.nodes() if node["Alive"] and "node:__internal_head__" in node["Resources"]]
        return str(heads[0]["NodeManagerAddress"]) if heads else "127.0.0.1"


def _find_proxies(config: ServeConfig) -> _Proxies:
    """Those of a running Serve, else those to start."""
    running = _get_global_client(raise_if_no_controller_running=False)
    if running is None:
        return _Proxies(config.host, config.port or _free_port(config.host), owned=True)
    options = running.http_config
    if config.port not in (0, options.port):
        logger.info("serve: Serve already runs on port %d, which is used in place of %d", options.port, config.port)
    return _Proxies(str(options.host), int(options.port), owned=False)


def _application(
    models: Mapping[str, str], *, config: ServeConfig, resources: WorkerResources, api_key: str | None
) -> "Application":
    with _root_logging_kept():
        from ray.serve.llm import LLMConfig  # imports vLLM: seconds, paid only where something is served

        from fusion_ray.stages import serve_app

    return serve_app.build(
        [
            LLMConfig.model_validate(llm_config(model_id, folder, config=config, resources=resources))
            for model_id, folder in models.items()
        ],
        key=KeyDigest.of(api_key) if api_key else None,
        api_key_env=config.api_key_env,
        insecure=not api_key,
        ingress_options={
            "max_ongoing_requests": config.max_ongoing_requests * config.max_replicas * len(models),
            "autoscaling_config": {
                "min_replicas": 1,
                "max_replicas": config.max_replicas,
                "target_ongoing_requests": config.target_ongoing_requests * len(models),
            },
            "ray_actor_options": {"num_cpus": 0},
            "graceful_shutdown_wait_loop_s": 0.1,
        },
    )


def _wait(name: str, url: str, ids: set[str], *, api_key: str | None, deadline: float) -> None:
    """Until the application runs and `/v1/models` lists `ids`. Raises ServeError with Serve's message when it fails or time runs out."""
    while True:
        app = serve.status().applications.get(name)
        if app is not None and app.status == ApplicationStatus.DEPLOY_FAILED:
            raise ServeError(f"the models {sorted(ids)} did not start: {_reasons(app)}")
        if app is not None and app.status == ApplicationStatus.RUNNING and _listed(url, api_key) == ids:
            return
        if time.monotonic() > deadline:
            resources = {key: value for key, value in ray.available_resources().items() if key in ("CPU", "GPU")}
            raise ServeError(
                f"the models {sorted(ids)} did not answer at {url} in time: {_reasons(app) if app else 'the application is unknown to Serve'}; "
                f"free in the cluster: {resources}; see resources.serve"
            )
        time.sleep(_POLL_S)


def _reasons(app: object) -> str:
    """The last line of each deployment's traceback, and where the whole lies."""
    messages = [value.message for value in getattr(app, "deployments", {}).values()] + [getattr(app, "message", "")]
    lines = [line.strip() for message in messages for line in message.splitlines() if "Error: " in line]
    short = " | ".join(dict.fromkeys(lines)) or " ".join(message.strip() for message in messages if message)
    logger.debug("serve: %s", "\n".join(messages))
    return f"{short or getattr(app, 'status', '')} (the replicas' logs lie below /tmp/ray/session_latest/logs on their node)"


def _listed(url: str, api_key: str | None) -> set[str] | None:
    """The ids under /v1/models; None while nothing answers there."""
    request = urllib.request.Request(f"{url}/models", headers={"Authorization": f"Bearer {api_key}"} if api_key else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return {row["id"] for row in json.load(response)["data"]}
    except (urllib.error.URLError, OSError, ValueError):  # the proxy is not up yet, or its route table is not
        return None


@contextlib.contextmanager
def _root_logging_kept() -> Iterator[None]:
    """Importing `ray.serve.llm` replaces the root logger's handlers by one that writes JSON, and vLLM tells what it finds; neither is the user's wish."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:], root.level = handlers, level
        logging.getLogger("ray.serve").setLevel(logging.WARNING)


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
