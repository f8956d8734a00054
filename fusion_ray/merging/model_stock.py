"""Model Stock (arXiv 2403.19522): between the base and the mean of the targets, as far as the angle between the task vectors says.

    t = M cos / (1 + (M - 1) cos)        cos: the mean cosine over the pairs of task vectors
    merged = t mean_j theta_j + (1 - t) theta_v

One t a tensor, or with `filter_wise` one a row (needs blocks of whole rows). Where a task vector is zero its cosines are 0; where 1 + (M - 1) cos is, the
equation says nothing and the base stays.
"""

from itertools import combinations

import numpy as np
from numba import njit

from fusion_ray.merging.blocks import Block, Blocks, Doubles, Floats, TensorMerge, Weights
from fusion_ray.merging.gram import gram_matrix
from fusion_ray.merging.kernels import add_weighted_deltas, as_float32, dot

SMALLEST_DIVISOR = 1e-12


def model_stock(blocks: Blocks, weights: Weights | None = None, *, filter_wise: bool = False) -> TensorMerge:
    """Raises ValueError for a single target, which makes no angle. `weights` is not used."""
    check_targets(blocks.targets)
    if filter_wise:
        return TensorMerge(None, lambda block, out: _merge_rows(block, blocks.row, out))
    each = coefficients(gram_matrix(blocks, of="deltas"))
    narrow = as_float32(each)
    return TensorMerge(each, lambda block, out: add_weighted_deltas(block.inputs, narrow, out))


def check_targets(targets: int) -> None:
    if targets < 2:
        raise ValueError("model_stock of one target: it needs the angle between at least two")


def coefficients(gram: Doubles) -> Weights:
    """What each task vector is multiplied by, from their inner products (M, M): t of the equation above, over M."""
    count = len(gram)
    cosines = []
    for i, j in combinations(range(count), 2):
        norms = np.sqrt(gram[i, i] * gram[j, j])
        cosines.append(float(np.clip(gram[i, j] / norms, -1.0, 1.0)) if norms > 0 else 0.0)
    cosine = float(np.mean(cosines))
    divisor = 1 + (count - 1) * cosine
    share = count * cosine / divisor if divisor > SMALLEST_DIVISOR else 0.0
    return (share / count,) * count


def _merge_rows(block: Block, row: int, out: Floats) -> None:
    _merge_by_row(block.base, block.targets, row, out)


@njit(cache=True, nogil=True, error_model="numpy")
def _merge_by_row(base: Floats, targets: Floats, row: int, out: Floats) -> None:
    M = targets.shape[0]
    deltas, gram = np.empty((M, row), np.float32), np.empty((M, M), np.float64)
    for start in range(0, base.size, row):
        for j in range(M):
            for i in range(row):
                deltas[j, i] = targets[j, start + i] - base[start + i]
        for first in range(M):
            for second in range(first, M):
                gram[first, second] = dot(deltas[first], deltas[second])
        share = _share_of_row(gram)
        for i in range(row):
            total = 0.0
            for j in range(M):
                total += np.float64(deltas[j, i])
            out[start + i] = np.float32(base[start + i] + share * total)


@njit(cache=True, nogil=True, error_model="numpy")
def shares_of_rows(grams: Doubles) -> Doubles:
    """(R,) what the sum of the task vectors is multiplied by in each row, from their inner products there (R, M, M), on and above the diagonal: t over M."""
    shares = np.empty(grams.shape[0], np.float64)
    for row in range(shares.size):
        shares[row] = _share_of_row(grams[row])
    return shares


@njit(cache=True, nogil=True, error_model="numpy")
def _share_of_row(gram: Doubles) -> float:
    M = gram.shape[0]
    cosine = 0.0
    for first in range(M):
        for second in range(first + 1, M):
            both = np.sqrt(gram[first, first]) * np.sqrt(gram[second, second])
            cosine += min(1.0, max(-1.0, gram[first, second] / both)) if both > 0.0 else 0.0
    cosine /= M * (M - 1) / 2
    divisor = 1.0 + (M - 1) * cosine
    return cosine / divisor if divisor > SMALLEST_DIVISOR else 0.0
