"""Proofs of the alignment over real tokenizers and arbitrary Unicode: pieces tile the text, nothing looks at another context, mass is moved and never made."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_ray.alignment.maps import MAPS
from fusion_ray.alignment.methods import Side
from fusion_ray.alignment.positions import Positions
from fusion_ray.alignment.project import Inside
from fusion_ray.alignment.spans import COMPARABLE, INSIDE, STRICT
from fusion_ray.alignment.vocabulary import END_OF_TURN, Vocabulary
from tests.made_up import aligned, both, conversation, distribution, permuted, teacher
from tests.tokenizers import NAMES, SENTENCEPIECE, locator, sentencepiece_model, tokenizer, vocabulary

MARKER = "▁".encode()
AWKWARD = (
    *("👩‍👩‍👧‍👦", "🧑🏽‍🚀", "🇩🇪", "\u200d", "e\u0301\u0323", "Z̷̡͘a̸l̵g̷o̶", "ﬁ Å", "\ufeff", "𝔘𝔫𝔦", "\U0010ffff"),
    *("漢字かな交じり文", "한국어", "ไทย", "हिन्दी", "שלום עליכם", "مرحبا\u202e", "naïve Straße"),
    *("\x00", "\x00\x00a", "\x07\x1b[0m", "\x7f", "\u0085", "\u2028", "\r\n", "\n\n\n", "\t", "  ", " ", "\u00a0"),
    *("0123456789" * 6, "3.14159", "007", "<s>", "</s>", "[INST]", "<|im_end|>", "<0x41>", "<unk>", "don't", "foo_bar"),
)
TEXT = st.lists(st.text(max_size=8) | st.sampled_from(AWKWARD), max_size=6).map("".join)
LONG = st.builds(
    lambda character, count: character * count, st.characters(exclude_categories=["Cs"]), st.integers(200, 500)
)
CONTENT = st.one_of(*[TEXT] * 9, LONG)
ROWS = st.lists(st.lists(CONTENT, min_size=1, max_size=2), min_size=1, max_size=2)
NAME = st.sampled_from(NAMES)
CHAIN = st.booleans()
INSIDES = st.sampled_from(["skip", "label", "condition"])
SEED = st.integers(0, 1000)
REPEAT = settings(deadline=None, max_examples=60, derandomize=True)


def without_marker(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """SentencePiece reads U+2581 as a blank: another text than the one that byte-level models read, which the aligner rejects."""
    return [[content.replace("▁", "_") for content in contents] for contents in rows]


def sides_of(
    pivot: str, source: str, rows: Sequence[Sequence[str]], seed: int, *, whole: bool = False
) -> tuple[Side, Side]:
    found = both(
        teacher(pivot, rows, seed=seed, whole=whole),
        teacher(source, rows, seed=seed + 1, whole=whole),
        vocabulary(pivot),
        vocabulary(source),
    )
    assert found is not None, "both sides read the same text"
    return found


@cache
def mapped(pivot: str, source: str, name: str) -> np.ndarray:
    return MAPS[name](vocabulary(source), vocabulary(pivot))


@cache
def mapped_back(name: str, vocabulary_map: str) -> np.ndarray:
    return MAPS[vocabulary_map](permuted(name)[0], vocabulary(name))


def maps_of(source: str) -> list[str]:
    """Those that are made in no time: `canonical` asks the pivot's tokenizer for every source piece, `min_edit` compares it with every pivot piece."""
    return list(MAPS) if vocabulary(source).size < 2000 else ["exact", "prefix"]


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_the_sentencepiece_files_are_converted_faithfully(name: str) -> None:
    model = sentencepiece_model(name)
    for text in ("Hello world  and 漢字 👩‍🚀", "def f(x):\n    return  x", "1234 5", "Straße\x00"):
        assert tokenizer(name).backend_tokenizer.encode(text, add_special_tokens=False).ids == model.encode(text)


@pytest.mark.parametrize("name", NAMES)
@given(content=CONTENT)
@settings(REPEAT, max_examples=30)
def test_the_pieces_of_the_tokens_tile_the_message(name: str, content: str) -> None:
    messages = conversation([content])
    row, pieces = locator(name).locate(messages), locator(name).pieces
    place = locator(name).template.locate(messages)[1][-1]  # some templates strip
    first = len(content[: place.skipped].encode())
    kept = len(content[place.skipped :][: place.end - place.start].encode())
    body = row.byte_end > row.byte_start
    start, end = row.byte_start[body], row.byte_end[body]
    assert body.any() == bool(kept)
    if kept:
        assert (start[0], end[-1]) == (first, first + kept)
        assert (start[1:] == end[:-1]).all()
    read = content.encode()
    for number, (label, low, high) in enumerate(zip(row.labels[body], start, end, strict=True)):
        piece, covered = vocabulary(name).pieces[label], read[low:high]
        if pieces.space_marker:  # the tokenizer reads U+2581 as a blank
            covered = covered.replace(MARKER, b" ")
        if number in (0, len(start) - 1):
            assert covered in piece  # a token that reaches over the edge of the message is clipped there
        else:
            assert piece == covered or (pieces.dummy_prefix and piece == b" " + covered)  # a blank after an added token
    assert row.labels[~body].tolist() in ([], [vocabulary(name).roles[END_OF_TURN]])


