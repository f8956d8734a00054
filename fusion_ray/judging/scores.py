"""Scores with confidence intervals: exact match, means with 95% bootstrap intervals over items, and the paired difference of two models.

The bootstrap is the percentile one over items (Efron), with a numpy generator as argument: the same seed gives the same intervals. Letters: n items,
S bootstrap samples. Called by stages/evaluate.py and the report.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_LEVEL = 0.95
_CHUNK = 1 << 22  # resampled entries held at a time


@dataclass(frozen=True)
class Interval:
    """A mean over `n` items with its 95% interval."""

    mean: float
    low: float
    high: float
    n: int

    def to_dict(self) -> dict[str, float | int]:
        return {"mean": self.mean, "low": self.low, "high": self.high, "n": self.n}


@dataclass(frozen=True)
class Difference:
    """First model minus second over the same items. `p` is two-sided; `inside_noise` where the interval holds 0."""

    mean: float
    low: float
    high: float
    p: float
    n: int

    @property
    def inside_noise(self) -> bool:
        return self.low <= 0.0 <= self.high

    def to_dict(self) -> dict[str, float | int | bool]:
        return {
            "mean": self.mean,
            "low": self.low,
            "high": self.high,
            "p": self.p,
            "n": self.n,
            "inside_noise": self.inside_noise,
        }


def normalise(text: str) -> str:
    """`text` stripped, white space runs made one space, case folded, one trailing full stop dropped."""
    return " ".join(text.split()).casefold().removesuffix(".").rstrip()


def exact_match(answer: str, reference: str) -> bool:
    return normalise(answer) == normalise(reference)


def turn_scores(answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """1.0 or 0.0 a turn. Raises ValueError when the two differ in length or are empty."""
    if len(answers) != len(references) or not answers:
        raise ValueError(f"{len(answers)} answers against {len(references)} references: expected one of each a turn")
    return [float(exact_match(answer, reference)) for answer, reference in zip(answers, references, strict=True)]


def item_score(answers: Sequence[str], references: Sequence[str]) -> float:
    """The mean of `turn_scores`."""
    scores = turn_scores(answers, references)
    return sum(scores) / len(scores)


def bootstrap_mean(values: Sequence[float], rng: np.random.Generator, *, samples: int = 2000) -> Interval:
    """The mean of `values` (n,) with the 95% percentile interval of `samples` resampled means. Raises ValueError for no values."""
    array = _checked(values, "values")
    low, high = np.quantile(_resampled_means(array, rng, samples), [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Interval(float(array.mean()), float(low), float(high), len(array))


def paired_difference(
    first: Sequence[float], second: Sequence[float], rng: np.random.Generator, *, samples: int = 2000
) -> Difference:
    """The mean of `first - second` item by item: (n,) scores of two models on the same items in the same order.

    `p` is twice the smaller share of resampled means on either side of 0, counting the observed one, at most 1. Raises ValueError when the lengths differ.
    """
    if len(first) != len(second):
        raise ValueError(
            f"{len(first)} scores against {len(second)}: a paired difference needs the same items of both models"
        )
    deltas = _checked(first, "first") - _checked(second, "second")
    means = _resampled_means(deltas, rng, samples)
    low, high = np.quantile(means, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    tail = min(int((means <= 0).sum()), int((means >= 0).sum()))
    p = min(1.0, 2 * (tail + 1) / (samples + 1))
    return Difference(float(deltas.mean()), float(low), float(high), p, len(deltas))


def summarise(
    categories: Sequence[str], values: Sequence[float], rng: np.random.Generator, *, samples: int = 2000
) -> tuple[dict[str, Interval], Interval]:
    """Per category (in order of first appearance) and over all items; `categories` and `values` are (n,)."""
    if len(categories) != len(values):
        raise ValueError(f"{len(categories)} categories against {len(values)} scores: expected one a item")
    groups: dict[str, list[float]] = {}
    for category, value in zip(categories, values, strict=True):
        groups.setdefault(category, []).append(value)
    by_category = {name: bootstrap_mean(group, rng, samples=samples) for name, group in groups.items()}
    return by_category, bootstrap_mean(values, rng, samples=samples)


def summarise_ratings(
    categories: Sequence[str],
    turns: Sequence[int],
    ratings: Sequence[float],
    rng: np.random.Generator,
    *,
    samples: int = 2000,
) -> dict[str, Mapping[str, object]]:
    """A judge's ratings (n,) by category, by turn and overall; -1 is dropped and counted, as FastChat's show_result drops it.

    Each entry is an Interval's dict plus `dropped`; `mean`, `low` and `high` are None where every rating was dropped. Turns of one question are resampled as
    items of their own.
    """
    if not len(categories) == len(turns) == len(ratings):
        raise ValueError(
            f"{len(categories)} categories, {len(turns)} turns, {len(ratings)} ratings: expected one of each"
        )
    rows = list(zip(categories, turns, ratings, strict=True))

    def entry(values: list[float]) -> dict[str, float | int | None]:
        kept = [value for value in values if value >= 0]
        counted: dict[str, float | int | None] = {"n": len(kept), "dropped": len(values) - len(kept)}
        if not kept:
            return {"mean": None, "low": None, "high": None} | counted
        return dict(bootstrap_mean(kept, rng, samples=samples).to_dict()) | counted

    return {
        "categories": {name: entry([r for c, _, r in rows if c == name]) for name in dict.fromkeys(categories)},
        "turns": {str(turn): entry([r for _, t, r in rows if t == turn]) for turn in sorted(set(turns))},
        "overall": entry(list(ratings)),
    }


def _checked(values: Sequence[float], name: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"`{name}` must be a non-empty list of numbers, given shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(
            f"`{name}` holds a score that is not finite at index {int(np.flatnonzero(~np.isfinite(array))[0])}"
        )
    return array


def _resampled_means(array: np.ndarray, rng: np.random.Generator, samples: int) -> np.ndarray:
    """(S,) means of resamples with replacement of `array` (n,), in chunks of bounded memory."""
    rows = max(1, _CHUNK // len(array))
    parts = [
        array[rng.integers(0, len(array), size=(min(rows, samples - start), len(array)))].mean(axis=1)
        for start in range(0, samples, rows)
    ]
    return np.concatenate(parts)
