"""AvgCE: the mean of both models' distributions, against an obvious one over dictionaries and by its properties."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_ray.alignment.average import average, source_weight

K = 3
Row = list[tuple[int, float]]  # ids with their probabilities


def obvious(pivot: Row, source: Row, weight: float) -> Row:
    masses: dict[int, float] = {}
    for share, row in ((1 - weight, pivot), (weight, source)):
        for name, probability in row:
            masses[name] = masses.get(name, 0.0) + share * probability
    return [(name, mass) for name, mass in sorted(masses.items(), key=lambda each: (-each[1], each[0])) if mass > 0][:K]


def arrays(rows: list[Row]) -> tuple[np.ndarray, np.ndarray]:
    ids, logprobs = np.zeros((len(rows), K), np.int32), np.full((len(rows), K), -np.inf, np.float32)
    for n, row in enumerate(rows):
        for k, (name, probability) in enumerate(row):
            ids[n, k], logprobs[n, k] = name, math.log(probability)
    return ids, logprobs


def rows_of(ids: np.ndarray, logprobs: np.ndarray) -> list[Row]:
    return [
        [(int(name), math.exp(value)) for name, value in zip(*row, strict=True) if value > -np.inf]
        for row in zip(ids, logprobs, strict=True)
    ]


@st.composite
def distributions(draw: st.DrawFn) -> Row:
    names = draw(st.lists(st.integers(0, 5), max_size=K, unique=True))
    amounts = [draw(st.integers(1, 8)) for _ in names]
    return [(name, amount / 32) for name, amount in zip(names, amounts, strict=True)]


@given(st.lists(st.tuples(distributions(), distributions(), st.sampled_from([0.0, 0.25, 0.5, 1.0])), max_size=6))
@settings(max_examples=60, deadline=None)
def test_as_over_dictionaries(cases: list[tuple[Row, Row, float]]) -> None:
    pivot, source = arrays([case[0] for case in cases]), arrays([case[1] for case in cases])
    found = rows_of(*average(pivot, source, np.array([case[2] for case in cases], np.float64)))
    for row, case in zip(found, cases, strict=True):
        wanted = obvious(*case)
        assert sorted(mass for _, mass in row) == pytest.approx(sorted(mass for _, mass in wanted), rel=1e-5)
        masses = dict(obvious(*case[:2], case[2]))
        assert all(masses.get(name, 0.0) == pytest.approx(mass, rel=1e-5) for name, mass in row if name in masses)


def test_by_hand() -> None:
    pivot, source = [(7, 0.5), (1, 0.25)], [(1, 0.75), (9, 0.125)]
    found = rows_of(*average(arrays([pivot]), arrays([source]), np.array([0.5])))
    assert [name for name, _ in found[0]] == [1, 7, 9]
    assert [mass for _, mass in found[0]] == pytest.approx([0.5, 0.25, 0.0625])


def test_equal_sides_are_themselves_and_weight_zero_is_the_pivot() -> None:
    rows: list[Row] = [[(4, 0.5), (2, 0.25), (3, 0.125)], [(1, 0.75)], []]
    sides = arrays(rows)
    for weight in (0.0, 0.3, 1.0):
        ids, logprobs = average(sides, sides, np.full(3, weight))
        assert [name for row in rows_of(ids, logprobs) for name, _ in row] == [name for row in rows for name, _ in row]
        np.testing.assert_allclose(logprobs, sides[1], rtol=1e-6)


def test_the_weight_is_the_published_softmax() -> None:
    pivot, source = np.array([1.0, 0.0, np.inf, np.inf, 0.5]), np.array([0.5, np.inf, 0.0, np.inf, 0.5])
    both = np.exp(np.exp(-np.stack([pivot, source])))
    np.testing.assert_allclose(source_weight(pivot, source), both[1] / both.sum(0))
    assert source_weight(pivot, source)[[1, 2]] == pytest.approx([1 - 0.731, 0.731], abs=1e-3)
    assert source_weight(pivot, source)[[3, 4]].tolist() == [0.5, 0.5]
