"""Several models' weighted mean on the sphere, in one step: at the normalised weighted mean of the directions, the weighted mean of the logs (`sphere.py`).

The length is the weighted mean of the lengths. With a base the same of the task vectors, added to it.
"""

import math

import numpy as np

from fusion_ray.merging.blocks import Blocks, Doubles, TensorMerge, Weights
from fusion_ray.merging.gram import gram_matrix
from fusion_ray.merging.parameters import cancel
from fusion_ray.merging.sphere import combination, directions, length, step


def multislerp(
    blocks: Blocks,
    weights: Weights | None = None,
    *,
    weight: Weights,
    normalize_weights: bool = True,
    eps: float = 1e-8,
    has_base: bool = False,
) -> TensorMerge:
    """`weight` holds one number a target, over their sum with `normalize_weights`. A tensor or a mean direction no longer than `eps` has no direction: the
    others' weights then add up to the same, and without any the tensors' weighted mean is taken.

    Raises ValueError for weights that add up to zero. `weights` is not used.
    """
    gram = gram_matrix(blocks, of="deltas" if has_base else "targets")
    return combination(coefficients(gram, weight, normalize_weights=normalize_weights, eps=eps), add_to_base=has_base)


def coefficients(gram: Doubles, weight: Weights, *, normalize_weights: bool, eps: float) -> Weights:
    """What each target, or its task vector, is multiplied by, from their inner products (M, M)."""
    if normalize_weights and cancel(weight):
        raise ValueError(f"multislerp with the weights {list(weight)}, which add up to zero: their mean is not defined")
    shares = np.asarray(weight, np.float64) / (math.fsum(weight) if normalize_weights else 1.0)
    norms, cosines = directions(gram)
    there = norms > eps
    of_directions = shares * there
    if not there.all() and of_directions.sum() != 0.0:
        of_directions *= shares.sum() / of_directions.sum()
    size = length(of_directions, cosines)
    if size <= eps:
        return tuple(shares.tolist())
    point, _ = step(of_directions / size, of_directions, cosines)
    return tuple((float(shares @ norms) * point / np.where(there, norms, 1.0)).tolist())
