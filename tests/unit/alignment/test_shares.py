"""The map `shares`: a source token as the pivot tokens that it met, each with its share."""

import numpy as np
import pytest

from fusion_ray.alignment.counts import PairCounts
from fusion_ray.alignment.edges import find_edges
from fusion_ray.alignment.maps import MAPS
from fusion_ray.alignment.project import project
from fusion_ray.alignment.shares import MOST, PRIOR, Shares, pair_shares
from fusion_ray.alignment.spans import match_spans
from tests.reference.alignment import Token, positions_of
from tests.unit.alignment.test_project import END, distribution, one, vocabulary

A, B = ord("a"), ord("b")


def shares_of(shares: Shares, source_id: int) -> dict[int, float]:
    part = slice(shares.offsets[source_id], shares.offsets[source_id + 1])
    return dict(zip(shares.ids[part].tolist(), shares.weights[part].tolist(), strict=True))


def counts(*pairs: tuple[int, int, int]) -> PairCounts:
    source, pivot, often = (np.array(column) for column in zip(*pairs, strict=True))
    return PairCounts.of_pairs(source, pivot, often)


def test_shares_are_how_often_each_was_met_with_the_map_as_one_more() -> None:
    theirs, ours = vocabulary(), vocabulary(b"ab", b"aba")
    ab, aba = 258, 259
    mapped = MAPS["prefix"](theirs, ours)
    shares = pair_shares(theirs, ours, counts((A, ab, 6), (A, aba, 3), (B, A, 5)), mapped)
    assert shares_of(shares, A) == pytest.approx({ab: 0.6, aba: 0.3, A: PRIOR / 10})
    assert shares_of(shares, B) == {}, "b was met with a alone, which does not begin as it does: the map holds"
    assert shares_of(shares, END) == {}, "special ids go by role"


def test_the_least_of_many_are_left_out_and_the_rest_still_adds_up() -> None:
    words = [b"a" + bytes([65 + number]) for number in range(MOST + 4)]
    theirs, ours = vocabulary(), vocabulary(*words)
    pairs = counts(*[(A, 258 + number, 100 - number) for number in range(len(words))])
    shares = pair_shares(theirs, ours, pairs, MAPS["prefix"](theirs, ours))
    assert set(shares_of(shares, A)) == {258 + number for number in range(MOST)}
    assert sum(shares_of(shares, A).values()) == pytest.approx(1)
    assert shares.most == MOST


def test_equal_vocabularies_need_none() -> None:
    words = vocabulary(b"ab")
    assert pair_shares(words, words, counts((A, B, 3)), MAPS["exact"](words, words)).most == 0


@pytest.mark.parametrize("chain", [False, True])
def test_candidates_are_shared_and_what_was_written_is_told_by_the_chain(chain: bool) -> None:
    theirs, ours = vocabulary(b"ba"), vocabulary(b"ab", b"bb")
    ab, bb = 258, 259
    mapped = MAPS["prefix"](theirs, ours)
    shares = pair_shares(theirs, ours, counts((A, ab, 3), (B, bb, 1)), mapped)
    pivot = positions_of([[one(0, 2, ab), one(2, 2, END)]], 4)
    source = positions_of(
        [[Token(1, 0, 1, A, ((A, 0.5), (B, 0.25)), 0.5), Token(1, 1, 2, B, ((B, 0.5),), 0.5), one(2, 2, END)]], 2
    )
    index, kind = match_spans(pivot.message_key, pivot.start, pivot.end, source.message_key, source.start, source.end)
    edges = find_edges(pivot, ours), find_edges(source, theirs)
    found = project(
        pivot, source, source_index=index, kind=kind, edges_pivot=edges[0], edges_source=edges[1],
        vocabulary_pivot=ours, vocabulary_source=theirs, mapped=mapped, whole_tokens=False, chain=chain, shares=shares,
        top_k=4,
    )  # fmt: skip
    of_b = {B: 0.125, bb: 0.125}
    of_a = {ab: 0.25} if chain else {ab: 0.375, A: 0.125}
    assert distribution(found, 0) == pytest.approx(of_b | of_a)
