"""The Kubernetes files, offline: field shapes, the operator's rules, what the files promise, and that a mistake in them would be caught."""

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any  # parsed YAML

import jsonschema
import pytest
import yaml
from ray.runtime_env import RuntimeEnv

from fusion_ray.config import ServeConfig, load_config
from fusion_ray.stages.cluster import WORKER_ENV

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
FOLDER = ROOT / "cluster" / "kuberay"
CLUSTERS = ("raycluster-gpu.yaml", "rayjob-fuse.yaml", "rayservice-endpoint.yaml")
FILES = (*CLUSTERS, "storage.yaml", "secrets.example.yaml")


def beside(name: str) -> ModuleType:
    """A helper module of this folder (tests are no package)."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


schema, rules = beside("kuberay_schema"), beside("kuberay_rules")


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8")))


def document(name: str) -> dict[str, Any]:
    return documents(name)[0]


def ray_version() -> str:
    lock = (ROOT / "requirements" / "gpu.lock").read_text(encoding="utf-8")
    return next(line.split("==")[1].strip() for line in lock.splitlines() if line.startswith("ray=="))


def shape_errors(resource: dict[str, Any]) -> list[str]:
    validator = jsonschema.Draft202012Validator(schema.KINDS[resource["kind"]])
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in validator.iter_errors(resource)]


def all_problems(resource: dict[str, Any]) -> list[str]:
    """Shapes first: the rules take them for granted."""
    found = shape_errors(resource)
    if found or not resource["apiVersion"].startswith("ray.io/"):
        return found
    claims = {item["metadata"]["name"] for item in documents("storage.yaml")}
    secrets = {item["metadata"]["name"]: set(item["stringData"]) for item in documents("secrets.example.yaml")}
    found += rules.operator_rules(resource)
    return found + list(rules.own_rules(resource, claims=claims, secrets=secrets, ray_version=ray_version()))


def test_every_file_of_the_folder_is_checked() -> None:
    assert {path.name for path in FOLDER.glob("*.yaml")} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_the_file_holds(name: str) -> None:
    for resource in documents(name):
        assert all_problems(resource) == []


MISTAKES: dict[str, tuple[str, Callable[[dict[str, Any]], None]]] = {
    "a misspelt field of a group": (
        "raycluster-gpu.yaml",
        lambda d: d["spec"]["workerGroupSpecs"][0].update(
            maxReplica=d["spec"]["workerGroupSpecs"][0].pop("maxReplicas")
        ),
    ),
    "a misspelt field of a job": ("rayjob-fuse.yaml", lambda d: d["spec"].update(backOffLimit=1)),
    "a misspelt field of a pod": (
        "rayjob-fuse.yaml",
        lambda d: d["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"].update(toleration=[]),
    ),
    "a misspelt field of a service": ("rayservice-endpoint.yaml", lambda d: d["spec"].update(serveConfig="x")),
    "an unknown auth mode": ("raycluster-gpu.yaml", lambda d: d["spec"]["authOptions"].update(mode="tokens")),
    "auth off": ("raycluster-gpu.yaml", lambda d: d["spec"].pop("authOptions")),
    "an old API": ("raycluster-gpu.yaml", lambda d: d.update(apiVersion="ray.io/v1alpha1")),
    "a number where a string must be": (
        "raycluster-gpu.yaml",
        lambda d: d["spec"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
    ),
    "another Ray": ("raycluster-gpu.yaml", lambda d: d["spec"].update(rayVersion="2.9.0")),
    "a wrong quantity": (
        "raycluster-gpu.yaml",
        lambda d: d["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["resources"]["limits"].update(
            memory="16GB"
        ),
    ),
    "TTL without shutdown": ("rayjob-fuse.yaml", lambda d: d["spec"].update(shutdownAfterJobFinishes=False)),
    "a selector beside a cluster": (
        "rayjob-fuse.yaml",
        lambda d: d["spec"].update(clusterSelector={"ray.io/cluster": "x"}),
    ),
    "a name that is too long": ("rayjob-fuse.yaml", lambda d: d["metadata"].update(name="f" * 48)),
    "more at least than at most": (
        "raycluster-gpu.yaml",
        lambda d: d["spec"]["workerGroupSpecs"][0].update(minReplicas=99),
    ),
    "a restart policy under autoscaler v2": (
        "raycluster-gpu.yaml",
        lambda d: d["spec"]["workerGroupSpecs"][0]["template"]["spec"].update(restartPolicy="Always"),
    ),
    "resources twice": (
        "raycluster-gpu.yaml",
        lambda d: d["spec"]["workerGroupSpecs"][0].update(rayStartParams={"num-gpus": "1"}, resources={"GPU": "1"}),
    ),
    "labels in the start parameters": (
        "raycluster-gpu.yaml",
        lambda d: d["spec"]["headGroupSpec"]["rayStartParams"].update(labels="pool=head"),
    ),
    "a claim that nobody makes": (
        "raycluster-gpu.yaml",
        lambda d: d["spec"]["workerGroupSpecs"][0]["template"]["spec"]["volumes"][0]["persistentVolumeClaim"].update(
            claimName="x"
        ),
    ),
    "a GPU pod without toleration": (
        "raycluster-gpu.yaml",
        lambda d: d["spec"]["workerGroupSpecs"][0]["template"]["spec"].pop("tolerations"),
    ),
    "a secret in the open": (
        "rayservice-endpoint.yaml",
        lambda d: d["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]["env"].append(
            {"name": "FUSION_RAY_API_KEY", "value": "abc"}
        ),
    ),
    "a secret that nobody makes": (
        "rayservice-endpoint.yaml",
        lambda d: d["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]["env"][1][
            "valueFrom"
        ]["secretKeyRef"].update(key="hf_token"),
    ),
    "two images": (
        "raycluster-gpu.yaml",
        lambda d: d["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0].update(image="other:1"),
    ),
    "no shared volume": (
        "raycluster-gpu.yaml",
        lambda d: d["spec"]["workerGroupSpecs"][1]["template"]["spec"]["containers"][0]["volumeMounts"].pop(0),
    ),
    "a volume that one pod alone may write": ("storage.yaml", lambda d: d["spec"].update(accessModes="ReadWriteMany")),
}


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_a_mistake_is_caught(mistake: str) -> None:
    name, change = MISTAKES[mistake]
    changed = copy.deepcopy(document(name))
    change(changed)
    assert changed != document(name)
    assert all_problems(changed)


def test_gpu_groups_grow_from_nothing_and_the_head_is_on_demand() -> None:
    for name in ("raycluster-gpu.yaml", "rayjob-fuse.yaml"):
        cluster = rules.cluster_of(document(name))
        assert cluster["enableInTreeAutoscaling"]
        assert cluster["autoscalerOptions"]["version"] == "v2"
        gpu_groups = [group for group in cluster["workerGroupSpecs"] if rules.GPU in str(group["template"])]
        assert gpu_groups
        assert all(group["minReplicas"] == group["replicas"] == 0 for group in gpu_groups)
        head = cluster["headGroupSpec"]["template"]["spec"]
        assert head["nodeSelector"]
        assert "spot" not in str(head.get("tolerations", ""))
        assert any("spot" in str(group["template"]["spec"]["tolerations"]) for group in gpu_groups)


def test_shared_storage_is_for_many_writers_and_secrets_are_placeholders() -> None:
    assert document("storage.yaml")["spec"]["accessModes"] == ["ReadWriteMany"]
    assert set(document("secrets.example.yaml")["stringData"].values()) == {"replace-me"}


def test_the_job_s_command_is_one_that_runs() -> None:
    words = document("rayjob-fuse.yaml")["spec"]["entrypoint"].split()
    assert words[0] == "python"
    for word in words[1:3]:
        path = Path(word).relative_to("/opt/fusion_ray")
        assert (ROOT / path).is_file(), path
    config = load_config(ROOT / Path(words[2]).relative_to("/opt/fusion_ray"), words[3:])
    assert config.run.storage.startswith("/shared/")
    cluster = rules.cluster_of(document("rayjob-fuse.yaml"))
    gpus = {
        group["groupName"]: int(group["template"]["spec"]["containers"][0]["resources"]["limits"].get(rules.GPU, 0))
        * group["maxReplicas"]
        for group in cluster["workerGroupSpecs"]
    }
    assert config.resources.teach.gpus * config.resources.teach.max_workers <= sum(gpus.values())
    assert config.resources.distill.gpus * config.resources.distill.max_workers <= sum(gpus.values())


def test_the_runtime_environment_is_valid_and_does_not_collide() -> None:
    raw = yaml.safe_load(document("rayjob-fuse.yaml")["spec"]["runtimeEnvYAML"])
    RuntimeEnv(**raw)
    assert set(raw) <= {"env_vars", "working_dir", "excludes", "config"}
    assert not set(raw["env_vars"]) & set(WORKER_ENV), "Ray refuses a variable that job and driver both set"
    assert not [name for name in raw["env_vars"] if "KEY" in name or name.endswith("TOKEN")]
    with pytest.raises((TypeError, ValueError)):
        RuntimeEnv(env_vars={"A": 1})  # type: ignore[dict-item]  # what the check above rests on


def serve_config() -> dict[str, Any]:
    return yaml.safe_load(document("rayservice-endpoint.yaml")["spec"]["serveConfigV2"])


def test_the_endpoint_asks_for_a_key_that_the_pods_have() -> None:
    args = serve_config()["applications"][0]["args"]
    variable = args["api_key_env"]
    assert variable == ServeConfig().api_key_env
    cluster = rules.cluster_of(document("rayservice-endpoint.yaml"))
    for _, group in rules.groups_of(cluster):
        found = [item for item in group["template"]["spec"]["containers"][0]["env"] if item["name"] == variable]
        assert len(found) == 1
        assert not found[0]["valueFrom"]["secretKeyRef"].get("optional")


def test_the_endpoint_scales_by_finite_targets_within_its_pods() -> None:
    cluster = rules.cluster_of(document("rayservice-endpoint.yaml"))
    pods = sum(group["maxReplicas"] for group in cluster["workerGroupSpecs"])
    for model in serve_config()["applications"][0]["args"]["llm_configs"]:
        deployment = model["deployment_config"]
        scaling = deployment["autoscaling_config"]
        assert scaling["target_ongoing_requests"] <= deployment["max_ongoing_requests"] < 10_000
        assert scaling["max_replicas"] * model["engine_kwargs"].get("tensor_parallel_size", 1) <= pods
        assert model["model_loading_config"]["model_source"].startswith("/shared/")
