"""A training run's figures as TensorBoard event files, step by step. Called by stages/distill.py on rank 0.

`tensorboard --logdir <storage>/artifacts/distill` shows every target, those in training too. On an object store the files arrive when the run ends.
"""

import math
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from fusion_ray.store import Folder

FOLDER = "tensorboard"
_NOT_DRAWN = {"done", "total", "eta_seconds"}
FLUSH_SECONDS = 10


class TensorBoardLog:
    """`scratch` is a folder of this machine, used where the storage is not one."""

    def __init__(self, out: Folder, *, scratch: Path) -> None:
        self._out = out
        self._folder = Path(out.path(FOLDER)) if out.is_local else scratch / FOLDER
        self._writer: SummaryWriter | None = None

    def append(self, figures: Mapping[str, object]) -> None:
        """The figures of step `done`; the first of an attempt hides what an earlier attempt wrote from that step on."""
        step = int(str(figures["done"]))
        if self._writer is None:
            self._writer = SummaryWriter(str(self._folder), purge_step=step, flush_secs=FLUSH_SECONDS)
        for name, value in figures.items():
            if name not in _NOT_DRAWN and isinstance(value, int | float) and math.isfinite(value):
                self._writer.add_scalar(f"train/{name}", value, step)

    def close(self) -> None:
        """Everything appended is on the storage from here on."""
        if self._writer is None:
            return
        self._writer.close()
        self._writer = None
        if not self._out.is_local:
            for path in sorted(self._folder.iterdir()):
                self._out.put_file(f"{FOLDER}/{path.name}", path)
