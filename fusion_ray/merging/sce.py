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
from typing import NamedTuple

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
from fusion_ray.merging.gathering import Gathered, Records, gather_selected, selected_of
from fusion_ray.merging.kernels import LANES, chunks_of, dot, gather, gather_delta, load, load_delta, square_at
from fusion_ray.merging.selection import (
    EVERYTHING,
    Places,
    Ranked,
    Ranks,
    Selection,
    as_arrays,
    places_of,
    rank_variance,
    select_top,
)
from fusion_ray.merging.task_vectors import add_elected

_MERGEKIT_UNIFORM_BELOW = 1e-6
_MERGEKIT_LEAST_DIVISOR = 1e-6
SMALLEST = 2.0**-1022  # no eta is smaller without being zero
VARIANTS = ("paper", "fusechat_release", "mergekit")


def sce(
    blocks: Blocks, weights: Weights | None = None, *, variant: str = "paper", select_topk: float = 0.1
) -> TensorMerge:
    """SCE made ready for one tensor: in one pass over it where that does (`gathering.py`), else in three. `weights` is not used. Raises ValueError for an
    unknown variant."""
    check_variant(variant)
    if select_topk < 1 and variant != "fusechat_release":
        gathered = gather_selected(blocks, select_topk)
        if gathered is not None:
            eta = eta_of(gathered.squares, blocks.size, variant)
            return TensorMerge(eta, _EraseGathered(gathered, _rule(variant, eta)))
    ranked = Ranked(blocks, rank_variance, rows=1)
    selection = _select(ranked, select_topk)
    eta = _calculate(blocks, ranked, selection, variant=variant)
    everything = variant == "fusechat_release"
    return TensorMerge(eta, _Erase(ranked, EVERYTHING if everything else selection, _rule(variant, eta)))


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


def _calculate(blocks: Blocks, ranked: Ranked, selection: Selection, *, variant: str) -> Weights:
    thresholds, remaining = as_arrays([selection])
    sums: list[Doubles] = []
    for block in blocks:
        of_block = np.empty((blocks.targets, chunks_of(block.size)))
        ranks = _ranks(ranked, selection, block)
        _square_selected(block.inputs, block.size, ranks, thresholds, remaining, of_block)
        sums.append(of_block)
    squares = [exact_sum([each[j] for each in sums]) for j in range(blocks.targets)]
    return eta_of(squares, blocks.size, variant)


class _Rule(NamedTuple):
    """How the selected task vectors become one."""

    paper: bool
    voices: Doubles  # (M,)
    eta: Doubles  # (M,)
    least: float  # divisor


def _rule(variant: str, eta: Weights) -> _Rule:
    return _Rule(variant == "paper", np.ones(len(eta)), np.asarray(eta, np.float64), least_divisor(variant))


class _Erase:
    """The last step of one tensor, block after block, in order."""

    def __init__(self, ranked: Ranked, selection: Selection, rule: _Rule) -> None:
        self._ranked, self._selection, self._rule = ranked, selection, rule
        self._thresholds, self._remaining = as_arrays([selection])

    def __call__(self, block: Block, out: Floats) -> None:
        ranks = _ranks(self._ranked, self._selection, block)
        _erase(block.inputs, ranks, self._thresholds, self._remaining, self._rule, out)


class _EraseGathered:
    """The same from what was gathered."""

    def __init__(self, gathered: Gathered, rule: _Rule) -> None:
        self._gathered, self._rule = gathered, rule

    def __call__(self, block: Block, out: Floats) -> None:
        _erase_gathered(block.inputs, self._gathered.records, *self._gathered.of(block), self._rule, out)


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
    count = places_of(ranks[start : start + size], np.uint32(thresholds[0]), remaining, places)
    base, deltas = bases[:count], room[: M * count].reshape(M, count)
    gather(inputs, 0, start, places, base)
    for j in range(M):
        gather_delta(inputs, j, start, places, base, deltas[j])
    return deltas


