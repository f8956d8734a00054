"""SCE: select, calculate, erase (FuseChat v2, arXiv 2408.07990, algorithm 1 and equations 5-9), as the paper defines it and as two programs compute it.

For one tensor, with delta_j = theta_j - theta_v of the M targets:

    select      dhat_j = delta_j at the selected positions, else 0                      (selection.py)
    calculate   eta_j = sum(dhat_j^2) / sum_j sum(dhat_j^2)
    erase       s = sum_j dhat_j;  d'_j = 0 where dhat_j has the sign opposite to s, else dhat_j
    merged      theta_v + sum_j eta_j d'_j          no renormalisation; what is not selected stays at the pivot's value

variant "paper": the above. Where s is exactly 0 no sign is opposite to it and nothing is erased.
variant "fusechat_release": Select shapes eta alone; erase and sum take the whole delta_j, a zero s counts as positive, a zero delta is erased, and the
result is divided at each position by the eta that survive there.
variant "mergekit" (0.1.5): the sum takes dhat_j, divided likewise (by no less than 1e-6), and eta is uniform where sum_j mean(dhat_j^2) < 1e-6.
eta is uniform where all dhat are zero.
"""

import math
from collections.abc import Sequence

import torch

from fusion_ray.merging.blocks import Block, Blocks, TensorMerge, Weights, chunk_sums, shares, weighted_sum
from fusion_ray.merging.selection import Selection, select

_MERGEKIT_UNIFORM_BELOW = 1e-6
_MERGEKIT_LEAST_DIVISOR = 1e-6


def sce(
    blocks: Blocks, weights: Weights | None = None, *, variant: str = "paper", select_topk: float = 0.1
) -> TensorMerge:
    """SCE made ready for one tensor in up to four passes over it. Raises ValueError for an unknown variant. `weights` is not used."""
    if variant not in ("paper", "fusechat_release", "mergekit"):
        raise ValueError(f"sce variant {variant!r}: give paper, fusechat_release or mergekit")
    selection = select(blocks, select_topk)
    eta = _calculate(blocks, selection, floor=_MERGEKIT_UNIFORM_BELOW if variant == "mergekit" else 0.0)
    if variant == "paper":
        return TensorMerge(eta, lambda block: _merge_paper(block, selection, eta))
    if variant == "mergekit":
        return TensorMerge(
            eta, lambda block: _merge_renormalised(block, _selected(block, selection), eta, _MERGEKIT_LEAST_DIVISOR)
        )
    return TensorMerge(eta, lambda block: _merge_renormalised(block, block.deltas, eta, 0.0))


def _calculate(blocks: Blocks, selection: Selection, *, floor: float) -> Weights:
    """eta (equation 6); uniform where the mean squares of all targets add up to less than `floor`."""
    sums: list[list[float]] | None = None
    size = 0
    for block in blocks:
        size += block.pivot.numel()
        sums = sums or [[] for _ in block.targets]
        for target, delta in enumerate(_selected(block, selection)):
            sums[target].extend(chunk_sums(delta.double().square_()))
    if sums is None:
        raise ValueError("a tensor without elements has no blocks and cannot be merged: copy it")
    squares = [math.fsum(parts) for parts in sums]
    return shares(squares if math.fsum(squares) / size >= floor else [0.0] * len(squares))


def _selected(block: Block, selection: Selection) -> list[torch.Tensor]:
    mask = selection.mask(block)
    return [delta * mask for delta in block.deltas]


def _sum_of(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """In float64: its sign decides what is erased, and two large deltas of opposite sign may nearly cancel."""
    total = deltas[0].double()
    for delta in deltas[1:]:
        total = total + delta
    return total


def _merge_paper(block: Block, selection: Selection, eta: Weights) -> torch.Tensor:
    deltas = _selected(block, selection)
    sign = torch.sign(_sum_of(deltas)).to(torch.float32)
    kept = [torch.where(delta * sign < 0, 0.0, delta) for delta in deltas]
    return block.pivot + weighted_sum(kept, eta)


def _merge_renormalised(block: Block, deltas: list[torch.Tensor], eta: Weights, least: float) -> torch.Tensor:
    """Erase, then divide by the surviving eta; a position where none survives stays at the pivot's value."""
    majority = torch.where(_sum_of(deltas) >= 0, 1.0, -1.0).to(torch.float32)
    survives = [delta * majority > 0 for delta in deltas]
    divisor = weighted_sum([mask.to(torch.float32) for mask in survives], eta).clamp_(min=least)
    divisor[divisor == 0] = 1.0
    return (
        block.pivot + weighted_sum([delta * mask for delta, mask in zip(deltas, survives, strict=True)], eta) / divisor
    )
