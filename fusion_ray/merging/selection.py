"""SCE's Select: the positions of a tensor where the targets differ most, exactly, in blocks (arXiv 2408.07990, equation 5).

With delta_j = theta_j - theta_v the variance at a position is taken over the M targets, in float64, and ranked as float32. Of the positions whose
variance is not zero the first int(select_topk * their number) by variance are selected. Ties at the threshold go to the lowest positions.

The threshold is found without sorting: a histogram of the upper 16 bits of the float32 variance, then one of the lower 16 bits within the bucket that
holds it (the bits of non-negative floats order as the floats do), then the place of the last tie that is taken.
"""

from dataclasses import dataclass

import torch

from fusion_ray.merging.blocks import Block, Blocks

_SMALLEST = 2.0**-149  # float32's smallest positive number: a variance below it still is not zero
_HALF = 1 << 16


@dataclass(frozen=True)
class Selection:
    """Selected are the positions whose rank is above `threshold`, and those equal to it that lie before `cut`."""

    threshold: int
    cut: int
    count: int
    everything: bool = False

    def mask(self, block: Block) -> torch.Tensor:
        """(n,) bool of a block."""
        if self.everything:
            return torch.ones(block.pivot.numel(), dtype=torch.bool)
        if self.count == 0:
            return torch.zeros(block.pivot.numel(), dtype=torch.bool)
        rank = variance_rank(block)
        before = max(0, self.cut - block.start)
        mask = rank > self.threshold
        mask[:before] |= rank[:before] == self.threshold
        return mask


def select(blocks: Blocks, select_topk: float) -> Selection:
    """The selection of one tensor in at most three passes. 1 switches it off: every position, also of zero variance."""
    if select_topk >= 1:
        return Selection(0, 0, 0, everything=True)
    upper = torch.zeros(_HALF >> 1, dtype=torch.int64)
    nonzero = 0
    for block in blocks:
        rank = variance_rank(block)
        nonzero += int(torch.count_nonzero(rank))
        upper += torch.bincount(rank >> 16, minlength=_HALF >> 1)
    count = int(select_topk * nonzero)
    if count == 0:
        return Selection(0, 0, 0)
    bucket, above = _find(upper, count)
    lower = torch.zeros(_HALF, dtype=torch.int64)
    for block in blocks:
        rank = variance_rank(block)
        lower += torch.bincount(rank[rank >> 16 == bucket] & (_HALF - 1), minlength=_HALF)
    low, above_low = _find(lower, count - above)
    threshold = bucket << 16 | low
    ties = count - above - above_low
    return Selection(threshold, _place_of_tie(blocks, threshold, ties), count)


def variance_rank(block: Block) -> torch.Tensor:
    """(n,) int32 that orders as the variance over the targets, zero where it is zero (all targets equal)."""
    wide = [delta.double() for delta in block.deltas]
    mean = wide[0].clone()
    for delta in wide[1:]:
        mean += delta
    mean /= len(wide)
    variance = torch.zeros_like(mean)
    for delta in wide:
        variance += (delta - mean).square_()
    variance /= len(wide)
    variance = torch.where(variance > 0, variance.clamp(min=_SMALLEST), 0.0)
    return variance.to(torch.float32).view(torch.int32)


def _find(histogram: torch.Tensor, count: int) -> tuple[int, int]:
    """The bin that holds the count-th entry from the top, and the number of entries in the bins above it."""
    from_top = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, count))
    above = int(from_top[place - 1]) if place else 0
    return histogram.numel() - 1 - place, above


def _place_of_tie(blocks: Blocks, threshold: int, ties: int) -> int:
    """One past the position of the ties-th element whose rank is the threshold."""
    for block in blocks:
        places = torch.nonzero(variance_rank(block) == threshold).reshape(-1)
        if places.numel() >= ties:
            return block.start + int(places[ties - 1]) + 1
        ties -= places.numel()
    raise AssertionError("the histogram counted more ties than the blocks hold: the blocks changed between two passes")
