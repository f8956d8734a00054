"""Properties that any implementation of a merge method has, as functions of a merge: applied to the slow oracles in test_properties.py and to the package.

`CASES` are methods with parameters and the names of the properties that hold there; `PROPERTIES` maps a name to a function
`(merge, case, pivot, targets)` that asserts it. A merge is `merge(method, pivot, targets, parameters) -> merged array`; parameters of the targets are
tuples with one entry a target, `pivot` is None for the methods without a base. Use:

    @pytest.mark.parametrize(("case", "name"), pairs())
    @given(data=st.data())
    def test_it(case, name, data):
        pivot, targets = data.draw(models(case))
        PROPERTIES[name](merge, case, pivot, targets)

What holds for which method, and why not for the others:

- equal_models: linear normalised, slerp, multislerp normalised, karcher, model_stock, varm, sce at tau = 1, fusechat_release at every tau, and the methods
  that add deltas where all elements are kept and the weights are normalised. A thinned delta is not the delta; equal models have no variance to select by.
- pivot_unmoved: everything whose weights sum to one or that adds deltas (these to the bit); not linear or multislerp with weights as they are.
- permuted_targets: everything but slerp (t belongs to an order) and the methods that draw by the number of the target; those too where all is kept.
- translated: everything that adds deltas to the base, or averages the models linearly; not on a sphere around zero (slerp, karcher, multislerp
  without a base), not linear with weights as they are.
- doubled: everything but sce's variant mergekit, whose floor of 1e-6 is absolute (as multislerp's eps, but that bites below norms of 1e-8 only).
- between: linear normalised, varm, sce, and normalised sums of deltas with a scale of at most 1; not rescaled deltas, not sums as they are,
  not model_stock (t may be negative), not on a sphere.
- sparse: ties, breadcrumbs, breadcrumbs_ties, sce paper and mergekit; dare and della keep a number at random, fusechat_release moves every position.
- whole_deltas: task_arithmetic, and dare_linear, breadcrumbs and della_linear where all is kept.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

Array = np.ndarray
Merge = Callable[[str, Array | None, list[Array], dict[str, object]], Array]

SHAPE = (2, 5)
NEAR = 4e-6  # relative and absolute: float32 arithmetic on numbers up to about 16


@dataclass(frozen=True)
class Case:
    method: str
    holds: frozenset[str]
    shared: Mapping[str, object] = field(default_factory=dict)
    each: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # of the targets in turn, from the start again
    base: bool = True
    least: int = 1
    most: int = 4
    aligned: bool = False  # models and deltas within a right angle of each other, where the method divides by angles

    def parameters(self, targets: int) -> dict[str, object]:
        lists = {name: tuple(values[j % len(values)] for j in range(targets)) for name, values in self.each.items()}
        return {**self.shared, **lists}

    def __str__(self) -> str:
        values = [*self.shared.values(), *("/".join(map(str, value)) for value in self.each.values())]
        return "-".join([self.method, *map(str, values), *([] if self.base else ["no base"])])


def holds(names: str) -> frozenset[str]:
    return frozenset(names.split())


ANY_ORDER = "pivot_unmoved permuted_targets doubled"
CONVEX = f"{ANY_ORDER} translated between"
WEIGHT = {"weight": (0.5, 0.25, 1.0)}
HALF = {**WEIGHT, "density": (0.5, 0.25)}
LEAST = {**WEIGHT, "density": (0.05,)}
WHOLE = {**WEIGHT, "density": (1.0,)}
MEAN = {"normalize": True}
SUM = {"normalize": False}

CASES = [
    Case("linear", holds(f"{CONVEX} equal_models"), {}, {}),
    Case("linear", holds(f"{CONVEX} equal_models"), MEAN, WEIGHT, base=False),
    Case("linear", holds("permuted_targets doubled"), SUM, WEIGHT, base=False),
    *(
        Case("slerp", holds("equal_models pivot_unmoved doubled"), {"t": t}, least=1, most=1, aligned=True)
        for t in (0.0, 0.25, 1.0)
    ),
    Case("multislerp", holds(f"{ANY_ORDER} equal_models"), {}, WEIGHT, base=False, least=2, aligned=True),
    Case("multislerp", holds(f"{ANY_ORDER} translated equal_models"), {}, WEIGHT, least=2, aligned=True),
    Case(
        "multislerp", holds("permuted_targets doubled"), {"normalize_weights": False}, WEIGHT, base=False, least=2, aligned=True
    ),
    Case("karcher", holds(f"{ANY_ORDER} equal_models"), {}, base=False, least=2, aligned=True),
    *(
        Case("model_stock", holds(f"{ANY_ORDER} translated equal_models"), {"filter_wise": rows}, least=2, aligned=True)
        for rows in (False, True)
    ),
    Case("task_arithmetic", holds(f"{ANY_ORDER} translated whole_deltas"), {"scale": 0.5}, WEIGHT),
    Case("task_arithmetic", holds(f"{CONVEX} whole_deltas equal_models"), MEAN, WEIGHT),
    Case("ties", holds(f"{CONVEX} sparse"), {}, HALF),
    Case("ties", holds(f"{CONVEX} sparse"), {}, LEAST),
    Case("ties", holds(f"{CONVEX} equal_models"), {}, WHOLE),
    Case("ties", holds(f"{ANY_ORDER} translated sparse"), {**SUM, "scale": 2.0}, HALF),
    Case("dare_linear", holds("pivot_unmoved translated doubled"), {}, HALF),
    Case("dare_linear", holds(f"{CONVEX} equal_models whole_deltas"), MEAN, WHOLE),
    Case("dare_linear", holds("pivot_unmoved translated doubled between"), {**MEAN, "rescale": False}, HALF),
    Case("dare_ties", holds("pivot_unmoved translated doubled"), {}, HALF),
    Case("dare_ties", holds("pivot_unmoved translated doubled between"), {**MEAN, "rescale": False}, HALF),
    Case("dare_ties", holds(f"{CONVEX} equal_models"), MEAN, WHOLE),
    Case("breadcrumbs", holds(f"{ANY_ORDER} translated sparse"), {}, {**HALF, "gamma": (0.2, 0.1)}),
    Case("breadcrumbs", holds(f"{CONVEX} sparse"), MEAN, {**HALF, "gamma": (0.9,)}),
    Case("breadcrumbs", holds(f"{CONVEX} equal_models whole_deltas"), MEAN, {**WHOLE, "gamma": (0.1,)}),
    Case("breadcrumbs_ties", holds(f"{ANY_ORDER} translated sparse"), {}, {**HALF, "gamma": (0.2, 0.1)}),
    Case("breadcrumbs_ties", holds(f"{CONVEX} equal_models"), MEAN, {**WHOLE, "gamma": (0.1,)}),
    Case("della", holds("pivot_unmoved translated doubled"), {}, {**HALF, "epsilon": (0.125,)}),
    Case("della", holds("pivot_unmoved translated doubled between"), {"rescale": False}, {**HALF, "epsilon": (0.125,)}),
    Case("della", holds(f"{CONVEX} equal_models"), {}, WHOLE),
    Case("della_linear", holds("pivot_unmoved translated doubled"), {}, {**HALF, "epsilon": (0.125,)}),
    Case("della_linear", holds(f"{CONVEX} equal_models whole_deltas"), MEAN, WHOLE),
    *(
        Case("sce", holds(f"{CONVEX} equal_models"), {"variant": variant, "select_topk": 1.0})
        for variant in ("paper", "fusechat_release")
    ),
    Case("sce", holds(f"{CONVEX} sparse"), {"variant": "paper", "select_topk": 0.5}),
    Case("sce", holds(f"{CONVEX} equal_models"), {"variant": "fusechat_release", "select_topk": 0.5}),
    Case("sce", holds(f"{CONVEX} sparse") - {"doubled"}, {"variant": "mergekit", "select_topk": 0.5}),
    Case("sce", holds(f"{CONVEX} equal_models") - {"doubled"}, {"variant": "mergekit", "select_topk": 1.0}),
    *(
        Case("varm", holds(f"{CONVEX} equal_models"), {"granularity": granularity, "square": square})
        for granularity in ("matrix", "parameter")
        for square in (True, False)
    ),
    *(
        Case("varm", holds(f"{CONVEX} equal_models"), {"granularity": granularity, "temperature": 0.5})
        for granularity in ("matrix", "layer", "model")
    ),
]  # fmt: skip


def models(case: Case) -> st.SearchStrategy[tuple[Array, list[Array]]]:
    """(pivot, targets) of eighths, so that differences, shifts and doublings are exact and ties of magnitude are frequent."""
    low, high = (1, 16) if case.aligned else (-32, 32)
    eighths = st.integers(low, high).map(lambda number: np.float32(number / 8))
    drawn = st.integers(case.least, case.most).flatmap(lambda m: arrays(np.float32, (m + 1, *SHAPE), elements=eighths))
    if case.aligned:  # positive numbers and positive moves: all angles are below ninety degrees
        return drawn.map(lambda all_: (all_[0], [all_[0] + move for move in all_[1:]]))
    return drawn.map(lambda all_: (all_[0], list(all_[1:])))


def merge_case(
    merge: Merge, case: Case, pivot: Array, targets: list[Array], parameters: dict[str, object] | None = None
) -> Array:
    given = case.parameters(len(targets)) if parameters is None else parameters
    merged = merge(case.method, pivot if case.base else None, targets, given)
    assert merged.shape == pivot.shape
    return merged


def near(got: Array, wanted: Array) -> None:
    np.testing.assert_allclose(got, wanted, rtol=NEAR, atol=NEAR)


def equal_models(merge: Merge, case: Case, pivot: Array, targets: list[Array]) -> None:
    """Merging copies of one model gives it. slerp's base is one of the merged models."""
    pivot = targets[0] if case.method == "slerp" else pivot
    merged = merge_case(merge, case, pivot, [targets[0]] * len(targets))
    near(merged, targets[0])


