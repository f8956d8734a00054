"""One rank of `workers.py`, which gives it its core and its environment: `python -m distilling_speed.rank TASK`, TASK as JSON. No Ray, no GPU."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist

from fusion_ray.config import DistillConfig
from fusion_ray.store import Folder
from fusion_ray.workers.trainer import Places, train


def main() -> None:
    task = json.loads(sys.argv[1])
    work, rank = Path(task["work"]), task["rank"]
    store = f"file://{work / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=task["world_size"])
    last: list[float] = []

    def report(figures: Mapping[str, object]) -> None:
        now = [time.perf_counter(), time.process_time()]
        seconds, processor = [b - a for a, b in zip(last or now, now, strict=True)]
        last[:] = now
        step = {name: figures[name] for name in ("sft", "fusion", "grad_norm")}
        with open(work / "steps.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"seconds": seconds, "processor": processor} | step) + "\n")

    places = Places(
        pivot=task["pivot"],
        shards=task["shards"],
        cache=str(work / "cache"),
        scratch=str(work / f"scratch-{rank}"),
        checkpoints=Folder(str(work / "checkpoints")),
        export=str(work / "export"),
    )
    train(places, DistillConfig.model_validate(task["config"]), key="benchmark", seed=7, report=report)


if __name__ == "__main__":
    main()
