"""Task arithmetic (arXiv 2212.04089): theta_v + scale * sum_j w_j (theta_j - theta_v), the weights as they are given or, with `normalize`, over their sum."""

from fusion_ray.merging.blocks import Blocks, TensorMerge, Weights
from fusion_ray.merging.task_vectors import merge_task_vectors


def task_arithmetic(
    blocks: Blocks, weights: Weights | None = None, *, weight: Weights, normalize: bool = False, scale: float = 1.0
) -> TensorMerge:
    """`weight` holds one number a target. `weights` is not used."""
    return merge_task_vectors(blocks, None, weight=weight, elect=False, normalize=normalize, scale=scale)
