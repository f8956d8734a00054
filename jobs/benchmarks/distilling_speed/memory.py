"""How much memory a step takes above what stands before it (weights, optimizer's state), in a process of its own. Called by `distill.py`; run as

    cd jobs/benchmarks; ../../.venv/bin/python -m distilling_speed.memory TASK      # TASK as JSON

On the CPU it is the high-water mark of resident memory less what was resident before the step, both as the kernel counts them; libraries and rows are
there before, so what is added is anonymous. On a GPU it is what torch's allocator says. One step warms up, the most of those after it counts.
"""

import ctypes
import gc
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from distilling_speed.steps import Steps, device, settle
from fusion_ray.config import DistillConfig
from merging_speed.process import run

BENCHMARKS = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Held:
    """Bytes: before a step, and the most above that during one."""

    before: int
    step: int


def measured(
    side: str, pivot: Path, shards: list[Path], *, cache: Path, config: DistillConfig, out: Path, steps: int = 2
) -> Held:
    """What the side's step takes in a fresh process. `out` is a file that it writes."""
    task = {
        "side": side,
        "pivot": str(pivot),
        "shards": [str(path) for path in shards],
        "cache": str(cache),
        "config": config.model_dump(),
        "steps": steps,
        "out": str(out),
    }
    run([sys.executable, "-m", "distilling_speed.memory", json.dumps(task)], cwd=BENCHMARKS)
    return Held(**json.loads(out.read_text(encoding="utf-8")))


def held(steps: Steps, side: str, repeats: int) -> Held:
    """In this process."""
    steps.step(side)
    found = [_one(steps, side) for _ in range(repeats)]
    return max(found, key=lambda each: each.step)


def _one(steps: Steps, side: str) -> Held:
    gc.collect()
    if device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        steps.step(side)
        return Held(before, torch.cuda.max_memory_allocated() - before)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the mark begins anew
    before = _status("VmRSS")
    steps.step(side)
    return Held(before, _status("VmHWM") - before)


def _status(name: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(1024 * int(row.split()[1]) for row in file if row.startswith(f"{name}:"))


def main() -> None:
    task = json.loads(sys.argv[1])
    settle()
    shards = [Path(path) for path in task["shards"]]
    steps = Steps(
        Path(task["pivot"]), shards, cache=Path(task["cache"]), config=DistillConfig.model_validate(task["config"])
    )
    Path(task["out"]).write_text(json.dumps(asdict(held(steps, task["side"], task["steps"]))), encoding="utf-8")


if __name__ == "__main__":
    main()
