"""Which rows make up which step, and at what learning rate: pure functions of the step's number, so that a resumed run is the undisturbed run.

Every epoch is a permutation of all usable rows by (seed, epoch), cut into global batches of `batch_size` rows; the last one of an epoch may be smaller.
Within a global batch rows are sorted by length and cut into as many micro-batches as all ranks need, so that padding is small and neighbours in length
run on different ranks at the same time. Packed, lines of several rows (workers/packing.py) take the place of the rows. Called by workers/trainer.py.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fusion_ray.workers.packing import pack, padded_size

MicroBatch = list[list[int]]  # lines of row numbers: one row a line, or several where rows are packed


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step: `rows` of the global batch, `micro_batches[rank]` in lines (no line where a rank has nothing left)."""

    epoch: int
    rows: list[int]
    micro_batches: list[list[MicroBatch]]


class Schedule:
    """The steps of a training run over rows with the given lengths in tokens.

    `batch_size` counts rows, `micro_batch_size` lines; with `line_length` rows are packed into lines of at most that many tokens, without it a line is a row.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        batch_size: int,
        micro_batch_size: int,
        epochs: int,
        world_size: int,
        seed: int,
        line_length: int | None = None,
    ) -> None:
        if not len(lengths):
            raise ValueError("there is no row to train on: every row is empty or has no predicting position")
        self.lengths = lengths
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.world_size = world_size
        self.seed = seed
        self.line_length = line_length
        self.steps_per_epoch = math.ceil(len(lengths) / batch_size)
        self.steps = self.steps_per_epoch * epochs
        self._permutation = lru_cache(maxsize=2)(self._permute)

    def step(self, number: int) -> StepPlan:
        """The plan of step `number`, counted from 0."""
        epoch, index = divmod(number, self.steps_per_epoch)
        start = index * self.batch_size
        rows = self._permutation(epoch)[start : start + self.batch_size]
        lines = self._lines(rows)
        waves = math.ceil(len(lines) / (self.world_size * self.micro_batch_size))
        parts = np.array_split(np.arange(len(lines)), waves * self.world_size)
        groups = [[lines[number] for number in part] for part in parts]
        return StepPlan(epoch, rows.tolist(), [groups[rank :: self.world_size] for rank in range(self.world_size)])

    def padding_share(self) -> float:
        """The share of the tokens of the first epoch's micro-batches that is padding."""
        plans = map(self.step, range(self.steps_per_epoch))
        size = sum(padded_size(self.lengths, lines) for plan in plans for rank in plan.micro_batches for lines in rank)
        return 1.0 - int(self.lengths.sum()) / size

    def _lines(self, rows: np.ndarray) -> list[list[int]]:
        """The rows of a global batch in lines, the longest line first."""
        lengths = self.lengths[rows]
        if self.line_length is None:
            return [[row] for row in rows[np.argsort(-lengths, kind="stable")].tolist()]
        return [rows[line].tolist() for line in pack(lengths, self.line_length, at_least=self.world_size)]

    def _permute(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.lengths))


def learning_rate(step: int, steps: int, *, peak: float, warmup_ratio: float, schedule: str) -> float:
    """The rate of step `step` (from 0) of `steps`: linear warm-up over warmup_ratio of the steps, then cosine or linear to 0, or constant.

    Raises ValueError for an unknown schedule.
    """
    warmup = math.ceil(steps * warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    if schedule == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * done))
    if schedule == "linear":
        return peak * (1.0 - done)
    if schedule == "constant":
        return peak
    raise ValueError(f"unknown schedule {schedule!r}: choose cosine, linear or constant")
