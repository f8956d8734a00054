"""Sparse counts of pairs: sums in any order, in memory of the pairs seen."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fusion_ray.alignment.counts import PairCounts

PAIRS = st.lists(st.tuples(st.integers(0, 200_000), st.integers(0, 200_000)), max_size=30)


def counts_of(pairs: list[tuple[int, int]]) -> PairCounts:
    array = np.array(pairs, np.int32).reshape(-1, 2)
    return PairCounts.of_pairs(array[:, 0], array[:, 1])


def as_counter(counts: PairCounts) -> Counter[tuple[int, int]]:
    pairs = zip(counts.source_ids.tolist(), counts.pivot_ids.tolist(), strict=True)
    return Counter(dict(zip(pairs, counts.counts.tolist(), strict=True)))


@given(st.lists(PAIRS, max_size=4))
def test_parts_add_up_to_the_whole(parts: list[list[tuple[int, int]]]) -> None:
    total = PairCounts.none()
    for part in parts:
        total = total + counts_of(part)
    everyone = [pair for part in parts for pair in part]
    assert as_counter(total) == Counter(everyone)
    whole = counts_of(everyone)
    assert (total.keys.tolist(), total.counts.tolist()) == (whole.keys.tolist(), whole.counts.tolist())
    assert (np.diff(total.keys) > 0).all()


def test_memory_is_of_the_pairs_seen() -> None:
    counts = counts_of([(151_645, 32_001)] * 1000 + [(0, 0)])
    assert counts.nbytes == 2 * 16
    assert as_counter(counts) == {(151_645, 32_001): 1000, (0, 0): 1}
