"""A node of the teachers' pool is announced to be taken: its actor begins no further shard there, long before the node goes, and nothing is taught twice."""

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from fusion_ray.config import ModelConfig, TeachConfig, TeachResources
from fusion_ray.corpus.shards import REJECTED
from fusion_ray.logprobs.codec import decode, from_table
from fusion_ray.stages import teach as stage
from fusion_ray.stages.notice import SECONDS
from fusion_ray.store import Store
from tests.ray.nodes import announce
from tests.teaching import make_corpus
from tests.tiny import make_tiny_model

pytestmark = [pytest.mark.ray, pytest.mark.slow]
STORE = 100 << 20  # bytes of a node's object store
SHARDS, ROWS = 600, 4  # half a minute


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    os.environ["RAY_AUTH_MODE"] = "disabled"  # loopback
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False}
    )
    environment = {"PYTHONPATH": str(Path(__file__).parents[2])}
    ray.init(address=cluster.address, log_to_driver=False, runtime_env={"env_vars": environment})
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def actors() -> int:
    """Ray names a worker's process after what its actor does."""
    found = 0
    for process in psutil.Process().children(recursive=True):
        try:
            found += "TeachShards" in " ".join(process.cmdline())
        except psutil.Error:
            continue
    return found


def test_an_announced_node_gets_no_further_shard(cluster: Cluster, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "one", "llama", "bytelevel", seed=1)
    corpus = make_corpus(tmp_path, rows=SHARDS * ROWS, rows_per_shard=ROWS)
    out = Store(str(tmp_path / "store")).artifact("teach", 1, {}, {})
    second = cluster.add_node(num_cpus=1, object_store_memory=STORE)
    announced: list[float] = []
    at_work: list[tuple[float, int]] = []  # seconds since the announcement, actors

    def report(figures: Mapping[str, object]) -> None:
        if not announced and figures["actors"] == 2:
            assert actors() == 2
            announce(second, 600)
            announced.append(time.monotonic())
        if announced:
            at_work.append((time.monotonic() - announced[0], actors()))

    stage.teach(
        out,
        corpus,
        model=ModelConfig(name="one", path=str(model), dtype="float32"),
        template=None,
        config=TeachConfig(top_k=4, max_length=100),
        max_rejected=0.0,
        seed=0,
        resources=TeachResources(min_workers=1, max_workers=2),
        report=report,
    )
    late = [count for seconds, count in at_work if seconds > 2 * SECONDS]
    assert late, "the stage was over before the notice could be heeded"
    assert set(late) == {1}
    assert any(node["NodeID"] == second.node_id and node["Alive"] for node in ray.nodes())
    names = [unit.name for unit in out.manifest().units if unit.name != REJECTED]
    ids = [row.id for name in names for row in from_table(decode(out.read_bytes(name)))]
    assert sorted(ids) == sorted(f"row-{number}" for number in range(SHARDS * ROWS))
