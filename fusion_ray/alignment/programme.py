"""The papers' sequence alignment: a dynamic programme over token strings (FuseLLM and FuseChat, `dtw()`; paper.md 1.3 (a)). Called by `fusechat.py`.

M[i + 1, j + 1] = cost(s_i, p_j) + min(M[i, j], M[i + 1, j], M[i, j + 1]), and the path back from the last cell. Costs come as a table of the row's distinct
tokens; one byte a cell is kept (which of the three was smallest), 4 MB for 2,048 tokens on either side.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

from fusion_ray.alignment.edit_distance import cost_table
from fusion_ray.alignment.token_strings import TokenStrings

Ints = npt.NDArray[np.int32] | npt.NDArray[np.int64]
FAR = 1 << 30


@dataclass(frozen=True)
class Matches:
    """For the pivot's j-th token the source tokens `source[offsets[j]:offsets[j + 1]]`, ascending; never none unless the source has no token."""

    offsets: npt.NDArray[np.int64]  # (P + 1,)
    source: npt.NDArray[np.int32]

    def lists(self) -> list[list[int]]:
        return [part.tolist() for part in np.split(self.source, self.offsets[1:-1])]


def match_tokens(source_ids: Ints, pivot_ids: Ints, source: TokenStrings, pivot: TokenStrings) -> Matches:
    """Align one row's ids (S,) and (P,) by the edit distances of their decoded strings."""
    if not source_ids.size or not pivot_ids.size:
        return Matches(np.zeros(pivot_ids.size + 1, np.int64), np.zeros(0, np.int32))
    rows, row = _distinct(source_ids)
    columns, column = _distinct(pivot_ids)
    costs = cost_table(source, pivot, rows.tolist(), columns.tolist())
    return Matches(*cheapest_path(costs, row, column))


def cheapest_path(
    costs: npt.NDArray[np.int32], row: Ints, column: Ints
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """The arrays of `Matches` for costs[row[i], column[j]]; `row` (S,) and `column` (P,) index the table and are not empty."""
    offsets, path = _cheapest_path(costs, row, column)
    return offsets, path


def join_matches(parts: Sequence[Matches], source_starts: Ints) -> Matches:
    """The matches of many rows as one: source tokens of row r are numbered from source_starts[r]."""
    offsets = [np.zeros(1, np.int64), *(np.diff(part.offsets) for part in parts)]
    source = [part.source + start for part, start in zip(parts, source_starts, strict=True)]
    return Matches(
        np.cumsum(np.concatenate(offsets)), np.concatenate([np.zeros(0, np.int32), *source]).astype(np.int32)
    )


@njit(cache=True)
def _distinct(ids):  # type: ignore[no-untyped-def]  # compiled, see match_tokens
    """The distinct ids, as they come, and the place of each id among them; np.unique takes ten times as long on a row."""
    mask = 15
    while mask < 2 * ids.size:
        mask = 2 * mask + 1
    slots = np.full(mask + 1, -1, np.int32)  # a hash table of places
    distinct = np.empty_like(ids)
    place = np.empty(ids.size, np.int32)
    count = 0
    for index in range(ids.size):
        number = ids[index]
        slot = (np.int64(number) * 2654435761 >> 16) & mask
        while slots[slot] >= 0 and distinct[slots[slot]] != number:
            slot = (slot + 1) & mask
        if slots[slot] < 0:
            slots[slot] = count
            distinct[count] = number
            count += 1
        place[index] = slots[slot]
    return distinct[:count], place


@njit(cache=True)
def _cheapest_path(costs, row, column):  # type: ignore[no-untyped-def]  # compiled, see cheapest_path
    S, P = row.size, column.size
    wide = np.empty((costs.shape[0], P), np.int32)  # a line for each distinct source token
    for number in range(costs.shape[0]):
        for j in range(P):
            wide[number, j] = costs[number, column[j]]
    came = np.empty(
        (S, P), np.uint8
    )  # 0 diagonal, 1 from the left (one pivot token back), 2 from above (one source token back)
    above = np.full(P + 1, FAR, np.int32)  # M[i], borders infinite
    above[0] = 0
    for i in range(S):
        line, moves = wide[row[i]], came[i]
        diagonal, left = above[0], np.int32(FAR)
        above[0] = FAR
        for j in range(P):
            up = above[j + 1]
            best = min(diagonal, up)
            # the first named on a tie: diagonal, left, up; without branches, which here are wrong every other time
            move = np.uint8(2) * np.uint8(up < diagonal)
            moves[j] = np.uint8(1) if left + np.int32(up >= diagonal) <= best else move
            left = min(left, best) + line[j]
            diagonal = up
            above[j + 1] = left
    path = np.empty(S + P, np.int32)
    counts = np.zeros(P + 1, np.int64)
    length = 0
    i, j = S - 1, P - 1
    while True:
        length += 1
        path[S + P - length] = i
        counts[j + 1] += 1
        if i == 0 and j == 0:
            break
        move = came[i, j]
        if move != 1:
            i -= 1
        if move != 2:
            j -= 1
    return np.cumsum(counts), path[S + P - length :].copy()
