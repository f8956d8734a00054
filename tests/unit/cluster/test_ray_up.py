"""The files for `ray up`, through Ray's own preparation and schema; no cloud is called."""

import os
from pathlib import Path
from typing import Any  # parsed YAML

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

FOLDER = Path(__file__).resolve().parents[3] / "cluster"
FILES = ("aws.yaml", "gcp.yaml")


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token file that file_mounts names: Ray looks whether it is there."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0" * 64)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert os.path.expanduser("~") == str(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_ray_accepts_the_file(name: str) -> None:
    validate_config(prepare_config(load(name)))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", ["top", "node type", "docker"])
def test_a_misspelt_field_is_caught(name: str, where: str) -> None:
    config = load(name)
    if where == "top":
        config["idle_timeout_minute"] = config.pop("idle_timeout_minutes")
    elif where == "node type":
        config["available_node_types"]["teacher"]["max_worker"] = 3
    else:
        config["docker"]["run_option"] = config["docker"].pop("run_options")
    with pytest.raises(Exception, match=r"(?i)additional propert|unexpected|unevaluated"):
        validate_config(prepare_config(config))


@pytest.mark.parametrize("name", FILES)
def test_the_head_takes_no_work_and_is_on_demand(name: str) -> None:
    config = load(name)
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]
    assert "preemptible" not in str(head["node_config"])


@pytest.mark.parametrize("name", FILES)
def test_workers_come_from_nothing_and_some_are_spot(name: str) -> None:
    config = load(name)
    workers = {key: value for key, value in config["available_node_types"].items() if key != config["head_node_type"]}
    assert all(worker["min_workers"] == 0 for worker in workers.values())
    assert sum(worker["max_workers"] for worker in workers.values()) >= config["max_workers"]
    spot = [
        key
        for key, value in workers.items()
        if "spot" in str(value["node_config"]) or "preemptible" in str(value["node_config"])
    ]
    assert "teacher" in spot
    assert "trainer" not in spot


@pytest.mark.parametrize("name", FILES)
def test_every_start_has_token_auth_and_the_token(name: str) -> None:
    config = load(name)
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in config[key] if "ray start" in command]
        assert len(starts) == 1
        assert "RAY_AUTH_MODE=token" in starts[0]
    assert "--dashboard-host=0.0.0.0" not in str(config)


def test_gcp_names_its_gpus() -> None:
    for node in load("gcp.yaml")["available_node_types"].values():
        counted = sum(item["acceleratorCount"] for item in node["node_config"].get("guestAccelerators", []))
        assert node["resources"].get("GPU", 0) == counted


def test_both_run_the_image_of_the_kubernetes_files() -> None:
    kuberay = yaml.safe_load((FOLDER / "kuberay" / "raycluster-gpu.yaml").read_text(encoding="utf-8"))
    image = kuberay["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["image"]
    assert {load(name)["docker"]["image"] for name in FILES} == {image}
