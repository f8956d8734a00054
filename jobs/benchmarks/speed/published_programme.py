"""The papers' sequence alignment in the shape in which it was published: plain Python, two nested loops, one edit distance a cell. The baseline of
`align_fusechat.py`, written anew.

As there, markers are removed and the distance taken by a C function in every cell, equal strings apart, and the matrix is numpy's. `in_lists` is the
same with what plain Python allows: strings made ready once, lists for the matrix.
"""

from collections.abc import Sequence

import numpy as np
from rapidfuzz.distance import Levenshtein

INFINITE = float("inf")
Lists = list[list[int]]


def published(source: Sequence[str], pivot: Sequence[str], *, marker_source: str, marker_pivot: str) -> Lists:
    """For every pivot token its source tokens; both are decoded strings."""

    def cost(first: str, second: str) -> int:
        if first == second:
            return 0
        a, b = first.replace(marker_source, ""), second.replace(marker_pivot, "")
        if not a or not b:
            a, b = first.replace(marker_source, marker_pivot), second
        return int(Levenshtein.distance(a, b))

    matrix = np.zeros((len(source) + 1, len(pivot) + 1))
    matrix[0, 1:] = np.inf
    matrix[1:, 0] = np.inf
    for i, first in enumerate(source):
        for j, second in enumerate(pivot):
            matrix[i + 1, j + 1] = cost(first, second) + min(matrix[i, j + 1], matrix[i + 1, j], matrix[i, j])
    return _way_back([[float(value) for value in row[1:]] for row in matrix[1:]])


def in_lists(source: Sequence[str], pivot: Sequence[str], *, marker_source: str, marker_pivot: str) -> Lists:
    """The same for strings of which none is empty without its marker."""
    mine = [text.replace(marker_source, "") for text in source]
    theirs = [text.replace(marker_pivot, "") for text in pivot]
    distance = Levenshtein.distance
    matrix: list[list[float]] = []
    above = [INFINITE] * len(theirs)
    corner = 0.0
    for first in mine:
        row: list[float] = []
        diagonal, left = corner, INFINITE
        for up, second in zip(above, theirs, strict=True):
            left = distance(first, second) + min(up, left, diagonal)
            row.append(left)
            diagonal = up
        matrix.append(row)
        above, corner = row, INFINITE
    return _way_back(matrix)


def _way_back(matrix: Sequence[Sequence[float]]) -> Lists:
    i, j = len(matrix) - 1, len(matrix[0]) - 1
    lists: Lists = [[] for _ in matrix[0]]
    lists[j].append(i)
    while i > 0 or j > 0:
        diagonal = matrix[i - 1][j - 1] if i > 0 and j > 0 else INFINITE
        left = matrix[i][j - 1] if j > 0 else INFINITE
        up = matrix[i - 1][j] if i > 0 else INFINITE
        least = min(diagonal, left, up)
        if diagonal == least:
            i, j = i - 1, j - 1
        elif left == least:
            j -= 1
        else:
            i -= 1
        lists[j].append(i)
    return [found[::-1] for found in lists]