def pivot_unmoved(merge: Merge, case: Case, pivot: Array, targets: list[Array]) -> None:
    """Targets that equal the pivot give the pivot, to the bit where the merge adds deltas to a base."""
    merged = merge_case(merge, case, pivot, [pivot] * len(targets))
    if case.base and case.method not in ("linear", "slerp", "varm", "model_stock"):
        np.testing.assert_array_equal(merged, pivot)
    else:
        near(merged, pivot)


def permuted_targets(merge: Merge, case: Case, pivot: Array, targets: list[Array]) -> None:
    """The order of the targets, with their parameters, makes no difference."""
    before = merge_case(merge, case, pivot, targets)
    parameters = case.parameters(len(targets))
    for name in case.each:
        values = parameters[name]
        assert isinstance(values, tuple)
        parameters[name] = values[1:] + values[:1]
    after = merge_case(merge, case, pivot, targets[1:] + targets[:1], parameters)
    near(after, before)


def translated(merge: Merge, case: Case, pivot: Array, targets: list[Array]) -> None:
    """Adding one tensor to the pivot and to every target adds it to the merge."""
    shift = np.arange(pivot.size, dtype=np.float32).reshape(pivot.shape) / 4 - 1
    before = merge_case(merge, case, pivot, targets)
    after = merge_case(merge, case, pivot + shift, [target + shift for target in targets])
    near(after, before + shift)


