"""The RayService's embedded Serve configuration against Ray's own schemas, and the application that it names."""

import copy
import inspect
from pathlib import Path
from typing import Any  # parsed YAML

import pytest
import yaml
from pydantic import ValidationError

pytestmark = pytest.mark.ray  # ray.serve.llm imports vLLM: seconds, though nothing is started

FILE = Path(__file__).resolve().parents[3] / "cluster" / "kuberay" / "rayservice-endpoint.yaml"


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    resource = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return yaml.safe_load(resource["spec"]["serveConfigV2"])


def unknown_fields(config: dict[str, Any]) -> list[str]:
    """Ray's schemas let an unknown field pass in silence, so the names are compared here."""
    from ray.serve.schema import HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema

    found = set(config) - set(ServeDeploySchema.model_fields)
    found |= set(config.get("http_options", {})) - set(HTTPOptionsSchema.model_fields)
    for application in config["applications"]:
        found |= set(application) - set(ServeApplicationSchema.model_fields)
    return sorted(found)


def test_ray_accepts_the_deployment(config: dict[str, Any]) -> None:
    from ray.serve.schema import ServeDeploySchema

    parsed = ServeDeploySchema.model_validate(config)
    assert (parsed.http_options.host, parsed.http_options.port) == ("0.0.0.0", 8000)
    assert unknown_fields(config) == []
    wrong = copy.deepcopy(config)
    wrong["applications"][0]["import_path"] = "build_app"
    with pytest.raises(ValidationError):
        ServeDeploySchema.model_validate(wrong)


@pytest.mark.parametrize("where", ["top", "http", "application"])
def test_a_misspelt_field_is_caught(config: dict[str, Any], where: str) -> None:
    wrong = copy.deepcopy(config)
    place = {"top": wrong, "http": wrong["http_options"], "application": wrong["applications"][0]}[where]
    place["route_prefixx"] = "/"
    assert unknown_fields(wrong) == ["route_prefixx"]


def test_ray_accepts_the_models(config: dict[str, Any]) -> None:
    from ray.serve.llm import LLMServingArgs

    models = config["applications"][0]["args"]["llm_configs"]
    assert len(LLMServingArgs.model_validate({"llm_configs": models}).llm_configs) == len(models)
    wrong = copy.deepcopy(models)
    wrong[0]["engine_kwarg"] = wrong[0].pop("engine_kwargs")
    with pytest.raises(ValidationError):
        LLMServingArgs.model_validate({"llm_configs": wrong})


def test_engine_arguments_are_vllm_s(config: dict[str, Any]) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    known = set(inspect.signature(AsyncEngineArgs).parameters)
    for model in config["applications"][0]["args"]["llm_configs"]:
        assert set(model["engine_kwargs"]) <= known - {"model", "served_model_name"}


def test_the_application_exists_and_takes_these_arguments(config: dict[str, Any]) -> None:
    import importlib

    application = config["applications"][0]
    module, _, name = application["import_path"].partition(":")
    build = getattr(importlib.import_module(module), name)
    with pytest.raises(ValueError, match="unknown argument"):
        build({**application["args"], "llm_config": []})
    for argument in application["args"]:
        assert argument in (build.__doc__ or ""), f"build_app's docstring does not name {argument}"
