"""MinCE: by row and by token, in bits per byte and nats per token, on the text that both sides have."""

import math

import numpy as np
import pytest

from fusion_ray.alignment.choose import cross_entropy, source_wins_rows, source_wins_tokens
from tests.reference.alignment import Token, bits_per_byte, positions_of


def token(start: int, end: int, nats: float, message: int = 1) -> Token:
    return Token(message, start, end, 0, ((0, 1.0),), math.exp(-nats))


# Four bytes: the pivot reads two tokens of 1.2 nats, the source four of 0.7. By the token the source is better, by the byte it is worse.
PIVOT = [token(0, 2, 1.2), token(2, 4, 1.2)]
SOURCE = [token(0, 1, 0.7), token(1, 2, 0.7), token(2, 3, 0.7), token(3, 4, 0.7)]


def test_a_source_with_shorter_tokens_wins_by_the_token_and_not_by_the_byte() -> None:
    pivot, source = positions_of([PIVOT], 1), positions_of([SOURCE], 1)
    ours, theirs = cross_entropy(pivot, source, 1), cross_entropy(source, pivot, 1)
    assert ours.per_byte[0] == pytest.approx(bits_per_byte([1.2, 1.2], 4))
    assert theirs.per_byte[0] == pytest.approx(bits_per_byte([0.7] * 4, 4))
    assert (ours.per_token[0], theirs.per_token[0]) == pytest.approx((1.2, 0.7))
    assert source_wins_rows(ours, theirs, unit="byte").tolist() == [False]
    assert source_wins_rows(ours, theirs, unit="token").tolist() == [True]
    assert source_wins_rows(ours, theirs, choose="source").tolist() == [True]
    assert source_wins_rows(theirs, ours, choose="pivot").tolist() == [False]


def test_a_tie_goes_to_the_pivot_and_so_does_a_row_without_text_in_common() -> None:
    pivot, source = positions_of([PIVOT, PIVOT], 1), positions_of([PIVOT], 1)
    ours, theirs = cross_entropy(pivot, source, 2), cross_entropy(source, pivot, 2)
    assert source_wins_rows(ours, theirs).tolist() == [False, False]
    assert np.isinf(theirs.per_byte).tolist() == [False, True]


def test_what_lies_behind_the_other_sides_cut_does_not_count() -> None:
    # the source was cut after two bytes, before its worst tokens
    pivot = positions_of([[token(0, 2, 1.0), token(2, 4, 9.0), token(4, 4, 9.0)]], 1)
    source = positions_of([[token(0, 1, 0.6), token(1, 2, 0.6)]], 1)
    ours, theirs = cross_entropy(pivot, source, 1), cross_entropy(source, pivot, 1)
    assert (ours.nats[0], ours.tokens[0], ours.bytes[0]) == (pytest.approx(1.0), 1, 2)
    assert source_wins_rows(ours, theirs).tolist() == [False]


def test_by_token_the_source_wins_only_where_it_says_something() -> None:
    pivot = positions_of([[token(0, 2, 1.0), token(2, 4, 1.0), token(4, 4, 1.0)]], 1)
    source = positions_of([[token(0, 1, 0.6), token(1, 4, 0.9), token(4, 4, 0.5)]], 1)
    index = np.array([0, 1, 2], np.int32)
    known = np.array([True, False, True])
    assert source_wins_tokens(pivot, source, index, known, unit="byte").tolist() == [False, False, True]
    assert source_wins_tokens(pivot, source, index, known, unit="token").tolist() == [True, False, True]
    assert source_wins_tokens(pivot, source, index, known, choose="source").tolist() == [True, False, True]
    assert not source_wins_tokens(pivot, source, index, known, choose="pivot").any()
