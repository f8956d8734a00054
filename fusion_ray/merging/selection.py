"""The positions of a tensor that come first by some rank, exactly, in blocks: SCE's Select by variance, TIES' and Breadcrumbs' trimming by magnitude.

A rank is a uint32 that orders as what is ranked does: the bits of a non-negative float32. The threshold is found without sorting: a histogram of the upper 16
bits, then one of the lower 16 bits within the bucket that holds it. Ties at the threshold go to the lowest positions, so a mask is made block after block, in
order, counting the ties taken so far. Legend of letters: R ranked rows (one for the variance, M for magnitudes), n elements of a block.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

from fusion_ray.merging import vectors
from fusion_ray.merging.blocks import CHUNK, Block, Blocks, Inputs, Scratch
from fusion_ray.merging.kernels import load, load_delta, prefetch
from fusion_ray.merging.vectors import SMALLEST_VARIANCE

Ranks = npt.NDArray[np.uint32]
Places = npt.NDArray[np.int64]  # of selected positions in their chunk
Ranker = Callable[[Block, Ranks], None]  # fills (R, n)
HALF = 1 << 16
_ABSOLUTE = np.uint32(0x7FFFFFFF)


@dataclass(frozen=True)
class Selection:
    """Selected are the positions whose rank is above `threshold`, and the first `ties` of those equal to it; `threshold` -1: every position."""

    threshold: int
    ties: int

    @property
    def everything(self) -> bool:
        return self.threshold < 0


EVERYTHING = Selection(-1, 0)
NOTHING = Selection((1 << 32) - 1, 0)  # above the bits of every finite float


class Ranked:
    """The ranks of a tensor's blocks, (R, n) each: kept where the tensor is small enough (`Blocks.spare`), else made anew whenever they are asked for."""

    def __init__(self, blocks: Blocks, rank: Ranker, *, rows: int) -> None:
        self.rows, self.size = rows, blocks.size
        self._blocks, self._rank = blocks, rank
        self.keeps = rows * blocks.size * np.dtype(np.uint32).itemsize <= blocks.spare
        self._room = blocks.kept.take(1, rows * blocks.size)[0] if self.keeps else None
        self._kept: dict[int, Ranks] = {}
        self._scratch = Scratch(np.uint32)

    def __iter__(self) -> Iterator[Ranks]:
        """Block after block, in order; the array may be overwritten by the next."""
        if self._kept:
            yield from self._kept.values()
            return
        for block in self._blocks:
            yield self.of(block)

    def of(self, block: Block) -> Ranks:
        if block.start in self._kept:
            return self._kept[block.start]
        if self._room is None:
            ranks = self._scratch.take(self.rows, block.size)
        else:
            start, stop = self.rows * block.start, self.rows * (block.start + block.size)
            ranks = self._kept[block.start] = self._room[start:stop].reshape(self.rows, block.size)
        self._rank(block, ranks)
        return ranks


def select_top(ranked: Ranked, *, count: Callable[[int, int], int]) -> tuple[Selection, ...]:
    """Of each of R ranked rows the selection of the first `count(row, positions whose rank is not zero)`, in at most two passes over the tensor."""
    rows = ranked.rows
    upper = np.zeros((rows, HALF), np.int64)
    zeros = np.zeros(rows, np.int64)
    for ranks in ranked:
        add_upper_histogram(ranks, upper, zeros)
    counts = [count(row, ranked.size - int(zeros[row])) for row in range(rows)]
    found = [find_bin(upper[row], counts[row]) if counts[row] > 0 else (-1, 0) for row in range(rows)]
    buckets = np.array([bucket for bucket, _ in found], np.int64)
    lower = np.zeros((rows, HALF), np.int64)
    if bool((buckets >= 0).any()):
        for ranks in ranked:
            _lower_histogram(ranks, buckets, lower)
    selections = []
    for row, (bucket, above) in enumerate(found):
        if counts[row] <= 0:
            selections.append(NOTHING)
            continue
        low, above_low = find_bin(lower[row], counts[row] - above)
        selections.append(Selection(bucket << 16 | low, counts[row] - above - above_low))
    return tuple(selections)


