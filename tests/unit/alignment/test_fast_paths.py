"""What is fast for speed's sake does as the obvious way: bad candidates, the text that both sides have, the pairs that lose most mass, unsure edges."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion_ray.alignment import coverage
from fusion_ray.alignment.choose import cross_entropy
from fusion_ray.alignment.coverage import PAIRS_A_SHARD
from fusion_ray.alignment.edges import find_edges, settle
from fusion_ray.alignment.positions import faults
from fusion_ray.alignment.vocabulary import Vocabulary
from tests.reference.alignment import Token, positions_of


@pytest.mark.parametrize(("name", "value", "which"), [
    ("topk_ids", -1, 0), ("topk_ids", 9, 0), ("topk_logprobs", np.nan, 1), ("topk_logprobs", 0.5, 2), ("topk_logprobs", 0.001, None),
    ("topk_logprobs", -np.inf, None), ("topk_ids", 8, None),
])  # fmt: skip
def test_one_bad_candidate_is_found_where_it_is(name: str, value: float, which: int | None) -> None:
    sound = positions_of([[Token(1, at, at + 1, 0, ((0, 0.5), (1, 0.25))) for at in range(4)]], 2)
    assert not any(mask.any() for _, mask in faults(sound, 9))
    values = getattr(sound, name).copy()
    values[2, 1] = value
    found = [mask.tolist() for _, mask in faults(replace(sound, **{name: values}), 9)]
    for number, mask in enumerate(found):
        assert mask == [False, False, number == which, False]


ROWS = st.lists(
    st.dictionaries(st.integers(0, 3), st.tuples(st.lists(st.integers(1, 3), max_size=4), st.booleans()), max_size=3),
    max_size=3,
)


def rows_of(messages: list[dict[int, tuple[list[int], bool]]]) -> list[list[Token]]:
    """Rows of messages, each by the lengths of its tokens and whether it has its end of turn."""
    rows = []
    for row in messages:
        tokens = []
        for message, (lengths, ends) in sorted(row.items()):
            stops = np.cumsum([0, *lengths]).tolist()
            tokens += [Token(message, a, b, 0, label_probability=0.5) for a, b in itertools.pairwise(stops)]
            tokens += [Token(message, stops[-1], stops[-1], 0, label_probability=0.25)] * ends
        rows.append(tokens)
    return rows


@given(ROWS, ROWS)
def test_a_token_counts_where_the_other_side_has_its_text(
    first: list[dict[int, tuple[list[int], bool]]], second: list[dict[int, tuple[list[int], bool]]]
) -> None:
    count = max(len(first), len(second))
    mine, other = rows_of(first + [{}] * (count - len(first))), rows_of(second + [{}] * (count - len(second)))
    found = cross_entropy(positions_of(mine, 1), positions_of(other, 1), count)
    for row in range(count):
        counted = []
        for token in mine[row]:
            theirs = [one for one in other[row] if one.message == token.message]
            if token.start == token.end:
                counted += [token] * any(one.start == one.end == token.end for one in theirs)
            else:
                counted += [token] * any(token.end <= one.end for one in theirs)
        assert found.tokens[row] == len(counted)
        assert found.bytes[row] == sum(token.end - token.start for token in counted)
        assert found.nats[row] == pytest.approx(-sum(np.log(token.label_probability) for token in counted))


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3, 1000]), st.floats(0, 1))
def test_the_worst_pairs_are_the_first_of_a_stable_sort(seed: int, values: int, same: float) -> None:
    generator = np.random.default_rng(seed)
    size = 900
    source = Vocabulary([b"%d" % number for number in range(size)])
    pivot = Vocabulary([b"%d" % number if generator.random() < same else b"x%d" % number for number in range(size)])
    moved = generator.integers(0, values + 1, size).astype(np.float64)  # few values: many ties
    seen, mapped = generator.integers(1, 9, size), np.where(generator.random(size) < 0.1, -1, np.arange(size))
    found = coverage._worst_pairs(moved, seen, mapped.astype(np.int32), pivot, source)
    order = [number for number in np.argsort(-moved, kind="stable").tolist() if moved[number] > 0]
    changed = [number for number in order if mapped[number] < 0 or source.pieces[number] != pivot.pieces[number]]
    assert found == [[n, int(mapped[n]), moved[n], int(seen[n])] for n in changed[:PAIRS_A_SHARD]]


@given(st.lists(st.integers(1, 3), min_size=2, max_size=6), st.data())
def test_an_unsure_edge_is_settled_by_the_other_sides_bytes(lengths: list[int], data: st.DataObject) -> None:
    """The pivot's last token has a byte more than its span; the source's short tokens, in a row behind others, say at which end."""
    text = b"abcdefghijklmnopqr"[: sum(lengths)]
    spans = list(itertools.pairwise(np.cumsum([0, *lengths]).tolist()))
    cut, before = data.draw(st.integers(0, len(text) - 1)), data.draw(st.integers(0, 2))
    pivot_words = Vocabulary([b"." + text[cut:], text[cut:] + b".", text[:cut] or b"?"])
    source_words = Vocabulary(
        [text[start:end] for start, end in spans] + [b"z" * (end - start) for start, end in spans]
    )
    rows = [[Token(2, *span, number + other) for number, span in enumerate(spans)] for other in (0, len(spans))]
    other = positions_of([rows[1]] * before + [rows[0]], 1)
    for label, lead in ((0, 1), (1, 0)):
        row = [Token(2, 0, cut, 2)] * (cut > 0) + [Token(2, cut, len(text), label)]
        mine = positions_of([[]] * before + [row], 1)
        edges, other_edges = find_edges(mine, pivot_words), find_edges(other, source_words)
        settled = settle(mine, edges, pivot_words, other, other_edges, source_words)
        assert (settled.lead.tolist()[-1], settled.trail.tolist()[-1]) == (lead, 1 - lead)
