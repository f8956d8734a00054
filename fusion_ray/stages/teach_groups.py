"""Teachers larger than a node: actors whose engines have GPUs in several nodes, each in a placement group that is made and removed here. Called by teach.py.

Ray Data's pools know no placement groups, so shards are handed out here: one at a time to each group, to whichever is free. vLLM's Ray executor finds the group
that its actor is in and starts its workers there. A group is removed when its work is done, when its actor died or a node of it is about to be taken (another
takes its place), and by Ray itself when the driver is gone.
"""

import logging
import time
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError
from ray.util import placement_group, placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from fusion_ray.config import TeachResources
from fusion_ray.workers.attempts import TeachError

logger = logging.getLogger(__name__)

MAX_DEATHS = 3  # of groups, one after the other, with no shard done in between
LOOK_SECONDS = 10.0


@dataclass
class _Group:
    place: PlacementGroup
    actor: Any = None
    shard: str | None = None

    def loses_a_node(self) -> bool:
        """Whether one of its nodes is announced to be taken, or drained."""
        nodes = placement_group_table(self.place)["bundles_to_node_id"].values()
        return not ray._private.state.state.get_draining_nodes().keys().isdisjoint(nodes)

    def remove(self) -> None:
        if self.actor is not None:
            ray.kill(self.actor)
        remove_placement_group(self.place)


def taught_by_groups(
    actor: type,
    settings: Mapping[str, object],
    shards: Sequence[str],
    *,
    resources: TeachResources,
    environment: Mapping[str, str],
    patience: float,
) -> Generator[dict[str, object]]:
    """The rows that `actor`, made with `settings`, gives for each shard, as Ray Data would give them; in the order in which they are done.

    Up to max_workers groups of `resources.nodes` nodes, as the cluster has room for them. Raises TeachError where no shard is done in `patience` seconds
    or groups die again and again; an actor's own error is raised as it is.
    """
    waiting = deque(shards)
    standing: list[_Group] = []
    coming: dict[ray.ObjectRef, _Group] = {}  # by what each group is waited for: its place, or its shard

    def begin() -> None:
        group = _Group(placement_group(_bundles(resources), strategy="PACK"))
        standing.append(group)
        coming[group.place.ready()] = group

    def end(group: _Group) -> None:
        standing.remove(group)
        group.remove()

    deaths, since = 0, time.monotonic()
    try:
        for _ in range(min(resources.max_workers, len(shards))):
            begin()
        while waiting or any(group.shard for group in standing):
            ready, _ = ray.wait(list(coming), num_returns=1, timeout=LOOK_SECONDS)
            if not ready and time.monotonic() - since > patience:
                raise TeachError(
                    f"no shard was taught in {patience:.0f} s: the cluster has no {resources.nodes} nodes with {resources.gpus:g} GPUs and "
                    f"{resources.cpus:g} CPUs each (resources.teach), or an engine hangs"
                )
            for reference in ready:
                group = coming.pop(reference)
                if group.actor is None:
                    group.actor = _start(actor, settings, group.place, resources, environment)
                else:
                    try:
                        row = ray.get(reference)
                    except (ActorDiedError, ActorUnavailableError) as error:
                        deaths += 1
                        logger.warning("teach: a group of %d nodes died on %s", resources.nodes, group.shard)
                        waiting.appendleft(str(group.shard))
                        end(group)
                        if deaths > MAX_DEATHS:
                            raise TeachError(f"{deaths} groups of nodes died in a row: {died(error)}") from error
                        begin()
                        continue
                    deaths, since = 0, time.monotonic()
                    yield {name: column[0] for name, column in row.items()}
                if waiting and group.loses_a_node():
                    logger.warning("teach: a node is about to be taken: its group ends and another takes its place")
                    end(group)
                    begin()
                    continue
                group.shard = waiting.popleft() if waiting else None
                if group.shard is None:
                    end(group)
                else:
                    coming[group.actor.__call__.remote({"shard": np.array([group.shard])})] = group
    finally:
        for group in standing:
            group.remove()


def died(error: RayActorError) -> str:
    """Why an actor died, in one line: what its start raised, or what Ray says of its process. Ray's own text is a page of remote traceback."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    if error.actor_init_failed:
        return f"a teacher does not start: {said[-1]} (its log has the rest; see teach.engine, resources.teach and the model's folder)"
    return f"a teacher's process died: {said[-1]}"


def _bundles(resources: TeachResources) -> list[dict[str, float]]:
    """A bundle for each GPU, as vLLM's executor wants them, with its share of a node's CPUs and memory."""
    gpus = int(resources.gpus)
    bundle = {"GPU": 1, "CPU": resources.cpus / gpus}
    if resources.memory_gb is not None:
        bundle["memory"] = int(resources.memory_gb * 2**30 / gpus)
    return [bundle] * (gpus * resources.nodes)


def _start(
    actor: type,
    settings: Mapping[str, object],
    place: PlacementGroup,
    resources: TeachResources,
    environment: Mapping[str, str],
) -> Any:
    strategy = PlacementGroupSchedulingStrategy(
        place, placement_group_bundle_index=0, placement_group_capture_child_tasks=True
    )
    options = {"num_cpus": resources.cpus / int(resources.gpus), "num_gpus": 0, "scheduling_strategy": strategy}
    return ray.remote(actor).options(**options, runtime_env={"env_vars": dict(environment)}).remote(**settings)
