"""What tests of clusters with several nodes share. Raylets are children of the test's process, workers of their raylet."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

STORE = 100 << 20  # bytes of a node's object store


def head_alone(cpus: int = 1) -> Cluster:
    """A cluster to add nodes to."""
    head = {"num_cpus": cpus, "object_store_memory": STORE, "include_dashboard": False}
    return Cluster(initialize_head=True, head_node_args=head)


def teachers(raylet: int | None = None) -> Iterator[tuple[psutil.Process, str]]:
    """The processes of TeachShards, of one node or of all, with their titles: Ray names a worker's process after its actor and what that does."""
    for process in psutil.Process(raylet).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            title = " ".join(process.cmdline()).strip()
            if "TeachShards" in title:
                yield process, title


def announce(node: Any, seconds: float) -> None:
    """Ray is told, as an autoscaler tells it, that the node will be taken in so many seconds."""
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    gcs = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    accepted, message = gcs.drain_node(node.node_id, reason, "taken", int((time.time() + seconds) * 1000))
    assert accepted, message
