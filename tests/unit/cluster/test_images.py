"""The Dockerfiles name files that exist and hold no secret."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
FILES = ("Dockerfile", "Dockerfile.cpu")


def lines(name: str) -> list[str]:
    text = (ROOT / "cluster" / name).read_text(encoding="utf-8").replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize("name", FILES)
def test_copied_files_exist(name: str) -> None:
    copies = [line.split()[1:] for line in lines(name) if line.startswith("COPY")]
    sources = [word for words in copies for word in [w for w in words if not w.startswith("--")][:-1]]
    assert {"fusion_ray", "jobs", "pyproject.toml"} <= set(sources)
    missing = [source for source in sources if not (ROOT / source).exists() and source != "README.md"]
    assert missing == []


@pytest.mark.parametrize("name", FILES)
def test_packages_come_from_the_lock_alone(name: str) -> None:
    installs = [part for line in lines(name) for part in line.split("&&") if "pip install" in part]
    assert installs
    assert all("--no-deps" in part for part in installs)


@pytest.mark.parametrize("name", FILES)
def test_no_secret_and_token_auth_on(name: str) -> None:
    text = "\n".join(lines(name))
    assert "RAY_AUTH_MODE=token" in text
    assert not re.search(r"(_KEY|_TOKEN|PASSWORD)=", text)


def test_the_gpu_image_is_of_the_lock_s_ray_and_python() -> None:
    lock = (ROOT / "requirements" / "gpu.lock").read_text(encoding="utf-8")
    version = next(line.split("==")[1] for line in lock.splitlines() if line.startswith("ray=="))
    base = next(line for line in lines("Dockerfile") if line.startswith("ARG BASE="))
    assert f"ray:{version}-py311" in base


def test_the_cpu_image_does_not_run_as_root() -> None:
    assert "USER ray" in lines("Dockerfile.cpu")
