"""Matching by byte spans: cases with the answer written down, the slow oracle, linear speed."""

import itertools
import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_ray.alignment.spans import match_spans
from fusion_ray.records import MatchKind
from tests.reference.alignment import Token, match

STRICT, COMPARABLE, INSIDE, NONE = (int(kind) for kind in MatchKind)


def spans(*tokens: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    columns = np.asarray(tokens, np.int64).reshape(-1, 3).T
    return columns[0].copy(), columns[1].astype(np.int32), columns[2].astype(np.int32)


def matched(pivot: list[tuple[int, int, int]], source: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
    index, kind = match_spans(*spans(*pivot), *spans(*source))
    return list(zip(index.tolist(), kind.tolist(), strict=True))


def test_the_four_kinds_and_the_end_of_the_turn() -> None:
    # pivot  |The| qu|ick| brown| fox|end     source |The| quick| br|own fox|end
    pivot = [(0, 0, 3), (0, 3, 6), (0, 6, 9), (0, 9, 15), (0, 15, 19), (0, 19, 19)]
    source = [(0, 0, 3), (0, 3, 9), (0, 9, 12), (0, 12, 19), (0, 19, 19)]
    assert matched(pivot, source) == [
        (0, STRICT),
        (1, COMPARABLE),
        (1, INSIDE),
        (2, COMPARABLE),
        (3, INSIDE),
        (4, STRICT),
    ]


def test_a_source_row_that_was_cut_matches_nothing_behind_the_cut() -> None:
    pivot = [(0, 0, 3), (0, 3, 6), (0, 6, 9), (0, 9, 9), (2, 0, 2), (2, 2, 2)]
    assert matched(pivot, [(0, 0, 5)]) == [(0, COMPARABLE), (0, INSIDE), (-1, NONE), (-1, NONE), (-1, NONE), (-1, NONE)]
    assert matched(pivot, []) == [(-1, NONE)] * 6


def test_an_end_of_turn_meets_only_an_end_of_turn() -> None:
    # the source's last token reaches over the end of the content, so it has no end of turn of its own
    assert matched([(0, 0, 2), (0, 2, 2)], [(0, 0, 2)]) == [(0, STRICT), (-1, NONE)]
    # an empty message is its end alone
    assert matched([(0, 0, 0), (1, 0, 4)], [(0, 0, 0), (1, 0, 4)]) == [(0, STRICT), (1, STRICT)]


def test_blanks_that_the_source_template_strips_have_no_match() -> None:
    pivot = [(0, 0, 1), (0, 1, 4), (0, 4, 5), (0, 5, 5)]
    source = [(0, 1, 4), (0, 5, 5)]
    assert matched(pivot, source) == [(-1, NONE), (0, STRICT), (-1, NONE), (1, STRICT)]


@st.composite
def tokenized(draw: st.DrawFn) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
    """Up to four messages, each cut into tokens in two ways, either side perhaps cut short."""
    sides: tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]] = ([], [])
    for message in range(draw(st.integers(0, 4))):
        size = draw(st.integers(0, 12))
        for side in sides:
            inner = draw(st.sets(st.integers(1, max(1, size - 1)))) if size > 1 else set()
            edges = [0, *sorted(inner), size] if size else []
            tokens = [(message, a, b) for a, b in itertools.pairwise(edges)] + [(message, size, size)]
            side.extend(tokens)
    for side in sides:
        del side[len(side) - draw(st.integers(0, min(3, len(side)))) :]
    return sides


@settings(deadline=None)  # the first example compiles
@given(tokenized())
def test_equals_the_slow_oracle(sides: tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]) -> None:
    pivot, source = sides
    expected = match([Token(*token, label=0) for token in pivot], [Token(*token, label=0) for token in source])
    assert matched(pivot, source) == expected


@settings(deadline=None)  # the first example compiles
@given(tokenized())
def test_no_position_reads_a_context_longer_or_shorter_than_its_own_bytes(
    sides: tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]],
) -> None:
    pivot, source = sides
    for (message, start, end), (index, kind) in zip(pivot, matched(pivot, source), strict=True):
        if kind in (STRICT, COMPARABLE):
            assert source[index][:2] == (message, start)
            assert (source[index][2] == end) == (kind == STRICT)
        elif kind == INSIDE:
            assert source[index][0] == message
            assert source[index][1] < start < source[index][2]


@settings(deadline=None)  # the first example compiles
@given(tokenized())
def test_a_tokenization_meets_itself_token_by_token(
    sides: tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]],
) -> None:
    pivot, _ = sides
    assert matched(pivot, pivot) == [(number, STRICT) for number in range(len(pivot))]


def test_a_million_positions_a_second_on_one_core() -> None:
    count = 1_000_000
    start = np.arange(count, dtype=np.int32) % 4096 * 4
    message = np.arange(count, dtype=np.int64) // 4096
    sides = (message, start, start + 4, message, start, start + 4)
    match_spans(*sides)  # compiles
    begin = time.perf_counter()
    match_spans(*sides)
    assert count / (time.perf_counter() - begin) > 1e6
