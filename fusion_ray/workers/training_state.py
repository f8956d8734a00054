"""Checkpoints of a training run on any storage: the last two kept, complete or not there, refused when they are of another run. Called by workers/trainer.py.

A checkpoint is the folder `step-<step>-<attempt>` with DeepSpeed's files and, written last, `complete.json` with their sizes and sha256; folders without
it do not count. The attempt is drawn anew each time, so that a worker that outlives its killed driver never writes into the files of the next run.
"""

import json
import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.engine import DeepSpeedEngine

from fusion_ray.store import Folder, file_sha256

logger = logging.getLogger(__name__)

COMPLETE = "complete.json"
KEPT = 2
TAG = "state"

Totals = dict[str, float]


@dataclass(frozen=True)
class Progress:
    """Steps done, and what they summed up to, by epoch."""

    step: int
    totals: dict[str, Totals]


class Checkpoints:
    """Save and load the state of all ranks. `key` names what is trained on what (the artefact's key); `scratch` is a local folder of this rank."""

    def __init__(self, folder: Folder, *, scratch: Path, key: str, seed: int) -> None:
        self.folder = folder
        self.scratch = scratch
        self.key = key
        self.seed = seed
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    def save(self, engine: DeepSpeedEngine, progress: Progress) -> None:
        """Collective. Raises StoreError when the storage cannot be written."""
        name = f"step-{progress.step:08d}-{_shared(secrets.token_hex(4))}"
        root = Path(self.folder.path(name)) if self.folder.is_local else self.scratch / name
        client_state = {"step": progress.step, "totals": progress.totals}
        engine.save_checkpoint(str(root), tag=TAG, client_state=client_state, save_latest=False)
        dist.barrier()
        written = sorted(path for path in root.rglob("*") if path.is_file())
        files = {}
        for path in written[self.rank :: self.world_size] if self.folder.is_local else written:
            relative = path.relative_to(root).as_posix()
            files[relative] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            if not self.folder.is_local:
                self.folder.put_file(f"{name}/{relative}", path)
                path.unlink()
        gathered: list[dict[str, dict[str, object]]] = [{} for _ in range(self.world_size)]
        dist.all_gather_object(gathered, files)
        if self.rank == 0:
            merged = {file: facts for part in gathered for file, facts in part.items()}
            complete = {"step": progress.step, "key": self.key, "seed": self.seed, "world_size": self.world_size}
            self.folder.write_json(f"{name}/{COMPLETE}", complete | {"files": merged})
            self._rotate(progress.step)

    def load(self, engine: DeepSpeedEngine) -> Progress | None:
        """Collective: put the newest whole checkpoint into the (fresh) engine. None where there is none.

        Raises ValueError for a checkpoint of another model, config, seed or number of workers.
        """
        name = _shared(self._newest() if self.rank == 0 else None)
        if name is None:
            return None
        root = Path(self.folder.path(name)) if self.folder.is_local else self._download(name)
        engine.checkpoint_engine = _WeightsOnly()
        _, client_state = engine.load_checkpoint(str(root), tag=TAG)
        logger.info("going on from step %d (%s)", client_state["step"], name)
        return Progress(client_state["step"], client_state["totals"])

    def _newest(self) -> str | None:
        for name in sorted(self._complete(), reverse=True):
            complete = self.folder.read_json(f"{name}/{COMPLETE}")
            self._refuse_others(name, complete)
            files = complete["files"]
            assert isinstance(files, dict)
            wrong = next((file for file, facts in files.items() if not self._whole(f"{name}/{file}", facts)), None)
            if wrong is None:
                return name
            logger.warning("checkpoint %s is damaged (%s): going back to the one before it", name, wrong)
        return None

    def _refuse_others(self, name: str, complete: Mapping[str, object]) -> None:
        expected = {"key": self.key, "seed": self.seed, "world_size": self.world_size}
        for what, value in expected.items():
            if complete.get(what) == value:
                continue
            cure = (
                f"set resources.distill.max_workers to {complete.get(what)}, or remove the folder to start over"
                if what == "world_size"
                else "remove the folder to start over"
            )
            raise ValueError(
                f"the checkpoint {self.folder.url}/{name} is of another run: its {what} is {complete.get(what)!r}, "
                f"this run has {value!r}; {cure}"
            )

    def _whole(self, name: str, facts: object) -> bool:
        assert isinstance(facts, dict)
        path = self.folder.path(name)
        if not self.folder.exists(name) or self.folder.fs.size(path) != facts["bytes"]:
            return False
        return not self.folder.is_local or file_sha256(path) == facts["sha256"]

    def _download(self, name: str) -> Path:
        for file in json.loads(self.folder.read_bytes(f"{name}/{COMPLETE}"))["files"]:
            local = self.scratch / name / file
            local.parent.mkdir(parents=True, exist_ok=True)
            self.folder.fs.get_file(self.folder.path(f"{name}/{file}"), str(local))
        return self.scratch / name

    def _complete(self) -> list[str]:
        return [name.split("/")[0] for name in self.folder.names() if name.count("/") == 1 and name.endswith(COMPLETE)]

    def _rotate(self, step: int) -> None:
        """Remove all but the last KEPT whole checkpoints, and what killed attempts left behind."""
        keep = sorted(self._complete())[-KEPT:]
        for name in {name.split("/")[0] for name in self.folder.names() if name.startswith("step-")}:
            if name not in keep and int(name.split("-")[1]) <= step:
                self.folder.remove(name)


class _WeightsOnly(TorchCheckpointEngine):
    """DeepSpeed's own reader, but no arbitrary pickle is run: tensors, plain values and the few classes of DeepSpeed that its states hold."""

    def load(self, path: str, map_location: torch.device | str | None = None) -> object:
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

        known = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
        with torch.serialization.safe_globals(known):
            return torch.load(path, map_location=map_location, weights_only=True)


def _shared(value: str | None) -> str | None:
    """Rank 0's value on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
