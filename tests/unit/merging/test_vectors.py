"""Passes written as vectors give the bits of the plain loops: whole chunks of bfloat16 against the same numbers as float32, which take the plain loops."""

import dataclasses

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from fusion_ray.checkpoints.floats import Caster
from fusion_ray.merging.blocks import CHUNK, Block, widen
from fusion_ray.merging.changes import measure_changes
from fusion_ray.merging.selection import rank_variance

SIZE = 5 * CHUNK + 77  # whole chunks and one that is not


class Once:
    """The blocks of a tensor that is one block."""

    def __init__(self, block):
        self.block, self.size, self.targets = block, block.size, len(block.stored) - 1

    def __iter__(self):
        yield self.block


def stored(models, seed=0):
    """Bits of bfloat16 (uint16) of every size, some the same as the base's, some zeros of both signs."""
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal((models, SIZE)) * 10.0 ** rng.integers(-20, 15, (models, SIZE))).astype(np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    bits[1:, ::3] = bits[0, ::3]
    bits[:, ::7] = 0x8000 * rng.integers(0, 2, bits[:, ::7].shape)
    return bits


def as_float32(bits):
    out = np.empty(bits.shape, np.float32)
    widen(bits, out)
    return out


def both(bits):
    return Block(0, list(bits)), Block(0, list(as_float32(bits)))


@pytest.mark.parametrize("targets", [1, 3])
def test_changes(targets):
    vectors, plain = both(stored(targets + 1))
    found = measure_changes(Once(vectors))
    assert found == measure_changes(Once(plain))
    assert all(0 < moved < SIZE for moved in found.moved)


@pytest.mark.parametrize("bad", [0x7F80, 0xFF80, 0x7FC0])
def test_changes_of_numbers_that_are_none(bad):
    bits = stored(3)
    bits[1, CHUNK + 5] = bad
    assert measure_changes(Once(Block(0, list(bits)))).finite == (True, False, True)


@pytest.mark.parametrize("row", [None, CHUNK, 512])
def test_narrowing(row):
    bits = stored(2)[:, : 5 * CHUNK if row else SIZE]
    vectors, plain = both(bits)
    values = as_float32(bits[0]).copy()
    values[::2] += np.random.default_rng(1).standard_normal(values[::2].size).astype(np.float32)
    values.view(np.uint32)[1::10] |= 0x8000  # halfway: to even
    written, cast = Caster(row).cast(values, vectors, "BF16")
    expected, expected_cast = Caster(row).cast(values, plain, "BF16")
    assert_array_equal(written, expected)
    assert (cast.moved, cast.odd) == (expected_cast.moved, 0)
    assert 0 < cast.moved < values.size
    assert_array_equal(cast.squares, expected_cast.squares)


def test_narrowing_counts_what_leaves_the_range():
    vectors, plain = both(stored(1))
    values = np.ones(SIZE, np.float32)
    values[3], values[CHUNK + 4], values[2 * CHUNK], values[-1] = np.inf, np.nan, np.finfo(np.float32).max, -np.inf
    for block in (vectors, plain):
        assert Caster().cast(values, block, "BF16")[1].odd == 4


def test_the_figures_are_plain():
    """Not only the same as the other loops': the sums themselves."""
    bits = stored(2)
    found, wide = measure_changes(Once(Block(0, list(bits)))), as_float32(bits)
    apart = (wide[1] - wide[0]).astype(np.float64)
    assert dataclasses.astuple(found) == (
        SIZE,
        (pytest.approx(float((apart**2).sum()), rel=1e-12),),
        (pytest.approx(float(np.abs(apart).sum()), rel=1e-12),),
        (np.count_nonzero(apart),),
        (True, True),
    )


@pytest.mark.parametrize("targets", [1, 2, 3, 4, 5])
def test_ranks_by_variance(targets):
    bits = stored(targets + 1)
    bits[1:, ::5] = bits[1, ::5]  # equal targets: exactly zero
    bits[1:, 1::50] = np.arange(targets)[:, None]  # variances below float32's smallest number
    found, expected = np.empty((2, 1, SIZE), np.uint32)
    for block, ranks in zip(both(bits), (found, expected), strict=True):
        rank_variance(block, ranks)
    assert_array_equal(found, expected)
    assert (found[0, ::5] == 0).all()
    assert targets == 1 or (found[0, 1::50] == 1).any()
