"""Exact match after normalisation."""

import pytest

from fusion_ray.zoo.scoring import exact_match, normalise


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("  Tom has  19\npens now. ", "tom has 19 pens now"),
        ("STRASSE.", "strasse"),
        ("Straße", "strasse"),
        ("wait...", "wait.."),
        ("", ""),
        (".", ""),
    ],
)
def test_normalise(text: str, wanted: str) -> None:
    assert normalise(text) == wanted


def test_exact_match_ignores_case_spacing_and_the_full_stop_but_no_word() -> None:
    assert exact_match("the girl sang a song", "The girl sang a song.")
    assert not exact_match("The girl sang the song.", "The girl sang a song.")
    assert not exact_match("It is 19. Yes.", "It is 19.")
    assert not exact_match("", "It is 19.")
