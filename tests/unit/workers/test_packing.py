"""Conversations in lines: each once, none cut, the same lines whatever came before, and the same rows in a global batch for any number of workers."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion_ray.workers.packing import pack, padded_size
from fusion_ray.workers.schedule import MicroBatch, Schedule

LINE = 100
LENGTHS = st.lists(st.integers(1, LINE), min_size=1, max_size=60)


def schedule(lengths: list[int], **changes: int | None) -> Schedule:
    how: dict[str, int | None] = {"batch_size": 16, "micro_batch_size": 2, "epochs": 2, "world_size": 2, "seed": 5}
    return Schedule(np.array(lengths), **(how | {"line_length": LINE} | changes))  # type: ignore[arg-type]


def lines_of(plan: Schedule, number: int) -> MicroBatch:
    return [line for rank in plan.step(number).micro_batches for lines in rank for line in lines]


def test_by_hand() -> None:
    """60 and 50 open lines; 40 fits the first exactly, 30 the second, 20 what is left of it, and 10 nothing any more."""
    assert pack(np.array([10, 50, 20, 60, 30, 40]), 100) == [[3, 5], [1, 4, 2], [0]]
    assert padded_size(np.array([10, 50, 20, 60, 30, 40]), [[3, 5], [1, 4], [0]]) == 300
    assert padded_size(np.array([10, 50]), []) == 0


@given(LENGTHS, st.integers(1, 8))
def test_every_conversation_in_one_line_that_holds_it(lengths: list[int], at_least: int) -> None:
    lines = pack(np.array(lengths), LINE, at_least=at_least)
    fills = [sum(lengths[number] for number in line) for line in lines]
    assert sorted(number for line in lines for number in line) == list(range(len(lengths)))
    assert max(fills) <= LINE
    assert fills == sorted(fills, reverse=True)
    assert len(lines) >= min(at_least, len(lengths))
    if at_least == 1:
        assert all(first + second > LINE for first, second in pairwise(fills))  # no two are one
    assert lines == pack(np.array(lengths), LINE, at_least=at_least)


def test_a_line_that_cannot_hold_a_conversation_is_an_error() -> None:
    with pytest.raises(ValueError, match="a conversation of 101 tokens does not fit a line of 100"):
        pack(np.array([5, 101]), 100)


@given(LENGTHS, st.integers(1, 20), st.integers(1, 4), st.integers(1, 4))
def test_every_row_once_an_epoch(lengths: list[int], batch: int, micro: int, world: int) -> None:
    plan = schedule(lengths, batch_size=batch, micro_batch_size=micro, world_size=world)
    for epoch in range(2):
        seen = []
        for number in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
            step = plan.step(number)
            assert sorted(row for line in lines_of(plan, number) for row in line) == sorted(step.rows)
            assert max(sum(lengths[row] for row in line) for line in lines_of(plan, number)) <= LINE
            assert len({len(rank) for rank in step.micro_batches}) == 1
            assert max(len(lines) for rank in step.micro_batches for lines in rank) <= micro
            busy = sum(any(rank) for rank in step.micro_batches)
            assert busy == min(world, len(step.rows))  # nobody waits while another has two conversations
            seen += step.rows
        assert sorted(seen) == list(range(len(lengths)))


@given(LENGTHS, st.integers(1, 5), st.integers(0, 2**32))
def test_a_step_is_a_function_of_its_number_alone(lengths: list[int], world: int, seed: int) -> None:
    """What a resumed run reads next is what the undisturbed one reads, and rows are the same packed or not, for any number of workers."""
    walked, fresh = (schedule(lengths, world_size=world, seed=seed) for _ in range(2))
    steps = [walked.step(number) for number in range(walked.steps)]
    assert fresh.step(walked.steps - 1) == steps[-1]
    for other in (schedule(lengths, seed=seed, world_size=1), schedule(lengths, seed=seed, line_length=None)):
        assert [other.step(number).rows for number in range(other.steps)] == [step.rows for step in steps]


def test_packing_leaves_little_padding() -> None:
    lengths = np.random.default_rng(1).integers(1, LINE, 640).tolist()
    shares = {}
    for line in (LINE, None):
        plan = schedule(lengths, batch_size=64, micro_batch_size=4, line_length=line)
        size = 0
        for number in range(plan.steps_per_epoch):
            for rank in plan.step(number).micro_batches:
                size += sum(len(lines) * max(sum(lengths[row] for row in row_s) for row_s in lines) for lines in rank)
        shares[line] = plan.padding_share()
        assert shares[line] == pytest.approx(1 - sum(lengths) / size)
    assert shares[LINE] < 0.02
    assert shares[LINE] < 0.5 * shares[None]
