"""The teach stage on a cluster that starts with no worker at all and whose autoscaler adds and replaces nodes (Ray's fake one, which starts raylets here)."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest
import ray

from fusion_ray.config import ModelConfig, TeachConfig, TeachResources
from fusion_ray.corpus.shards import REJECTED
from fusion_ray.logprobs.codec import decode, from_table
from fusion_ray.stages import teach as stage
from fusion_ray.store import Store
from tests.ray.nodes import STORE
from tests.teaching import make_corpus
from tests.tiny import make_tiny_model

pytestmark = [pytest.mark.ray, pytest.mark.slow]
PORT = 6379  # the fake provider's nodes look for their head there
SHARDS, ROWS = 240, 40
FLEET = {
    "cluster_name": "fleet",
    "max_workers": 2,
    "upscaling_speed": 1.0,
    "idle_timeout_minutes": 1,
    "provider": {"type": "fake_multinode", "disable_node_updaters": True},
    "auth": {"ssh_user": "nobody"},
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {
            "resources": {"CPU": 1, "object_store_memory": STORE},
            "node_config": {},
            "min_workers": 0,
            "max_workers": 2,
        },
    },
} | {"docker": {}, "file_mounts": {}, "cluster_synced_files": [], "file_mounts_sync_continuously": False}
LISTS = ("rsync_exclude", "rsync_filter", "initialization_commands", "setup_commands", "head_setup_commands")
LISTS += ("worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")


@pytest.fixture
def head(tmp_path: Path) -> Iterator[psutil.Process]:
    """The process of `ray start`, below which everything runs. Not ray.cluster_utils.AutoscalingCluster: that ends every Ray of the machine."""
    os.environ["RAY_AUTH_MODE"] = "disabled"  # loopback
    config = tmp_path / "fleet.json"
    config.write_text(json.dumps(FLEET | {name: [] for name in LISTS}))
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--port", str(PORT)]
    command += ["--autoscaling-config", str(config), "--num-cpus", "0", "--object-store-memory", str(STORE)]
    command += ["--include-dashboard", "false", "--temp-dir", f"/tmp/fleet-{os.getpid()}"]
    environment = os.environ | {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    with open(tmp_path / "head.log", "wb") as log:
        process = psutil.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                ray.init(
                    address=f"127.0.0.1:{PORT}",
                    log_to_driver=False,
                    runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parents[2])}},
                )
                break
            except ConnectionError:
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "head.log").read_text()  # noqa: PT018  # one reason
                time.sleep(1)
        yield process
        ray.shutdown()
    finally:
        below = process.children(recursive=True)
        process.terminate()
        process.wait(60)
        for left in below:
            with contextlib.suppress(psutil.Error):
                left.kill()


def raylets(head: psutil.Process) -> list[psutil.Process]:
    """Those of the nodes that the autoscaler started."""
    found = []
    for process in head.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.name() == "raylet" and process.environ().get("RAY_NODE_TYPE_NAME") == "worker":
                found.append(process)
    return found


def test_nodes_are_added_and_replaced_and_every_row_is_there_once(head: psutil.Process, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "one", "llama", "bytelevel", seed=1)
    corpus = make_corpus(tmp_path, rows=SHARDS * ROWS, rows_per_shard=ROWS)
    out = Store(str(tmp_path / "store")).artifact("teach", 1, {}, {})
    assert raylets(head) == []
    killed: list[int] = []
    seen: set[int] = set()

    def report(figures: Mapping[str, object]) -> None:
        there = raylets(head)
        seen.update(process.pid for process in there)
        if not killed and int(str(figures["done"])) > SHARDS // 4:
            killed.append(there[0].pid)
            there[0].kill()

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
    assert killed
    assert seen - set(killed), "no other node did any work"
    names = [unit.name for unit in out.manifest().units if unit.name != REJECTED]
    ids = [row.id for name in names for row in from_table(decode(out.read_bytes(name)))]
    assert sorted(ids) == sorted(f"row-{number}" for number in range(SHARDS * ROWS))
