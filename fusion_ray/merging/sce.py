"""SCE: select, calculate, erase (FuseChat v2, arXiv 2408.07990, algorithm 1 and equations 5-9), as the paper defines it and as two programs compute it.

For one tensor, with delta_j = theta_j - theta_v of the M targets:

    select      dhat_j = delta_j at the selected positions, else 0
    calculate   eta_j = sum(dhat_j^2) / sum_j sum(dhat_j^2)
    erase       s = sum_j dhat_j;  d'_j = 0 where dhat_j has the sign opposite to s, else dhat_j
    merged      theta_v + sum_j eta_j d'_j          no renormalisation; what is not selected stays at the base's value

Selected are, of the positions whose variance over the targets is not zero, the first int(select_topk * their number) by it (`selection.py`); 1 switches
Select off. eta is uniform where all dhat are zero.

variant "paper": the above. Where s is exactly 0 no sign is opposite to it and nothing is erased.
variant "fusechat_release": Select shapes eta alone; erase and sum take the whole delta_j, a zero s counts as positive, a zero delta is erased, and the
result is divided at each position by the eta that survive there.
variant "mergekit" (0.1.5): the sum takes dhat_j, divided likewise (by no less than 1e-6), and eta is uniform where sum_j mean(dhat_j^2) < 1e-6.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from numba import njit

from fusion_ray.merging.blocks import (
    CHUNK,
    Block,
    Blocks,
    Doubles,
    Floats,
    Inputs,
    TensorMerge,
    Weights,
    exact_sum,
    shares,
)
from fusion_ray.merging.kernels import LANES, chunks_of, dot, fold, gather, load, load_delta
from fusion_ray.merging.selection import EVERYTHING, Ranked, Ranks, Selection, as_arrays, rank_variance, select_top
from fusion_ray.merging.task_vectors import add_elected

Places = npt.NDArray[np.int64]  # of the selected positions in their chunk
_MERGEKIT_UNIFORM_BELOW = 1e-6
_MERGEKIT_LEAST_DIVISOR = 1e-6
_NOT_KEPT, _NEVER_KEPT = np.int32(-1), np.int32(-2)  # counts of chunks
SMALLEST = 2.0**-1022  # no eta is smaller without being zero
VARIANTS = ("paper", "fusechat_release", "mergekit")


def sce(
    blocks: Blocks, weights: Weights | None = None, *, variant: str = "paper", select_topk: float = 0.1
) -> TensorMerge:
    """SCE made ready for one tensor in three passes over it. Raises ValueError for an unknown variant. `weights` is not used."""
    check_variant(variant)
    ranked = Ranked(blocks, rank_variance, rows=1)
    selection = _select(ranked, select_topk)
    collected = _Collected(blocks.size, ranked.keeps and not selection.everything and variant != "fusechat_release")
    eta = _calculate(blocks, ranked, selection, collected, variant=variant)
    everything = variant == "fusechat_release"
    return TensorMerge(eta, _Erase(ranked, EVERYTHING if everything else selection, collected, variant, eta))


def check_variant(variant: str) -> None:
    if variant not in VARIANTS:
        raise ValueError(f"sce variant {variant!r}: give {', '.join(VARIANTS[:-1])} or {VARIANTS[-1]}")


def eta_of(squares: Sequence[float], size: int, variant: str) -> Weights:
    """eta (equation 6) from the targets' sums of squares over so many elements; uniform where the variant calls them too small."""
    floor = _MERGEKIT_UNIFORM_BELOW if variant == "mergekit" else 0.0
    return shares(squares if sum(squares) / size >= floor else [0.0] * len(squares))


def least_divisor(variant: str) -> float:
    return _MERGEKIT_LEAST_DIVISOR if variant == "mergekit" else 0.0


def _select(ranked: Ranked, select_topk: float) -> Selection:
    if select_topk >= 1:
        return EVERYTHING
    (selection,) = select_top(ranked, count=lambda row, nonzero: int(select_topk * nonzero))
    return selection


class _Collected:
    """What the pass that calculates eta leaves for the last one: of each chunk how many positions are selected, their places, their base and their task vectors
    in the place of the ranks, which nobody needs any more. A chunk of which that has no room, or any where ranks are not kept, is selected again."""

    def __init__(self, size: int, keeps: bool) -> None:
        self.counts = np.full(chunks_of(size), _NOT_KEPT if keeps else _NEVER_KEPT, np.int32)
        self.ties = np.zeros(chunks_of(size), np.int64)  # that were left to be taken where a chunk begins

    def of(self, block: Block) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Views of a block's chunks."""
        first = block.start // CHUNK
        chunks = slice(first, first + chunks_of(block.size))
        return self.counts[chunks], self.ties[chunks]


