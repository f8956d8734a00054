"""A node of the teachers' pool is announced to be taken: it gets no further shard, long before it goes, and nothing is taught twice."""

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from fusion_ray.config import ModelConfig, TeachConfig, TeachResources
from fusion_ray.corpus.shards import REJECTED
from fusion_ray.logprobs.codec import decode, from_table
from fusion_ray.stages import teach as stage
from fusion_ray.store import Store
from tests.ray.nodes import STORE, announce, head_alone, teachers
from tests.teaching import make_corpus
from tests.tiny import make_tiny_model

pytestmark = [pytest.mark.ray, pytest.mark.slow]
SECONDS = 6  # until Ray Data has heard of it
SHARDS, ROWS = 240, 40  # both actors have work for half a minute


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    os.environ["RAY_AUTH_MODE"] = "disabled"  # loopback
    cluster = head_alone()
    environment = {"PYTHONPATH": str(Path(__file__).parents[2])}
    ray.init(address=cluster.address, log_to_driver=False, runtime_env={"env_vars": environment})
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def teaching(raylet: int) -> bool:
    """Whether an actor of the node is at a shard."""
    return any(title.endswith(".submit") for _, title in teachers(raylet))


def test_an_announced_node_gets_no_further_shard(cluster: Cluster, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "one", "llama", "bytelevel", seed=1)
    corpus = make_corpus(tmp_path, rows=SHARDS * ROWS, rows_per_shard=ROWS)
    out = Store(str(tmp_path / "store")).artifact("teach", 1, {}, {})
    second = cluster.add_node(num_cpus=1, object_store_memory=STORE)
    announced: list[float] = []
    before: list[bool] = []
    at_work: list[
        tuple[float, bool]
    ] = []  # seconds since the announcement, and whether the announced node is at a shard
    raylet = second.all_processes["raylet"][0].process.pid

    def report(figures: Mapping[str, object]) -> None:
        if not announced:
            before.append(teaching(raylet))
        if not announced and figures["actors"] == 2 and any(before):
            announce(second, 600)
            announced.append(time.monotonic())
        if announced:
            at_work.append((time.monotonic() - announced[0], teaching(raylet)))

    stage.teach(
        out,
        corpus,
        model=ModelConfig(name="one", path=str(model), dtype="float32"),
        template=None,
        config=TeachConfig(top_k=4, max_length=100),
        max_rejected=0.0,
        seed=0,
        resources=TeachResources(min_workers=2, max_workers=2),
        report=report,
    )
    late = [busy for seconds, busy in at_work if seconds > SECONDS]
    assert len(late) > 20, "the stage was over before the notice could be heeded"
    assert not any(late)
    names = [unit.name for unit in out.manifest().units if unit.name != REJECTED]
    ids = [row.id for name in names for row in from_table(decode(out.read_bytes(name)))]
    assert sorted(ids) == sorted(f"row-{number}" for number in range(SHARDS * ROWS))
