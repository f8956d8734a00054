"""Task arithmetic (arXiv 2212.04089): theta_v + sum_j w_j (theta_j - theta_v), the weights as they are given."""

from fusion_ray.merging.blocks import Blocks, TensorMerge, Weights, weighted_sum


def task_arithmetic(blocks: Blocks, weights: Weights | None = None, *, weight: Weights) -> TensorMerge:
    """`weight` holds one number a target. `weights` is not used."""
    return TensorMerge(weight, lambda block: block.pivot + weighted_sum(block.deltas, weight))
