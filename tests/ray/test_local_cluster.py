"""A local cluster is our own, also where somebody left another one running on the machine."""

import os
import subprocess
import sys

import pytest
from ray.cluster_utils import Cluster

pytestmark = pytest.mark.ray

RUN = """
import ray
from fusion_ray.config import ResourcesConfig
from fusion_ray.stages.cluster import connected
with connected(ResourcesConfig(num_cpus=3, object_store_gb=0.1)):
    print(int(ray.cluster_resources()["CPU"]))
"""


SMALL = """
import ray
from fusion_ray.config import ResourcesConfig
from fusion_ray.stages.cluster import check_room, connected
resources = ResourcesConfig(num_cpus=2, object_store_gb=0.1, teach={"gpus": 1}, distill={"max_workers": 3}, merge={"cpus": 9})
with connected(resources):
    check_room(resources, ["corpus", "align"])
    check_room(resources, ["corpus", "teach", "distill"])
"""


def test_what_a_local_cluster_can_never_have_is_said_before_it_is_waited_for() -> None:
    env = os.environ | {
        "RAY_AUTH_MODE": "disabled",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "CUDA_VISIBLE_DEVICES": "",
    }
    run = subprocess.run(
        [sys.executable, "-c", SMALL], capture_output=True, text=True, check=False, env=env, timeout=240
    )
    assert "ConfigError: resources.teach.gpus is 1 for each of 1 workers, the cluster has 0 GPUs\n" in run.stderr
    assert "resources.distill.cpus is 1 for each of 3 workers, the cluster has 2 CPUs\n" in run.stderr
    assert "resources.merge" not in run.stderr.partition("ConfigError")[2]


def test_a_cluster_that_was_left_running_is_not_joined() -> None:
    other = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False},
    )
    try:
        env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        run = subprocess.run(
            [sys.executable, "-c", RUN],
            capture_output=True,
            text=True,
            check=False,
            env=env | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": os.pathsep.join(sys.path)},
            timeout=240,
        )
        assert run.stdout.strip() == "3", run.stderr[-2000:]
    finally:
        other.shutdown()