def _calculate(blocks: Blocks, ranked: Ranked, selection: Selection, collected: _Collected, *, variant: str) -> Weights:
    thresholds, remaining = as_arrays([selection])
    sums: list[Doubles] = []
    for block in blocks:
        of_block = np.empty((blocks.targets, chunks_of(block.size)))
        ranks = _ranks(ranked, selection, block)
        _square_selected(block.inputs, block.size, ranks, thresholds, remaining, *collected.of(block), of_block)
        sums.append(of_block)
    squares = [exact_sum([each[j] for each in sums]) for j in range(blocks.targets)]
    return eta_of(squares, blocks.size, variant)


class _Erase:
    """The last step of one tensor, block after block, in order."""

    def __init__(self, ranked: Ranked, selection: Selection, collected: _Collected, variant: str, eta: Weights) -> None:
        self._ranked, self._selection, self._collected = ranked, selection, collected
        self._thresholds, _ = as_arrays([selection])
        self._paper = variant == "paper"
        self._eta = np.asarray(eta, np.float64)
        self._voices = np.ones(len(eta))
        self._least = least_divisor(variant)

    def __call__(self, block: Block, out: Floats) -> None:
        ranks = _ranks(self._ranked, self._selection, block)
        selected = block.inputs, ranks, self._thresholds, *self._collected.of(block)
        if self._paper:
            _add_unopposed(*selected, self._eta, out)
        else:
            _add_agreeing(*selected, self._voices, self._eta, self._least, out)


def _ranks(ranked: Ranked, selection: Selection, block: Block) -> Ranks:
    """(n,), or none where they decide nothing."""
    return np.empty(0, np.uint32) if selection.everything else ranked.of(block)[0]


@njit(cache=True, nogil=True)
def _select_chunk(
    inputs: Inputs,
    start: int,
    size: int,
    ranks: Ranks,
    thresholds: npt.NDArray[np.int64],
    remaining: npt.NDArray[np.int64],
    places: Places,
    bases: Floats,
    room: Floats,
) -> Floats:
    """(M, s) the task vectors at the s positions that are selected of the `size` from `start` on; in `room`.

    Their `places` from there on and their `bases` are written. Counts down the ties that remain. Threshold -1: all are selected, `places` are left alone.
    """
    M = inputs.addresses.size - 1
    if thresholds[0] < 0:
        base, deltas = bases[:size], room[: M * size].reshape(M, size)
        load(inputs, 0, start, base)
        for j in range(M):
            load_delta(inputs, j, start, base, deltas[j])
        return deltas
    count = _places_of(ranks[start : start + size], np.uint32(thresholds[0]), remaining, places)
    base, deltas = bases[:count], room[: M * count].reshape(M, count)
    gather(inputs, 0, start, places, base)
    for j in range(M):
        delta = deltas[j]
        gather(inputs, j + 1, start, places, delta)
        for s in range(count):
            delta[s] -= base[s]
    return deltas


@njit(cache=True, nogil=True)
def _places_of(ranks: Ranks, least: np.uint32, remaining: npt.NDArray[np.int64], places: Places) -> int:
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


@njit(cache=True, nogil=True)
def _square_selected(
    inputs: Inputs,
    size: int,
    ranks: Ranks,
    thresholds: npt.NDArray[np.int64],
    remaining: npt.NDArray[np.int64],
    counts: npt.NDArray[np.int32],
    ties: npt.NDArray[np.int64],
    sums: Doubles,
) -> None:
    """Chunk sums of dhat_j^2, as `dot` adds them up over all elements of the chunk: those that are not selected add nothing. Leaves what `_Collected` says."""
    places, lanes = np.empty(CHUNK, np.int64), np.empty(LANES, np.float64)
    bases, room = np.empty(CHUNK, np.float32), np.empty(sums.shape[0] * CHUNK, np.float32)
    for chunk in range(sums.shape[1]):
        start = chunk * CHUNK
        of_chunk = min(CHUNK, size - start)
        ties[chunk] = remaining[0]
        deltas = _select_chunk(inputs, start, of_chunk, ranks, thresholds, remaining, places, bases, room)
        if counts[chunk] == _NOT_KEPT and (deltas.shape[0] + 2) * deltas.shape[1] <= of_chunk:
            counts[chunk] = deltas.shape[1]
            _keep(ranks[start : start + of_chunk], places, bases, deltas)
        for j in range(deltas.shape[0]):
            delta = deltas[j]
            if thresholds[0] < 0:
                sums[j, chunk] = dot(delta, delta)
                continue
            lanes[:] = 0.0
            for s in range(delta.size):
                value = np.float64(delta[s])
                lanes[places[s] % LANES] += value * value
            sums[j, chunk] = fold(lanes)


