"""SCE: select, calculate, erase (FuseChat v2, equations 5-9), and the two public programs that differ from it.

- `paper`: the selected deltas, the minority's signs erased, weighted by eta and summed; nothing is divided by what survived.
- `fusechat_release`: Select shapes eta only; the whole deltas are erased, weighted, and divided by the surviving eta.
- `mergekit`: the selected deltas as in the paper, divided by the surviving eta as in the release.

Found in the golden cases: mergekit 0.1.5's own output differs from the paper (0.04 at tau = 0.1, 0.04 at tau = 1) and from the release at
tau = 0.1 (0.05), and is the release's at tau = 1, where nothing is selected away; the variant `mergekit` gives both files. It keeps int(tau size)
positions and elects the sign by the plain sum of the deltas (by the weighted sum it would be 0.08 off). Every position there has variance and deltas
are about 0.02, so no case decides whether mergekit's tau counts the positions without variance, nor its equal weights where the mean squares add up
to less than 1e-6.
"""

import numpy as np

Array = np.ndarray


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
