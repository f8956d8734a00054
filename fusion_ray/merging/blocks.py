"""One tensor of every model, in blocks: what every merge method reads, and how sums over it are taken so that they do not depend on the blocks.

A block is a range of the tensor's flattened elements, the same range of every model. A method may go over the blocks of a tensor as often as it needs,
so a tensor that fits no memory is merged like a small one. Legend of letters: M targets, n elements of a block.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

# Sums are taken over chunks of so many elements at fixed places of the tensor, then added exactly: the same result for any size of block. Every block
# starts at a multiple of it. It is also what the compiled loops keep in the nearest cache at a time.
CHUNK = 1024

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Weights = tuple[float, ...]  # one a target


@dataclass(frozen=True)
class Block:
    """Elements `start : start + n` of one flattened tensor: the base's (n,) and the targets' (M, n), all float32. Where a merge has no base, `base` is zeros.

    The arrays may be overwritten when the next block is asked for.
    """

    start: int
    base: Floats
    targets: Floats

    @property
    def size(self) -> int:
        return int(self.targets.shape[1])


class Blocks(Protocol):
    """The blocks of one tensor; may be iterated any number of times, in the order of `start`."""

    name: str  # of the output tensor: the seed of random methods
    size: int  # elements
    row: int  # elements of the last dimension; row-wise methods get blocks of whole rows
    targets: int  # M
    spare: int  # bytes that a method may keep of what it makes of the whole tensor

    def __iter__(self) -> Iterator[Block]: ...


@dataclass(frozen=True)
class TensorMerge:
    """A method made ready for one tensor. `apply(block, out)` writes the merged (n,) float32 of a block; `weights` are None where each element has its own."""

    weights: Weights | None
    apply: Callable[[Block, Floats], None]


@dataclass(frozen=True)
class ArrayBlocks:
    """The blocks of tensors that are in memory, `step` elements each. Raises ValueError for a step that is not a multiple of CHUNK."""

    base: Floats | None  # any shape
    arrays: Sequence[Floats]  # of the same shape
    name: str = "tensor"
    step: int = 1 << 16
    spare: int = 1 << 20

    def __post_init__(self) -> None:
        if self.step < CHUNK or self.step % CHUNK:
            raise ValueError(f"a block of {self.step} elements: give a multiple of {CHUNK}")

    @property
    def size(self) -> int:
        return int(self.arrays[0].size)

    @property
    def row(self) -> int:
        return int(self.arrays[0].shape[-1]) if self.arrays[0].ndim else 1

    @property
    def targets(self) -> int:
        return len(self.arrays)

    def __iter__(self) -> Iterator[Block]:
        flat = np.stack([array.reshape(-1).astype(np.float32, copy=False) for array in self.arrays])
        base = np.zeros(self.size, np.float32) if self.base is None else self.base.reshape(-1).astype(np.float32)
        for start in range(0, self.size, self.step):
            stop = start + self.step
            yield Block(start, base[start:stop], np.ascontiguousarray(flat[:, start:stop]))


class Scratch:
    """Memory that a method uses again for one block after the other: fresh memory costs more than the loops that fill it."""

    def __init__(self, dtype: npt.DTypeLike) -> None:
        self._flat: npt.NDArray[np.generic] = np.empty(0, dtype)

    def take(self, rows: int, size: int) -> npt.NDArray:
        """(rows, size), contiguous; what was there is still there."""
        if self._flat.size < rows * size:
            self._flat = np.empty(rows * size, self._flat.dtype)
        return self._flat[: rows * size].reshape(rows, size)


def shares(amounts: Sequence[float]) -> Weights:
    """The amounts over their sum; equal shares where the sum is zero."""
    total = math.fsum(amounts)
    return tuple(amount / total for amount in amounts) if total > 0 else (1.0 / len(amounts),) * len(amounts)


def exact_sum(chunks: Sequence[Doubles]) -> float:
    """The sum of chunk sums of all blocks, exact and rounded once; nan where one is not finite (`fsum` refuses infinities of both signs)."""
    values = np.concatenate(chunks) if chunks else np.zeros(0)
    return math.fsum(values.tolist()) if bool(np.isfinite(values).all()) else math.nan
