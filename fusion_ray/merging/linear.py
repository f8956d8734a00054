"""Linear: the weighted mean of the targets, sum_j w_j theta_j / sum_j w_j (model soups, arXiv 2203.05482). The base has no part in it."""

import math

from fusion_ray.merging.blocks import Blocks, TensorMerge, Weights
from fusion_ray.merging.kernels import as_float32, sum_weighted
from fusion_ray.merging.parameters import cancel


def linear(blocks: Blocks, weights: Weights | None = None, *, weight: Weights, normalize: bool = True) -> TensorMerge:
    """`weight` holds one number a target; without `normalize` the sum is not divided. Raises ValueError where it would be divided by zero.

    `weights` is not used.
    """
    divided = divide(weight, normalize=normalize)
    narrow = as_float32(divided)
    return TensorMerge(divided, lambda block, out: sum_weighted(block.inputs, narrow, out))


def divide(weight: Weights, *, normalize: bool) -> Weights:
    """The weights over their sum. Raises ValueError where that is zero."""
    if normalize and cancel(weight):
        raise ValueError(f"linear with the weights {list(weight)}, which add up to zero: their mean is not defined")
    total = math.fsum(weight) if normalize else 1.0
    return tuple(one / total for one in weight)
