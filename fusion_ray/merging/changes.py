"""How far each target moved from the pivot, tensor by tensor: the statistics that are taken over all units before anything is merged.

Called by the merge worker, which also refuses non-finite values by them; VaRM turns them into weights.
"""

import math
from dataclasses import dataclass

import torch

from fusion_ray.merging.blocks import Blocks, chunk_sums


@dataclass(frozen=True)
class Changes:
    """Of one tensor with `size` elements; tuples have one entry a target, `finite` one a model with the pivot first."""

    size: int
    squares: tuple[float, ...]  # sum of the squared changes, the squared norm of the task vector
    absolutes: tuple[float, ...]  # sum of the absolute changes
    moved: tuple[int, ...]  # elements that differ from the pivot's
    finite: tuple[bool, ...]


def measure_changes(blocks: Blocks, *, targets: int) -> Changes:
    """One pass over a tensor. Sums in float64, the same for any size of block."""
    size = 0
    squares: list[list[float]] = [[] for _ in range(targets)]
    absolutes: list[list[float]] = [[] for _ in range(targets)]
    moved = [0] * targets
    finite = [True] * (targets + 1)
    for block in blocks:
        size += block.pivot.numel()
        for model, tensor in enumerate((block.pivot, *block.targets)):
            finite[model] = finite[model] and bool(torch.isfinite(tensor).all())
        for target, delta in enumerate(block.deltas):
            moved[target] += int(torch.count_nonzero(delta))
            wide = delta.double()
            absolutes[target].extend(chunk_sums(wide.abs()))
            squares[target].extend(chunk_sums(wide.square_()))
    return Changes(
        size=size,
        squares=tuple(_total(sums) for sums in squares),
        absolutes=tuple(_total(sums) for sums in absolutes),
        moved=tuple(moved),
        finite=tuple(finite),
    )


def _total(sums: list[float]) -> float:
    """The exact sum rounded once; nan where a model holds non-finite values (fsum refuses to add infinities of both signs)."""
    return math.fsum(sums) if all(map(math.isfinite, sums)) else math.nan