@given(pivot=NAME, source=NAME, rows=ROWS, seed=SEED)
@REPEAT
def test_no_position_looks_at_a_longer_or_shorter_context_than_its_own_bytes(
    pivot: str, source: str, rows: list[list[str]], seed: int
) -> None:
    sides = sides_of(pivot, source, without_marker(rows), seed)
    mine, theirs = sides[0].positions, sides[1].positions
    result = aligned(sides, mapped=mapped(pivot, source, "prefix"))
    met = result.source_index >= 0
    other = result.source_index[met]
    kind, start, end = result.kind[met], mine.start[met], mine.end[met]
    assert (mine.message_key[met] == theirs.message_key[other]).all()
    same = (kind == STRICT) | (kind == COMPARABLE)
    assert (theirs.start[other][same] == start[same]).all()
    assert ((theirs.end[other] == end)[same] == (kind == STRICT)[same]).all()
    inside = kind == INSIDE
    assert (same | inside).all()
    assert (theirs.start[other] < start)[inside].all()
    assert (theirs.end[other] > start)[inside].all()
    assert not result.projection.known[~met].any()


@pytest.mark.parametrize("inside", ["skip", "label", "condition"])
@given(name=NAME, rows=ROWS, seed=SEED, vocabulary_map=st.sampled_from(list(MAPS)), chain=CHAIN)
@REPEAT
def test_a_tokenization_aligned_with_itself_is_the_identity_with_mass_one(
    inside: Inside, name: str, rows: list[list[str]], seed: int, vocabulary_map: str, chain: bool
) -> None:
    words = vocabulary(name)
    positions = teacher(name, without_marker(rows), seed=seed, whole=True)
    sides = both(positions, positions, words, words)
    assert sides is not None
    same = np.arange(words.size, dtype=np.int32)  # what every map is here, see the next test
    result = aligned(sides, mapped=same, vocabulary_map=vocabulary_map, chain=chain, inside=inside)
    assert (result.kind == STRICT).all()
    assert result.source_index.tolist() == list(range(positions.count))
    assert (result.topk_ids == np.where(np.isfinite(positions.topk_logprobs), positions.topk_ids, 0)).all()
    assert result.topk_logprobs == pytest.approx(positions.topk_logprobs, abs=1e-5)
    assert result.projection.mass == pytest.approx(np.ones(positions.count), abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_vocabulary_maps_to_itself_by_the_identity(name: str) -> None:
    for vocabulary_map in MAPS:
        assert (mapped(name, name, vocabulary_map) == np.arange(vocabulary(name).size)).all()


@given(pivot=NAME, source=NAME, rows=ROWS, seed=SEED, inside=INSIDES, chain=CHAIN, data=st.data())
@REPEAT
def test_mass_is_moved_and_never_made(
    pivot: str, source: str, rows: list[list[str]], seed: int, inside: Inside, chain: bool, data: st.DataObject
) -> None:
    vocabulary_map = data.draw(st.sampled_from(maps_of(source)))
    sides = sides_of(pivot, source, without_marker(rows), seed)
    map_given = mapped(pivot, source, vocabulary_map)
    result = aligned(sides, mapped=map_given, vocabulary_map=vocabulary_map, chain=chain, inside=inside)
    theirs = sides[1].positions
    given_mass = np.exp(theirs.topk_logprobs.astype(np.float64)).sum(axis=1)
    if chain:  # knows the label's probability where the top-k does not hold it
        unseen = (theirs.topk_ids != theirs.label[:, None]) | np.isneginf(theirs.topk_logprobs)
        given_mass += np.where(unseen.all(axis=1), np.exp(theirs.label_logprob.astype(np.float64)), 0.0)
    same = (result.kind == STRICT) | (result.kind == COMPARABLE)
    out = result.projection.mass
    assert (out[same] <= given_mass[result.source_index[same]] + 1e-5).all()
    assert (out <= 1 + 1e-5).all()
    assert (out[~result.projection.known] == 0).all()
    ids = result.projection.topk_ids
    assert ((ids >= 0) & (ids < vocabulary(pivot).size)).all()
    finite = np.where(np.isfinite(result.projection.topk_logprobs), result.projection.topk_logprobs, -1e9)
    assert (np.diff(finite, axis=1) <= 0).all()


@given(pivot=NAME, source=NAME, rows=ROWS, seed=SEED, data=st.data())
@REPEAT
def test_prefix_and_canonical_conserve_mass(
    pivot: str, source: str, rows: list[list[str]], seed: int, data: st.DataObject
) -> None:
    vocabulary_map = data.draw(st.sampled_from([name for name in maps_of(source) if name in ("prefix", "canonical")]))
    sides = sides_of(pivot, source, without_marker(rows), seed)
    theirs, words = sides[1].positions, vocabulary(source)
    result = aligned(sides, mapped=mapped(pivot, source, vocabulary_map), vocabulary_map=vocabulary_map)
    speaks = np.array([bool(piece) for piece in words.pieces]) & ~words.is_special
    speaks[words.roles[END_OF_TURN]] = True
    if pivot == source:
        speaks[:] = True
    probability = np.exp(theirs.topk_logprobs.astype(np.float64))
    expected = np.where(speaks[theirs.topk_ids], probability, 0.0).sum(axis=1)
    same = (result.kind == STRICT) | (result.kind == COMPARABLE)
    same[same] &= (sides[1].edges.lead[result.source_index[same]] == 0) & (sides[0].edges.lead[same] == 0)
    assert result.projection.mass[same] == pytest.approx(expected[result.source_index[same]], abs=1e-5)


@given(pivot=NAME, source=NAME, rows=ROWS, seed=SEED)
@REPEAT
def test_the_chain_rule_conserves_mass(pivot: str, source: str, rows: list[list[str]], seed: int) -> None:
    rows = without_marker(rows)
    words, other_words = vocabulary(pivot), vocabulary(source)
    theirs = teacher(source, rows, seed=seed, whole=True, spoken=True)
    room = teacher(pivot, rows, seed=seed, top_k=48)  # for the candidates of several positions
    sides = both(room, theirs, words, other_words)
    assert sides is not None
    mine, edges = sides[0].positions, sides[0].edges
    result = aligned(sides, mapped=mapped(pivot, source, "prefix"), chain=True)
    met = np.flatnonzero((result.kind == STRICT) | (result.kind == COMPARABLE))
    other = result.source_index[met]
    told = edges.lead[met] == sides[1].edges.lead[other]
    # A control token in the text has no bytes of its own, and where a template or an added token swallowed blanks nothing more is known.
    told &= ~np.array(
        [
            _controls(theirs, other_words, at, mine.message_key[i], mine.end[i])
            for i, at in zip(met, other, strict=True)
        ],
        bool,
    )
    assert result.projection.mass[met[told]] == pytest.approx(np.ones(int(told.sum())), abs=1e-5)
    assert (told.mean() if told.size else 1) > 0.2


def _controls(source: Positions, words: Vocabulary, at: int, message: int, end: int) -> bool:
    """Whether the source writes the bytes up to `end` with a control token among them, or stops before."""
    while source.start[at] < source.end[at] < end:
        if source.label[at] in words.special or at + 1 == source.count or source.start[at + 1] != source.end[at]:
            return True
        at += 1
        if source.message_key[at] != message or source.start[at] == source.end[at]:
            return True
    return False


@given(name=NAME, rows=ROWS, seed=SEED, vocabulary_map=st.sampled_from(["exact", "prefix"]), chain=CHAIN)
@REPEAT
def test_a_teacher_of_a_permuted_vocabulary_gives_the_permuted_distribution(
    name: str, rows: list[list[str]], seed: int, vocabulary_map: str, chain: bool
) -> None:
    words = vocabulary(name)
    shuffled, new = permuted(name)
    positions = teacher(name, without_marker(rows), seed=seed)
    source = replace(positions, label=new[positions.label], topk_ids=new[positions.topk_ids])
    sides = both(positions, source, words, shuffled)
    assert sides is not None
    result = aligned(sides, mapped=mapped_back(name, vocabulary_map), vocabulary_map=vocabulary_map, chain=chain)
    for at in range(0, positions.count, 1 + positions.count // 40):
        expected: dict[int, float] = {}
        for token, probability in distribution(positions.topk_ids[at], positions.topk_logprobs[at]).items():
            if token == positions.label[at] and (chain or token not in words.special):
                known = token
            elif token in words.special:
                known = token if token == words.roles[END_OF_TURN] else -1
            else:
                known = words.id_of(words.pieces[token])  # a byte that SentencePiece has twice is the ordinary token
            expected[known] = expected.get(known, 0.0) + probability
        expected.pop(-1, None)  # a control token without a role, an id without bytes
        assert distribution(result.topk_ids[at], result.topk_logprobs[at]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("word", [" the", " and", " of", " a"])
def test_a_word_after_a_blank_begins_with_the_token_that_running_text_has(name: str, word: str) -> None:
    words = vocabulary(name)
    assert words.first_token is not None
    running = tokenizer(name).encode(f"x{word}", add_special_tokens=False)
    spelled = {words.pieces[token]: token for token in running}
    if word.encode() not in spelled:
        pytest.skip("this tokenizer writes the word in several tokens")
    assert words.first_token(word.encode()) == spelled[word.encode()]
