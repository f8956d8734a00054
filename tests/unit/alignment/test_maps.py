"""Vocabulary maps: what each gives for the same pieces, and that no map makes mass."""

import numpy as np
import pytest

from fusion_ray.alignment.counts import PairCounts
from fusion_ray.alignment.maps import MAPS, UNMAPPED, statistics_map
from fusion_ray.alignment.vocabulary import END_OF_TURN, Vocabulary
from fusion_ray.workers.align_setup import vocabulary_of
from tests.tiny import make_tokenizer

BYTES = [bytes([value]) for value in range(256)]
PIVOT_PIECES = [*BYTES, b" e", b"ea", b"eat", b" rain", b"</s>"]
SOURCE_PIECES = [b" eat", b"eat", b"ea", b" rain", b"t", b"\xe2\x82", b"<eot>", b"<pad>", b""]


def first_token(text: bytes) -> int:
    """A tokenizer that splits the blank from every word but ` rain`."""
    if text.startswith(b" ") and text != b" rain":
        return ord(" ")
    return PIVOT_PIECES.index(text) if text in PIVOT_PIECES else -1


PIVOT = Vocabulary(PIVOT_PIECES, frozenset({260}), {END_OF_TURN: 260}, first_token=first_token)
SOURCE = Vocabulary(SOURCE_PIECES, frozenset({6, 7}), {END_OF_TURN: 6})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("exact", [UNMAPPED, 258, 257, 259, ord("t"), UNMAPPED, 260, UNMAPPED, UNMAPPED]),
        ("prefix", [256, 258, 257, 259, ord("t"), 0xE2, 260, UNMAPPED, UNMAPPED]),
        ("min_edit", [258, 258, 257, 259, ord("t"), 0x82, 260, UNMAPPED, UNMAPPED]),
        ("canonical", [ord(" "), 258, 257, 259, ord("t"), 0xE2, 260, UNMAPPED, UNMAPPED]),
    ],
)
def test_each_map_of_the_same_pieces(name: str, expected: list[int]) -> None:
    assert MAPS[name](SOURCE, PIVOT).tolist() == expected


def test_statistics_goes_by_frequency_then_distance_then_id() -> None:
    """\" eat\" met 256 and 257 twice each (as near), \"ea\" has its own bytes; a special id and one that was never seen are not counted."""
    pairs = [(0, 257), (0, 256), (0, 257), (0, 256), (0, 258), (2, 97), (2, 97), (5, 97), (5, 0xE2), (6, 97)]
    counts = PairCounts.of_pairs(*np.array(pairs).T)
    expected = [256, 258, 257, 259, ord("t"), 0xE2, 260, UNMAPPED, UNMAPPED]
    assert statistics_map(SOURCE, PIVOT, counts).tolist() == expected
    assert statistics_map(SOURCE, PIVOT, PairCounts.none()).tolist() == MAPS["exact"](SOURCE, PIVOT).tolist()
    assert statistics_map(PIVOT, PIVOT, counts).tolist() == list(range(PIVOT.size))


@pytest.mark.parametrize("name", MAPS)
def test_equal_vocabularies_map_to_themselves(name: str) -> None:
    assert MAPS[name](PIVOT, PIVOT).tolist() == list(range(PIVOT.size))


@pytest.mark.parametrize("kind", ["bytelevel", "sentencepiece"])
def test_canonical_is_how_the_tokenizer_begins_a_word(kind: str) -> None:
    """Over real tokenizers: a mapped piece begins the source's, and a word's piece is mapped to what the pivot's own encoding starts with."""
    tokenizer = make_tokenizer(kind, vocab_size=400)
    pivot = vocabulary_of(tokenizer)
    source = vocabulary_of(make_tokenizer("bytelevel", vocab_size=700))
    mapped = MAPS["canonical"](source, pivot)
    for number in np.flatnonzero(mapped != UNMAPPED):
        if not source.is_special[number]:
            assert source.pieces[number].startswith(pivot.pieces[mapped[number]])
    number = source.id_of(b" the")
    assert number >= 0
    # within a text: at its beginning Llama 2's manner puts a blank of its own before this one
    assert mapped[number] == tokenizer.encode("see the", add_special_tokens=False)[-1]


def test_canonical_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="needs the pivot's tokenizer"):
        MAPS["canonical"](PIVOT, SOURCE)
