"""The trainer in plain processes over gloo, each held to one core and one thread. Called by `distill.py`."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fusion_ray.config import DistillConfig

BENCHMARKS = Path(__file__).resolve().parents[1]
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Step:
    """One step as rank 0 saw it. `seconds` and `processor` (of rank 0) from the report before to its own; the first one's are 0."""

    seconds: float
    processor: float
    sft: float
    fusion: float
    grad_norm: float


def train(
    pivot: Path, shards: Sequence[Path], config: DistillConfig, *, world_size: int, timeout: float = 900
) -> list[Step]:
    """Train with `world_size` fresh processes on as many cores and return the steps. Raises RuntimeError with the workers' errors."""
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        task = {
            "work": folder,
            "pivot": str(pivot),
            "shards": [str(path) for path in shards],
            "config": config.model_dump(),
            "world_size": world_size,
        }
        processes = []
        for rank in range(world_size):
            variables = (
                os.environ | ENVIRONMENT | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
            )
            command = [sys.executable, "-m", "distilling_speed.rank", json.dumps(task | {"rank": rank})]
            with open(work / f"said-{rank}", "wb") as said:
                process = subprocess.Popen(
                    command, cwd=BENCHMARKS, env=variables, stdin=subprocess.DEVNULL, stdout=said, stderr=said
                )
            os.sched_setaffinity(process.pid, {cores[rank % len(cores)]})  # threads that it starts inherit it
            processes.append(process)
        try:
            codes = [process.wait(timeout) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if any(codes):
            texts = [
                (work / f"said-{rank}").read_text(encoding="utf-8", errors="replace") for rank in range(world_size)
            ]
            raise RuntimeError("\n".join(text.strip()[-3000:] for text in texts))
        rows = (work / "steps.jsonl").read_text(encoding="utf-8").splitlines()
        return [Step(**json.loads(row)) for row in rows]
