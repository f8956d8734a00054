"""The papers' programme, rules and maps against the slow reference, over random vocabularies whose strings overlap in every way."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_ray.alignment.counts import PairCounts
from fusion_ray.alignment.fusechat import EMPTY, ONE_HOT, choose_rows, met_pairs, move_rows
from fusion_ray.alignment.fusechat_maps import min_edit_strings, row_map, statistics_strings
from fusion_ray.alignment.programme import match_tokens
from fusion_ray.alignment.token_strings import TokenStrings
from tests.reference import fusechat as reference

MARKERS = ("Ġ", "▁", "")
RULES = ("exact", "min_edit", "statistics")


@st.composite
def sides(draw: st.DrawFn) -> reference.Side:
    """Pieces of a, b, é and the marker; their decoded strings keep, lose or blank the marker as tokenizers do."""
    marker = draw(st.sampled_from(MARKERS))
    pieces = draw(st.lists(st.text("abé" + marker, max_size=4), min_size=3, max_size=10))
    blank = draw(st.sampled_from([" ", "", marker]))
    decoded = [blank.join(piece.split(marker)) if marker else piece for piece in pieces]
    ids = st.integers(-1, len(pieces) - 1)
    return reference.Side(decoded, pieces, marker, draw(ids), draw(ids), draw(ids))


def compiled(side: reference.Side) -> TokenStrings:
    return TokenStrings(side.decoded, side.pieces, side.marker, side.bos, side.eos, side.unk)


@st.composite
def cases(draw: st.DrawFn) -> tuple[reference.Side, reference.Side, list[int], list[int]]:
    source, pivot = draw(sides()), draw(sides())
    sequences = [
        draw(st.lists(st.integers(0, len(side.pieces) - 1), min_size=1, max_size=9)) for side in (source, pivot)
    ]
    return source, pivot, *sequences


@settings(deadline=None, max_examples=150)
@given(cases(), st.sampled_from(RULES), st.integers(0, 2**32))
def test_the_papers_alignment_is_the_reference(
    case: tuple[reference.Side, reference.Side, list[int], list[int]], rules: str, seed: int
) -> None:
    source, pivot, source_ids, pivot_ids = case
    theirs, mine = compiled(source), compiled(pivot)
    ids_source, ids_pivot = np.array(source_ids), np.array(pivot_ids)

    lists = reference.path(source_ids, pivot_ids, source, pivot)
    matches = match_tokens(ids_source, ids_pivot, theirs, mine)
    assert matches.lists() == lists

    met = reference.count(lists, source_ids, pivot_ids)
    counts = PairCounts.of_pairs(*met_pairs(matches, ids_pivot, ids_source))
    found = zip(counts.source_ids.tolist(), counts.pivot_ids.tolist(), counts.counts.tolist(), strict=True)
    assert {(s, p): count for s, p, count in found} == met

    expected_maps = {
        "exact": [-1] * len(source.pieces),
        "min_edit": reference.min_edit_map(source, pivot),
        "statistics": reference.statistics_map(met, source, pivot),
    }
    assert statistics_strings(theirs, mine, counts).tolist() == expected_maps["statistics"]
    assert min_edit_strings(theirs, mine).tolist() == expected_maps["min_edit"]

    plain_map, mapped = expected_maps[rules], row_map(rules, theirs, mine, counts)
    chosen = choose_rows(matches, ids_pivot, ids_source, pivot=mine, source=theirs, rules=rules, mapped=mapped)
    names = {ONE_HOT: reference.ONE_HOT, EMPTY: reference.EMPTY}
    expected = [
        reference.choose(positions, source_ids, p, rules, plain_map, source, pivot)
        for positions, p in zip(lists, pivot_ids, strict=True)
    ]
    assert [names.get(int(at), int(at)) for at in chosen] == expected

    generator = np.random.default_rng(seed)
    topk = generator.integers(0, len(source.pieces), (len(source_ids), 4)).astype(np.int32)
    logprobs = -np.sort(generator.exponential(size=topk.shape), axis=1).astype(np.float32)
    logprobs[generator.random(topk.shape) < 0.1] = -np.inf  # padding
    ids, values, moved, seen = move_rows(chosen, topk, logprobs, mapped=mapped, width=3)
    taken = [int(at) for at in chosen if at >= 0]
    for at, row in enumerate(chosen):
        pairs = [(int(t), float(x)) for t, x in zip(topk[row], logprobs[row], strict=True) if np.isfinite(x)]
        wanted = reference.move(pairs, rules, plain_map, source, pivot)[:3] if row >= 0 else []
        used = int(np.isfinite(values[at]).sum())
        assert list(zip(ids[at, :used].tolist(), values[at, :used].tolist(), strict=True)) == wanted
        assert not ids[at, used:].any()
    assert moved.sum() == pytest.approx(np.exp(logprobs[taken]).sum())
    assert seen.sum() == np.isfinite(logprobs[taken]).sum()


@settings(deadline=None, max_examples=50)
@given(cases())
def test_a_sequence_aligned_with_itself_is_the_identity(
    case: tuple[reference.Side, reference.Side, list[int], list[int]],
) -> None:
    """Where neighbours differ: equal neighbours cost nothing to run over, but the diagonal is taken first."""
    side, _, ids, _ = case
    strings = compiled(side)
    matches = match_tokens(np.array(ids), np.array(ids), strings, strings)
    assert matches.lists() == [[at] for at in range(len(ids))]


def strings(pieces: list[str], marker: str = "▁") -> TokenStrings:
    return TokenStrings([piece.replace(marker, " ") if marker else piece for piece in pieces], pieces, marker)


def rule(pivot: str, parts: list[str]) -> int:
    """What the `statistics` rules make of one pivot token that meets `parts`."""
    mine, theirs = TokenStrings([pivot], [pivot], "▁"), TokenStrings(parts, parts, "Ġ")
    matches = match_tokens(np.arange(len(parts)), np.zeros(1, np.int64), theirs, mine)
    assert matches.lists() == [list(range(len(parts)))]
    return int(
        choose_rows(
            matches,
            np.zeros(1, np.int64),
            np.arange(len(parts)),
            pivot=mine,
            source=theirs,
            rules="statistics",
            mapped=np.zeros(len(parts), np.int32),
        )[0]
    )


@pytest.mark.parametrize(
    ("pivot", "parts", "expected"),
    [
        ("tion", ["tion"], 0),
        ("▁nation", ["ation"], 0),  # one is a suffix of the other
        ("nation", ["na"], ONE_HOT),
        ("nation", ["na", "tion"], 1),  # the last is a suffix
        ("abc", ["ab", "x", "c"], 2),
        ("aab", ["a", "abx"], ONE_HOT),
        ("abca", ["ab", "ca", "x"], 1),
        ("▁", ["Ġ", "a"], 0),  # the bare marker: the empty string is consumed by an empty part
        ("▁", ["x", "y"], EMPTY),  # by none here: there is no last part whose row to take
    ],
)
def test_rules_by_hand(pivot: str, parts: list[str], expected: int) -> None:
    assert rule(pivot, parts) == expected


def test_frequent_pairs_are_penalised_as_published() -> None:
    """Equal distances: the rarer pair wins, as the sigmoid of the count multiplies the distance (paper.md Q4)."""
    source, pivot = strings(["xy"]), strings(["ab", "cd"])
    counts = PairCounts.of_pairs(np.zeros(2, np.int32), np.arange(2, dtype=np.int32), np.array([5, 1]))
    assert statistics_strings(source, pivot, counts).tolist() == [1]


def test_ids_that_were_never_seen_go_to_the_unknown_token_or_the_end() -> None:
    source, pieces = strings(["a", "b"]), ["a", "<unk>", "</s>"]
    none = PairCounts.none()
    assert statistics_strings(source, TokenStrings(pieces, pieces, "", eos=2, unk=1), none).tolist() == [1, 1]
    assert statistics_strings(source, TokenStrings(pieces, pieces, "", eos=2), none).tolist() == [2, 2]
    assert statistics_strings(source, TokenStrings(pieces, pieces, ""), none).tolist() == [-1, -1]
    # a piece of the same name goes before the map
    assert row_map("statistics", source, TokenStrings(pieces, pieces, "", eos=2, unk=1), none).tolist() == [0, 1]


def test_a_map_without_its_counts_is_refused() -> None:
    side = strings(["a"])
    with pytest.raises(ValueError, match="statistics with the counts of a corpus"):
        row_map("statistics", side, side)
    with pytest.raises(ValueError, match="no map 'prefix'"):
        row_map("prefix", side, side)


def test_a_row_without_tokens_on_the_other_side_matches_nothing() -> None:
    side = strings(["a", "b"])
    none, some = np.zeros(0, np.int64), np.zeros(2, np.int64)
    assert match_tokens(none, some, side, side).lists() == [[], []]
    assert match_tokens(some, none, side, side).offsets.tolist() == [0]
