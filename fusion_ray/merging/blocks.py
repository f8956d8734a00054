"""One tensor of every model, in blocks: what every merge method reads, and how sums over it are taken so that they do not depend on the blocks.

A block is a range of the tensor's flattened elements, the same range of every model. A method may go over the blocks of a tensor as often as it needs,
so a tensor that fits no memory is merged like a small one. Legend of letters: M targets, n elements of a block.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

# Sums are taken over chunks of so many elements at fixed places of the tensor, then added exactly: the same result for any size of block. Every block
# starts at a multiple of it. It is also what the compiled loops keep in the nearest cache at a time.
CHUNK = 1024

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Stored = npt.NDArray[np.generic]
Weights = tuple[float, ...]  # one a target


class Inputs(NamedTuple):
    """Where the compiled loops find a block: `kernels.load` takes pieces of it. Valid as long as the block is there."""

    addresses: npt.NDArray[np.int64]  # (M + 1,) of the base's and the targets' first elements
    bfloat16: bool  # else float32


class Block:
    """Elements `start : start + n` of one flattened tensor, of the base and of M targets, as they are stored: float32, or the bits of bfloat16 (uint16).

    Compiled loops take `inputs`; `base` and `targets` are float32 and are made when they are asked for. Where a merge has no base, the base is zeros or one of
    the targets. The arrays may be overwritten when the next block is asked for. Raises ValueError for arrays of other types, or of different ones.
    """

    def __init__(self, start: int, stored: Sequence[Stored], room: "Scratch | None" = None) -> None:
        types = {each.dtype for each in stored}
        if types != {np.dtype(np.float32)} and types != {np.dtype(np.uint16)}:
            raise ValueError(
                f"a block of {', '.join(sorted(map(str, types)))}: float32 throughout, or the bits of bfloat16"
            )
        self.start = start
        self.stored = tuple(each if each.flags.c_contiguous else np.ascontiguousarray(each) for each in stored)
        self._room = Scratch(np.float32) if room is None else room
        self._is_wide: set[int] = set()

    @property
    def size(self) -> int:
        return int(self.stored[0].size)

    @cached_property
    def inputs(self) -> Inputs:
        places = [each.__array_interface__["data"][0] for each in self.stored]
        return Inputs(np.array(places, np.int64), self.stored[0].dtype == np.uint16)

    @property
    def base(self) -> Floats:
        """(n,)."""
        return self._wide(0, 1)[0]

    @property
    def targets(self) -> Floats:
        """(M, n)."""
        return self._wide(1, len(self.stored))

    def _wide(self, first: int, last: int) -> Floats:
        room = self._room.take(len(self.stored), self.size)
        for model in range(first, last):
            if model not in self._is_wide:
                widen(self.stored[model], room[model])
                self._is_wide.add(model)
        return room[first:last]


class Blocks(Protocol):
    """The blocks of one tensor; may be iterated any number of times, in the order of `start`."""

    name: str  # of the output tensor: the seed of random methods
    size: int  # elements
    row: int  # elements of the last dimension; row-wise methods get blocks of whole rows
    targets: int  # M
    spare: int  # bytes that a method may keep of what it makes of the whole tensor
    kept: "Scratch"  # where it may keep them: uint32, the same memory for one tensor after the other

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
    kept: "Scratch" = field(default_factory=lambda: Scratch(np.uint32))

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
            yield Block(start, [base[start:stop], *(each[start:stop] for each in flat)])


class Scratch:
    """Memory that a method uses again for one block after the other: fresh memory costs more than the loops that fill it."""

    def __init__(self, dtype: npt.DTypeLike) -> None:
        self._flat: npt.NDArray[np.generic] = np.empty(0, dtype)

    def take(self, rows: int, size: int) -> npt.NDArray:
        """(rows, size), contiguous; what was there is still there."""
        if self._flat.size < rows * size:
            self._flat = np.empty(rows * size, self._flat.dtype)
        return self._flat[: rows * size].reshape(rows, size)


def widen(stored: Stored, out: Floats) -> None:
    """Floating numbers of any type, bfloat16 as its bits (uint16), as float32."""
    if stored.dtype == np.uint16:
        np.left_shift(stored, np.uint32(16), out=out.view(np.uint32), dtype=np.uint32)
    else:
        out[:] = stored


def shares(amounts: Sequence[float]) -> Weights:
    """The amounts over their sum; equal shares where the sum is zero."""
    total = math.fsum(amounts)
    return tuple(amount / total for amount in amounts) if total > 0 else (1.0 / len(amounts),) * len(amounts)


def exact_sum(chunks: Sequence[Doubles]) -> float:
    """The sum of chunk sums of all blocks, exact and rounded once; nan where one is not finite (`fsum` refuses infinities of both signs)."""
    values = np.concatenate(chunks) if chunks else np.zeros(0)
    return math.fsum(values.tolist()) if bool(np.isfinite(values).all()) else math.nan
