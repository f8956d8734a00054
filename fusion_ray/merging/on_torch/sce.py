"""SCE and its two variants on a torch device: `merging/sce.py`, whose docstring has the equations, for this folder. Called by `methods.py`."""

import torch
from torch import Tensor

from fusion_ray.merging.blocks import Weights
from fusion_ray.merging.on_torch.blocks import Piece, TorchBlocks, TorchMerge
from fusion_ray.merging.on_torch.selection import EVERYTHING, rank_all, rank_variance, select_top
from fusion_ray.merging.on_torch.sums import chunk_sums, total_of
from fusion_ray.merging.on_torch.task_vectors import add_elected
from fusion_ray.merging.sce import SMALLEST, check_variant, eta_of, least_divisor


def sce(blocks: TorchBlocks, weights: Weights | None, *, variant: str, select_topk: float) -> TorchMerge:
    """Raises ValueError for an unknown variant. `weights` is not used."""
    check_variant(variant)
    selected, ranks = EVERYTHING, None
    if select_topk < 1:
        ranks = rank_all(blocks, rank_variance)
        selected = select_top(ranks, int(select_topk * int(ranks.count_nonzero())))

    def mask_of(piece: Piece) -> Tensor | None:
        return None if ranks is None else selected.mask(ranks[piece.start : piece.start + piece.size], piece.start)

    squares = []
    for piece in blocks:
        deltas = _selected(piece, mask_of(piece))
        squares.append(chunk_sums(deltas, deltas))
    eta = eta_of(total_of(squares).tolist(), blocks.size, variant)
    everyone = (1.0,) * blocks.targets

    def apply(piece: Piece) -> Tensor:
        mask = None if variant == "fusechat_release" else mask_of(piece)
        deltas = _selected(piece, mask)
        if variant == "paper":
            merged = _add_unopposed(piece.base, deltas, eta)
        else:
            merged = add_elected(
                piece.base, deltas, everyone, eta, one_below=SMALLEST, least=least_divisor(variant), scale=1.0
            )
        return merged if mask is None else torch.where(mask, merged, piece.base)

    return TorchMerge(eta, apply)


def _selected(piece: Piece, mask: Tensor | None) -> Tensor:
    """dhat (M, p)."""
    return piece.deltas if mask is None else torch.where(mask, piece.deltas, 0.0)


def _add_unopposed(base: Tensor, deltas: Tensor, eta: Weights) -> Tensor:
    """The paper's erase and sum. The sign is that of a float64 sum: two large deltas of opposite sign may nearly cancel."""
    sign, total = torch.zeros((2, base.numel()), dtype=torch.float64, device=base.device)
    for delta in deltas:
        sign += delta.double()
    up, down = sign >= 0, sign <= 0
    for delta, weight in zip(deltas, eta, strict=True):
        unopposed = ((delta >= 0) & up) | ((delta <= 0) & down)
        total += torch.where(unopposed, delta.double() * weight, 0.0)
    return (base.double() + total).float()
