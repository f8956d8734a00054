"""Means on the sphere: a tensor is a length times a direction, and directions are averaged along great circles. For `slerp`, `multislerp` and `karcher`.

A point in the span of M unit vectors u_i is its coefficients c (sum_i c_i u_i), and cos = (u_i . u_j) tells all lengths and angles, so none of this reads the
tensors: `gram.py` reads them once. With a point m, angle_i = arccos(m . u_i):

    log_m(u_i) = angle_i / sin(angle_i) (u_i - cos(angle_i) m)        the way from m to u_i in the plane that touches the sphere at m
    exp_m(v) = cos|v| m + sin|v| v / |v|                              back to the sphere
"""

import math
from collections.abc import Callable

import numpy as np

from fusion_ray.merging.blocks import Block, Doubles, Floats, TensorMerge, Weights
from fusion_ray.merging.kernels import add_weighted_deltas, as_float32, sum_weighted

_SMALL = 1e-300


def directions(gram: Doubles) -> tuple[Doubles, Doubles]:
    """(M,) lengths and (M, M) cosines of vectors with these inner products; a zero vector is orthogonal to all others."""
    norms = np.sqrt(np.maximum(np.diag(gram), 0.0))
    safe = np.maximum(norms, _SMALL)
    cosines = np.clip(gram / safe[:, None] / safe[None, :], -1.0, 1.0)
    np.fill_diagonal(cosines, 1.0)
    return norms, cosines


def length(point: Doubles, cosines: Doubles) -> float:
    return math.sqrt(max(0.0, float(point @ cosines @ point)))


def step(point: Doubles, weights: Doubles, cosines: Doubles) -> tuple[Doubles, float]:
    """One step of the mean from `point` (of length 1): exp of the weighted mean of the logs, and how long that mean is."""
    dots = np.clip(cosines @ point, -1.0, 1.0)
    angles = np.arccos(dots)
    sines = np.sin(angles)
    factors = np.where(sines > 1e-12, angles / np.where(sines > 1e-12, sines, 1.0), 1.0)
    way = weights * factors
    way = way - (way @ dots) * point
    size = length(way, cosines)
    if size == 0.0:
        return point, 0.0
    moved = np.cos(size) * point + np.sin(size) / size * way
    return moved / length(moved, cosines), size


def combination(coefficients: Weights, *, add_to_base: bool) -> TensorMerge:
    """The merge that is a weighted sum of the targets, or of their task vectors on the base."""
    narrow = as_float32(coefficients)
    apply: Callable[[Block, Floats], None]
    if add_to_base:
        apply = lambda block, out: add_weighted_deltas(block.inputs, narrow, out)  # noqa: E731
    else:
        apply = lambda block, out: sum_weighted(block.inputs, narrow, out)  # noqa: E731
    return TensorMerge(coefficients, apply)
