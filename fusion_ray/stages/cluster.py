"""The Ray cluster of a run: join the one that is named, or start a local one with token auth, and leave it as it was found.

Called by pipeline.py and the command line; everything else in stages/ finds Ray initialised.
"""

import contextlib
import logging
import os
import secrets
from collections.abc import Iterable, Iterator

import ray

from fusion_ray.config import ConfigError, ResourcesConfig

logger = logging.getLogger(__name__)

# Quiet workers; the stages add what their engines need.
WORKER_ENV = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"}
# The driver reads these when it imports what they name.
DRIVER_ENV = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}

# Their plans, pools and progress are ours to tell (progress.py); their errors are raised.
_CHATTY = ("ray.data", "ray.train", "ray.serve")


_started = False  # whether this process started the cluster that it is joined to


def started_here() -> bool:
    """Whether the cluster is this process's own: one node, that nobody else uses and nothing adds to."""
    return _started and ray.is_initialized()


@contextlib.contextmanager
def connected(resources: ResourcesConfig) -> Iterator[None]:
    """Ray initialised for the block: `resources.address` or RAY_ADDRESS (a submitted job has it) joins a cluster, else one starts here.

    A local cluster runs with token auth under a token of its own. A cluster that was already joined by this process is used and left alone.
    """
    global _started  # Ray's cluster is the process's too
    if ray.is_initialized():
        yield
        return
    for name, value in DRIVER_ENV.items():
        os.environ.setdefault(name, value)
    address = resources.address or os.environ.get("RAY_ADDRESS")
    if address:
        logger.info("joining the Ray cluster at %s", address)
        ray.init(address=address, runtime_env={"env_vars": WORKER_ENV}, log_to_driver=False, logging_level="ERROR")
    else:
        # With the mode unset ray.init() turns token auth on; a token of our own keeps it from writing one into the user's home, which would
        # later flip `ray start` to token mode. Setting the mode here would come too late: Ray reads it when it is imported.
        if "RAY_AUTH_MODE" not in os.environ:
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        ray.init(
            address="local",  # without it Ray joins a cluster that somebody left running on this machine, and refuses the sizes
            num_cpus=resources.num_cpus,
            object_store_memory=int(resources.object_store_gb * (1 << 30)),
            include_dashboard=False,
            runtime_env={"env_vars": WORKER_ENV},
            log_to_driver=False,
            logging_level="ERROR",
        )
        logger.info("started a local Ray cluster with %s logical CPUs", int(ray.cluster_resources().get("CPU", 0)))
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    _started = not address
    try:
        yield
    finally:
        _started = False
        ray.shutdown()


def check_room(resources: ResourcesConfig, stages: Iterable[str]) -> None:
    """Whether the cluster has what the least of each stage's pool needs, which would else be waited for without an end.

    Raises ConfigError with all that is lacking where the cluster is this process's own; one that was joined may grow, so there it is a warning.
    """
    have = ray.cluster_resources()
    pools = {pool for stage in stages for pool in ((stage, "serve") if stage == "evaluate" else (stage,))}
    lacking = []
    for name in ("teach", "align", "distill", "merge", "serve", "evaluate"):
        if name not in pools:
            continue
        pool = getattr(resources, name)
        nodes = pool.min_workers * getattr(pool, "nodes", 1)
        for kind, each in (("CPU", pool.cpus), ("GPU", pool.gpus)):
            if each * nodes > have.get(kind, 0):
                key = f"resources.{name}.{kind.lower()}s"
                lacking.append(
                    f"{key} is {each:g} for each of {nodes} workers, the cluster has {have.get(kind, 0):g} {kind}s"
                )
    if lacking and started_here():
        raise ConfigError(
            "\n".join(lacking)
            + "\nlower them (or min_workers), raise resources.num_cpus (logical CPUs), or give resources.address of a larger cluster"
        )
    for lack in lacking:
        logger.warning("%s: its stage waits until there are more", lack)
