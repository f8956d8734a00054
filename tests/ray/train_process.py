"""One rank of tests/ray/training.py: `python train_process.py TASK`, TASK as JSON. No Ray anywhere."""

import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
sys.path.insert(0, str(Path(__file__).parents[2]))

import fsspec
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal
from fsspec.implementations.local import LocalFileSystem

from fusion_ray.config import DistillConfig
from fusion_ray.store import Folder
from fusion_ray.workers.trainer import Places, train


class Elsewhere(LocalFileSystem):
    """A storage that is not local to `Folder`: its files are put and got, never opened in place."""

    protocol = "elsewhere"

    def __init__(self) -> None:
        super().__init__(auto_mkdir=True)  # object stores have no folders

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("elsewhere://")))


def main(task: dict) -> None:
    fsspec.register_implementation("elsewhere", Elsewhere)
    if task["kill_converting"]:
        vars(ds_to_universal)["_save_optimizer_state_stage3"] = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    work, rank = Path(task["work"]), task["rank"]
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(task["world_size"])}
    dist.init_process_group("gloo", init_method=f"file://{task['store']}", rank=rank, world_size=task["world_size"])

    def report(figures: Mapping[str, object]) -> None:
        with open(work / "reports.jsonl", "a") as file:
            file.write(json.dumps(figures) + "\n")
        if figures["done"] == task["stop_after"]:
            os.kill(os.getpid(), signal.SIGKILL)

    places = Places(
        pivot=task["pivot"],
        shards=task["shards"],
        cache=str(work / "cache"),
        scratch=str(work / f"scratch-{rank}"),
        checkpoints=Folder(task["checkpoints"] or str(work / "checkpoints")),
        export=str(work / "export"),
    )
    facts = train(places, DistillConfig.model_validate(task["config"]), key=task["key"], seed=7, report=report)
    if rank == 0:
        (work / "facts.json").write_text(json.dumps(facts))
    dist.destroy_process_group()  # as Ray Train does


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
    sys.stderr.flush()
    os._exit(0)  # as Ray ends an actor: gloo's and torch's threads may abort an interpreter that is being torn down
