"""Methods that add up task vectors: task arithmetic, TIES, DARE, breadcrumbs and DELLA are one sum over differently thinned deltas.

A task vector is taken in the models' own type (float32 models: one rounding), so that equal magnitudes are ties here as in any float32 program, and is
float64 from there on.
"""

import numpy as np

Array = np.ndarray


def task_vectors(pivot: Array, targets: list[Array]) -> list[Array]:
    return [(target - pivot).astype(np.float64) for target in targets]


def summed(pivot: Array, deltas: list[Array], weight: list[float], *, normalize: bool, scale: float) -> Array:
    """theta_v + scale sum_j w_j delta_j, with normalize divided by sum_j w_j (by 1 where that is below 1e-8, as in the election)."""
    total = sum(one * delta for one, delta in zip(weight, deltas, strict=True))
    divisor = sum(weight) if normalize and abs(sum(weight)) >= 1e-8 else 1.0
    return pivot.astype(np.float64) + scale * total / divisor


def agreed(pivot: Array, deltas: list[Array], weight: list[float], *, normalize: bool, scale: float) -> Array:
    """TIES' election (arXiv 2306.01708, section 3): per position only the w_j delta_j with the sign of their sum count, over the sum of their w_j."""
    merged = pivot.astype(np.float64).ravel().copy()
    for place in range(merged.size):
        weighted = [one * float(delta.ravel()[place]) for one, delta in zip(weight, deltas, strict=True)]
        sign = 1 if sum(weighted) >= 0 else -1
        agreeing = [(one, value) for one, value in zip(weight, weighted, strict=True) if value * sign > 0]
        divisor = sum(one for one, _ in agreeing)
        if not normalize or abs(divisor) < 1e-8:
            divisor = 1
        merged[place] += scale * sum(value for _, value in agreeing) / divisor
    return merged.reshape(pivot.shape)


def by_magnitude(delta: Array) -> list[int]:
    """Positions from the largest magnitude to the smallest; equal ones by position."""
    return sorted(range(delta.size), key=lambda place: (-abs(delta.ravel()[place]), place))


def only(delta: Array, places: list[int]) -> Array:
    thinned = np.zeros(delta.size)
    for place in places:
        thinned[place] = delta.ravel()[place]
    return thinned.reshape(delta.shape)


def task_arithmetic(
    pivot: Array,
    targets: list[Array],
    weight: list[float],
    *,
    normalize: bool = False,
    scale: float = 1.0,
) -> Array:
    """arXiv 2212.04089. The deltas are float64 from the start."""
    deltas = [target.astype(np.float64) - pivot.astype(np.float64) for target in targets]
    return summed(pivot, deltas, weight, normalize=normalize, scale=scale)


def ties(
    pivot: Array,
    targets: list[Array],
    *,
    weight: list[float],
    density: list[float] | None = None,
    normalize: bool = True,
    scale: float = 1.0,
) -> Array:
    """Trim every delta to its largest magnitudes, elect a sign, average what agrees (arXiv 2306.01708).

    Found in mergekit's golden case: the count is int(density size), neither rounded (0.02 off in 8 tensors) nor rounded up (0.03 off in all); size is of the
    tensor, zeros included. The trimmed zeros have no say in the divisor. At least one is kept where density > 0.
    """
    density = density or [1.0] * len(targets)
    deltas = [
        only(delta, by_magnitude(delta)[: max(int(part * delta.size), 1 if part > 0 else 0)])
        for delta, part in zip(task_vectors(pivot, targets), density, strict=True)
    ]
    return agreed(pivot, deltas, weight, normalize=normalize, scale=scale)


def dropped_at_random(delta: Array, uniforms: Array, probability: Array, *, rescale: bool) -> Array:
    """Elements with u < their keep probability, divided by it."""
    thinned = np.zeros(delta.size)
    for place in range(delta.size):
        chance = float(probability.ravel()[place])
        if uniforms.ravel()[place] < chance:
            thinned[place] = delta.ravel()[place] / (chance if rescale else 1)
    return thinned.reshape(delta.shape)


def dare_deltas(
    pivot: Array, targets: list[Array], uniforms: Array, density: list[float] | None, *, rescale: bool
) -> list[Array]:
    density = density or [1.0] * len(targets)
    return [
        dropped_at_random(delta, uniform, np.full(delta.shape, part), rescale=rescale)
        for delta, uniform, part in zip(task_vectors(pivot, targets), uniforms, density, strict=True)
    ]


def dare_linear(
    pivot: Array,
    targets: list[Array],
    uniforms: Array,
    *,
    weight: list[float],
    density: list[float] | None = None,
    normalize: bool = False,
    scale: float = 1.0,
    rescale: bool = True,
) -> Array:
    """Drop elements of every delta at random and rescale the rest by 1 / density (arXiv 2311.03099), then task arithmetic. uniforms (M, *shape)."""
    deltas = dare_deltas(pivot, targets, uniforms, density, rescale=rescale)
    return summed(pivot, deltas, weight, normalize=normalize, scale=scale)


