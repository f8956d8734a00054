"""Projection of the source's top-k: mass in is mass out, the slow oracle, labels that reach over the edge of a message, off by one."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_ray.alignment.edges import find_edges, settle, texts_differ
from fusion_ray.alignment.maps import MAPS, exact_map, prefix_map
from fusion_ray.alignment.positions import Positions
from fusion_ray.alignment.project import Duplicates, Inside, Projection, project
from fusion_ray.alignment.spans import COMPARABLE, INSIDE, STRICT, match_spans
from fusion_ray.alignment.vocabulary import END_OF_TURN, Vocabulary
from tests.reference import alignment as slow
from tests.reference.alignment import Token, positions_of

BYTES = [bytes([value]) for value in range(256)]
END = 256  # the id of the end of turn in `vocabulary`
WORDS = [b"ab", b"ba", b"aba", b" a", b" ab", b"b ", b"b\n", b"\n", b" ab\n", b"bb", b"abab"]


def vocabulary(*words: bytes, padded: int = 0) -> Vocabulary:
    """All bytes, the end of turn at 256, a control token without a role at 257, then the words and `padded` ids without a token."""
    pieces = [*BYTES, b"<end>", b"<other>", *words, *[b""] * padded]
    words = Vocabulary(tuple(pieces), frozenset({END, END + 1}), {END_OF_TURN: END})
    return replace(words, first_token=words.longest_prefix)  # a tokenizer that writes the longest token it can


def run(
    pivot: Positions,
    source: Positions,
    pivot_words: Vocabulary,
    source_words: Vocabulary,
    *,
    vocabulary_map: str = "prefix",
    inside: Inside = "skip",
    duplicates: Duplicates = "sum",
    chain: bool = False,
    top_k: int | None = None,
) -> tuple[np.ndarray, Projection]:
    ours, theirs = find_edges(pivot, pivot_words), find_edges(source, source_words)
    edges_pivot = settle(pivot, ours, pivot_words, source, theirs, source_words)
    edges_source = settle(source, theirs, source_words, pivot, ours, pivot_words)
    assert not texts_differ(pivot, edges_pivot, pivot_words, source, edges_source, source_words).any()
    index, kind = match_spans(pivot.message_key, pivot.start, pivot.end, source.message_key, source.start, source.end)
    return kind, project(
        pivot,
        source,
        source_index=index,
        kind=kind,
        edges_pivot=edges_pivot,
        edges_source=edges_source,
        vocabulary_pivot=pivot_words,
        vocabulary_source=source_words,
        mapped=MAPS[vocabulary_map](source_words, pivot_words),
        whole_tokens=vocabulary_map == "exact",
        chain=chain,
        inside=inside,
        duplicates=duplicates,
        top_k=top_k,
    )


def distribution(projection: Projection, at: int) -> dict[int, float]:
    pairs = zip(projection.topk_ids[at].tolist(), projection.topk_logprobs[at].tolist(), strict=True)
    return {token: math.exp(logprob) for token, logprob in pairs if logprob > -math.inf}


def one(start: int, end: int, label: int, candidates: dict[int, float] | None = None, message: int = 1) -> Token:
    return Token(message, start, end, label, tuple((candidates or {label: 1.0}).items()))


@st.composite
def row(draw: st.DrawFn, words: Vocabulary, text: bytes, top_k: int, lead: bytes, trail: bytes) -> list[Token]:
    """A random tokenization of `text` between two bits of template, with random candidates."""
    whole = lead + text + trail
    tokens, at = [], 0
    straddles = False
    while at < len(whole):
        fitting = [
            number
            for number, piece in enumerate(words.pieces)
            if piece and number not in words.special and whole.startswith(piece, at)
        ]
        label = draw(st.sampled_from(fitting))
        end = at + len(words.pieces[label])
        low, high = max(at, len(lead)), min(end, len(lead) + len(text))
        if low < high:
            straddles = end > len(lead) + len(text)
            before, behind = (
                words.pieces[label][: low - at],
                words.pieces[label][len(words.pieces[label]) - (end - high) :],
            )
            tokens.append((low - len(lead), high - len(lead), label, before, behind))
        at = end
    if not straddles:
        tokens.append((len(text), len(text), END, b"", b""))
    found = []
    for start, end, label, before, behind in tokens:
        ids = draw(st.permutations([*range(ord("a"), ord("c")), ord(" "), *range(END, words.size)]))[:top_k]
        if draw(st.booleans()) and label not in ids:
            ids[0] = label
        weights = draw(st.lists(st.integers(1, 50), min_size=top_k, max_size=top_k))
        total = sum(weights) + draw(st.integers(1, 50))
        ordered = sorted(weights, reverse=True)
        candidates = tuple((token, weight / total) for token, weight in zip(ids, ordered, strict=True))
        own = dict(candidates).get(label, 0.5 / total)
        found.append(Token(1, start, end, label, candidates, own, before, behind if end == len(text) else b""))
    return found


@st.composite
def pair(draw: st.DrawFn) -> tuple[Vocabulary, Vocabulary, list[Token], list[Token], int]:
    ours = vocabulary(*draw(st.lists(st.sampled_from(WORDS), unique=True)))
    theirs = vocabulary(*draw(st.lists(st.sampled_from(WORDS), unique=True)), padded=draw(st.integers(0, 2)))
    text = (
        b"a" + draw(st.text("ab ", max_size=8)).encode() + b"b"
    )  # no blanks at the ends: they would look like the template's
    top_k = draw(st.integers(1, 5))
    sides = [
        draw(row(words, text, top_k, draw(st.sampled_from([b"", b" "])), draw(st.sampled_from([b"", b"\n"]))))
        for words in (ours, theirs)
    ]
    return ours, theirs, sides[0], sides[1], top_k


@settings(deadline=None, max_examples=60)  # the first example compiles
@given(pair(), st.sampled_from(["exact", "prefix"]), st.booleans(), st.booleans())
def test_equals_the_slow_oracle(
    case: tuple[Vocabulary, Vocabulary, list[Token], list[Token], int],
    vocabulary_map: str,
    condition: bool,
    chain: bool,
) -> None:
    ours, theirs, pivot, source, top_k = case
    _, projection = run(
        positions_of([pivot], top_k),
        positions_of([source], top_k),
        ours,
        theirs,
        vocabulary_map=vocabulary_map,
        inside="condition" if condition else "skip",
        chain=chain,
        top_k=9 * (top_k + 1),  # room for all that the source's tokens within one of the pivot's say
    )
    for at, (index, kind) in enumerate(slow.match(pivot, source)):
        expected = slow.project(
            pivot[at],
            source[index:],
            kind,
            ours,
            theirs,
            whole=vocabulary_map == "exact",
            condition=condition,
            chain=chain,
        )
        if (
            kind != slow.NONE
            and ours.same_as(theirs)
            and pivot[at].lead == source[index].lead == b""
            and kind != INSIDE
        ):
            continue  # equal vocabularies map control tokens to themselves, which the oracle does not
        found = distribution(projection, at)
        if ours.same_as(theirs):
            found.pop(END + 1, None)  # the same at a position with a lead
        assert found == pytest.approx(expected, rel=1e-4), (pivot[at], source[index])


@settings(deadline=None, max_examples=60)  # the first example compiles
@given(pair(), st.sampled_from(["exact", "prefix"]), st.sampled_from(["skip", "condition"]), st.booleans())
def test_mass_is_moved_and_never_made(
    case: tuple[Vocabulary, Vocabulary, list[Token], list[Token], int], vocabulary_map: str, inside: Inside, chain: bool
) -> None:
    ours, theirs, pivot, source, top_k = case
    kind, projection = run(
        positions_of([pivot], top_k), positions_of([source], top_k), ours, theirs, vocabulary_map=vocabulary_map, inside=inside,
        chain=chain, top_k=9 * (top_k + 1),
    )  # fmt: skip
    assert (projection.mass <= 1 + 1e-5).all()
    finite = np.where(np.isfinite(projection.topk_logprobs), projection.topk_logprobs, -1e9)
    assert (np.diff(finite, axis=1) <= 0).all()  # descending
    for at, (index, _) in enumerate(slow.match(pivot, source)):
        if kind[at] not in (STRICT, COMPARABLE) or pivot[at].lead or source[index].lead:
            continue
        given_mass = sum(probability for _, probability in source[index].candidates)
        if chain and slow.goes_on(pivot[at], source[index:]):
            outside = source[index].label not in dict(source[index].candidates)
            assert projection.mass[at] <= (given_mass + outside * source[index].label_probability) * (1 + 1e-5)
            continue
        lost = sum(
            probability
            for token, probability in source[index].candidates
            if token == END + 1 or not theirs.pieces[token]
        )
        if vocabulary_map == "prefix" and not ours.same_as(theirs):
            assert projection.mass[at] == pytest.approx(
                given_mass - lost, rel=1e-4
            )  # all of it: every byte is a pivot token
        assert projection.mass[at] <= given_mass * (1 + 1e-5)


@settings(deadline=None, max_examples=60)  # the first example compiles
@given(pair())
def test_a_tokenization_aligned_with_itself_is_the_identity(
    case: tuple[Vocabulary, Vocabulary, list[Token], list[Token], int],
) -> None:
    ours, _, pivot, _, top_k = case
    positions = positions_of([pivot], top_k)
    for name in MAPS:
        kind, projection = run(positions, positions, ours, ours, vocabulary_map=name)
        assert (kind == STRICT).all()
        for at, token in enumerate(pivot):
            if not token.lead and not token.trail:
                assert distribution(projection, at) == pytest.approx(dict(token.candidates), rel=1e-6)


@settings(deadline=None, max_examples=60)  # the first example compiles
@given(pair(), st.randoms(use_true_random=False))
def test_a_permuted_vocabulary_gives_the_permuted_distribution(
    case: tuple[Vocabulary, Vocabulary, list[Token], list[Token], int], random: object
) -> None:
    ours, _, pivot, _, top_k = case
    order = list(range(ours.size))
    random.shuffle(order)  # type: ignore[attr-defined]  # order[new] = old
    new = {old: number for number, old in enumerate(order)}
    theirs = Vocabulary(
        tuple(ours.pieces[old] for old in order), frozenset(new[old] for old in ours.special), {END_OF_TURN: new[END]}
    )
    source = [
        Token(t.message, t.start, t.end, new[t.label], tuple((new[c], p) for c, p in t.candidates), t.label_probability, t.lead, t.trail)
        for t in pivot
    ]  # fmt: skip
    for name in MAPS:
        _, projection = run(
            positions_of([pivot], top_k), positions_of([source], top_k), ours, theirs, vocabulary_map=name
        )
        for at, token in enumerate(pivot):
            if token.lead:
                continue
            expected = {c: p for c, p in token.candidates if c != END + 1 and ours.pieces[c]}
            if not (ours.same_as(theirs)):
                assert distribution(projection, at) == pytest.approx(expected, rel=1e-6)


def test_the_distribution_comes_from_the_position_that_read_the_same_bytes() -> None:
    # "abcdefgh" under a source of one to three bytes a token, whose candidates encode the byte that they are predicted from
    ours = vocabulary(*[f"at{byte}".encode() for byte in range(9)])
    mark = {byte: ours.id_of(f"at{byte}".encode()) for byte in range(9)}
    text, cuts = b"abcdefgh", [0, 1, 3, 6, 8]
    theirs = vocabulary(*[text[a:b] for a, b in itertools.pairwise(cuts)], *[f"at{byte}".encode() for byte in range(9)])
    source = [
        one(a, b, theirs.id_of(text[a:b]), {theirs.id_of(f"at{a}".encode()): 0.9}) for a, b in itertools.pairwise(cuts)
    ] + [one(8, 8, END, {theirs.id_of(b"at8"): 0.9})]
    pivot = [one(byte, byte + 1, text[byte]) for byte in range(8)] + [one(8, 8, END)]
    kind, projection = run(positions_of([pivot], 1), positions_of([source], 1), ours, theirs)
    for at, token in enumerate(pivot):
        if token.start in cuts:
            assert distribution(projection, at) == pytest.approx({mark[token.start]: 0.9})
        else:
            assert kind[at] == INSIDE
            assert not projection.known[at]


def test_ids_that_meet_on_one_pivot_id_are_summed_or_the_likeliest_stays() -> None:
    ours, theirs = vocabulary(), vocabulary(b"ab", b"aba")
    pivot, source = (
        [one(0, 1, ord("a"))],
        [one(0, 1, ord("a"), {theirs.id_of(b"ab"): 0.5, ord("b"): 0.25, ord("a"): 0.125})],
    )
    sides = positions_of([pivot], 3), positions_of([source], 3)
    _, summed = run(*sides, ours, theirs)
    assert distribution(summed, 0) == pytest.approx({ord("a"): 0.625, ord("b"): 0.25})
    _, first = run(*sides, ours, theirs, duplicates="first")
    assert distribution(first, 0) == pytest.approx({ord("a"): 0.5, ord("b"): 0.25})
    assert first.topk_logprobs[0, 2] == -np.inf
    assert first.topk_ids[0, 2] == 0


def test_a_first_token_that_begins_in_the_template() -> None:
    # pivot "Assistant:" + " ab", source "Assistant:\n" + "ab": the pivot's piece has a blank that the source's has not
    ours, theirs = vocabulary(b" ab", b" a", b"ab"), vocabulary(b"ab", b" b")
    spaced, plain = ours.id_of(b" ab"), theirs.id_of(b"ab")
    pivot, source = (
        [one(0, 2, spaced), one(2, 2, END)],
        [one(0, 2, plain, {plain: 0.5, ord("a"): 0.25, ord("b"): 0.125, END: 0.0625}), one(2, 2, END)],
    )
    _, projection = run(positions_of([pivot], 4), positions_of([source], 4), ours, theirs)
    assert distribution(projection, 0) == pytest.approx(
        {spaced: 0.5, ours.id_of(b" a"): 0.25, ord(" "): 0.125, END: 0.0625}
    )
    # the other way round: candidates without the blank cannot be what follows "Assistant:" here
    _, projection = run(
        positions_of([[one(0, 2, plain), one(2, 2, END)]], 4),
        positions_of([[one(0, 2, spaced, {spaced: 0.5, ours.id_of(b" a"): 0.25, ord("b"): 0.125}), one(2, 2, END)]], 4),
        theirs,
        ours,
    )
    assert distribution(projection, 0) == pytest.approx({plain: 0.5, ord("a"): 0.25})


def test_a_last_token_that_ends_in_the_template() -> None:
    # source ".\n" over the end of the message, pivot "." and the end of turn
    ours, theirs = vocabulary(b"\n", b".\n"), vocabulary(b".\n", b". ")
    over = theirs.id_of(b".\n")
    pivot = [one(0, 1, ord("x")), one(1, 2, ord(".")), one(2, 2, END)]
    source = [one(0, 1, ord("x")), one(1, 2, over, {over: 0.5, theirs.id_of(b". "): 0.25, ord("!"): 0.125})]
    _, projection = run(positions_of([pivot], 3), positions_of([source], 3), ours, theirs)
    # the label means "." and then the end; ". " begins with the pivot's "."
    assert distribution(projection, 1) == pytest.approx({ord("."): 0.75, ord("!"): 0.125})
    assert not projection.known[2]
    # and the pivot's label over the end: the source's "." there is the pivot's ".\n"
    reached = ours.id_of(b".\n")
    _, projection = run(
        positions_of([[one(0, 1, ord("x")), one(1, 2, reached)]], 3),
        positions_of([[one(0, 1, ord("x")), one(1, 2, ord("."), {ord("."): 0.5, ord("!"): 0.25}), one(2, 2, END)]], 3),
        ours,
        theirs,
    )
    assert distribution(projection, 1) == pytest.approx({reached: 0.5, ord("!"): 0.25})


def test_a_message_in_one_token_with_bytes_to_spare_is_settled_by_the_other_side() -> None:
    ours, theirs = vocabulary(b"ab\n", b"\nab"), vocabulary(b"ab")
    for piece, lead, trail in ((b"ab\n", 0, 1), (b"\nab", 1, 0)):
        pivot = positions_of([[one(0, 2, ours.id_of(piece))]], 1)
        source = positions_of([[one(0, 1, ord("a")), one(1, 2, ord("b")), one(2, 2, END)]], 1)
        edges = find_edges(pivot, ours)
        other = find_edges(source, theirs)
        settled = settle(pivot, edges, ours, source, other, theirs)
        assert (settled.lead.tolist(), settled.trail.tolist()) == ([lead], [trail])
        assert not texts_differ(pivot, settled, ours, source, other, theirs).any()


def test_the_exact_conditional_inside_a_source_token() -> None:
    # source "abab" in one token, pivot at byte 2, having read "ab"
    ours, theirs = vocabulary(b"ab"), vocabulary(b"abab", b"aba", b"ab")
    whole, three, two = (theirs.id_of(piece) for piece in (b"abab", b"aba", b"ab"))
    pivot = [one(0, 2, ours.id_of(b"ab")), one(2, 4, ours.id_of(b"ab"))]
    source = [one(0, 4, whole, {whole: 0.4, three: 0.2, two: 0.1, ord("b"): 0.2})]
    kind, projection = run(positions_of([pivot], 4), positions_of([source], 4), ours, theirs, inside="condition")
    assert kind.tolist() == [COMPARABLE, INSIDE]
    # no other id begins with "ab", so the tail holds nothing that fits; "ab" itself says nothing of what follows
    assert distribution(projection, 1) == pytest.approx({ours.id_of(b"ab"): 0.4 / 0.7, ord("a"): 0.2 / 0.7})
    _, labels = run(positions_of([pivot], 4), positions_of([source], 4), ours, theirs, inside="label")
    assert distribution(labels, 1) == {ours.id_of(b"ab"): 1.0}
    assert labels.one_hot.tolist() == [False, True]


def test_special_tokens_map_by_role_and_padding_goes_to_the_tail() -> None:
    ours = Vocabulary((*BYTES, b"<stop>", b"<end>"), frozenset({256, 257}), {END_OF_TURN: 256})
    theirs = vocabulary(padded=3)
    for mapped in (exact_map(theirs, ours), prefix_map(theirs, ours)):
        assert mapped[END] == 256  # not 257, whose string is the same
        assert mapped[END + 1] == -1
        assert mapped[theirs.size - 3 :].tolist() == [-1, -1, -1]
    pivot, source = [one(0, 0, 256)], [one(0, 0, END, {END: 0.5, END + 1: 0.25, theirs.size - 1: 0.125})]
    _, projection = run(positions_of([pivot], 3), positions_of([source], 3), ours, theirs)
    assert distribution(projection, 0) == pytest.approx({256: 0.5})


def test_prefix_without_the_first_byte_goes_to_the_tail() -> None:
    ours = Vocabulary((b"a", b"ab"))
    theirs = Vocabulary((b"abc", b"b", b"ac"))
    assert prefix_map(theirs, ours).tolist() == [1, -1, 0]
    assert exact_map(theirs, ours).tolist() == [-1, -1, -1]


def test_of_equal_pieces_byte_fallback_comes_last() -> None:
    words = Vocabulary((b"a", b"b", b"a", b"b"), fallback=frozenset({2, 3}))
    assert (words.id_of(b"a"), words.longest_prefix(b"bx"), words.longest_prefix(b"x")) == (0, 1, -1)
    assert Vocabulary((b"a", b"b", b"a")).id_of(b"a") == 2


def test_an_id_outside_the_vocabulary_is_named() -> None:
    with pytest.raises(ValueError, match="special id 5 is outside a vocabulary of 1 ids"):
        Vocabulary((b"a",), frozenset({5}))


def test_a_pivot_token_that_the_source_writes_as_two_gets_the_product() -> None:
    """The source writes "a", "b" where the pivot writes "ab": the map alone gives the source's mass to the pivot's "a"."""
    ours, theirs = vocabulary(b"ab", b"aba"), vocabulary(b"ba")
    a, b, ba, ab, aba = ord("a"), ord("b"), 258, 258, 259
    pivot = [one(0, 2, ab), one(2, 2, END)]
    source = [
        Token(1, 0, 1, a, ((a, 0.6), (b, 0.3)), 0.6),
        Token(1, 1, 2, b, ((ba, 0.5), (b, 0.25), (END, 0.125)), 0.25),
        Token(1, 2, 2, END, ((END, 0.9),), 0.9),
    ]
    positions = positions_of([pivot], 3), positions_of([source], 3)
    _, by_map = run(*positions, ours, theirs)
    assert distribution(by_map, 0) == pytest.approx({a: 0.6, b: 0.3})
    _, by_chain = run(*positions, ours, theirs, chain=True, top_k=4)
    assert distribution(by_chain, 0) == pytest.approx({ab: 0.15, b: 0.3, aba: 0.3, a: 0.075})
    assert distribution(by_chain, 1) == pytest.approx({END: 0.9})


def test_no_position_behind_the_pivots_token_is_looked_at() -> None:
    ours, theirs = vocabulary(b"ab"), vocabulary(b"ba")
    a, b, ab = ord("a"), ord("b"), 258
    pivot = positions_of([[one(0, 2, ab), one(2, 3, a), one(3, 3, END)]], 2)
    source = [one(0, 1, a, {a: 0.5, b: 0.2}), one(1, 2, b, {b: 0.5, a: 0.2}), one(2, 3, a, {a: 0.9}), one(3, 3, END)]
    first = run(pivot, positions_of([source], 2), ours, theirs, chain=True)[1]
    source[2] = one(2, 3, a, {b: 0.9, a: 0.05})
    second = run(pivot, positions_of([source], 2), ours, theirs, chain=True)[1]
    assert distribution(first, 0) == distribution(second, 0)
    assert distribution(first, 1) != distribution(second, 1)