@njit(cache=True, nogil=True)
def _keep(ranks: Ranks, places: Places, bases: Floats, deltas: Floats) -> None:
    """Over a chunk's ranks: the places, the bases and the task vectors of its selected positions."""
    count = deltas.shape[1]
    floats = ranks.view(np.float32)
    for s in range(count):
        ranks[s] = np.uint32(places[s])
        floats[count + s] = bases[s]
    for j in range(deltas.shape[0]):
        kept, delta = floats[(2 + j) * count : (3 + j) * count], deltas[j]
        for s in range(count):
            kept[s] = delta[s]


@njit(cache=True, nogil=True)
def _selected_again(
    inputs: Inputs,
    start: int,
    size: int,
    ranks: Ranks,
    thresholds: npt.NDArray[np.int64],
    count: np.int32,
    ties: np.int64,
    places: Places,
    bases: Floats,
    room: Floats,
) -> Floats:
    """As `_select_chunk` gave it to the pass before: what was kept of `count` positions, or selected anew."""
    if count < 0:
        remaining = np.empty(1, np.int64)
        remaining[0] = ties
        return _select_chunk(inputs, start, size, ranks, thresholds, remaining, places, bases, room)
    M = inputs.addresses.size - 1
    kept = ranks[start : start + size].view(np.float32)
    of_ranks = ranks[start : start + count]
    deltas = room[: M * count].reshape(M, count)
    for s in range(count):
        places[s] = of_ranks[s]
        bases[s] = kept[count + s]
    for j in range(M):
        delta, stored = deltas[j], kept[(2 + j) * count : (3 + j) * count]
        for s in range(count):
            delta[s] = stored[s]
    return deltas


@njit(cache=True, nogil=True)
def _put(inputs: Inputs, start: int, everything: bool, places: Places, merged: Floats, out: Floats) -> None:
    """A chunk of the output: `merged` at its places, the base elsewhere."""
    if everything:
        out[:] = merged
        return
    load(inputs, 0, start, out)
    for s in range(merged.size):
        out[places[s]] = merged[s]


@njit(cache=True, nogil=True, error_model="numpy")
def _add_unopposed(
    inputs: Inputs,
    ranks: Ranks,
    thresholds: npt.NDArray[np.int64],
    counts: npt.NDArray[np.int32],
    ties: npt.NDArray[np.int64],
    eta: Doubles,
    out: Floats,
) -> None:
    """The paper's erase and sum. The sign is that of a float64 sum: two large deltas of opposite sign may nearly cancel."""
    places, bases, results = np.empty(CHUNK, np.int64), np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    room = np.empty(eta.size * CHUNK, np.float32)
    signs, totals = np.empty(CHUNK, np.float64), np.empty(CHUNK, np.float64)
    for chunk in range(counts.size):
        start = chunk * CHUNK
        of_chunk = min(CHUNK, out.size - start)
        deltas = _selected_again(
            inputs, start, of_chunk, ranks, thresholds, counts[chunk], ties[chunk], places, bases, room
        )
        size = deltas.shape[1]
        sign, total, base, merged = signs[:size], totals[:size], bases[:size], results[:size]
        sign[:] = 0.0
        total[:] = 0.0
        for j in range(deltas.shape[0]):
            delta = deltas[j]
            for i in range(sign.size):
                sign[i] += delta[i]
        for i in range(sign.size):
            sign[i] = (1.0 if sign[i] > 0.0 else 0.0) - (1.0 if sign[i] < 0.0 else 0.0)
        for j in range(deltas.shape[0]):
            delta, weight = deltas[j], eta[j]
            for i in range(sign.size):
                value = np.float64(delta[i])
                total[i] += weight * value if value * sign[i] >= 0.0 else 0.0
        for i in range(merged.size):
            merged[i] = np.float32(np.float64(base[i]) + total[i])
        _put(inputs, start, thresholds[0] < 0, places, merged, out[start : start + CHUNK])


@njit(cache=True, nogil=True)
def _add_agreeing(
    inputs: Inputs,
    ranks: Ranks,
    thresholds: npt.NDArray[np.int64],
    counts: npt.NDArray[np.int32],
    ties: npt.NDArray[np.int64],
    voices: Doubles,
    eta: Doubles,
    least: float,
    out: Floats,
) -> None:
    """The two programs' erase and sum: an election with one voice each, divided by the eta of those that agree."""
    places, bases, results = np.empty(CHUNK, np.int64), np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    room = np.empty(eta.size * CHUNK, np.float32)
    for chunk in range(counts.size):
        start = chunk * CHUNK
        of_chunk = min(CHUNK, out.size - start)
        deltas = _selected_again(
            inputs, start, of_chunk, ranks, thresholds, counts[chunk], ties[chunk], places, bases, room
        )
        merged = results[: deltas.shape[1]]
        add_elected(bases[: merged.size], deltas, voices, eta, True, SMALLEST, least, 1.0, merged)
        _put(inputs, start, thresholds[0] < 0, places, merged, out[start : start + CHUNK])
