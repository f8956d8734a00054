"""A training that stops to learn is told from one that meets a hard batch."""

import math

import numpy as np
import pytest

from fusion_ray.workers.loss_watch import LossWatch

VOCABULARY = 32_000


def told(losses: list[float], totals: dict[str, dict[str, float]] | None = None) -> int | None:
    """The number of the loss at which the watch says so."""
    watch, totals = LossWatch(VOCABULARY), {} if totals is None else totals
    return next((number for number, loss in enumerate(losses) if watch.add(loss, totals)), None)


def test_a_collapse_of_what_was_learned_is_seen_though_guessing_costs_more() -> None:
    learned = [0.0006] * 20
    assert told([*learned, 10.28, 9.44, 9.81, 7.46]) in (20, 21)
    assert told([*learned, *([2.5] * 20)]) is not None  # far below what guessing evenly costs: 10.4


def test_the_first_step_may_be_past_all_bounds() -> None:
    assert told([2.1 * math.log(VOCABULARY)]) == 0


def test_a_run_that_learns_is_left_alone() -> None:
    rng = np.random.default_rng(0)
    falling = [10.0 * 0.99**step + 1.0 for step in range(500)]
    assert told((np.array(falling) * rng.uniform(0.7, 1.4, 500)).tolist()) is None
    assert told([1.0] * 50 + [6.0] + [1.0] * 50) is None  # one hard batch of few rows


def test_a_resumed_run_remembers() -> None:
    totals: dict[str, dict[str, float]] = {}
    assert told([0.5] * 30, totals) is None
    assert told([9.0, 9.0, 9.0], {name: dict(kept) for name, kept in totals.items()}) is not None
    assert told([9.0, 9.0, 9.0]) is None


@pytest.mark.parametrize("loss", [math.nan])
def test_what_is_not_a_number_is_not_its_business(loss: float) -> None:
    assert told([loss]) is None  # the trainer has stopped before
