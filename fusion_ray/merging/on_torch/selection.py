"""The positions of a tensor that come first by some rank, exactly, on a torch device: `merging/selection.py` for this folder, with the same ranks and ties.

A rank is the bits of a non-negative float32 as an int32. The threshold is found bit by bit from the top, by counting the ranks that reach it; the last tie that
is taken likewise, so that the mask of a piece needs no other's. Called by `task_vectors.py` and `sce.py`. Legend of letters: n elements of the
tensor, p of a piece.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fusion_ray.merging.on_torch.blocks import Piece, TorchBlocks
from fusion_ray.merging.selection import SMALLEST_VARIANCE

_BITS = 31  # of a rank


@dataclass(frozen=True)
class Selected:
    """The positions whose rank is above `threshold`, and those before `end` whose rank equals it."""

    threshold: int
    end: int

    @property
    def everything(self) -> bool:
        return self.threshold < 0

    def mask(self, ranks: Tensor, start: int) -> Tensor:
        """(..., p) of the positions from `start` on, from their ranks (..., p)."""
        chosen = ranks > self.threshold
        ties = self.end - start
        if ties > 0:
            chosen[..., :ties] |= ranks[..., :ties] == self.threshold
        return chosen


EVERYTHING = Selected(-1, 0)
NOTHING = Selected((1 << _BITS) - 1, 0)  # above the bits of every finite float


def select_top(ranks: Tensor, count: int) -> Selected:
    """The first `count` of the ranks (n,); of equal ones the lowest positions."""
    if count <= 0:
        return NOTHING
    threshold = 0
    for bit in reversed(range(_BITS)):
        higher = threshold | 1 << bit
        if _count(ranks >= higher) >= count:
            threshold = higher
    return Selected(threshold, _end_of(ranks == threshold, count - _count(ranks > threshold)))


def rank_all(blocks: TorchBlocks, rank: Callable[[Piece], Tensor]) -> Tensor:
    """(n,) the ranks of the whole tensor, from those of its pieces."""
    ranks = torch.empty(blocks.size, dtype=torch.int32, device=blocks.device)
    for piece in blocks:
        ranks[piece.start : piece.start + piece.size] = rank(piece)
    return ranks


def rank_magnitudes(deltas: Tensor) -> Tensor:
    """The ranks of float32 numbers by magnitude."""
    return deltas.abs().view(torch.int32)


def rank_variance(piece: Piece) -> Tensor:
    """(p,) the ranks by the variance of the task vectors over the targets, as `selection.rank_variance`; zero where all targets are equal."""
    deltas = piece.deltas
    total = torch.zeros(piece.size, dtype=torch.float64, device=deltas.device)
    for first in range(len(deltas)):
        for second in range(first + 1, len(deltas)):
            apart = deltas[first].double() - deltas[second].double()
            total += apart * apart
    variance = (total * (1.0 / (len(deltas) * len(deltas)))).clamp_(min=SMALLEST_VARIANCE)
    return torch.where(total > 0, variance, 0.0).float().view(torch.int32)


def _end_of(equal: Tensor, ties: int) -> int:
    """Before which position of (n,) the first `ties` lie that are true; there are so many, and at least one."""
    low, high = 0, equal.numel()
    while high - low > 1:
        middle = (low + high) // 2
        found = _count(equal[low:middle])
        if found >= ties:
            high = middle
        else:
            low, ties = middle, ties - found
    return high


def _count(mask: Tensor) -> int:
    return int(mask.count_nonzero())
