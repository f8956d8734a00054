"""Whether the node of this process is about to be taken: a spot machine whose loss the cloud announces, or a node that Ray drains. Called by actors."""

import time

import ray

SECONDS = 5.0


class Notice:
    """Asks Ray at most every SECONDS: within the two minutes that clouds give, and next to nothing beside the work."""

    def __init__(self) -> None:
        self._node = ray.get_runtime_context().get_node_id()
        self._asked = -SECONDS

    def given(self) -> bool:
        if time.monotonic() - self._asked < SECONDS:
            return False
        self._asked = time.monotonic()
        return self._node in ray._private.state.state.get_draining_nodes()
