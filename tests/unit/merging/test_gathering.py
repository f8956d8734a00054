"""What is gathered in one pass is what sorting selects; tensors that one pass does not do for are told."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from fusion_ray.merging.blocks import CHUNK, ArrayBlocks, Block, Scratch
from fusion_ray.merging.gathering import gather_selected, selected_of

STEP = 4 * CHUNK


class Stored(ArrayBlocks):
    """The arrays are bits of bfloat16, given to methods as they are."""

    def __iter__(self):
        for start in range(0, self.size, self.step):
            models = [self.base, *self.arrays]
            yield Block(start, [each[start : start + self.step] for each in models])


def tensors(targets, size, *, distinct=1 << 16, growth=None):
    """A base and targets, bits of bfloat16; few `distinct` changes give many ties. `growth` (size,) scales the changes."""
    rng = np.random.default_rng(targets)
    base = rng.standard_normal(size).astype(np.float32)
    steps = rng.integers(-distinct // 2, distinct // 2 + 1, (targets, size)) * (8.0 / distinct)
    changed = base + (steps * (1.0 if growth is None else growth)).astype(np.float32)
    return [(each.view(np.uint32) >> 16).astype(np.uint16) for each in [base, *changed]]


def floats(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def by_sorting(models, select_topk):
    """The selected positions, in order."""
    base, *others = map(floats, models)
    deltas = np.stack([each - base for each in others]).astype(np.float64)
    apart = sum((deltas[i] - deltas[j]) ** 2 for i in range(len(deltas)) for j in range(i + 1, len(deltas)))
    variance = (apart / len(deltas) ** 2).astype(np.float32)
    count = int(select_topk * np.count_nonzero(variance))
    return np.sort(np.argsort(-variance, kind="stable")[:count])


@pytest.mark.parametrize("distinct", [4, 1 << 16])
@pytest.mark.parametrize("targets", [2, 3, 4, 5])
@pytest.mark.parametrize("as_stored", [True, False])
def test_gathers_what_sorting_selects(as_stored, targets, distinct):
    models = tensors(targets, 11 * CHUNK + 300, distinct=distinct)
    wide = [floats(each) for each in models]
    blocks = Stored(models[0], models[1:], step=STEP) if as_stored else ArrayBlocks(wide[0], wide[1:], step=STEP)
    found = gather_selected(blocks, 0.3)
    expected = by_sorting(models, 0.3)
    places, bases, deltas = [], [], []
    for chunk, count in enumerate(found.counts.tolist()):
        of_chunk = selected_of(found.records, int(found.offsets[chunk]), count, targets)
        places += (of_chunk[0].astype(np.int64) + chunk * CHUNK).tolist()
        bases.append(of_chunk[1])
        deltas.append(of_chunk[2])
    assert_array_equal(places, expected)
    assert_array_equal(np.concatenate(bases), wide[0][expected])
    changes = np.stack([each - wide[0] for each in wide[1:]])[:, expected]
    assert_array_equal(np.concatenate(deltas, axis=1), changes)
    assert found.squares == pytest.approx(np.square(changes.astype(np.float64)).sum(1).tolist(), rel=1e-12)


def test_nothing_is_selected_where_nothing_moved():
    base = np.ones(3 * CHUNK, np.float32)
    found = gather_selected(ArrayBlocks(base, [base, base]), 0.5)
    assert found.counts.tolist() == [0, 0, 0]
    assert found.squares == (0.0, 0.0)


def test_a_bound_that_was_too_high_gives_none():
    """The first blocks move most: what they set as the bound leaves out what the last blocks would add."""
    size = 12 * CHUNK
    falling = tensors(3, size, growth=np.where(np.arange(size) < STEP, 8.0, 1.0))
    rising = tensors(3, size, growth=np.where(np.arange(size) < STEP, 1.0, 1.2))
    assert gather_selected(Stored(falling[0], falling[1:], step=STEP), 0.3) is None
    assert gather_selected(Stored(rising[0], rising[1:], step=STEP), 0.3) is not None


@pytest.mark.parametrize("spare", [0, 60_000, 1 << 20])
def test_without_room_for_the_records_gives_none(spare):
    models = tensors(2, 8 * CHUNK)
    blocks = Stored(models[0], models[1:], step=STEP, spare=spare, kept=Scratch(np.uint32))
    assert (gather_selected(blocks, 0.3) is None) == (spare < 100_000)


def test_more_candidates_than_records_gives_none():
    """Each block moves more than the one before, so the bounds come late and let too many through."""
    size = 12 * CHUNK
    models = tensors(3, size, growth=1.0 * 16 ** (np.arange(size) // STEP))
    assert gather_selected(Stored(models[0], models[1:], step=STEP), 0.3) is None
