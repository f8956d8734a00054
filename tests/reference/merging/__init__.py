"""Slow, obvious merges of one tensor in float64 numpy, from the papers' equations, never from the package's code.

Every function takes `targets`, a list of arrays of one shape, and where its equation has a base the `pivot` of that shape; settings of the targets are
lists with one entry a target. `merge` calls any of them by the name of the method with the package's names of the parameters; methods that draw
elements take the uniform random numbers as an argument and so need no generator.
"""

from collections.abc import Callable

import numpy as np

from tests.reference.merging.averages import linear, model_stock, varm, varm_parameter, varm_weights
from tests.reference.merging.sce import sce, sce_selection
from tests.reference.merging.sphere import karcher, multislerp, slerp
from tests.reference.merging.task_vectors import (
    breadcrumbs,
    breadcrumbs_ties,
    dare_linear,
    dare_ties,
    della,
    della_linear,
    della_probabilities,
    task_arithmetic,
    ties,
)

__all__ = [
    "at_a_threshold",
    "breadcrumbs",
    "breadcrumbs_ties",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "della_probabilities",
    "karcher",
    "linear",
    "merge",
    "model_stock",
    "multislerp",
    "sce",
    "sce_selection",
    "slerp",
    "task_arithmetic",
    "ties",
    "varm",
    "varm_parameter",
    "varm_weights",
]

Array = np.ndarray

METHODS: dict[str, Callable[..., Array]] = {
    "slerp": slerp,
    "multislerp": multislerp,
    "model_stock": model_stock,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
    "breadcrumbs": breadcrumbs,
    "breadcrumbs_ties": breadcrumbs_ties,
    "della": della,
    "della_linear": della_linear,
    "varm": varm,
}
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")


def merge(
    method: str, pivot: Array | None, targets: list[Array], *, uniforms: Array | None = None, **parameters: object
) -> Array:
    """The merged tensor by the package's names of methods and parameters (`weight`, `density`, `scale`, ...); defaults are the package's.

    `uniforms` (M, *shape) in [0, 1) is for the methods in RANDOM; their `seed` is ignored. slerp merges the pivot with its one target. A tensor by
    itself is its own unit for varm, whatever the granularity: for whole models see `varm_weights`.
    """
    ones = [1.0] * len(targets)
    if method == "linear":
        return linear(targets, list(parameters.pop("weight", ones)), **parameters)  # type: ignore[call-overload,arg-type]
    if method == "karcher":
        return karcher(targets, **parameters)  # type: ignore[arg-type]
    if method == "sce":
        parameters = {"select_topk": 0.1, "variant": "paper", **parameters}
        return sce(pivot, targets, **parameters)[0]  # type: ignore[arg-type]
    if method in RANDOM:
        parameters.pop("seed", None)
        return METHODS[method](pivot, targets, uniforms, **parameters)
    return METHODS[method](pivot, targets, **parameters)


def at_a_threshold(
    merged: Callable[[Array, list[Array]], Array], pivot: Array, targets: list[Array], *, moved: float = 1e-5
) -> Array:
    """Bool, the shape of the tensor: positions where moving targets by one float32 unit in the last place moves the merge by more than `moved`.

    Two right programs may differ there: a magnitude or a variance at the border of what is kept, or a sum whose sign is rounding.
    """
    before = merged(pivot, targets)
    found = np.zeros(before.shape, bool)
    rng = np.random.default_rng(0)
    for _ in range(8):
        nudged = []
        for target in targets:
            towards = np.where(rng.random(target.shape) < 0.5, -np.inf, np.inf).astype(np.float32)
            step = np.nextafter(target.astype(np.float32), towards)
            nudged.append(np.where(target == pivot, target, step))  # an unmoved element stays unmoved
        found |= np.abs(merged(pivot, nudged) - before) > moved
    return found
