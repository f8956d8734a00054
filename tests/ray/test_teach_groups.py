"""Teachers that have GPUs of several nodes: their placement groups on a cluster of pretended GPUs, whatever dies in between, and none of them afterwards.

The engine is the real one on the CPU, in the actor alone: vLLM's Ray executor, which would start workers in the group, does not run without GPUs.
"""

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group_table

from fusion_ray.config import ModelConfig, TeachConfig, TeachResources
from fusion_ray.corpus.shards import REJECTED
from fusion_ray.stages import teach as stage
from fusion_ray.stages.teach_groups import taught_by_groups
from fusion_ray.store import Artifact, Store
from fusion_ray.workers.attempts import TeachError
from tests.ray.nodes import STORE, announce, head_alone, teachers
from tests.teaching import make_corpus
from tests.tiny import make_tiny_model

pytestmark = [pytest.mark.ray, pytest.mark.slow]  # four starts of an engine
TWO_NODES = TeachResources(gpus=1, cpus=1, nodes=2, memory_gb=0.5)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    os.environ["RAY_AUTH_MODE"] = "disabled"  # loopback
    cluster = head_alone(2)
    for _ in range(2):
        cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=STORE)
    environment = {"PYTHONPATH": str(Path(__file__).parents[2])}
    ray.init(address=cluster.address, log_to_driver=False, runtime_env={"env_vars": environment})
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = make_tiny_model(tmp_path_factory.mktemp("models") / "one", "llama", "bytelevel", seed=1)
    return ModelConfig(name="one", path=str(folder), dtype="float32")


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "parallel", lambda *given, **named: {})


def teach(out: Artifact, corpus: Artifact, model: ModelConfig, resources: TeachResources, seen: list[object]) -> None:
    def report(figures: Mapping[str, object]) -> None:
        seen.append(figures["actors"])
        standing.append([group for group in placement_group_table().values() if group["state"] == "CREATED"])
        if len(seen) == 2 and resources.nodes > 1:
            kill_the_actor()

    standing: list[list[dict]] = []
    teach_with(out, corpus, model, resources, report)
    for groups in standing if resources.nodes > 1 else ():
        assert [sorted(group["bundles_to_node_id"]) for group in groups] in ([[0, 1]], [])
        assert all(len(set(group["bundles_to_node_id"].values())) == 2 for group in groups)  # one GPU each
        assert all(bundle["memory"] == 2**29 for group in groups for bundle in group["bundles"].values())
    assert resources.nodes == 1 or any(standing)


def teach_with(
    out: Artifact,
    corpus: Artifact,
    model: ModelConfig,
    resources: TeachResources,
    report: Callable[[Mapping[str, object]], None],
) -> None:
    stage.teach(
        out,
        corpus,
        model=model,
        template=None,
        config=TeachConfig(top_k=4, max_length=100),
        max_rejected=0.01,
        seed=0,
        resources=resources,
        report=report,
    )


def kill_the_actor() -> None:
    process, _ = next(teachers())
    process.send_signal(signal.SIGKILL)


def left() -> list[str]:
    return [group["state"] for group in placement_group_table().values() if group["state"] != "REMOVED"]


def test_groups_teach_what_a_pool_teaches(cluster: Cluster, model: ModelConfig, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    outs = [Store(str(tmp_path / "store")).artifact("teach", 1, {"kind": kind}, {}) for kind in ("pool", "groups")]
    seen: list[object] = []
    teach(outs[0], corpus, model, TeachResources(), [])
    teach(outs[1], corpus, model, TWO_NODES, seen)
    assert seen[-1] == 2  # the one that was killed and the one that took its place
    names = [unit.name for unit in corpus.manifest().units if unit.name != REJECTED]
    assert len(seen) == len(names)
    for name in names:
        assert outs[1].read_bytes(name) == outs[0].read_bytes(name)
    assert left() == []


def test_an_error_leaves_no_group(cluster: Cluster, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    out = Store(str(tmp_path / "store")).artifact("teach", 1, {}, {})
    nobody = ModelConfig(name="nobody", path=str(tmp_path / "nothing"))
    with pytest.raises((ValueError, OSError), match="nothing"):
        teach(out, corpus, nobody, TWO_NODES, [])
    assert left() == []


class Dies:
    def __call__(self, batch: Mapping[str, object]) -> None:
        os._exit(1)


@pytest.mark.parametrize(
    ("nodes", "says"),
    [(3, "the cluster has no 3 nodes with 1 GPUs and 1 CPUs"), (2, "4 groups of nodes died one after the other")],
)
def test_what_never_works_is_given_up(cluster: Cluster, nodes: int, says: str) -> None:
    resources = TeachResources(gpus=1, cpus=1, nodes=nodes)
    with pytest.raises(TeachError, match=says):
        list(taught_by_groups(Dies, {}, ["a", "b"], resources=resources, environment={}, patience=2))
    assert left() == []


def test_a_group_ends_when_a_node_of_it_is_announced(cluster: Cluster, model: ModelConfig, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    out = Store(str(tmp_path / "store")).artifact("teach", 1, {}, {})
    third = cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=STORE)
    leaving: list[str] = []
    standing: list[set[str]] = []

    def report(figures: Mapping[str, object]) -> None:
        tables = [group for group in placement_group_table().values() if group["state"] == "CREATED"]
        standing.append({node for group in tables for node in group["bundles_to_node_id"].values()})
        if figures["done"] == 2:
            node = next(node for node in [*cluster.worker_nodes] if node.node_id in standing[-1] and node != third)
            leaving.append(node.node_id)
            announce(node, 600)

    teach_with(out, corpus, model, TWO_NODES, report)
    assert leaving[0] in standing[1]
    assert leaving[0] not in standing[-1]
    assert third.node_id in standing[-1]
    assert left() == []
