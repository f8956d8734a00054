"""The properties of properties.py on the slow oracles, and what only the oracles can be asked: their random numbers and weights as arguments."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference import merging as oracle
from tests.unit.merging import properties
from tests.unit.merging.properties import CASES, PROPERTIES, Array, Case


def merge(method: str, pivot: Array | None, targets: list[Array], parameters: dict[str, object]) -> Array:
    """The oracle; the random numbers depend on the number of the target and the position alone."""
    uniforms = None
    if method in oracle.RANDOM:
        uniforms = np.random.default_rng(1).random((len(targets), *targets[0].shape))
    return oracle.merge(method, pivot, targets, uniforms=uniforms, **parameters)


@pytest.mark.parametrize(("case", "name"), properties.pairs())
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_oracle_has_the_property(case: Case, name: str, data: st.DataObject) -> None:
    pivot, targets = data.draw(properties.models(case))
    PROPERTIES[name](merge, case, pivot, targets)


def test_every_method_has_cases() -> None:
    assert {case.method for case in CASES} == {*oracle.METHODS, "linear", "karcher", "sce"}


ON_THE_SPHERE = next(case for case in CASES if case.method == "slerp")


@settings(max_examples=50, deadline=None)
@given(drawn=properties.models(ON_THE_SPHERE))
def test_two_on_the_sphere(drawn: tuple[Array, list[Array]]) -> None:
    pivot, (target,) = drawn
    cosine = float((pivot * target).sum()) / float(np.linalg.norm(pivot) * np.linalg.norm(target))
    if cosine < 0.999:  # beyond, slerp is linear
        properties.two_on_the_sphere(merge, pivot, target)
    properties.slerp_ends_and_turns_round(merge, pivot, target)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_weights_are_shares(data: st.DataObject) -> None:
    pivot, targets = data.draw(properties.models(CASES[0]))
    same = [targets[0]] * len(targets)
    for models, equal in ((targets, False), (same, True), ([pivot] * len(targets), True)):
        for variant in ("paper", "fusechat_release", "mergekit"):
            properties.good_weights(oracle.sce(pivot, models, 0.5, variant)[1], equal=equal)
        for granularity in ("matrix", "layer", "model"):
            for temperature in (None, 0.5):
                weights = oracle.varm_weights({"w": (pivot, models)}, granularity, temperature=temperature)
                properties.good_weights(weights["w"], equal=equal)
    first, last = (
        oracle.varm_weights({"w": (pivot, order)}, "matrix", temperature=0.5)["w"] for order in (targets, targets[::-1])
    )
    assert first == pytest.approx(last[::-1], abs=1e-12)


@pytest.mark.parametrize("method", oracle.RANDOM)
def test_permuted_with_their_random_numbers(method: str) -> None:
    rng = np.random.default_rng(3)
    pivot, *targets = rng.normal(size=(4, 3, 7)).astype(np.float32)
    uniforms = rng.random((3, 3, 7))
    weight, density = [0.5, 0.25, 1.0], [0.5, 0.25, 0.75]
    before = oracle.merge(method, pivot, targets, uniforms=uniforms, weight=weight, density=density)
    after = oracle.merge(
        method, pivot, targets[::-1], uniforms=uniforms[::-1], weight=weight[::-1], density=density[::-1]
    )
    np.testing.assert_allclose(after, before, atol=1e-12)
    assert not np.allclose(
        oracle.merge(method, pivot, targets, uniforms=uniforms[::-1], weight=weight, density=density), before
    )


@pytest.mark.parametrize(("method", "more"), [("dare_linear", {}), ("della_linear", {"epsilon": [0.125, 0.0]})])
def test_rescaled_draws_average_to_the_whole_delta(method: str, more: dict[str, list[float]]) -> None:
    rng = np.random.default_rng(4)
    pivot, *targets = rng.normal(size=(3, 2, 5)).astype(np.float32)
    weight = [0.5, 1.0]
    total = np.zeros(pivot.shape)
    for number in np.arange(0.5, 64) / 64:  # every 64th of [0, 1), once for all positions: the densities are 64ths too
        uniforms = np.full((2, *pivot.shape), number)
        total += oracle.merge(method, pivot, targets, uniforms=uniforms, weight=weight, density=[0.5, 0.25], **more)
    np.testing.assert_allclose(total / 64, oracle.task_arithmetic(pivot, targets, weight), atol=1e-6)  # float32 deltas


def test_answers_by_hand() -> None:
    pivot = np.zeros(5, np.float32)
    target = np.array([1, -5, 2, -3, 4], np.float32)

    def one(method: str, **parameters: object) -> list[float]:
        return oracle.merge(method, pivot, [target], **parameters).tolist()

    assert one("ties", weight=[1.0], density=[0.5]) == [0, -5, 0, 0, 4]  # int(2.5) elements
    assert one("breadcrumbs", weight=[1.0], density=[0.4], gamma=[0.2]) == [0, 0, 0, -3, 4]
    assert one("breadcrumbs", weight=[1.0], density=[0.8], gamma=[0.9]) == [1, 0, 2, -3, 4]
    uniforms = np.array([[0.1, 0.49, 0.5, 0.51, 0.9]])
    assert one("dare_linear", weight=[1.0], density=[0.5], uniforms=uniforms) == [2, -10, 0, 0, 0]
    ranks = oracle.della_probabilities(np.array([[1, -5, 2, -3, 4], [1, 1, 1, 1, 1]]), 0.5, 0.2)
    np.testing.assert_allclose(ranks, [[0.3, 0.7, 0.4, 0.5, 0.6], [0.3, 0.4, 0.5, 0.6, 0.7]])
    assert oracle.della_probabilities(np.array([1.0, 2.0]), 1.0, 0.25).tolist() == [1.0, 1.0]

    first, second = np.array([2, 2, -1], np.float32), np.array([-1, 1, -2], np.float32)
    elected = oracle.ties(np.zeros(3, np.float32), [first, second], weight=[1.0, 3.0])
    np.testing.assert_allclose(elected, [-1, 1.25, -1.75])  # -3 outweighs 2; then (2 + 3) / 4 and (-1 - 6) / 4
    stock = oracle.model_stock(np.zeros(2), [np.array([1.0, 0.0]), np.array([1.0, 1.0])])
    cosine = 0.5**0.5
    np.testing.assert_allclose(stock, 2 * cosine / (1 + cosine) * np.array([1.0, 0.5]))
    quarter = oracle.slerp(np.array([1.0, 0.0]), [np.array([0.0, 2.0])], t=0.5)
    np.testing.assert_allclose(quarter, [0.5**0.5, 2 * 0.5**0.5])
