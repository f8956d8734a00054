"""Linear: the weighted mean of the targets, sum_j w_j theta_j / sum_j w_j (model soups, arXiv 2203.05482). The pivot has no part in it."""

import math

from fusion_ray.merging.blocks import Blocks, TensorMerge, Weights, weighted_sum


def linear(blocks: Blocks, weights: Weights | None = None, *, weight: Weights) -> TensorMerge:
    """`weight` holds one number a target. Raises ValueError where they add up to zero. `weights` is not used."""
    total = math.fsum(weight)
    if total == 0:
        raise ValueError(f"linear with the weights {list(weight)}, which add up to zero: their mean is not defined")
    normalised = tuple(one / total for one in weight)
    return TensorMerge(normalised, lambda block: weighted_sum(block.targets, normalised))
