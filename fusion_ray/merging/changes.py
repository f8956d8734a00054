"""How far each target moved from the base, tensor by tensor: the statistics that are taken over all units before anything is merged.

Called by the merge worker, which also refuses non-finite values by them; VaRM turns them into weights. A target's statistics depend on it and on the base
alone, so they are kept: one target more reads that target and the base.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

from fusion_ray.merging.blocks import CHUNK, Blocks, Doubles, Floats, exact_sum
from fusion_ray.merging.kernels import chunks_of, dot


@dataclass(frozen=True)
class Changes:
    """Of one tensor with `size` elements; tuples have one entry a target, `finite` one a model with the base first."""

    size: int
    squares: tuple[float, ...]  # sum of the squared changes, the squared norm of the task vector
    absolutes: tuple[float, ...]  # sum of the absolute changes
    moved: tuple[int, ...]  # elements that differ from the base's
    finite: tuple[bool, ...]

    @property
    def targets(self) -> int:
        return len(self.squares)

    def of(self, target: int) -> "Changes":
        """Those of one target."""
        return Changes(
            self.size,
            (self.squares[target],),
            (self.absolutes[target],),
            (self.moved[target],),
            (self.finite[0], self.finite[target + 1]),
        )

    def __add__(self, other: "Changes") -> "Changes":
        """The targets of both, `self`'s first; both were measured against one base."""
        return Changes(
            self.size,
            self.squares + other.squares,
            self.absolutes + other.absolutes,
            self.moved + other.moved,
            self.finite + other.finite[1:],
        )


def measure_changes(blocks: Blocks) -> Changes:
    """One pass over a tensor. Sums in float64, the same for any size of block."""
    targets = blocks.targets
    squares: list[Doubles] = []
    absolutes: list[Doubles] = []
    moved = np.zeros(targets, np.int64)
    finite = np.ones(targets + 1, np.bool_)
    for block in blocks:
        square, absolute = np.empty((2, targets, chunks_of(block.size)))
        _measure(block.base, block.targets, square, absolute, moved)
        if not np.isfinite(
            square
        ).all():  # a float32 difference squared in float64 is finite unless a model's number is not
            finite &= [bool(np.isfinite(tensor).all()) for tensor in (block.base, *block.targets)]
        squares.append(square)
        absolutes.append(absolute)
    return Changes(
        size=blocks.size,
        squares=tuple(exact_sum([each[j] for each in squares]) for j in range(targets)),
        absolutes=tuple(exact_sum([each[j] for each in absolutes]) for j in range(targets)),
        moved=tuple(moved.tolist()),
        finite=tuple(finite.tolist()),
    )


@njit(cache=True, nogil=True, error_model="numpy")
def _measure(base: Floats, targets: Floats, squares: Doubles, absolutes: Doubles, moved: npt.NDArray[np.int64]) -> None:
    """Chunk sums of each target's squared and absolute changes; adds up the elements that moved."""
    room, sizes = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    ones = np.ones(CHUNK, np.float32)
    for chunk in range(squares.shape[1]):
        start = chunk * CHUNK
        of_base = base[start : start + CHUNK]
        delta, size, one = room[: of_base.size], sizes[: of_base.size], ones[: of_base.size]
        for j in range(targets.shape[0]):
            target = targets[j, start : start + CHUNK]
            differ = np.uint32(0)
            for i in range(target.size):
                differ += np.uint32(target[i] != of_base[i])
            moved[j] += differ
            for i in range(target.size):
                delta[i] = target[i] - of_base[i]
                size[i] = abs(delta[i])
            squares[j, chunk] = dot(delta, delta)
            absolutes[j, chunk] = dot(size, one)
