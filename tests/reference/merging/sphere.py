"""Means on the sphere: a tensor is one flat vector, its direction a point on the unit sphere, its norm averaged by itself."""

import math

import numpy as np

Array = np.ndarray


def norm(tensor: Array) -> float:
    return math.sqrt(float((tensor.astype(np.float64) ** 2).sum()))


def slerp(pivot: Array, targets: list[Array], *, t: float) -> Array:
    """sin((1 - t) O) / sin(O) a + sin(t O) / sin(O) b with O the angle of the flattened tensors; linear where |cos O| > 0.9995 or a tensor is zero.

    Found in mergekit's golden case: t = 0 is the base, t = 1 the other model; the coefficients are applied to the tensors as they are, only the
    angle comes from normalised ones. The norm vectors there have cosines of 0.9998 and are merged linearly: the sines would be 4e-5 off.
    Linear with a zero tensor is a choice, no case decides it.
    """
    (target,) = targets
    a, b = pivot.astype(np.float64), target.astype(np.float64)
    if norm(a) == 0 or norm(b) == 0:
        return (1 - t) * a + t * b
    cosine = float((a * b).sum()) / (norm(a) * norm(b))
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def log_map(at: Array, point: Array) -> Array:
    """The tangent vector at the unit vector `at` that leads to the unit vector `point`; zero where they are equal or opposite (no direction)."""
    cosine = min(1.0, max(-1.0, float((at * point).sum())))
    across = point - cosine * at
    length = norm(across)
    return across * (math.atan2(length, cosine) / length) if length > 1e-12 else np.zeros_like(at)


def exp_map(at: Array, tangent: Array) -> Array:
    """The unit vector that the tangent vector leads to."""
    length = norm(tangent)
    if length == 0:
        return at
    point = math.cos(length) * at + math.sin(length) * tangent / length
    return point / norm(point)


def karcher(targets: list[Array], *, max_iter: int = 10, tol: float = 1e-5) -> Array:
    """The point on the sphere with the least sum of squared angles to the directions, times the mean of the norms.

    Found in mergekit's golden case: it starts at the normalised mean of the directions; a step takes the mean of the log maps and follows it by the exp
    map; it stops BEFORE a step whose length is below `tol` (one more step is 8e-7 off, this 2e-8 on the matrices); the factor is the arithmetic mean
    of the norms. By choice, no case decides it: a zero tensor has no direction and is left out of the mean direction, its norm counts; directions
    that cancel have no mean, then the tensors are averaged linearly.
    """
    tensors = [target.astype(np.float64) for target in targets]
    points = [tensor / norm(tensor) for tensor in tensors if norm(tensor) > 0]
    if not points:
        return np.zeros_like(tensors[0])
    mean = np.sum(points, axis=0) / len(points)
    if norm(mean) < 1e-12:
        return np.sum(tensors, axis=0) / len(tensors)
    mean = mean / norm(mean)
    for _ in range(max_iter):
        tangent = np.sum([log_map(mean, point) for point in points], axis=0) / len(points)
        if norm(tangent) < tol:
            break
        mean = exp_map(mean, tangent)
    return mean * sum(norm(tensor) for tensor in tensors) / len(tensors)


def multislerp(
    pivot: Array | None,
    targets: list[Array],
    *,
    weight: list[float] | None = None,
    normalize_weights: bool = True,
    eps: float = 1e-8,
) -> Array:
    """One step of a weighted Karcher mean: log maps at the normalised weighted mean direction, their weighted mean, exp map, times the weighted mean norm.

    With a pivot on the task vectors. For two models the direction is slerp's with t = w_2 / (w_1 + w_2), to the letter. By choice, no golden case decides
    it: a tensor with a norm of at most `eps` has no direction, and the weights of the others are scaled up to the same sum for the direction; directions
    that cancel (mean shorter than `eps`) are averaged linearly.
    """
    weights = list(weight) if weight is not None else [1.0] * len(targets)
    if normalize_weights:
        weights = [one / sum(weights) for one in weights]
    base = np.zeros(targets[0].shape) if pivot is None else pivot.astype(np.float64)
    vectors = [target.astype(np.float64) - base for target in targets]
    points = [(one, vector / norm(vector)) for one, vector in zip(weights, vectors, strict=True) if norm(vector) > eps]
    if len(points) < len(vectors):
        there = sum(one for one, _ in points)
        points = [(one * sum(weights) / there, point) for one, point in points]
    mean = np.sum([np.zeros(base.shape), *(one * point for one, point in points)], axis=0)
    if norm(mean) <= eps:
        return base + np.sum([one * vector for one, vector in zip(weights, vectors, strict=True)], axis=0)
    mean = mean / norm(mean)
    tangent = np.sum([one * log_map(mean, point) for one, point in points], axis=0)
    return base + exp_map(mean, tangent) * sum(one * norm(vector) for one, vector in zip(weights, vectors, strict=True))
