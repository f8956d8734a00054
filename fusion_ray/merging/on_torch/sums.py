"""Sums of floats on a torch device with the bits of the compiled loops, and what is made of them: `kernels.dot`, `gram.py` and `changes.py` for this folder.

torch adds up in an order of its own, which differs between devices. Here products (exact in float64) are added over LANES side by side, row after row, then the
lanes folded, all by additions of whole tensors; sums of chunks go to the host, where they are added up exactly. Called by the methods and the merge worker.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from fusion_ray.merging.blocks import CHUNK, Doubles, exact_sum
from fusion_ray.merging.changes import Changes
from fusion_ray.merging.gram import Of
from fusion_ray.merging.kernels import LANES
from fusion_ray.merging.on_torch.blocks import TorchBlocks


def row_sums(first: Tensor, second: Tensor) -> Tensor:
    """(...) the inner products of float32 rows (..., R) in float64; the shapes before R may be those of one to the other's many."""
    one, other = _in_lanes(first), _in_lanes(second)  # (..., R / LANES, LANES)
    shape = torch.broadcast_shapes(one.shape[:-2], other.shape[:-2])
    lanes = torch.zeros((*shape, LANES), dtype=torch.float64, device=one.device)
    for at in range(one.shape[-2]):
        lanes += one[..., at, :].double() * other[..., at, :].double()
    while lanes.shape[-1] > 1:
        lower, upper = lanes.chunk(2, dim=-1)
        lanes = lower + upper
    return lanes[..., 0]


def chunk_sums(first: Tensor, second: Tensor) -> Tensor:
    """(..., chunks) the inner products of float32 (..., R) over every CHUNK elements, the last of a row over what is left."""
    return row_sums(_in_chunks(first), _in_chunks(second))


def total_of(sums: list[Tensor]) -> Doubles:
    """(...) the exact sums over the last dimension of all of these (..., chunks), rounded once."""
    together = torch.cat(sums, dim=-1).cpu().numpy()
    flat = together.reshape(-1, together.shape[-1])
    return np.array([exact_sum([row]) for row in flat]).reshape(together.shape[:-1])


def gram_matrix(blocks: TorchBlocks, *, of: Of) -> Doubles:
    """As `gram.gram_matrix`: inner products of the targets, of their task vectors, or of the base and the targets."""
    count = blocks.targets + (of == "base and targets")
    sums: list[list[Tensor]] = [[] for _ in range(count)]
    for piece in blocks:
        if of == "base and targets":
            tensors = torch.cat([piece.base[None], piece.targets])
        else:
            tensors = piece.deltas if of == "deltas" else piece.targets
        for row in range(count):
            sums[row].append(chunk_sums(tensors[row : row + 1], tensors[row:]))
    gram = np.empty((count, count))
    for row, of_pieces in enumerate(sums):
        gram[row, row:] = gram[row:, row] = total_of(of_pieces)
    return gram


def measure_changes(blocks: TorchBlocks) -> Changes:
    """As `changes.measure_changes`."""
    squares: list[Tensor] = []
    absolutes: list[Tensor] = []
    moved = torch.zeros(blocks.targets, dtype=torch.int64, device=blocks.device)
    for piece in blocks:
        deltas = piece.deltas
        squares.append(chunk_sums(deltas, deltas))
        absolutes.append(chunk_sums(deltas.abs(), torch.ones_like(piece.base)[None]))
        moved += (piece.targets != piece.base).sum(dim=1)
    square = total_of(squares)
    finite = [True] * (blocks.targets + 1)
    if not np.isfinite(square).all():
        finite = [bool(torch.isfinite(tensor.float()).all()) for tensor in (blocks.base, *blocks.stored)]
    return Changes(
        size=blocks.size,
        squares=tuple(square.tolist()),
        absolutes=tuple(total_of(absolutes).tolist()),
        moved=tuple(moved.tolist()),
        finite=tuple(finite),
    )


def _in_lanes(rows: Tensor) -> Tensor:
    """(..., R / LANES, LANES)."""
    return _filled(rows, LANES).unflatten(-1, (-1, LANES))


def _in_chunks(rows: Tensor) -> Tensor:
    """(..., chunks, CHUNK)."""
    return _filled(rows, CHUNK).unflatten(-1, (-1, CHUNK))


def _filled(rows: Tensor, unit: int) -> Tensor:
    """Up to whole units with zeros, which add nothing."""
    missing = -rows.shape[-1] % unit
    return pad(rows, (0, missing)) if missing else rows