@njit(cache=True, nogil=True)
def _square_selected(
    inputs: Inputs,
    size: int,
    ranks: Ranks,
    thresholds: npt.NDArray[np.int64],
    remaining: npt.NDArray[np.int64],
    sums: Doubles,
) -> None:
    """Chunk sums of dhat_j^2, as `dot` adds them up over all elements of the chunk: those that are not selected add nothing."""
    places, lanes = np.empty(CHUNK, np.int64), np.empty(LANES, np.float64)
    bases, room = np.empty(CHUNK, np.float32), np.empty(sums.shape[0] * CHUNK, np.float32)
    for chunk in range(sums.shape[1]):
        start = chunk * CHUNK
        of_chunk = min(CHUNK, size - start)
        deltas = _select_chunk(inputs, start, of_chunk, ranks, thresholds, remaining, places, bases, room)
        for j in range(deltas.shape[0]):
            delta = deltas[j]
            sums[j, chunk] = dot(delta, delta) if thresholds[0] < 0 else square_at(delta, places, lanes)


@njit(cache=True, nogil=True)
def _put(inputs: Inputs, start: int, places: Places, merged: Floats, out: Floats) -> None:
    """A chunk of the output: `merged` at its places, the base elsewhere."""
    load(inputs, 0, start, out)
    for s in range(merged.size):
        out[places[s]] = merged[s]


@njit(cache=True, nogil=True)
def _erase(
    inputs: Inputs,
    ranks: Ranks,
    thresholds: npt.NDArray[np.int64],
    remaining: npt.NDArray[np.int64],
    rule: "_Rule",
    out: Floats,
) -> None:
    places, bases, results = np.empty(CHUNK, np.int64), np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    room = np.empty(rule.eta.size * CHUNK, np.float32)
    for start in range(0, out.size, CHUNK):
        of_chunk = min(CHUNK, out.size - start)
        deltas = _select_chunk(inputs, start, of_chunk, ranks, thresholds, remaining, places, bases, room)
        merged = results[: deltas.shape[1]]
        _merge(bases[: merged.size], deltas, rule, merged)
        if thresholds[0] < 0:
            out[start : start + CHUNK] = merged
        else:
            _put(inputs, start, places, merged, out[start : start + CHUNK])


@njit(cache=True, nogil=True)
def _erase_gathered(
    inputs: Inputs,
    records: Records,
    offsets: npt.NDArray[np.int64],
    counts: npt.NDArray[np.int64],
    rule: "_Rule",
    out: Floats,
) -> None:
    results = np.empty(CHUNK, np.float32)
    for chunk in range(counts.size):
        start, merged = chunk * CHUNK, results[: counts[chunk]]
        places, base, deltas = selected_of(records, offsets[chunk], counts[chunk], rule.eta.size)
        _merge(base, deltas, rule, merged)
        _put(inputs, start, places, merged, out[start : start + CHUNK])


@njit(cache=True, nogil=True)
def _merge(base: Floats, deltas: Floats, rule: "_Rule", out: Floats) -> None:
    """Erase and sum at some positions of a chunk. The two programs hold an election with one voice each and divide by the eta of those that agree."""
    if rule.paper:
        _add_unopposed(base, deltas, rule.eta, out)
    else:
        add_elected(base, deltas, rule.voices, rule.eta, True, SMALLEST, rule.least, 1.0, out)


@njit(cache=True, nogil=True, error_model="numpy")
def _add_unopposed(base: Floats, deltas: Floats, eta: Doubles, out: Floats) -> None:
    """The paper's erase and sum. The sign is that of a float64 sum: two large deltas of opposite sign may nearly cancel."""
    sign, total = np.zeros(out.size, np.float64), np.zeros(out.size, np.float64)
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
    for i in range(out.size):
        out[i] = np.float32(np.float64(base[i]) + total[i])