def as_arrays(selections: Sequence[Selection]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(R,) thresholds and (R,) ties that are still to be taken, which the compiled masks count down."""
    return (
        np.array([each.threshold for each in selections], np.int64),
        np.array([each.ties for each in selections], np.int64),
    )


def rank_variance(block: Block, ranks: Ranks) -> None:
    """(1, n) ranks by the variance of the task vectors over the targets, population variance in float64; zero where all targets are equal."""
    _variance(block.inputs, ranks[0])


def rank_magnitudes(block: Block, ranks: Ranks) -> None:
    """(M, n) ranks by the magnitude of each task vector's elements."""
    _magnitudes(block.inputs, ranks)


def find_bin(histogram: npt.NDArray[np.int64], count: int) -> tuple[int, int]:
    """The bin that holds the count-th entry from the top, and the number of entries in the bins above it."""
    from_top = np.cumsum(histogram[::-1])
    place = int(np.searchsorted(from_top, count))
    if place == from_top.size:
        raise AssertionError("more positions were asked for than the tensor has: the blocks changed between two passes")
    above = int(from_top[place - 1]) if place else 0
    return histogram.size - 1 - place, above


@njit(cache=True, nogil=True)
def add_upper_histogram(ranks: Ranks, histogram: npt.NDArray[np.int64], zeros: npt.NDArray[np.int64]) -> None:
    for row in range(ranks.shape[0]):
        of_row, bins = ranks[row], histogram[row]
        none = np.int64(0)
        for i in range(of_row.size):
            bins[of_row[i] >> np.uint32(16)] += 1
            none += of_row[i] == 0
        zeros[row] += none


@njit(cache=True, nogil=True)
def _lower_histogram(ranks: Ranks, buckets: npt.NDArray[np.int64], histogram: npt.NDArray[np.int64]) -> None:
    for row in range(ranks.shape[0]):
        if buckets[row] >= 0:
            add_lower_histogram(ranks[row], np.uint32(buckets[row]), histogram[row])


@njit(cache=True, nogil=True)
def add_lower_histogram(ranks: Ranks, bucket: np.uint32, bins: npt.NDArray[np.int64]) -> None:
    """Of the lower halves of those (n,) ranks whose upper half is `bucket`."""
    for i in range(ranks.size):
        if ranks[i] >> np.uint32(16) == bucket:
            bins[ranks[i] & np.uint32(0xFFFF)] += 1


@njit(cache=True, nogil=True, error_model="numpy")
def _variance(inputs: Inputs, ranks: npt.NDArray[np.uint32]) -> None:
    """M^2 times the variance, sum_{i<j} (delta_i - delta_j)^2: without a mean there is no division, and equal targets have exactly 0."""
    M = inputs.addresses.size - 1
    room, deltas, sums = np.empty((2, CHUNK), np.float32), np.empty((M, CHUNK), np.float64), np.empty(CHUNK, np.float64)
    scale = 1.0 / (M * M)
    for start in range(0, ranks.size, CHUNK):
        rank = ranks[start : start + CHUNK]
        if inputs.bfloat16 and rank.size == CHUNK and 2 <= M <= 4:
            for model in range(M + 1):
                prefetch(inputs, model, start)
            if M == 2:
                vectors.variance_of_2(inputs.addresses.ctypes.data, start, rank.ctypes.data, scale)
            elif M == 3:
                vectors.variance_of_3(inputs.addresses.ctypes.data, start, rank.ctypes.data, scale)
            else:
                vectors.variance_of_4(inputs.addresses.ctypes.data, start, rank.ctypes.data, scale)
            continue
        total, base, narrow = sums[: rank.size], room[0, : rank.size], room[1, : rank.size]
        bits = narrow.view(np.uint32)
        total[:] = 0.0
        load(inputs, 0, start, base)
        for j in range(M):
            load_delta(inputs, j, start, base, narrow)
            delta = deltas[j]
            for i in range(narrow.size):
                delta[i] = np.float64(narrow[i])
        for j in range(M):
            one = deltas[j, : rank.size]
            for k in range(j + 1, M):
                other = deltas[k, : rank.size]
                for i in range(total.size):
                    apart = one[i] - other[i]
                    total[i] += apart * apart
        for i in range(total.size):
            value = total[i] * scale
            narrow[i] = np.float32(max(value, SMALLEST_VARIANCE)) if total[i] > 0.0 else np.float32(0.0)
        for i in range(total.size):
            rank[i] = bits[i]


@njit(cache=True, nogil=True, error_model="numpy")
def _magnitudes(inputs: Inputs, ranks: Ranks) -> None:
    room = np.empty((2, CHUNK), np.float32)
    for start in range(0, ranks.shape[1], CHUNK):
        count = min(CHUNK, ranks.shape[1] - start)
        base, delta = room[0, :count], room[1, :count]
        bits = delta.view(np.uint32)
        load(inputs, 0, start, base)
        for j in range(ranks.shape[0]):
            load_delta(inputs, j, start, base, delta)
            rank = ranks[j, start : start + CHUNK]
            for i in range(rank.size):
                rank[i] = bits[i] & _ABSOLUTE


@njit(cache=True, nogil=True)
def places_of(ranks: Ranks, least: np.uint32, remaining: npt.NDArray[np.int64], places: Places) -> int:
    """Where a chunk's ranks are above `least`, or equal to it while ties remain; how many. No branch in the loop that is nearly always taken."""
    equal = np.uint32(0)
    for i in range(ranks.size):
        equal += np.uint32(ranks[i] == least)
    count = 0
    if equal <= remaining[0]:
        remaining[0] -= equal
        for i in range(ranks.size):
            places[count] = i
            count += ranks[i] >= least
        return count
    for i in range(ranks.size):
        if ranks[i] == least:
            if remaining[0] == 0:
                continue
            remaining[0] -= 1
        elif ranks[i] < least:
            continue
        places[count] = i
        count += 1
    return count