def doubled(merge: Merge, case: Case, pivot: Array, targets: list[Array]) -> None:
    """Doubling every model doubles the merge."""
    before = merge_case(merge, case, pivot, targets)
    after = merge_case(merge, case, 2 * pivot, [2 * target for target in targets])
    near(after, 2 * before)


def between(merge: Merge, case: Case, pivot: Array, targets: list[Array]) -> None:
    """Every element lies between the least and the greatest that the models (with the base) have there."""
    merged = merge_case(merge, case, pivot, targets)
    everyone = np.stack([*targets, pivot] if case.base else targets)
    assert (merged >= everyone.min(axis=0) - NEAR).all()
    assert (merged <= everyone.max(axis=0) + NEAR).all()


def sparse(merge: Merge, case: Case, pivot: Array, targets: list[Array]) -> None:
    """No more elements leave the pivot than the densities of the targets, or the selection, keep."""
    merged = merge_case(merge, case, pivot, targets)
    if case.method == "sce":
        most = int(float(str(case.shared["select_topk"])) * pivot.size)
    else:
        densities = case.parameters(len(targets))["density"]
        assert isinstance(densities, tuple)
        most = sum(max(int(density * pivot.size), 1) for density in densities)
    assert np.count_nonzero(merged != pivot) <= most


