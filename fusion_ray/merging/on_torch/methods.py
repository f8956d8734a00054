"""The merge methods on a torch device: the functions of `merging/methods.py`, by the same names and with the same arguments, all of them given.

The weights of a whole merge (`Method.weights`) come from statistics alone and are the same. What a weighted mean multiplies by is computed from inner
products of whole tensors by the functions that the compiled loops use. Called by the merge worker where a merge has a device. Legend of letters: M targets,
p elements of a piece, R of a row.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fusion_ray.merging.blocks import Weights
from fusion_ray.merging.karcher import coefficients as karcher_coefficients
from fusion_ray.merging.kernels import as_float32
from fusion_ray.merging.linear import divide
from fusion_ray.merging.model_stock import check_targets, shares_of_rows
from fusion_ray.merging.model_stock import coefficients as model_stock_coefficients
from fusion_ray.merging.multislerp import coefficients as multislerp_coefficients
from fusion_ray.merging.on_torch.blocks import Piece, TorchBlocks, TorchMerge
from fusion_ray.merging.on_torch.sce import sce
from fusion_ray.merging.on_torch.sums import gram_matrix, row_sums
from fusion_ray.merging.on_torch.task_vectors import (
    Thin,
    add_weighted_deltas,
    drop,
    drop_by_rank,
    leave_out,
    merge_task_vectors,
    trim,
    whole,
)
from fusion_ray.merging.slerp import coefficients as slerp_coefficients


def linear(blocks: TorchBlocks, weights: Weights | None, *, weight: Weights, normalize: bool) -> TorchMerge:
    return _combination(divide(weight, normalize=normalize), add_to_base=False)


def slerp(blocks: TorchBlocks, weights: Weights | None, *, t: float) -> TorchMerge:
    of_base, of_target = slerp_coefficients(gram_matrix(blocks, of="base and targets"), t=t)
    base, target = as_float32((of_base, of_target)).tolist()
    return TorchMerge((of_target,), lambda piece: piece.targets[0] * target + piece.base * base)


def multislerp(
    blocks: TorchBlocks,
    weights: Weights | None,
    *,
    weight: Weights,
    normalize_weights: bool,
    eps: float,
    has_base: bool,
) -> TorchMerge:
    gram = gram_matrix(blocks, of="deltas" if has_base else "targets")
    found = multislerp_coefficients(gram, weight, normalize_weights=normalize_weights, eps=eps)
    return _combination(found, add_to_base=has_base)


def karcher(blocks: TorchBlocks, weights: Weights | None, *, max_iter: int, tol: float) -> TorchMerge:
    found = karcher_coefficients(gram_matrix(blocks, of="targets"), max_iter=max_iter, tol=tol)
    return _combination(found, add_to_base=False)


def model_stock(blocks: TorchBlocks, weights: Weights | None, *, filter_wise: bool) -> TorchMerge:
    check_targets(blocks.targets)
    if filter_wise:
        return TorchMerge(None, lambda piece: _merge_rows(piece, blocks.row))
    return _combination(model_stock_coefficients(gram_matrix(blocks, of="deltas")), add_to_base=True)


def thinned(thin: Callable[..., Thin | None], *, elect: bool) -> Callable[..., TorchMerge]:
    """The method that adds up what `thin` leaves of the task vectors; `thin` takes the arguments that are its own."""

    def merge(
        blocks: TorchBlocks,
        weights: Weights | None,
        *,
        weight: Weights,
        normalize: bool,
        scale: float,
        **of_thin: object,
    ) -> TorchMerge:
        left = thin(blocks, **of_thin)
        return merge_task_vectors(blocks, left, weight=weight, elect=elect, normalize=normalize, scale=scale)

    return merge


def varm(
    blocks: TorchBlocks,
    weights: Weights | None,
    *,
    granularity: str,
    square: bool,
    temperature: float | None = None,
) -> TorchMerge:
    """`weights` are those of `varm_weights`; None at parameter granularity."""
    if granularity == "parameter":
        return TorchMerge(None, lambda piece: _merge_elements(piece, square))
    assert weights is not None, "varm needs the tensor's weights at any granularity but parameter"
    return _combination(weights, add_to_base=True)


def passthrough(blocks: TorchBlocks, weights: Weights | None) -> TorchMerge:
    assert blocks.targets == 1, "passthrough takes one model a tensor"
    return TorchMerge((1.0,), lambda piece: piece.targets[0])


TORCH_METHODS: dict[str, Callable[..., TorchMerge]] = {
    "varm": varm,
    "sce": sce,
    "linear": linear,
    "slerp": slerp,
    "multislerp": multislerp,
    "karcher": karcher,
    "model_stock": model_stock,
    "task_arithmetic": thinned(whole, elect=False),
    "ties": thinned(trim, elect=True),
    "dare_linear": thinned(drop, elect=False),
    "dare_ties": thinned(drop, elect=True),
    "breadcrumbs": thinned(leave_out, elect=False),
    "breadcrumbs_ties": thinned(leave_out, elect=True),
    "della": thinned(drop_by_rank, elect=True),
    "della_linear": thinned(drop_by_rank, elect=False),
    "passthrough": passthrough,
}


def _combination(coefficients: Weights, *, add_to_base: bool) -> TorchMerge:
    """As `sphere.combination`."""
    if add_to_base:
        return TorchMerge(coefficients, lambda piece: add_weighted_deltas(piece, coefficients))
    narrow = as_float32(coefficients).tolist()

    def apply(piece: Piece) -> Tensor:
        total = torch.zeros_like(piece.base)
        for target, weight in zip(piece.targets, narrow, strict=True):
            total += target * weight
        return total

    return TorchMerge(coefficients, apply)


def _merge_rows(piece: Piece, row: int) -> Tensor:
    """Model Stock with a share of each row's own."""
    rows = piece.deltas.unflatten(-1, (-1, row))  # (M, rows, R)
    grams = torch.stack([row_sums(one[None], rows) for one in rows]).permute(2, 0, 1).contiguous()  # (rows, M, M)
    shares = torch.from_numpy(shares_of_rows(grams.cpu().numpy())).to(piece.base.device)
    total = torch.zeros(rows.shape[1:], dtype=torch.float64, device=rows.device)
    for delta in rows:
        total += delta.double()
    return (piece.base.double() + (total * shares[:, None]).view(-1)).float()


def _merge_elements(piece: Piece, square: bool) -> Tensor:
    """VaRM with weights of each element's own; where nobody moved every delta is zero, whatever its weight."""
    amount, total = torch.zeros((2, piece.size), dtype=torch.float64, device=piece.base.device)
    for delta in piece.deltas:
        wide = delta.double()
        size = wide * wide if square else wide.abs()
        amount += size
        total += size * wide
    return (piece.base.double() + torch.where(amount > 0, total / amount, 0.0)).float()
