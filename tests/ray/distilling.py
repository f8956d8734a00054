"""What tests of the distill stage share: sealed align rows, the steps that an artefact has, and a driver that is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from fusion_ray.config import DistillConfig
from fusion_ray.store import Artifact
from tests.ray import training

HERE = Path(__file__).parent
UNDER_WAY = "_work/metrics.jsonl"


def rows_of(work: Path, vocabulary: int = 600) -> Artifact:
    rows = Artifact(str(work / "rows"), "align", "rows")
    paths = training.write_shards(work / "shards", vocabulary=vocabulary)
    rows.seal([rows.commit_file(path.name, path, rows=10) for path in paths])
    return rows


def steps(out: Artifact, name: str = "metrics.jsonl") -> list[int]:
    lines = out.read_bytes(name).splitlines() if out.exists(name) else []
    return [json.loads(line)["step"] for line in lines if line.endswith(b"}")]


def wait_for_step(out: Artifact, step: int, driver: "subprocess.Popen[bytes] | None" = None) -> None:
    deadline = time.monotonic() + 240
    while max(steps(out, UNDER_WAY), default=0) < step:
        assert time.monotonic() < deadline, f"step {step} was not reached"
        assert driver is None or driver.poll() is None, "the driver ended before it could be killed"
        time.sleep(0.02)


def kill_a_driver(out: Artifact, work: Path, config: DistillConfig, *, after: int, workers: int) -> None:
    """SIGKILL to a driver, with a Ray of its own, that trains `work/pivot` on `work/rows`, once that step is done."""
    task = {"out": out.url, "key": out.key, "rows": str(work / "rows"), "pivot": str(work / "pivot")}
    driver = subprocess.Popen(
        [
            sys.executable,
            str(HERE / "distill_driver.py"),
            json.dumps(task | {"config": config.model_dump(), "workers": workers}),
        ],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        cwd=work,
        env=os.environ | {"RAY_AUTH_MODE": "disabled"},  # loopback
    )
    try:
        wait_for_step(out, after, driver)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    assert not out.sealed
