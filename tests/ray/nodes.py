"""What tests of clusters with several nodes share."""

import time
from typing import Any

import ray


def announce(node: Any, seconds: float) -> None:
    """Ray is told, as an autoscaler tells it, that the node will be taken in so many seconds."""
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    gcs = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    accepted, message = gcs.drain_node(node.node_id, reason, "taken", int((time.time() + seconds) * 1000))
    assert accepted, message
