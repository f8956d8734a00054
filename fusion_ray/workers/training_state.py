"""Checkpoints of a training run on any storage: the last two kept, complete or not there, refused when they are of another run. Called by workers/trainer.py.

A checkpoint is the folder `step-<step>-<attempt>` with DeepSpeed's files and, written last, `complete.json` with their sizes and sha256; folders without
it do not count. The attempt is drawn anew each time, so that a worker that outlives its killed driver never writes into the files of the next run.

Another number of ranks goes on through `universal-<drawn>`, a conversion of the newest whole checkpoint that is there while it is loaded and never used
twice: what a killed one leaves behind is removed, not read. One rank converts and the others wait, so it must end within the process group's timeout.
"""

import logging
import secrets
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.engine import DeepSpeedEngine

from fusion_ray.store import Folder, file_sha256
from fusion_ray.workers.universal import INFO, convert, load_universal, plain_values_only

logger = logging.getLogger(__name__)

COMPLETE = "complete.json"
KEPT = 2
TAG = "state"
CONVERTED = "universal-"

Totals = dict[str, float]
T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """Steps done, and what they summed up to, by epoch."""

    step: int
    totals: dict[str, Totals]


class Checkpoints:
    """Save and load the state of all ranks. `key` names what is trained on what (the artefact's key); `scratch` is a local folder of this rank.

    `near` is where this rank reads checkpoints: the storage itself if it is local, else what `reader`, the first rank of this host, downloads there.
    """

    def __init__(self, folder: Folder, *, scratch: Path, key: str, seed: int) -> None:
        self.folder = folder
        self.scratch = scratch
        self.key = key
        self.seed = seed
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        hosts = _gathered((socket.gethostname(), str(scratch)))
        self.reader = (
            0 if folder.is_local else next(rank for rank, (host, _) in enumerate(hosts) if host == socket.gethostname())
        )
        self.near = Path(folder.path() if folder.is_local else hosts[self.reader][1])

    def save(self, engine: DeepSpeedEngine, progress: Progress) -> None:
        """Collective. Raises StoreError when the storage cannot be written."""
        name = f"step-{progress.step:08d}-{_shared(secrets.token_hex(4))}"
        root = Path(self.folder.path(name)) if self.folder.is_local else self.scratch / name
        client_state = {"step": progress.step, "totals": progress.totals} | INFO
        # What is not trained stays as the pivot has it, which the key names.
        engine.save_checkpoint(
            str(root), tag=TAG, client_state=client_state, save_latest=False, exclude_frozen_parameters=True
        )
        dist.barrier()
        written = sorted(path for path in root.rglob("*") if path.is_file())
        files = {}
        for path in written[self.rank :: self.world_size] if self.folder.is_local else written:
            relative = path.relative_to(root).as_posix()
            files[relative] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            if not self.folder.is_local:
                self.folder.put_file(f"{name}/{relative}", path)
                path.unlink()
        gathered = _gathered(files)
        if self.rank == 0:
            merged = {file: facts for part in gathered for file, facts in part.items()}
            complete = {"step": progress.step, "key": self.key, "seed": self.seed, "world_size": self.world_size}
            self.folder.write_json(f"{name}/{COMPLETE}", complete | {"files": merged})
            self._rotate(progress.step)

    def load(self, engine: DeepSpeedEngine) -> Progress | None:
        """Collective: put the newest whole checkpoint, of any number of ranks, into the (fresh) engine. None where there never was one.

        Raises ValueError, on every rank, for a checkpoint of another model, config or seed, and when all that there are have been damaged.
        """
        if self.rank == self.reader:
            for left in self.near.glob(f"{CONVERTED}*"):
                shutil.rmtree(left, ignore_errors=True)
        damaged: dict[str, str] = {}
        for name, complete in _shared(self._newest_first() if self.rank == 0 else []):
            self._refuse_others(name, complete)
            wrong = self._damaged(name, complete)
            if wrong is None:
                progress = self._enter(engine, name, complete)
                if self.rank == 0:
                    for superseded in damaged:
                        self.folder.remove(superseded)
                return progress
            damaged[name] = wrong
            if self.rank == 0:
                logger.warning("checkpoint %s is damaged (%s): going back to the one before it", name, wrong)
        if damaged:
            found = ", ".join(f"{name} ({wrong} is missing or not what was saved)" for name, wrong in damaged.items())
            raise ValueError(
                f"none of the checkpoints in {self.folder.url} is whole: {found}; restore the files, or remove the folder to start over"
            )
        return None

    def _newest_first(self) -> list[tuple[str, dict[str, object]]]:
        """The complete checkpoints with their complete.json, which is empty where it cannot be parsed."""
        found: list[tuple[str, dict[str, object]]] = []
        for name in sorted(self._complete(), reverse=True):
            try:
                found.append((name, dict(self.folder.read_json(f"{name}/{COMPLETE}"))))
            except ValueError:
                found.append((name, {}))
        return found

    def _refuse_others(self, name: str, complete: Mapping[str, object]) -> None:
        for what, value in {"key": self.key, "seed": self.seed}.items():
            if complete and complete.get(what) != value:
                raise ValueError(
                    f"the checkpoint {self.folder.url}/{name} is of another run: its {what} is {complete.get(what)!r}, "
                    f"this run has {value!r}; remove the folder to start over"
                )

    def _damaged(self, name: str, complete: Mapping[str, object]) -> str | None:
        """Collective: the first file that is missing or not as complete.json has it, after which all of them are at `near`."""
        if not complete:
            return COMPLETE
        files = complete["files"]
        assert isinstance(files, dict)
        mine = sorted(files)[self.rank :: self.world_size] if self.folder.is_local else sorted(files)
        if not self.folder.is_local and self.rank != self.reader:
            mine = []
        wrong = next((file for file in mine if not self._whole(f"{name}/{file}", files[file])), None)
        return next((file for file in _gathered(wrong) if file is not None), None)

    def _whole(self, name: str, facts: Mapping[str, object]) -> bool:
        path = self.near / name
        if not self.folder.is_local and self.folder.exists(name):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.folder.get_file(name, path)
        return path.is_file() and path.stat().st_size == facts["bytes"] and file_sha256(path) == facts["sha256"]

    def _enter(self, engine: DeepSpeedEngine, name: str, complete: Mapping[str, object]) -> Progress:
        engine.checkpoint_engine = _WeightsOnly()
        if complete["world_size"] == self.world_size:
            whole = all(parameter.requires_grad for parameter in engine.module.parameters())
            _, client_state = engine.load_checkpoint(str(self.near / name), tag=TAG, load_module_strict=whole)
        else:
            client_state = self._enter_converted(engine, name, complete["world_size"])
        dist.barrier()
        if self.rank == self.reader and not self.folder.is_local:
            shutil.rmtree(self.near / name)
        logger.info("going on from step %d (%s)", client_state["step"], name)
        return Progress(client_state["step"], client_state["totals"])

    def _enter_converted(self, engine: DeepSpeedEngine, name: str, ranks: object) -> dict[str, object]:
        converted = self.near / f"{CONVERTED}{_shared(secrets.token_hex(4))}"
        if self.rank == self.reader:
            logger.info("converting %s, of %s ranks, for %d", name, ranks, self.world_size)
            trained = [name for name, parameter in engine.module.named_parameters() if parameter.requires_grad]
            convert(self.near / name / TAG, converted / TAG, trained)
        dist.barrier()
        client_state = load_universal(engine, converted, TAG)
        dist.barrier()
        if self.rank == self.reader:
            shutil.rmtree(converted)
        return client_state

    def _complete(self) -> list[str]:
        return [name.split("/")[0] for name in self.folder.names() if name.count("/") == 1 and name.endswith(COMPLETE)]

    def _rotate(self, step: int) -> None:
        """Remove all but the last KEPT whole checkpoints, and what killed attempts left behind."""
        keep = sorted(self._complete())[-KEPT:]
        for name in {name.split("/")[0] for name in self.folder.names() if name.startswith("step-")}:
            if name not in keep and int(name.split("-")[1]) <= step:
                self.folder.remove(name)


class _WeightsOnly(TorchCheckpointEngine):
    """DeepSpeed's own reader, but no arbitrary pickle is run."""

    def load(self, path: str, map_location: torch.device | str | None = None) -> object:
        with plain_values_only():
            return torch.load(path, map_location=map_location, weights_only=True)


def _shared(value: T) -> T:
    """Rank 0's value on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _gathered(value: T) -> list[T]:
    """Every rank's value, by rank, on every rank."""
    box = [value] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box