def dare_ties(
    pivot: Array,
    targets: list[Array],
    uniforms: Array,
    *,
    weight: list[float],
    density: list[float] | None = None,
    normalize: bool = False,
    scale: float = 1.0,
    rescale: bool = True,
) -> Array:
    """DARE's deltas, TIES' election. uniforms (M, *shape)."""
    deltas = dare_deltas(pivot, targets, uniforms, density, rescale=rescale)
    return agreed(pivot, deltas, weight, normalize=normalize, scale=scale)


def breadcrumbs_deltas(
    pivot: Array, targets: list[Array], density: list[float] | None, gamma: list[float] | None
) -> list[Array]:
    """Without the int(gamma size) largest magnitudes, then the next int(density size); fewer of the largest fall where density leaves fewer to drop."""
    density = density or [1.0] * len(targets)
    gamma = gamma or [0.01] * len(targets)
    deltas = []
    for delta, part, top in zip(task_vectors(pivot, targets), density, gamma, strict=True):
        count = int(part * delta.size)
        first = min(int(top * delta.size), delta.size - count)
        deltas.append(only(delta, by_magnitude(delta)[first : first + count]))
    return deltas


def breadcrumbs(
    pivot: Array,
    targets: list[Array],
    *,
    weight: list[float],
    density: list[float] | None = None,
    gamma: list[float] | None = None,
    normalize: bool = False,
    scale: float = 1.0,
) -> Array:
    """Drop the outliers and the smallest of every delta (arXiv 2312.06795), then task arithmetic."""
    deltas = breadcrumbs_deltas(pivot, targets, density, gamma)
    return summed(pivot, deltas, weight, normalize=normalize, scale=scale)


def breadcrumbs_ties(
    pivot: Array,
    targets: list[Array],
    *,
    weight: list[float],
    density: list[float] | None = None,
    gamma: list[float] | None = None,
    normalize: bool = False,
    scale: float = 1.0,
) -> Array:
    """Breadcrumbs' deltas, TIES' election."""
    deltas = breadcrumbs_deltas(pivot, targets, density, gamma)
    return agreed(pivot, deltas, weight, normalize=normalize, scale=scale)


def della_probabilities(delta: Array, density: float, epsilon: float) -> Array:
    """Keep probabilities (arXiv 2406.11617): linear in the rank by magnitude within a row, from density - epsilon to density + epsilon.

    A row is the last dimension; equal magnitudes rank by position; the one element of a row of one gets the density. A density of 1 keeps everything,
    whatever epsilon; below 1 an epsilon that leaves [0, 1] is the caller's mistake.
    """
    if density >= 1:
        return np.ones(delta.shape)
    if delta.ndim > 1:
        return np.stack([della_probabilities(row, density, epsilon) for row in delta])
    values = np.atleast_1d(delta)
    order = sorted(range(values.size), key=lambda place: (abs(values[place]), place))
    probabilities = np.full(values.size, float(density))
    for rank, place in enumerate(order):
        if values.size > 1:
            probabilities[place] = density - epsilon + 2 * epsilon * rank / (values.size - 1)
    return probabilities.reshape(delta.shape)


def della_deltas(
    pivot: Array,
    targets: list[Array],
    uniforms: Array,
    density: list[float] | None,
    epsilon: list[float] | None,
    *,
    rescale: bool,
) -> list[Array]:
    density = density or [1.0] * len(targets)
    epsilon = epsilon or [0.15] * len(targets)
    return [
        dropped_at_random(delta, uniform, della_probabilities(delta, part, spread), rescale=rescale)
        for delta, uniform, part, spread in zip(task_vectors(pivot, targets), uniforms, density, epsilon, strict=True)
    ]


def della(
    pivot: Array,
    targets: list[Array],
    uniforms: Array,
    *,
    weight: list[float],
    density: list[float] | None = None,
    epsilon: list[float] | None = None,
    normalize: bool = True,
    scale: float = 1.0,
    rescale: bool = True,
) -> Array:
    """Elements drawn by their rank, each over its own keep probability, TIES' election. uniforms (M, *shape)."""
    deltas = della_deltas(pivot, targets, uniforms, density, epsilon, rescale=rescale)
    return agreed(pivot, deltas, weight, normalize=normalize, scale=scale)


def della_linear(
    pivot: Array,
    targets: list[Array],
    uniforms: Array,
    *,
    weight: list[float],
    density: list[float] | None = None,
    epsilon: list[float] | None = None,
    normalize: bool = False,
    scale: float = 1.0,
    rescale: bool = True,
) -> Array:
    """DELLA's deltas, task arithmetic. uniforms (M, *shape)."""
    deltas = della_deltas(pivot, targets, uniforms, density, epsilon, rescale=rescale)
    return summed(pivot, deltas, weight, normalize=normalize, scale=scale)
