"""The Karcher (Riemannian) mean of the targets' directions, times the mean of their lengths (Karcher 1977; Grove, Karcher and Ruh 1974).

From the normalised mean direction, step by step along the mean of the logs (`sphere.py`) until a step would be shorter than `tol`: that one is not taken, as
in mergekit. All targets weigh the same; a zero tensor has a length and no direction.
"""

import numpy as np

from fusion_ray.merging.blocks import Blocks, Doubles, TensorMerge, Weights
from fusion_ray.merging.gram import gram_matrix
from fusion_ray.merging.sphere import combination, directions, length, step


def karcher(blocks: Blocks, weights: Weights | None = None, *, max_iter: int = 10, tol: float = 1e-5) -> TensorMerge:
    """At most `max_iter` steps. Where all targets are zero, so is the merge. `weights` is not used."""
    return combination(coefficients(gram_matrix(blocks, of="targets"), max_iter=max_iter, tol=tol), add_to_base=False)


def coefficients(gram: Doubles, *, max_iter: int, tol: float) -> Weights:
    """What each target is multiplied by, from their inner products (M, M)."""
    norms, cosines = directions(gram)
    there = norms > 0
    equal = there / max(1, int(there.sum()))
    size = length(equal, cosines)
    if size < 1e-12:  # directions that cancel have no mean: then the tensors'
        return (1.0 / len(gram),) * len(gram)
    point = equal / size
    for _ in range(max_iter):
        further, moved = step(point, equal, cosines)
        if moved < tol:
            break
        point = further
    return tuple((float(norms.mean()) * point / np.where(there, norms, 1.0)).tolist())
