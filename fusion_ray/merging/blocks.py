"""One tensor of every model, in blocks: what every merge method reads, and sums over it that do not depend on the blocks.

A block is a range of the tensor's flattened elements, the same range of every model. A method may go over the blocks of a tensor as often as it needs,
so a tensor that fits no memory is merged like a small one. Legend of letters: M targets, n elements of a block.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

# Sums are taken over chunks of so many elements at fixed places of the tensor, then added exactly: the same result for any size of block. Every block
# starts at a multiple of it, and below torch's grain of 32768 the number of threads changes nothing either.
CHUNK = 1024

Weights = tuple[float, ...]  # one a target


@dataclass(frozen=True)
class Block:
    """Elements `start : start + n` of one flattened tensor: the pivot's (n,) and each of the M targets' (n,), all float32."""

    start: int
    pivot: torch.Tensor
    targets: tuple[torch.Tensor, ...]

    @property
    def deltas(self) -> list[torch.Tensor]:
        """The M task vectors (target minus pivot), each (n,) float32."""
        return [target - self.pivot for target in self.targets]


Blocks = Iterable[Block]  # may be iterated any number of times, in the order of `start`


@dataclass(frozen=True)
class TensorMerge:
    """A method made ready for one tensor. `apply` turns a block of it into the merged (n,) float32; `weights` are None where each element has its own."""

    weights: Weights | None
    apply: Callable[[Block], torch.Tensor]


def split(pivot: torch.Tensor, targets: Sequence[torch.Tensor], *, size: int = 1 << 18) -> list[Block]:
    """The blocks of tensors that are in memory, `size` elements each (a multiple of CHUNK). Raises ValueError for any other size."""
    if size < CHUNK or size % CHUNK:
        raise ValueError(f"a block of {size} elements: give a multiple of {CHUNK}")
    flat = [tensor.to(torch.float32).reshape(-1) for tensor in (pivot, *targets)]
    return [
        Block(start, flat[0][start : start + size], tuple(tensor[start : start + size] for tensor in flat[1:]))
        for start in range(0, flat[0].numel(), size)
    ]


def chunk_sums(values: torch.Tensor) -> Iterator[float]:
    """The sums in float64 of the chunks of a block's values (n,); `math.fsum` adds those of all blocks."""
    whole = values.numel() // CHUNK * CHUNK
    yield from values[:whole].view(-1, CHUNK).sum(1, dtype=torch.float64).tolist()
    if whole < values.numel():
        yield float(values[whole:].sum(dtype=torch.float64))


def shares(amounts: Sequence[float]) -> Weights:
    """The amounts over their sum; equal shares where the sum is zero."""
    total = math.fsum(amounts)
    return tuple(amount / total for amount in amounts) if total > 0 else (1.0 / len(amounts),) * len(amounts)


def weighted_sum(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """sum_j weights_j tensors_j (n,), added in order in float32."""
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total += tensor * weight
    return total
