"""How far each target moved from the base, tensor by tensor: the statistics that are taken over all units before anything is merged.

Called by the merge worker, which also refuses non-finite values by them; VaRM turns them into weights. A target's statistics depend on it and on the base
alone, so they are kept: one target more reads that target and the base.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

from fusion_ray.merging import vectors
from fusion_ray.merging.blocks import CHUNK, Blocks, Doubles, Floats, Inputs, exact_sum
from fusion_ray.merging.kernels import LANES, chunks_of, fold, load, load_delta, prefetch


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
    finite = [True] * (targets + 1)
    for block in blocks:
        square, absolute = np.empty((2, targets, chunks_of(block.size)))
        _measure(block.inputs, block.size, square, absolute, moved)
        if not np.isfinite(
            square
        ).all():  # a float32 difference squared in float64 is finite unless a model's number is not
            models = [block.base, *block.targets]
            finite = [so_far and bool(np.isfinite(each).all()) for so_far, each in zip(finite, models, strict=True)]
        squares.append(square)
        absolutes.append(absolute)
    return Changes(
        size=blocks.size,
        squares=tuple(exact_sum([each[j] for each in squares]) for j in range(targets)),
        absolutes=tuple(exact_sum([each[j] for each in absolutes]) for j in range(targets)),
        moved=tuple(moved.tolist()),
        finite=tuple(finite),
    )


@njit(cache=True, nogil=True, error_model="numpy")
def _measure(inputs: Inputs, size: int, squares: Doubles, absolutes: Doubles, moved: npt.NDArray[np.int64]) -> None:
    """Chunk sums of each target's squared and absolute changes; adds up the elements that moved."""
    room, lanes = np.empty((2, CHUNK), np.float32), np.empty((2, LANES), np.float64)
    for chunk in range(squares.shape[1]):
        start = chunk * CHUNK
        count = min(CHUNK, size - start)
        base, delta = room[0, :count], room[1, :count]
        as_vectors = inputs.bfloat16 and count == CHUNK
        if as_vectors:
            prefetch(inputs, 0, start)
        else:
            load(inputs, 0, start, base)
        for j in range(squares.shape[0]):
            if as_vectors:
                prefetch(inputs, j + 1, start)
                of_base, of_target = inputs.addresses[0] + 2 * start, inputs.addresses[j + 1] + 2 * start
                moved[j] += vectors.sum_changes(of_base, of_target, lanes[0].ctypes.data, lanes[1].ctypes.data)
            else:
                load_delta(inputs, j, start, base, delta)
                moved[j] += _sum_changes(delta, lanes)
            squares[j, chunk], absolutes[j, chunk] = fold(lanes[0]), fold(lanes[1])


@njit(cache=True, nogil=True)
def _sum_changes(apart: Floats, lanes: Doubles) -> np.int64:
    """The squares and the absolutes of a chunk's differences, added up side by side as `kernels.dot` does, into `lanes` (2, LANES); how many are not zero."""
    moved = np.uint32(0)
    for i in range(apart.size):
        moved += np.uint32(apart[i] != np.float32(0.0))
    squares, absolutes = lanes[0], lanes[1]
    squares[:] = 0.0
    absolutes[:] = 0.0
    pairs = apart.size // (2 * LANES)
    rows = apart[: pairs * 2 * LANES].reshape(pairs, 2 * LANES)
    for pair in range(pairs):
        row = rows[pair]
        for lane in range(LANES):
            upper, lower = np.float64(row[lane]), np.float64(row[lane + LANES])
            squares[lane] = (squares[lane] + upper * upper) + lower * lower
            absolutes[lane] = (absolutes[lane] + abs(upper)) + abs(lower)
    for start in range(pairs * 2 * LANES, apart.size, LANES):
        row = apart[start : start + LANES]
        for lane in range(row.size):
            value = np.float64(row[lane])
            squares[lane] += value * value
            absolutes[lane] += abs(value)
    return np.int64(moved)
