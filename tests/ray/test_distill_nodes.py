"""The distill stage on a cluster whose nodes go: one is announced to be taken and then taken, the next dies without a word. Nobody calls the stage again."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from fusion_ray.config import DistillConfig, DistillResources, ModelConfig
from fusion_ray.stages.distill import distill
from fusion_ray.store import Artifact, StoreError
from tests import tiny
from tests.ray import training
from tests.ray.distilling import UNDER_WAY, rows_of, steps
from tests.ray.nodes import STORE, announce, head_alone

pytestmark = [pytest.mark.ray, pytest.mark.slow]  # three starts of a worker group: a minute and a half


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # loopback
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.5")
    monkeypatch.setenv(
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1"
    )  # another test's local cluster may have switched it off
    cluster = head_alone()
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def train(
    out: Artifact,
    rows: Artifact,
    pivot: Path,
    config: DistillConfig,
    failures: list[BaseException],
    resources: DistillResources | None = None,
) -> None:
    try:
        distill(
            out,
            rows,
            pivot=ModelConfig(name="pivot", path=str(pivot)),
            config=config,
            seed=7,
            max_rejected=0.1,
            resources=resources or DistillResources(max_workers=2),
            report=lambda figures: None,
        )
    except BaseException as error:
        failures.append(error)


def wait_until(true: Any, failures: list[BaseException], what: str, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert not failures, failures
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.05)


def saved(out: Artifact) -> list[int]:
    """The steps of the checkpoints that are whole."""
    names = out.names("_work/checkpoints")
    return sorted({int(name.split("/")[-2].split("-")[1]) for name in names if name.endswith("complete.json")})


def test_an_announced_and_a_silent_loss_of_a_node(tmp_path: Path, cluster: Cluster) -> None:
    tiny.make_tiny_model(tmp_path / "pivot", "llama", dtype="bfloat16")
    rows = rows_of(tmp_path)
    # Checkpoints of its own accord would come at step 120: what is saved before is saved because of the notice.
    config = training.config(epochs=40, checkpoint_every=120, learning_rate=3e-4)
    out = Artifact(str(tmp_path / "out"), "distill", "the-task")
    failures: list[BaseException] = []
    thread = threading.Thread(target=train, args=(out, rows, tmp_path / "pivot", config, failures))
    first = cluster.add_node(num_cpus=2, object_store_memory=STORE)
    thread.start()
    wait_until(lambda: max(steps(out, UNDER_WAY), default=0) >= 5, failures, "step 5 was reached")
    announce(first, seconds=30)
    wait_until(lambda: saved(out), failures, "a checkpoint was saved")
    (at,) = saved(out)
    assert 5 <= at < 120
    cluster.remove_node(first, allow_graceful=False)
    second = cluster.add_node(num_cpus=2, object_store_memory=STORE)
    wait_until(lambda: 120 in saved(out), failures, "step 120 was saved on the second node")
    cluster.remove_node(second, allow_graceful=False)
    cluster.add_node(num_cpus=2, object_store_memory=STORE)
    thread.join(240)
    assert not thread.is_alive()
    assert not failures
    assert steps(out) == list(range(1, 161))
    shards = [Path(rows.path(unit.name)) for unit in rows.manifest().units]
    training.run_training(tmp_path / "undisturbed", tmp_path / "pivot", shards, config, world_size=2)
    assert out.read_bytes("model.safetensors") == (tmp_path / "undisturbed/export/model.safetensors").read_bytes()
    assert "# pivot, fine-tuned" in out.read_bytes("README.md").decode()


def test_a_node_that_is_not_replaced_where_fewer_workers_do(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three workers, one of them on the node that is lost: two go on from the newest checkpoint with the same global batches."""
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
    tiny.make_tiny_model(tmp_path / "pivot", "llama", dtype="bfloat16")
    rows = rows_of(tmp_path)
    config = training.config(epochs=30, checkpoint_every=20, learning_rate=3e-4)
    out = Artifact(str(tmp_path / "out"), "distill", "the-task")
    lost = [cluster.add_node(num_cpus=1, object_store_memory=STORE) for _ in range(2)][-1]
    failures: list[BaseException] = []
    resources = DistillResources(min_workers=1, max_workers=3)
    thread = threading.Thread(target=train, args=(out, rows, tmp_path / "pivot", config, failures, resources))
    thread.start()
    wait_until(lambda: saved(out), failures, "a checkpoint was saved")
    assert ranks(out) == {3}
    cluster.remove_node(lost, allow_graceful=False)
    wait_until(lambda: 2 in ranks(out), failures, "two workers had saved a checkpoint")
    thread.join(240)
    assert not thread.is_alive()
    assert not failures
    assert steps(out) == list(range(1, 121))
    shards = [Path(rows.path(unit.name)) for unit in rows.manifest().units]
    alone = training.run_training(tmp_path / "undisturbed", tmp_path / "pivot", shards, config)
    told = [json.loads(line)["sft"] for line in out.read_bytes("metrics.jsonl").splitlines()]
    assert told == pytest.approx([line["sft"] for line in alone], rel=2e-3)


def ranks(out: Artifact) -> set[int]:
    """How many workers saved each of the checkpoints that are there."""
    names = [name for name in out.names("_work/checkpoints") if name.endswith("complete.json")]
    found = set()
    for name in names:
        with contextlib.suppress(StoreError):  # removed at this moment
            found.add(int(str(out.read_json(name)["world_size"])))
    return found
