"""Which rows make up which step, and at what learning rate: pure functions of the step's number, so that a resumed run is the undisturbed run.

Every epoch is a permutation of all usable rows by (seed, epoch), cut into global batches of `batch_size` rows; the last one of an epoch may be smaller.
Within a global batch rows are sorted by length and cut into as many micro-batches as all ranks need, so that padding is small and neighbours in length
run on different ranks at the same time. Called by workers/trainer.py.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step: `rows` of the global batch, `micro_batches[rank]` lists of row numbers (an empty list where a rank has nothing left)."""

    epoch: int
    rows: list[int]
    micro_batches: list[list[list[int]]]


class Schedule:
    """The steps of a training run over rows with the given lengths in tokens."""

    def __init__(
        self, lengths: np.ndarray, *, batch_size: int, micro_batch_size: int, epochs: int, world_size: int, seed: int
    ) -> None:
        if not len(lengths):
            raise ValueError("there is no row to train on: every row is empty or has no predicting position")
        self.lengths = lengths
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.world_size = world_size
        self.seed = seed
        self.steps_per_epoch = math.ceil(len(lengths) / batch_size)
        self.steps = self.steps_per_epoch * epochs
        self._permutation = lru_cache(maxsize=2)(self._permute)

    def step(self, number: int) -> StepPlan:
        """The plan of step `number`, counted from 0."""
        epoch, index = divmod(number, self.steps_per_epoch)
        start = index * self.batch_size
        rows = self._permutation(epoch)[start : start + self.batch_size]
        longest_first = rows[np.argsort(-self.lengths[rows], kind="stable")]
        waves = math.ceil(len(rows) / (self.world_size * self.micro_batch_size))
        groups = [group.tolist() for group in np.array_split(longest_first, waves * self.world_size)]
        return StepPlan(epoch, rows.tolist(), [groups[rank :: self.world_size] for rank in range(self.world_size)])

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
