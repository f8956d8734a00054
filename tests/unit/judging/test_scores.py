"""Exact match and bootstrap intervals, against answers written here."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion_ray.judging.scores import (
    bootstrap_mean,
    exact_match,
    item_score,
    normalise,
    paired_difference,
    summarise,
    summarise_ratings,
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("  The cat\n sat. ", "the cat sat", True),
        ("STRASSE", "straße", True),
        ("Yes..", "yes", False),
        ("Yes .", "yes", True),
        ("12", "12.0", False),
        ("", ".", True),
        ("a b", "ab", False),
    ],
)
def test_exact_match(answer: str, reference: str, same: bool) -> None:
    assert exact_match(answer, reference) is same


@given(st.text())
def test_normalising_changes_nothing_but_spaces_case_and_one_full_stop(text: str) -> None:
    assert normalise(f" {text}\t") == normalise(text)
    assert normalise(normalise(text)).rstrip(".") == normalise(text).rstrip(".")


def test_item_score_is_the_mean_over_turns() -> None:
    assert item_score(["Paris.", "no"], ["paris", "Rome"]) == 0.5
    with pytest.raises(ValueError, match="1 answers against 2 references"):
        item_score(["a"], ["a", "b"])


def test_bootstrap_interval_is_near_the_normal_one() -> None:
    values = [1.0] * 60 + [0.0] * 40
    interval = bootstrap_mean(values, rng(), samples=20_000)
    half = 1.96 * math.sqrt(0.6 * 0.4 / 100)
    assert interval.mean == pytest.approx(0.6)
    assert interval.n == 100
    assert interval.low == pytest.approx(0.6 - half, abs=0.012)
    assert interval.high == pytest.approx(0.6 + half, abs=0.012)


def test_bootstrap_is_the_same_for_the_same_seed_and_exact_for_equal_items() -> None:
    values = list(np.linspace(0, 1, 41))
    assert bootstrap_mean(values, rng(5)) == bootstrap_mean(values, rng(5))
    assert bootstrap_mean([0.25] * 7, rng()).to_dict() == {"mean": 0.25, "low": 0.25, "high": 0.25, "n": 7}


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(0, 100))
def test_interval_lies_within_the_values(values: list[float], seed: int) -> None:
    interval = bootstrap_mean(values, rng(seed), samples=200)
    assert min(values) - 1e-12 <= interval.low <= interval.high <= max(values) + 1e-12


def test_coverage_of_the_interval_over_many_draws() -> None:
    draws = rng(1).random((300, 60)) < 0.4
    held = [
        low.low <= 0.4 <= low.high for low in (bootstrap_mean(row.astype(float), rng(2), samples=500) for row in draws)
    ]
    assert 0.90 <= np.mean(held) <= 0.98


def test_paired_difference_sees_what_unpaired_intervals_hide() -> None:
    hard = rng(3).random(200)  # items differ far more than the models do
    first, second = list(hard + 0.02 * rng(4).random(200)), list(hard)
    difference = paired_difference(first, second, rng())
    assert difference.mean == pytest.approx(0.01, abs=0.002)
    assert not difference.inside_noise
    assert difference.p < 0.01
    assert bootstrap_mean(first, rng()).low < bootstrap_mean(second, rng()).mean


def test_paired_difference_of_a_model_with_itself_is_noise() -> None:
    scores = list(rng().random(50))
    difference = paired_difference(scores, scores, rng())
    assert (difference.mean, difference.low, difference.high, difference.p) == (0, 0, 0, 1)
    assert difference.inside_noise


def test_paired_difference_changes_sign_when_the_models_change_places() -> None:
    first, second = list(rng(1).random(80)), list(rng(2).random(80))
    there, back = paired_difference(first, second, rng(7)), paired_difference(second, first, rng(7))
    assert there.mean == pytest.approx(-back.mean)
    assert (there.low, there.high, there.p) == pytest.approx((-back.high, -back.low, back.p))
    with pytest.raises(ValueError, match="80 scores against 79"):
        paired_difference(first, second[:-1], rng())


def test_summarise_by_category_and_overall() -> None:
    by_category, overall = summarise(["math", "stem", "math"], [1.0, 0.0, 0.5], rng())
    assert {name: (entry.mean, entry.n) for name, entry in by_category.items()} == {"math": (0.75, 2), "stem": (0.0, 1)}
    assert (overall.mean, overall.n) == (0.5, 3)


def test_ratings_drop_minus_one_and_count_it() -> None:
    table = summarise_ratings(["math", "math", "stem", "stem"], [1, 2, 1, 2], [8, -1, -1, -1], rng())
    assert table["categories"]["math"] == {"mean": 8, "low": 8, "high": 8, "n": 1, "dropped": 1}
    assert table["categories"]["stem"] == {"mean": None, "low": None, "high": None, "n": 0, "dropped": 2}
    assert table["turns"]["2"]["dropped"] == 2
    assert (table["overall"]["n"], table["overall"]["dropped"]) == (1, 3)


@pytest.mark.parametrize("values", [[], [float("nan")], [[1.0]]])
def test_no_scores_or_broken_scores_are_errors(values: list[float]) -> None:
    with pytest.raises(ValueError, match="values"):
        bootstrap_mean(values, rng())
