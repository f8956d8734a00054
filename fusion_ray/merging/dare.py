"""DARE (arXiv 2311.03099): drop elements of each task vector by chance and rescale the others, so that its expected value stays.

    delta'_j = delta_j / density_j with probability density_j, else 0

`dare_linear` adds the rescaled task vectors up, `dare_ties` elects a sign at every position first (`task_vectors.py`). mergekit rescales to the tensor's
L1 norm instead; this is the paper's.
"""

import numpy as np

from fusion_ray.merging.blocks import Blocks, TensorMerge, Weights
from fusion_ray.merging.sampling import keep_by_chance, stream_keys
from fusion_ray.merging.task_vectors import Thin, merge_task_vectors


def dare_linear(
    blocks: Blocks,
    weights: Weights | None = None,
    *,
    weight: Weights,
    density: Weights,
    normalize: bool = False,
    rescale: bool = True,
    scale: float = 1.0,
    seed: int = 0,
) -> TensorMerge:
    """`weight` and `density` hold one number a target. `weights` is not used."""
    thin = drop(blocks, density, rescale=rescale, seed=seed)
    return merge_task_vectors(blocks, thin, weight=weight, elect=False, normalize=normalize, scale=scale)


def dare_ties(
    blocks: Blocks,
    weights: Weights | None = None,
    *,
    weight: Weights,
    density: Weights,
    normalize: bool = False,
    rescale: bool = True,
    scale: float = 1.0,
    seed: int = 0,
) -> TensorMerge:
    """As `dare_linear`, with the election of TIES."""
    thin = drop(blocks, density, rescale=rescale, seed=seed)
    return merge_task_vectors(blocks, thin, weight=weight, elect=True, normalize=normalize, scale=scale)


def drop(blocks: Blocks, density: Weights, *, rescale: bool, seed: int) -> Thin:
    """Keeps each element of target j with probability density_j."""
    keys = stream_keys(seed, blocks.name, blocks.targets)
    kept = np.asarray(density, np.float64)
    factors = np.array([factor_of(each, rescale=rescale) for each in density])
    return lambda block, deltas: keep_by_chance(block, keys, kept, factors, deltas)


def factor_of(density: float, *, rescale: bool) -> float:
    """What the elements that are kept are multiplied by."""
    return 1.0 / density if rescale and density > 0 else 1.0
