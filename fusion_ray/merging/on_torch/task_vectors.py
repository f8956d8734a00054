"""Task vectors, thinned out and added up, on a torch device: `merging/task_vectors.py`, `ties.py`, `dare.py`, `breadcrumbs.py` and `della.py` for this folder.

Their docstrings have the equations. Called by `methods.py`. Legend of letters: M targets, p elements of a piece, R of a row.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fusion_ray.merging.blocks import Weights
from fusion_ray.merging.breadcrumbs import tops_of
from fusion_ray.merging.dare import factor_of
from fusion_ray.merging.della import half_ranges
from fusion_ray.merging.kernels import as_float32
from fusion_ray.merging.on_torch.blocks import Piece, TorchBlocks, TorchMerge
from fusion_ray.merging.on_torch.sampling import random_bits
from fusion_ray.merging.on_torch.selection import EVERYTHING, Selected, rank_all, rank_magnitudes, select_top
from fusion_ray.merging.sampling import BITS, limit_of, stream_keys
from fusion_ray.merging.task_vectors import LEAST_DIVISOR, applied_weights
from fusion_ray.merging.ties import kept_of

Thin = Callable[[Piece], Tensor]  # what is left of the task vectors, (M, p) float32


def merge_task_vectors(
    blocks: TorchBlocks, thin: Thin | None, *, weight: Weights, elect: bool, normalize: bool, scale: float
) -> TorchMerge:
    """The merge of one tensor; without `thin` task vectors are taken whole."""
    weights = applied_weights(weight, elect=elect, normalize=normalize, scale=scale)
    if thin is None and not elect:
        return TorchMerge(weights, lambda piece: add_weighted_deltas(piece, weights))

    def apply(piece: Piece) -> Tensor:
        deltas = piece.deltas if thin is None else thin(piece)
        if not elect:
            return add_all(piece.base, deltas, weights)
        divisor = LEAST_DIVISOR if normalize else None
        return add_elected(piece.base, deltas, weight, weight, one_below=divisor, least=0.0, scale=scale)

    return TorchMerge(weights, apply)


def add_weighted_deltas(piece: Piece, weights: Weights) -> Tensor:
    """base + sum_j weights_j (targets_j - base) in float32, as `kernels.add_weighted_deltas`."""
    total = torch.zeros_like(piece.base)
    for target, weight in zip(piece.targets, as_float32(weights).tolist(), strict=True):
        total += (target - piece.base) * weight
    return total + piece.base


def add_all(base: Tensor, deltas: Tensor, weights: Weights) -> Tensor:
    """base + sum_j weights_j deltas_j in float64."""
    total = torch.zeros_like(base, dtype=torch.float64)
    for delta, weight in zip(deltas, weights, strict=True):
        total += delta.double() * weight
    return (base.double() + total).float()


def add_elected(
    base: Tensor,
    deltas: Tensor,
    voices: Weights,
    weights: Weights,
    *,
    one_below: float | None,
    least: float,
    scale: float,
) -> Tensor:
    """The elected merge, as `task_vectors.add_elected`; divided where `one_below` says below what a divisor counts as 1."""
    vote, total, divisor = torch.zeros((3, base.numel()), dtype=torch.float64, device=base.device)
    for delta, voice in zip(deltas, voices, strict=True):
        vote += delta.double() * voice
    positive = vote >= 0
    for delta, voice, weight in zip(deltas, voices, weights, strict=True):
        wide = delta.double()
        said = wide * voice
        goes_on = torch.where(positive, said > 0, said < 0)
        total += torch.where(goes_on, wide * weight, 0.0)
        divisor += goes_on.double() * weight
    if one_below is not None:
        by = torch.where(divisor.abs() < one_below, 1.0, divisor)
        total /= by.clamp_(min=least) if least > 0 else by
    return (base.double() + total * scale).float()


def whole(blocks: TorchBlocks) -> None:
    """Task arithmetic leaves nothing out."""


def trim(blocks: TorchBlocks, density: Weights) -> Thin | None:
    """TIES: the largest elements of each task vector."""
    if all(each >= 1 for each in density):
        return None
    chosen = [
        EVERYTHING if each >= 1 else select_top(_ranks(blocks, target), kept_of(each, blocks.size))
        for target, each in enumerate(density)
    ]
    return lambda piece: _kept(piece, chosen)


def leave_out(blocks: TorchBlocks, density: Weights, gamma: Weights) -> Thin:
    """Breadcrumbs: without the largest and without the smallest."""
    outer, inner = [], []
    for target, each in enumerate(zip(density, gamma, strict=True)):
        ranks = _ranks(blocks, target)
        larger, largest = tops_of(*each, blocks.size)
        outer.append(select_top(ranks, larger))
        inner.append(select_top(ranks, largest))
    return lambda piece: _kept(piece, outer) - _kept(piece, inner)


def drop(blocks: TorchBlocks, density: Weights, *, rescale: bool, seed: int) -> Thin:
    """DARE: each element with a probability."""
    keys = stream_keys(seed, blocks.name, blocks.targets).tolist()
    factors = as_float32([factor_of(each, rescale=rescale) for each in density]).tolist()

    def thin(piece: Piece) -> Tensor:
        deltas = piece.deltas
        for delta, key, each, factor in zip(deltas, keys, density, factors, strict=True):
            kept = random_bits(key, piece.start, piece.size, blocks.device) < limit_of(each)
            delta.copy_(torch.where(kept, delta * factor, 0.0))
        return deltas

    return thin


def drop_by_rank(blocks: TorchBlocks, density: Weights, epsilon: Weights, *, rescale: bool, seed: int) -> Thin:
    """DELLA: each element with the probability of its rank in its row."""
    half = half_ranges(density, epsilon)
    keys = stream_keys(seed, blocks.name, blocks.targets).tolist()

    def thin(piece: Piece) -> Tensor:
        deltas = piece.deltas
        for delta, key, middle, around in zip(deltas, keys, density, half, strict=True):
            keep = _keep_probabilities(delta.view(-1, blocks.row), middle, around).view(-1)
            chance = random_bits(key, piece.start, piece.size, blocks.device).double() * 2.0**-BITS
            left = (delta.double() / keep).float() if rescale else delta
            delta.copy_(torch.where(chance < keep, left, 0.0))
        return deltas

    return thin


def _keep_probabilities(rows: Tensor, middle: float, half: float) -> Tensor:
    """(rows, R) float64, from (rows, R) the elements."""
    size = rows.shape[1]
    order = rows.abs().sort(dim=1, stable=True).indices
    ranks = torch.arange(size, device=rows.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, ranks).double()
    return rank * (2.0 * half / (size - 1) if size > 1 else 0.0) + (middle - half if size > 1 else middle)


def _ranks(blocks: TorchBlocks, target: int) -> Tensor:
    """(n,) of one target's elements by magnitude."""
    return rank_all(blocks.of(target), lambda piece: rank_magnitudes(piece.deltas[0]))


def _kept(piece: Piece, chosen: list[Selected]) -> Tensor:
    """(M, p) the task vectors where they are chosen, else 0."""
    deltas = piece.deltas
    for delta, selected in zip(deltas, chosen, strict=True):
        if not selected.everything:
            delta.masked_fill_(~selected.mask(rank_magnitudes(delta), piece.start), 0.0)
    return deltas
