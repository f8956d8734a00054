"""The distill stage on a real Ray cluster: a killed driver, a killed worker, branches side by side, and what the user must mend.

Three runs of one task - undisturbed, driver killed, worker killed - must end in the same bytes.
"""

import contextlib
import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest
import ray

from fusion_ray.config import DistillConfig, DistillResources, ModelConfig, ResourcesConfig
from fusion_ray.stages.cluster import connected
from fusion_ray.stages.distill import distill
from fusion_ray.store import Artifact, Manifest
from tests import tiny
from tests.ray import training
from tests.ray.distilling import UNDER_WAY, kill_a_driver, rows_of, steps, wait_for_step

pytestmark = pytest.mark.ray


LINE = {"step", "steps", "epoch", "sft", "fusion", "distilled", "from_source", "learning_rate", "grad_norm"}
LINE |= {"tokens_per_second", "peak_memory_bytes", "eta_seconds"}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pivot, sealed align rows, and room for artefacts."""
    work = tmp_path_factory.mktemp("distill")
    tiny.make_tiny_model(work / "pivot", "llama", dtype="bfloat16")
    rows_of(work)
    return work


def settings() -> DistillConfig:
    """160 steps, so that there is a middle to be killed in."""
    return training.config(epochs=40, checkpoint_every=10, learning_rate=3e-4)


def artifact(work: Path, name: str) -> Artifact:
    """All runs here are of one task, so they have one key; only their folders differ."""
    return Artifact(str(work / name), "distill", "the-task")


@pytest.fixture(scope="module")
def killed_driver(work: Path) -> Artifact:
    """An artefact whose driver got SIGKILL after step 25, and left checkpoints of steps 10 and 20."""
    out = artifact(work, "killed-driver")
    kill_a_driver(out, work, settings(), after=25, workers=2)
    return out


@pytest.fixture(scope="module")
def cluster(killed_driver: Artifact) -> Iterator[None]:
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # loopback; ray read its mode when it was imported
    with connected(ResourcesConfig(num_cpus=6, object_store_gb=0.2)):
        yield


def _run(out: Artifact, work: Path, config: DistillConfig, seen: list[Mapping[str, object]] | None = None) -> Manifest:
    return distill(
        out,
        Artifact(str(work / "rows"), "align", "rows"),
        pivot=ModelConfig(name="pivot", path=str(work / "pivot")),
        config=config,
        seed=7,
        max_rejected=0.1,
        resources=DistillResources(max_workers=2),
        report=(seen if seen is not None else []).append,
    )


def _kill_a_worker(out: Artifact) -> int:
    """SIGKILL to rank 0 of the run that makes `out`: it holds metrics.jsonl open."""
    wait_for_step(out, 25)
    held = str(Path(out.url) / "_work" / "metrics.jsonl")
    for process in psutil.Process().children(recursive=True):
        try:
            if held in {opened.path for opened in process.open_files()}:
                os.kill(process.pid, signal.SIGKILL)
                return process.pid
        except psutil.Error:
            continue
    raise AssertionError(f"no process holds {held}")


def test_killed_driver_and_killed_worker_end_in_the_undisturbed_bytes(
    work: Path, killed_driver: Artifact, cluster: None
) -> None:
    """Also: three branches in threads of one driver, and no step twice in metrics.jsonl."""
    outs = [artifact(work, "undisturbed"), killed_driver, artifact(work, "killed-worker")]
    before = steps(killed_driver, UNDER_WAY)
    failures: list[BaseException] = []
    seen: list[list[Mapping[str, object]]] = [[], [], []]

    def branch(number: int) -> None:
        try:
            _run(outs[number], work, settings(), seen[number])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=branch, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    assert _kill_a_worker(outs[2]) > 0
    for thread in threads:
        thread.join(400)
    assert not failures
    assert max(before) >= 25
    for out in outs:
        assert out.sealed
        out.verify()
        assert steps(out) == list(range(1, 161))
        assert not out.exists("_work")
        assert out.read_bytes("model.safetensors") == outs[0].read_bytes("model.safetensors")
        assert out.read_bytes("training.json") == outs[0].read_bytes("training.json")
        assert any(name.startswith("tensorboard/") for name in out.names())
    last = json.loads(outs[0].read_bytes("metrics.jsonl").splitlines()[-1])
    assert last.keys() >= LINE
    losses = [[json.loads(line)["sft"] for line in out.read_bytes("metrics.jsonl").splitlines()] for out in outs]
    assert losses[0] == losses[1] == losses[2]
    assert all(figures[-1]["done"] == figures[-1]["total"] == 160 for figures in seen)
    assert int(str(seen[1][0]["done"])) > 10  # the resumed branch did not start over


def test_a_branch_that_has_no_room_waits_for_the_one_before_it(work: Path, cluster: None) -> None:
    """Two workers of two CPUs each, of six: one branch at a time."""
    times: list[list[float]] = [[], []]
    failures: list[BaseException] = []

    def branch(number: int) -> None:
        try:
            distill(
                artifact(work, f"queued-{number}"),
                Artifact(str(work / "rows"), "align", "rows"),
                pivot=ModelConfig(name="pivot", path=str(work / "pivot")),
                config=training.config(),
                seed=7,
                max_rejected=0.1,
                resources=DistillResources(max_workers=2, cpus=2),
                report=lambda figures: times[number].append(time.monotonic()),
            )
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=branch, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not failures
    first, second = sorted(times)
    assert first[-1] < second[0]
    assert all(artifact(work, f"queued-{number}").sealed for number in range(2))


def test_the_figures_of_a_step_are_ray_metrics(work: Path, cluster: None) -> None:
    """As Prometheus reads them from the node."""
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    found: set[str] = set()

    def look(figures: Mapping[str, object]) -> None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2) as page:  # it may not be up yet
            found.update(line.split("{")[0] for line in page.read().decode().splitlines() if not line.startswith("#"))

    distill(
        artifact(work, "watched"),
        Artifact(str(work / "rows"), "align", "rows"),
        pivot=ModelConfig(name="pivot", path=str(work / "pivot")),
        config=training.config(epochs=60, checkpoint_every=300, learning_rate=3e-4),
        seed=7,
        max_rejected=0.1,
        resources=DistillResources(max_workers=1),
        report=look,
    )
    assert {f"ray_fusion_ray_distill_{name}" for name in LINE - {"step", "steps"}} <= found


def test_a_sealed_artefact_is_left_alone(work: Path, cluster: None) -> None:
    out = artifact(work, "undisturbed")
    if not out.sealed:
        _run(out, work, settings())
    began = time.monotonic()
    assert _run(out, work, settings()).info["steps"] == 160
    assert time.monotonic() - began < 1.0


def test_rows_of_another_pivot_are_named_and_not_retried(work: Path, cluster: None, tmp_path: Path) -> None:
    rows = rows_of(tmp_path, vocabulary=5000)
    out = Artifact(str(tmp_path / "out"), "distill", "another")
    with pytest.raises(ValueError, match=r"shard-00000.parquet: row 'row-\d+' has ids outside the pivot's embedding"):
        distill(
            out,
            rows,
            pivot=ModelConfig(name="pivot", path=str(work / "pivot")),
            config=settings(),
            seed=7,
            max_rejected=0.1,
            resources=DistillResources(max_workers=2),
            report=lambda figures: None,
        )
    assert not out.sealed
