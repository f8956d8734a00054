"""The nearest string of a vocabulary, and the maps that use it, against looking at every pair."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fusion_ray.alignment.nearest import nearest
from tests.reference.fusechat import levenshtein


def by_looking(texts: list, candidates: list) -> list[int]:
    found = []
    for text in texts:
        near = [(levenshtein(text, other), place) for place, other in enumerate(candidates) if other]
        found.append(min(near)[1] if text and near else -1)
    return found


WORDS = st.text("abcÿ€🙂", max_size=6)


@settings(deadline=None, max_examples=150)
@given(st.lists(WORDS, max_size=6), st.lists(WORDS, max_size=12))
@example(["ab"], ["b" * 70, "ba", "ab" * 40])
@example(["x" * 64 + "y", "x" * 64, "x" * 63], ["x", "x" * 60 + "y", "x" * 64])
@example(["x" * 70], [""])
@example(["a\ud800"], ["\ud800", "a"])  # what a vocabulary of byte pieces may hold
def test_nearest_is_what_looking_at_every_pair_finds(texts: list[str], candidates: list[str]) -> None:
    assert nearest(texts, candidates).tolist() == by_looking(texts, candidates)
    raw = [[text.encode("utf-8", "surrogatepass") for text in part] for part in (texts, candidates)]
    assert nearest(*raw).tolist() == by_looking(*raw)


@pytest.mark.parametrize("seed", range(3))
def test_nearest_in_vocabularies_of_some_size(seed: int) -> None:
    """Long strings of few and of many symbols, more than a word of 64 bits has room for."""
    generator = np.random.default_rng(seed)

    def words(count: int, alphabet: int) -> list[str]:
        sizes = generator.integers(1, 20, count)
        return ["".join(chr(97 + c) for c in generator.integers(0, alphabet, size)) for size in sizes]

    alphabet = (2, 26, 300)[seed]
    texts, candidates = words(40, alphabet), words(200, alphabet)
    assert nearest(texts, candidates).tolist() == by_looking(texts, candidates)
