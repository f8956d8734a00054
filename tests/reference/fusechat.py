"""The papers' token alignment the slow and obvious way: lists of strings, one cell at a time. The oracle of tests/unit/alignment/test_fusechat*.py.

A vocabulary is a list of (decoded string, piece); a marker is how its pieces write a blank. The rules are those of the published code, to the letter.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ONE_HOT = "one-hot"
EMPTY = "empty"


@dataclass(frozen=True)
class Side:
    decoded: Sequence[str]
    pieces: Sequence[str]
    marker: str
    bos: int = -1
    eos: int = -1
    unk: int = -1


def levenshtein(first: str, second: str) -> int:
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        last, row = row, [i]
        for j, b in enumerate(second, 1):
            row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (a != b)))
    return row[-1]


def removed(text: str, marker: str) -> str:
    return "".join(text.split(marker)) if marker else text


def exchanged(text: str, marker: str, other: str) -> str:
    return other.join(text.split(marker)) if marker else text


def comparable(source: str, pivot: str, marker_source: str, marker_pivot: str) -> tuple[str, str]:
    """The two strings whose distance counts."""
    a, b = removed(source, marker_source), removed(pivot, marker_pivot)
    if not a or not b:
        return exchanged(source, marker_source, marker_pivot), pivot
    return a, b


def path(source_ids: Sequence[int], pivot_ids: Sequence[int], source: Side, pivot: Side) -> list[list[int]]:
    """For every pivot position the source positions on the cheapest path, ascending."""
    M: dict[tuple[int, int], float] = {(0, 0): 0.0}
    for i, s in enumerate(source_ids):
        for j, p in enumerate(pivot_ids):
            cost = levenshtein(*comparable(source.decoded[s], pivot.decoded[p], source.marker, pivot.marker))
            around = [M.get((i, j + 1), math.inf), M.get((i + 1, j), math.inf), M.get((i, j), math.inf)]
            M[i + 1, j + 1] = cost + min(around)
    del M[0, 0]  # the way back is within the cells proper
    lists: list[list[int]] = [[] for _ in pivot_ids]
    i, j = len(source_ids) - 1, len(pivot_ids) - 1
    while True:
        lists[j].insert(0, i)
        if i == j == 0:
            return lists
        options = [(i - 1, j - 1), (i, j - 1), (i - 1, j)]
        values = [M.get((a + 1, b + 1), math.inf) for a, b in options]
        i, j = options[values.index(min(values))]


def count(
    lists: Sequence[Sequence[int]], source_ids: Sequence[int], pivot_ids: Sequence[int]
) -> Counter[tuple[int, int]]:
    """(source id, pivot id) to how often they met."""
    met: Counter[tuple[int, int]] = Counter()
    for p, positions in zip(pivot_ids, lists, strict=True):
        met.update({(source_ids[position], p) for position in positions})
    return met


def statistics_map(met: Mapping[tuple[int, int], int], source: Side, pivot: Side) -> list[int]:
    mapped = []
    for s in range(len(source.pieces)):
        best, best_value = pivot.unk if pivot.unk >= 0 else pivot.eos, math.inf
        for p in range(len(pivot.pieces)):
            if (s, p) in met:
                a, b = comparable(source.pieces[s], pivot.pieces[p], source.marker, pivot.marker)
                value = levenshtein(a, b) * (0.1 if a in b or b in a else 1.0) / (1.0 + math.exp(-met[s, p]))
                if value < best_value:
                    best, best_value = p, value
        mapped.append(best)
    if source.bos >= 0 and pivot.bos >= 0:
        mapped[source.bos] = pivot.bos
    if source.eos >= 0 and pivot.eos >= 0:
        mapped[source.eos] = pivot.eos
    return mapped


def min_edit_map(source: Side, pivot: Side) -> list[int]:
    mapped = []
    for piece in source.pieces:
        text = exchanged(piece, source.marker, pivot.marker)
        near = [(levenshtein(text, other), p) for p, other in enumerate(pivot.pieces) if other]
        mapped.append(min(near)[1] if text and near else -1)
    return mapped


def move(
    row: Sequence[tuple[int, float]], rules: str, mapped: Sequence[int], source: Side, pivot: Side
) -> list[tuple[int, float]]:
    result: list[tuple[int, float]] = []
    for token, logprob in row:
        piece = exchanged(source.pieces[token], source.marker, pivot.marker)
        target = -1
        if piece and piece in pivot.pieces:
            target = list(pivot.pieces).index(piece)
        elif rules != "exact":
            target = mapped[token]
        if target >= 0 and target not in [taken for taken, _ in result]:
            result.append((target, logprob))
    return result


def choose(
    positions: Sequence[int],
    source_ids: Sequence[int],
    p: int,
    rules: str,
    mapped: Sequence[int],
    source: Side,
    pivot: Side,
) -> int | str:
    """The source position whose row is taken, or ONE_HOT or EMPTY."""
    whole = pivot.decoded[p]
    if len(positions) == 1:
        s = source_ids[positions[0]]
        text = exchanged(source.decoded[s], source.marker, pivot.marker)
        fits = text == whole
        if rules == "min_edit":
            fits = fits or [token for token, _ in move([(s, 0.0)], rules, mapped, source, pivot)] == [p]
        if rules == "statistics":
            fits = text.endswith(whole) or whole.endswith(text)
        return positions[0] if fits else ONE_HOT
    if rules != "statistics":
        return ONE_HOT
    text = removed(whole, pivot.marker)
    strings = [removed(source.decoded[source_ids[position]], source.marker) for position in positions]
    if whole != pivot.marker or not pivot.marker:
        for position, string in zip(positions, strings, strict=True):
            if text.endswith(string) or string.endswith(text):
                return position
    parts: list[tuple[int, str]] = []
    for position, string in zip(positions, strings, strict=True):
        if text[len("".join(part for _, part in parts)) :].startswith(string):
            parts.append((position, string))
    if "".join(part for _, part in parts) != text:
        parts = []
    joined = "".join(strings)
    if parts:
        return parts[-1][0]
    return EMPTY if joined.endswith(text) or text.endswith(joined) else ONE_HOT
