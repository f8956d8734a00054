"""Exactly once, whatever dies: actors, drivers and whole nodes are killed at random moments, and the table is that of a run that nobody disturbed.

FUSION_RAY_CHAOS_ROUNDS says how many are killed (default 5), FUSION_RAY_CHAOS_SEED which and when. A seed that fails is printed.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from fusion_ray.corpus.shards import REJECTED
from fusion_ray.logprobs.codec import decode, from_table
from fusion_ray.store import Artifact
from tests.ray.nodes import STORE, head_alone, teachers
from tests.teaching import make_corpus
from tests.tiny import make_tiny_model

pytestmark = [pytest.mark.ray, pytest.mark.slow]  # an engine starts anew after every kill
HERE = Path(__file__).parent
ROUNDS = int(os.environ.get("FUSION_RAY_CHAOS_ROUNDS", "5"))
SEED = int(os.environ.get("FUSION_RAY_CHAOS_SEED", str(random.SystemRandom().randrange(1 << 16))))
SHARDS, ROWS = 300, 4
KINDS = ("actor", "driver", "node")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # loopback
    cluster = head_alone()
    yield cluster
    cluster.shutdown()


class Run:
    """A stage under way in a driver of its own, started again when it was killed."""

    def __init__(self, task: dict[str, str], log: Path) -> None:
        self.task, self.log, self.out = task, log, Artifact(task["out"], "teach", task["out"])
        self.driver = self.start()

    def start(self) -> "subprocess.Popen[bytes]":
        with open(self.log, "ab") as log:
            return subprocess.Popen(
                [sys.executable, str(HERE / "teach_driver.py"), json.dumps(self.task)], stdout=log, stderr=log
            )

    def done(self) -> int:
        return sum(name.endswith(".json") for name in self.out.names("_units"))

    def wait(self, until: Any, seconds: float = 400) -> None:
        deadline = time.monotonic() + seconds
        while not until():
            code = self.driver.poll()
            assert code in (None, 0), f"seed {SEED}: the driver ended with {code}: {self.log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"seed {SEED}: no progress past {self.done()} shards"
            time.sleep(0.05)


def rows_of(out: Artifact) -> list[tuple[str, bytes]]:
    return [(unit.name, out.read_bytes(unit.name)) for unit in out.manifest().units]


def test_killed_at_random_moments_the_table_is_the_undisturbed_one(tmp_path: Path, cluster: Cluster) -> None:
    chance = random.Random(SEED)
    make_tiny_model(tmp_path / "one", "llama", "bytelevel", seed=1)
    corpus = make_corpus(tmp_path, rows=SHARDS * ROWS, rows_per_shard=ROWS)
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=STORE) for _ in range(2)]
    task = {"address": cluster.address, "corpus": corpus.url, "model": str(tmp_path / "one")}
    run = Run(task | {"out": str(tmp_path / "disturbed")}, tmp_path / "disturbed.log")
    killed = []
    for number in range(ROUNDS):
        run.wait(lambda least=number * SHARDS // (ROUNDS + 1): run.done() > least or run.out.sealed)  # type: ignore[misc]
        time.sleep(chance.random())
        kind = KINDS[number] if number < len(KINDS) else chance.choice(KINDS)
        if run.out.sealed:
            break
        if kind == "driver":
            run.driver.send_signal(signal.SIGKILL)
            run.driver.wait()
            run.driver = run.start()
        elif kind == "node":
            lost = nodes.pop(chance.randrange(len(nodes)))
            cluster.remove_node(lost, allow_graceful=False)
            nodes.append(cluster.add_node(num_cpus=1, object_store_memory=STORE))
        else:
            for process, _ in list(teachers())[:1]:
                process.kill()
        killed.append(kind)
    run.wait(lambda: run.driver.poll() == 0)
    assert len(killed) >= len(KINDS), f"seed {SEED}: over before {killed} were killed"

    undisturbed = Run(task | {"out": str(tmp_path / "undisturbed")}, tmp_path / "undisturbed.log")
    undisturbed.wait(lambda: undisturbed.driver.poll() == 0)
    assert rows_of(run.out) == rows_of(undisturbed.out), f"seed {SEED}, killed {killed}"
    shards = [data for name, data in rows_of(run.out) if name != REJECTED]
    ids = [row.id for data in shards for row in from_table(decode(data))]
    assert sorted(ids) == sorted(f"row-{number}" for number in range(SHARDS * ROWS))
    run.out.verify()
