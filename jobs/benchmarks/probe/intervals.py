"""What held-out answers say of a difference between two trainings. Called by `jobs/benchmarks/objective.py`."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

DRAWS = 2000


@dataclass(frozen=True)
class Answers:
    """The bits of every answer (seeds, problems) and their bytes (problems,), domain by domain."""

    bits: Sequence[npt.NDArray[np.float64]]
    bytes: Sequence[npt.NDArray[np.float64]]

    def by_seed(self) -> npt.NDArray[np.float64]:
        """(seeds,) bits per byte, the mean of the domains."""
        return np.mean([of.sum(1) / size.sum() for of, size in zip(self.bits, self.bytes, strict=True)], 0)


def difference(one: Answers, other: Answers) -> tuple[float, float, float]:
    """`one` minus `other` in bits per byte and its paired 95% interval over the problems: each draw takes the same problems for both and for every seed."""
    rng = np.random.default_rng(0)
    draws = np.zeros(DRAWS)
    for ours, theirs, size in zip(one.bits, other.bits, one.bytes, strict=True):
        apart = (ours - theirs).mean(0)
        taken = rng.integers(0, size.size, (DRAWS, size.size))
        draws += apart[taken].sum(1) / size[taken].sum(1) / len(one.bits)
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(one.by_seed().mean() - other.by_seed().mean()), float(low), float(high)