def whole_deltas(merge: Merge, case: Case, pivot: Array, targets: list[Array]) -> None:
    """Where every element is kept the merge is task arithmetic."""
    weights = case.parameters(len(targets))["weight"]
    assert isinstance(weights, tuple)
    total = sum(weight * (target - pivot) for weight, target in zip(weights, targets, strict=True))
    divisor = sum(weights) if case.shared.get("normalize") else 1
    expected = pivot + float(str(case.shared.get("scale", 1.0))) * total / divisor
    near(merge_case(merge, case, pivot, targets), expected)


PROPERTIES: dict[str, Callable[[Merge, Case, Array, list[Array]], None]] = {
    "equal_models": equal_models,
    "pivot_unmoved": pivot_unmoved,
    "permuted_targets": permuted_targets,
    "translated": translated,
    "doubled": doubled,
    "between": between,
    "sparse": sparse,
    "whole_deltas": whole_deltas,
}


def pairs() -> list[object]:
    """Every case with every property that holds there, for pytest.mark.parametrize(("case", "name"), ...)."""
    return [
        pytest.param(case, name, id=f"{name}-{case}") for case in CASES for name in PROPERTIES if name in case.holds
    ]


def two_on_the_sphere(merge: Merge, pivot: Array, target: Array) -> None:
    """Barycentres of two models have slerp's directions, at t = 1/2 and at the second one's share of the weights; norms are averaged.

    For positive arrays with a cosine below slerp's bound of linearity.
    """

    def norm(tensor: Array) -> float:
        return float(np.linalg.norm(np.asarray(tensor, np.float64)))

    for t in (0.5, 0.25):
        on_arc = merge("slerp", pivot / norm(pivot), [target / norm(target)], {"t": t})
        expected = on_arc / norm(on_arc) * ((1 - t) * norm(pivot) + t * norm(target))
        got = merge("multislerp", None, [pivot, target], {"weight": (1 - t, t)})
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-5)
        if t == 0.5:
            karcher = merge("karcher", None, [pivot, target], {})
            np.testing.assert_allclose(karcher, expected, rtol=2e-5, atol=1e-5)


def slerp_ends_and_turns_round(merge: Merge, pivot: Array, target: Array) -> None:
    """t = 0 is the base, t = 1 the other, and t from one end is 1 - t from the other."""
    near(merge("slerp", pivot, [target], {"t": 0.0}), pivot)
    near(merge("slerp", pivot, [target], {"t": 1.0}), target)
    there, back = merge("slerp", pivot, [target], {"t": 0.25}), merge("slerp", target, [pivot], {"t": 0.75})
    near(there, back)


def good_weights(weights: list[float], *, equal: bool = False) -> None:
    """What linear (normalised), varm and sce report: shares of one; `equal` for models that all moved alike, or not at all."""
    assert min(weights) >= 0
    assert sum(weights) == pytest.approx(1, abs=1e-12)
    if equal:
        assert weights == pytest.approx([1 / len(weights)] * len(weights), abs=1e-6)
