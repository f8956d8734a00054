"""DELLA (arXiv 2406.11617): drop elements of each task vector by chance, the small ones rather than the large ones of their row, and rescale the others.

Within a row of R elements (the last dimension; a vector is one row) the element of rank r by magnitude, 0 the smallest, is kept with probability

    p = density_j - epsilon_j + 2 epsilon_j r / (R - 1)

and divided by p (MagPrune). Of equal magnitudes the lower position ranks lower; a row of one element has p = density_j. `della` elects a sign at every
position (`task_vectors.py`), `della_linear` does not. Needs blocks of whole rows.
"""

import numpy as np
import numpy.typing as npt
from numba import njit

from fusion_ray.merging.blocks import Block, Blocks, Floats, TensorMerge, Weights
from fusion_ray.merging.sampling import BITS, random_bits, stream_keys
from fusion_ray.merging.task_vectors import Thin, merge_task_vectors


def della(
    blocks: Blocks,
    weights: Weights | None = None,
    *,
    weight: Weights,
    density: Weights,
    epsilon: Weights,
    normalize: bool = True,
    rescale: bool = True,
    scale: float = 1.0,
    seed: int = 0,
) -> TensorMerge:
    """`weight`, `density` and `epsilon` hold one number a target. Raises ValueError where a probability would leave 0..1. `weights` is not used."""
    thin = drop_by_rank(blocks, density, epsilon, rescale=rescale, seed=seed)
    return merge_task_vectors(blocks, thin, weight=weight, elect=True, normalize=normalize, scale=scale)


def della_linear(
    blocks: Blocks,
    weights: Weights | None = None,
    *,
    weight: Weights,
    density: Weights,
    epsilon: Weights,
    normalize: bool = False,
    rescale: bool = True,
    scale: float = 1.0,
    seed: int = 0,
) -> TensorMerge:
    """As `della`, without the election."""
    thin = drop_by_rank(blocks, density, epsilon, rescale=rescale, seed=seed)
    return merge_task_vectors(blocks, thin, weight=weight, elect=False, normalize=normalize, scale=scale)


def half_ranges(density: Weights, epsilon: Weights) -> Weights:
    """How far each target's keep probabilities lie around its density. Raises ValueError where one would leave 0..1."""
    for target, (kept, around) in enumerate(zip(density, epsilon, strict=True)):
        if kept < 1 and (kept - around <= 0 or kept + around >= 1):
            raise ValueError(
                f"della with density {kept:g} and epsilon {around:g} for target {target}: keep density - epsilon above 0 and density + epsilon below 1"
            )
    return tuple(0.0 if kept >= 1 else around for kept, around in zip(density, epsilon, strict=True))


def drop_by_rank(blocks: Blocks, density: Weights, epsilon: Weights, *, rescale: bool, seed: int) -> Thin:
    half = half_ranges(density, epsilon)
    keys = stream_keys(seed, blocks.name, blocks.targets)

    def thin(block: Block, deltas: Floats) -> None:
        np.subtract(block.targets, block.base, out=deltas)
        for target in range(blocks.targets):
            rows = deltas[target].reshape(-1, blocks.row)
            order = np.argsort(np.abs(rows), axis=1, kind="stable")
            _drop(rows, order, keys[target], np.uint64(block.start), density[target], half[target], rescale)

    return thin


@njit(cache=True, nogil=True, error_model="numpy")
def _drop(
    rows: npt.NDArray[np.float32],
    order: npt.NDArray[np.int64],
    key: np.uint64,
    start: np.uint64,
    middle: float,
    half: float,
    rescale: bool,
) -> None:
    size = rows.shape[1]
    step = 2.0 * half / (size - 1) if size > 1 else 0.0
    least = middle - half if size > 1 else middle
    for row in range(rows.shape[0]):
        for rank in range(size):
            at = order[row, rank]
            keep = least + step * rank
            chance = np.float64(random_bits(key, start + np.uint64(row * size + at))) / np.float64(1 << BITS)
            if chance >= keep:
                rows[row, at] = np.float32(0.0)
            elif rescale:
                rows[row, at] = np.float32(rows[row, at] / keep)
