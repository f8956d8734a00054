"""Slow, obvious merges in float64 numpy, from the papers' equations. Every function takes `pivot` (any shape) and `targets`, a list of the same shape."""

import numpy as np

Array = np.ndarray


def linear(targets: list[Array], weights: list[float]) -> Array:
    return sum(weight * target.astype(np.float64) for weight, target in zip(weights, targets, strict=True)) / sum(
        weights
    )


def task_arithmetic(pivot: Array, targets: list[Array], weights: list[float]) -> Array:
    base = pivot.astype(np.float64)
    return base + sum(weight * (target - base) for weight, target in zip(weights, targets, strict=True))


def varm_weights(
    tensors: dict[str, tuple[Array, list[Array]]], granularity: str, *, square: bool = True
) -> dict[str, list[float]]:
    """The mean change over all elements of a unit; `tensors` maps a name to (pivot, targets). Not for the parameter granularity."""

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
    weights: dict[str, list[float]] = {}
    for name in tensors:
        means = [sum(values) / len(values) for values in changes[unit(name)]]
        weights[name] = [mean / sum(means) if sum(means) else 1 / len(means) for mean in means]
    return weights


def varm_parameter(pivot: Array, targets: list[Array], *, square: bool = True) -> Array:
    merged = np.empty(pivot.size)
    for place, before in enumerate(pivot.ravel().tolist()):
        afters = [float(target.ravel()[place]) for target in targets]
        changes = [(after - before) ** 2 if square else abs(after - before) for after in afters]
        total = sum(changes)
        weights = [change / total if total else 1 / len(afters) for change in changes]
        merged[place] = sum(weight * after for weight, after in zip(weights, afters, strict=True))
    return merged.reshape(pivot.shape)


def sce_selection(pivot: Array, targets: list[Array], select_topk: float) -> Array:
    """Bool, the shape of the tensor. Ties of the float32 variance go to the lowest positions."""
    if select_topk >= 1:
        return np.ones(pivot.shape, bool)
    deltas = np.stack([(target - pivot).astype(np.float64).ravel() for target in targets])
    variance = deltas.var(axis=0)
    variance[(deltas == deltas[0]).all(axis=0)] = 0.0
    count = int(select_topk * np.count_nonzero(variance))
    order = sorted(range(variance.size), key=lambda place: (-np.float32(variance[place]), place))
    mask = np.zeros(variance.size, bool)
    mask[order[:count]] = True
    return mask.reshape(pivot.shape)


def sce(pivot: Array, targets: list[Array], select_topk: float, variant: str) -> tuple[Array, list[float]]:
    """(merged, eta). The task vectors are taken in float32, as the models hold them."""
    mask = sce_selection(pivot, targets, select_topk)
    whole = [(target - pivot).astype(np.float64) for target in targets]
    selected = [delta * mask for delta in whole]
    squares = [float((delta**2).sum()) for delta in selected]
    eta = [square / sum(squares) if sum(squares) else 1 / len(squares) for square in squares]
    if variant == "mergekit" and sum(squares) / pivot.size < 1e-6:
        eta = [1 / len(squares)] * len(squares)
    used = whole if variant == "fusechat_release" else selected
    merged = pivot.astype(np.float64).ravel().copy()
    for place in range(merged.size):
        here = [float(delta.ravel()[place]) for delta in used]
        total = sum(here)
        if variant == "paper":
            merged[place] += sum(weight * value for weight, value in zip(eta, here, strict=True) if value * total >= 0)
            continue
        sign = 1 if total >= 0 else -1
        survivors = [(weight, value) for weight, value in zip(eta, here, strict=True) if value * sign > 0]
        divisor = sum(weight for weight, _ in survivors)
        if variant == "mergekit":
            divisor = max(divisor, 1e-6)
        if divisor:
            merged[place] += sum(weight * value for weight, value in survivors) / divisor
    return merged.reshape(pivot.shape), eta
