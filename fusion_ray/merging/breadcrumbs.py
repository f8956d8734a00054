"""Model Breadcrumbs (arXiv 2312.06795): leave out the largest and the smallest elements of each task vector; what lies between is added up.

Of target j's n elements the int(gamma_j n) largest by magnitude go, and so many of the smallest that int(density_j n) are left; where gamma_j is more than
1 - density_j, no small one goes and the largest n - int(density_j n) do. `breadcrumbs_ties` elects a sign at every position (`task_vectors.py`).
"""

import numpy as np

from fusion_ray.merging.blocks import Block, Blocks, Floats, Scratch, TensorMerge, Weights
from fusion_ray.merging.selection import Ranked, as_arrays, rank_magnitudes, select_top
from fusion_ray.merging.task_vectors import Thin, merge_task_vectors
from fusion_ray.merging.ties import keep_largest


def breadcrumbs(
    blocks: Blocks,
    weights: Weights | None = None,
    *,
    weight: Weights,
    density: Weights,
    gamma: Weights,
    normalize: bool = False,
    scale: float = 1.0,
) -> TensorMerge:
    """`weight`, `density` and `gamma` hold one number a target. `weights` is not used."""
    thin = leave_out(blocks, density, gamma)
    return merge_task_vectors(blocks, thin, weight=weight, elect=False, normalize=normalize, scale=scale)


def breadcrumbs_ties(
    blocks: Blocks,
    weights: Weights | None = None,
    *,
    weight: Weights,
    density: Weights,
    gamma: Weights,
    normalize: bool = False,
    scale: float = 1.0,
) -> TensorMerge:
    """As `breadcrumbs`, with the election of TIES."""
    thin = leave_out(blocks, density, gamma)
    return merge_task_vectors(blocks, thin, weight=weight, elect=True, normalize=normalize, scale=scale)


def leave_out(blocks: Blocks, density: Weights, gamma: Weights) -> Thin:
    """What is largest of all, less what is largest of that: two selections of the tops of one ranking, in four passes over the tensor."""
    counts = [tops_of(each, top, blocks.size) for each, top in zip(density, gamma, strict=True)]
    ranked = Ranked(blocks, rank_magnitudes, rows=blocks.targets)
    selections = (
        select_top(ranked, count=lambda target, nonzero: counts[target][0]),
        select_top(ranked, count=lambda target, nonzero: counts[target][1]),
    )
    (outer, outer_ties), (inner, inner_ties) = map(as_arrays, selections)
    scratch = Scratch(np.float32)

    def thin(block: Block, deltas: Floats) -> None:
        largest = scratch.take(blocks.targets, block.size)
        keep_largest(block.inputs, outer, outer_ties, deltas)
        keep_largest(block.inputs, inner, inner_ties, largest)
        np.subtract(deltas, largest, out=deltas)  # an element is in both as it is, or in the first alone

    return thin


def tops_of(density: float, gamma: float, size: int) -> tuple[int, int]:
    """Of so many elements, how many are larger than those left out as small, and how many of them are left out as large."""
    kept = int(density * size)
    top = min(int(gamma * size), size - kept)
    return top + kept, top
