"""The baseline of the fusechat benchmark is the papers' programme: it matches the same tokens as the slow reference and the compiled one."""

import importlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_ray.alignment.programme import match_tokens
from fusion_ray.alignment.token_strings import TokenStrings
from tests.reference import fusechat as reference

BENCHMARKS = Path(__file__).resolve().parents[2] / "jobs" / "benchmarks"


@pytest.fixture(autouse=True, scope="module")
def _beside_itself() -> Iterator[None]:
    """Imports as they are when a benchmark is run by its path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield


@settings(deadline=None, max_examples=50)
@given(*[st.lists(st.text("ab ", min_size=1, max_size=4), min_size=1, max_size=8)] * 2)
def test_the_baseline_is_the_published_programme(source: list[str], pivot: list[str]) -> None:
    module = importlib.import_module("speed.published_programme")
    mine, theirs = reference.Side(pivot, pivot, "▁"), reference.Side(source, source, "Ġ")
    ids_source, ids_pivot = list(range(len(source))), list(range(len(pivot)))
    expected = reference.path(ids_source, ids_pivot, theirs, mine)
    markers = {"marker_source": "Ġ", "marker_pivot": "▁"}
    assert module.published(source, pivot, **markers) == expected
    assert module.in_lists(source, pivot, **markers) == expected
    compiled = TokenStrings(source, source, "Ġ"), TokenStrings(pivot, pivot, "▁")
    assert match_tokens(np.array(ids_source), np.array(ids_pivot), *compiled).lists() == expected


def test_the_benchmark_measures_both_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("align_fusechat")
    assert set(module.ROWS) == {150, 2048}
    words = TokenStrings(["a", " b", "ab"], ["a", "Ġb", "ab"], "Ġ")
    row = np.array([0, 1, 2, 1]), np.array([2, 0, 1])
    figures = module._speedup([row], words, words, length=3, repeats=1)
    assert set(figures) == {"fusechat_speedup_3", "fusechat_speedup_3_lists", "fusechat_positions_per_second_3"}
    monkeypatch.setattr(module, "published", lambda *_, **__: [])
    with pytest.raises(RuntimeError, match="do not match the same tokens"):
        module._speedup([row], words, words, length=3, repeats=1)
