"""The whole graph on the zoo's real models: one run from corpus to report, again, with one source more, and as a Ray job."""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import LIMIT_SECONDS, ROOT, fusion_ray, manifests, small_config

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("small")


@pytest.fixture(scope="module")
def first_run(folder: Path) -> dict[str, object]:
    """report.json of an undisturbed run."""
    done = fusion_ray("run", str(small_config(folder)))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads((folder / "runs" / "runs" / "small" / "report.json").read_text())


def statuses(folder: Path) -> dict[str, str]:
    report = json.loads((folder / "runs" / "runs" / "small" / "report.json").read_text())
    return {f"{stage['stage']}:{stage['branch']}": stage["status"] for stage in report["stages"]}


def test_report_json_holds_what_the_run_made(first_run: dict[str, object]) -> None:
    assert set(first_run) == {"run", "versions", "stages", "corpus", "models", "alignment", "merges", "engine"}
    corpus = first_run["corpus"]
    assert corpus["rows"] == sum(source["kept"] for source in corpus["sources"].values())  # type: ignore[index, attr-defined]
    assert {stage["status"] for stage in first_run["stages"]} == {"ran"}  # type: ignore[index, attr-defined]
    models = {model["name"]: model for model in first_run["models"]}  # type: ignore[index, attr-defined]
    roles = [model["role"] for model in models.values()]
    assert roles == ["pivot", "source", "source", "sft", "target", "target", "fused", "fused"]
    assert {model["merge"] for model in models.values()} == {None, "varm", "sce"}
    for model in models.values():
        assert len(model["scores"]) == 8
        assert model["overall"]["n"] == 16
        assert 0 <= model["overall"]["low"] <= model["overall"]["mean"] <= model["overall"]["high"] <= 1
        assert 0 < model["bits_per_byte"] < 8
    pivot = models["pivot"]["parameters"]
    assert {model["parameters"] for name, model in models.items() if name not in ("qwen3", "neox")} == {pivot}
    for aligned in first_run["alignment"]:  # type: ignore[attr-defined]
        assert sum(aligned["coverage"].values()) == pytest.approx(1, abs=1e-6)
        assert 0 < aligned["mass_kept"] <= 1
        assert None not in aligned.values()
        assert aligned["worst_pairs"]
    assert first_run["engine"]["teach"].startswith("vllm ")  # type: ignore[index]
    assert "ray serve" in first_run["engine"]["serve"]  # type: ignore[index]


def test_report_page_stands_alone(first_run: dict[str, object], folder: Path) -> None:
    page = (folder / "runs" / "runs" / "small" / "report.html").read_text()
    assert "<svg" in page
    for outside in ('src="http', 'href="http', "<script"):
        assert outside not in page


def test_every_model_of_the_table_is_another(first_run: dict[str, object]) -> None:
    bits = [model["bits_per_byte"] for model in first_run["models"]]  # type: ignore[attr-defined]
    assert len(set(bits)) == len(bits)


def test_second_run_does_nothing(first_run: dict[str, object], folder: Path) -> None:
    done = fusion_ray("run", str(folder / "small.yaml"))
    assert done.returncode == 0, done.stderr
    assert set(statuses(folder).values()) == {"cached"}


def test_one_source_more_runs_its_branch_alone(first_run: dict[str, object], folder: Path) -> None:
    before = set(statuses(folder))
    config = small_config(folder, sources=("qwen3", "neox", "gemma"))
    done = fusion_ray("merge-targets", str(config))
    assert done.returncode == 0, done.stderr
    for stage in ("corpus", "teach", "align", "distill", "merge"):
        assert (
            len(manifests(folder / "runs", stage))
            == {"corpus": 1, "teach": 4, "align": 3, "distill": 4, "merge": 4}[stage]
        )
    cached = {line.split()[1] for line in done.stdout.splitlines() if " cached " in line}
    ran = {line.split()[1] for line in done.stdout.splitlines() if " done in " in line}
    assert ran == {"teach:gemma", "align:gemma", "distill:gemma", "merge:varm", "merge:sce"}
    assert cached == {name for name in before if name.split(":")[0] in ("corpus", "teach", "align", "distill")} - {
        "distill:sft"
    }


def _free_ports(count: int) -> list[str]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [str(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture
def ray_head(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A cluster as `ray start` makes it, token auth on: the dashboard's address and the environment with its token."""
    port, dashboard, agent = _free_ports(3)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    ray = str(Path(sys.executable).parent / "ray")
    arguments = ["start", "--head", "--block", "--port", port, "--dashboard-port", dashboard, "--num-cpus", "8"]
    # The agent takes submitted jobs; at its default port it would meet another cluster's on this machine.
    arguments += ["--dashboard-agent-listen-port", agent, "--object-store-memory", "300000000"]
    arguments += ["--temp-dir", f"/tmp/fusion-ray-{secrets.token_hex(4)}"]
    with open(tmp_path / "head.log", "wb") as log:
        head = subprocess.Popen([ray, *arguments], env=environment, stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{dashboard}"
        deadline = time.monotonic() + 120
        listing = [ray, "job", "list", "--address", address]
        while subprocess.run(listing, env=environment, capture_output=True, check=False).returncode:
            assert head.poll() is None and time.monotonic() < deadline, (tmp_path / "head.log").read_text()  # noqa: PT018  # one reason
            time.sleep(2)
        yield address, environment
    finally:
        head.terminate()
        head.wait(60)


def test_ray_job_gives_the_same_artefacts(
    first_run: dict[str, object], folder: Path, tmp_path: Path, ray_head: tuple[str, dict[str, str]]
) -> None:
    address, environment = ray_head
    ray = str(Path(sys.executable).parent / "ray")
    small = folder / "small.yaml"
    small_config(folder)
    command = [ray, "job", "submit", "--address", address, "--working-dir", str(ROOT), "--"]
    command += [sys.executable, "jobs/merge_targets.py", str(small), f"run.storage={tmp_path}/runs"]
    for _ in range(30):  # the head answers before its agent has registered
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
        )
        if "No available agent" not in done.stderr:
            break
        time.sleep(2)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    for stage in ("align", "merge"):
        mine = manifests(tmp_path / "runs", stage)
        assert mine
        assert mine.items() <= manifests(folder / "runs", stage).items()
    refused = subprocess.run(
        [ray, "job", "list", "--address", address],
        env=environment | {"RAY_AUTH_TOKEN": "0" * 64},
        capture_output=True,
        check=False,
    )
    assert refused.returncode != 0  # token auth is on
