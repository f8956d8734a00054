"""Averages of the models themselves: linear, VaRM (FuseChat v1 section 3.3) and Model Stock."""

import itertools

import numpy as np

Array = np.ndarray


def linear(targets: list[Array], weights: list[float], *, normalize: bool = True) -> Array:
    """sum_j w_j theta_j, divided by sum_j w_j (model soups, arXiv 2203.05482). Weights that add up to zero are the caller's mistake."""
    total = np.zeros(targets[0].shape)
    for weight, target in zip(weights, targets, strict=True):
        total = total + weight * target.astype(np.float64)
    return total / sum(weights) if normalize else total


def varm_weights(
    tensors: dict[str, tuple[Array, list[Array]]],
    granularity: str,
    *,
    square: bool = True,
    temperature: float | None = None,
) -> dict[str, list[float]]:
    """The mean change over all elements of a unit; `tensors` maps a name to (pivot, targets). Not for the parameter granularity.

    The golden cases: `layer` is one decoder layer, every tensor outside the layers its own unit; a unit nobody moved gets equal weights.
    """

    def unit(name: str) -> str:
        if granularity == "model":
            return "the model"
        if granularity == "layer" and ".layers." in name:
            return "layer " + name.split(".layers.")[1].split(".")[0]
        return name

    changes: dict[str, list[list[float]]] = {}
    for name, (pivot, targets) in tensors.items():
        lists = changes.setdefault(unit(name), [[] for _ in targets])
        for into, target in zip(lists, targets, strict=True):
            for before, after in zip(pivot.ravel().tolist(), target.ravel().tolist(), strict=True):
                into.append((after - before) ** 2 if square else abs(after - before))
    return {
        name: shares([sum(values) / len(values) for values in changes[unit(name)]], temperature) for name in tensors
    }


def shares(amounts: list[float], temperature: float | None = None) -> list[float]:
    """amounts / their sum (equal where all are zero), or the softmax of these shares / temperature."""
    total = sum(amounts)
    ratio = [amount / total if total else 1 / len(amounts) for amount in amounts]
    if temperature is None:
        return ratio
    powers = [np.exp((share - max(ratio)) / temperature) for share in ratio]
    return [float(power / sum(powers)) for power in powers]


def varm_parameter(
    pivot: Array, targets: list[Array], *, square: bool = True, temperature: float | None = None
) -> Array:
    """Every position is its own unit."""
    merged = np.empty(pivot.size)
    for place, before in enumerate(pivot.ravel().tolist()):
        afters = [float(target.ravel()[place]) for target in targets]
        weights = shares([(after - before) ** 2 if square else abs(after - before) for after in afters], temperature)
        merged[place] = sum(weight * after for weight, after in zip(weights, afters, strict=True))
    return merged.reshape(pivot.shape)


def varm(
    pivot: Array,
    targets: list[Array],
    *,
    granularity: str = "matrix",
    square: bool = True,
    temperature: float | None = None,
) -> Array:
    """One tensor that is a unit by itself."""
    if granularity == "parameter":
        return varm_parameter(pivot, targets, square=square, temperature=temperature)
    weights = varm_weights({"w": (pivot, targets)}, granularity, square=square, temperature=temperature)["w"]
    return linear(targets, weights, normalize=False)


def model_stock(pivot: Array, targets: list[Array], *, filter_wise: bool = False) -> Array:
    """t mean(theta_j) + (1 - t) theta_v with t = N c / (1 + (N - 1) c), c the mean cosine over the pairs of deltas (arXiv 2403.19522, equation 7).

    Found in mergekit's golden case: N counts the targets alone; c is the mean of the cosines (not the cosine of means); a zero delta has cosine 0 with every
    other; t is clamped nowhere (with nearly orthogonal deltas it is about N c, and negative in a third of the tensors). With filter_wise every row (the
    last dimension; a vector is one row) has its own t. Where 1 + (N - 1) c is zero the equation says nothing: the base stays (t = 0).
    """
    if filter_wise and pivot.ndim > 1:
        rows = [
            model_stock(pivot[row], [target[row] for target in targets], filter_wise=True) for row in range(len(pivot))
        ]
        return np.stack(rows)
    base = pivot.astype(np.float64)
    deltas = [target.astype(np.float64) - base for target in targets]
    cosines = []
    for one, other in itertools.combinations(deltas, 2):
        lengths = np.sqrt((one**2).sum()) * np.sqrt((other**2).sum())
        cosines.append((one * other).sum() / lengths if lengths else 0.0)
    cosine, count = sum(cosines) / len(cosines), len(targets)
    divisor = 1 + (count - 1) * cosine
    t = count * cosine / divisor if divisor > 1e-12 else 0.0
    return t * linear(targets, [1.0] * count) + (1 - t) * base
