"""The plan of a training run: every row once an epoch, equal numbers of micro-batches on all ranks, rates by step."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion_ray.workers.schedule import Schedule, learning_rate


def schedule(rows: int, **changes: int) -> Schedule:
    lengths = np.random.default_rng(1).integers(1, 100, rows)
    how = {"batch_size": 8, "micro_batch_size": 3, "epochs": 2, "world_size": 2, "seed": 5} | changes
    return Schedule(lengths, **how)


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 6), st.integers(1, 4))
def test_every_row_once_an_epoch_on_one_rank(rows: int, batch: int, micro: int, world: int) -> None:
    plan = schedule(rows, batch_size=batch, micro_batch_size=micro, world_size=world)
    for epoch in range(2):
        seen = []
        for number in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
            step = plan.step(number)
            assert step.epoch == epoch
            given_out = [row for rank in step.micro_batches for group in rank for (row,) in group]
            assert sorted(given_out) == sorted(step.rows)
            assert len({len(rank) for rank in step.micro_batches}) == 1
            assert len(step.micro_batches) == world
            assert max(len(group) for rank in step.micro_batches for group in rank) <= micro
            seen += step.rows
        assert sorted(seen) == list(range(rows))


def test_a_global_batch_holds_the_same_rows_for_any_number_of_workers() -> None:
    one, three = schedule(50, world_size=1, micro_batch_size=1), schedule(50, world_size=3)
    assert [one.step(n).rows for n in range(one.steps)] == [three.step(n).rows for n in range(three.steps)]


def test_order_depends_on_seed_and_epoch_alone() -> None:
    plan = schedule(64)
    assert plan.step(0).rows == schedule(64).step(0).rows
    assert plan.step(0).rows != schedule(64, seed=6).step(0).rows
    assert plan.step(0).rows != plan.step(plan.steps_per_epoch).rows


def test_micro_batches_hold_similar_lengths() -> None:
    plan = schedule(64, batch_size=64, micro_batch_size=4)
    for number in range(plan.steps):
        groups = [[row for (row,) in group] for rank in plan.step(number).micro_batches for group in rank]
        padded = sum(len(group) * plan.lengths[group].max() for group in groups)
        assert padded < 1.15 * plan.lengths.sum()


def test_no_rows_is_an_error() -> None:
    with pytest.raises(ValueError, match="no row to train on"):
        schedule(0)


def test_learning_rate_by_hand() -> None:
    def rate(step: int, how: str) -> float:
        return learning_rate(step, 12, peak=2.0, warmup_ratio=1 / 6, schedule=how)

    assert [rate(0, "cosine"), rate(1, "cosine"), rate(2, "cosine")] == [1.0, 2.0, 2.0]
    assert rate(7, "cosine") == pytest.approx(1.0)
    assert rate(7, "linear") == pytest.approx(1.0)
    assert rate(11, "linear") == pytest.approx(0.2)
    assert rate(11, "constant") == 2.0
    assert learning_rate(0, 10, peak=1.0, warmup_ratio=0.0, schedule="cosine") == 1.0
    with pytest.raises(ValueError, match="unknown schedule 'step'"):
        rate(5, "step")
