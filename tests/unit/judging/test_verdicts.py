"""Ratings read from free text."""

import pytest

from fusion_ray.judging.verdicts import parse_rating


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Good. Rating: [[7]]", 7),
        ("Rating: [[7.5]]", 7.5),
        ("Rating: [[8.]]", 8),
        ("Rating: [6]", 6),
        ("Section [1] is weak. Rating: [[4]]", 4),
        ("[[3]] and later [[9]]", 3),
        ("Rating: [[10]]", 10),
        ("Rating: [[0]]", 0),
        ("Rating: [[95]]", -1),
        ("Rating: 7", -1),
        ("Rating: [[rating]]", -1),
        ("Rating: [[-2]]", -1),
        ("$ERROR$", -1),
        ("", -1),
    ],
)
def test_rating(text: str, expected: float) -> None:
    assert parse_rating(text) == expected
