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
    TensorMerge,
    Weights,
    exact_sum,
    shares,
)
from fusion_ray.merging.kernels import chunks_of, dot
from fusion_ray.merging.selection import EVERYTHING, Ranked, Ranks, Selection, as_arrays, rank_variance, select_top
from fusion_ray.merging.task_vectors import add_elected

_MERGEKIT_UNIFORM_BELOW = 1e-6
_MERGEKIT_LEAST_DIVISOR = 1e-6
SMALLEST = 2.0**-1022  # no eta is smaller without being zero
VARIANTS = ("paper", "fusechat_release", "mergekit")


def sce(
    blocks: Blocks, weights: Weights | None = None, *, variant: str = "paper", select_topk: float = 0.1
) -> TensorMerge:
    """SCE made ready for one tensor in three passes over it. Raises ValueError for an unknown variant. `weights` is not used."""
    check_variant(variant)
    ranked = Ranked(blocks, rank_variance, rows=1)
    selection = _select(ranked, select_topk)
    eta = _calculate(blocks, ranked, selection, variant=variant)
    return TensorMerge(eta, _Erase(ranked, EVERYTHING if variant == "fusechat_release" else selection, variant, eta))


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
        _square_selected(block.base, block.targets, _ranks(ranked, selection, block), thresholds, remaining, of_block)
        sums.append(of_block)
    squares = [exact_sum([each[j] for each in sums]) for j in range(blocks.targets)]
    return eta_of(squares, blocks.size, variant)


class _Erase:
    """The last step of one tensor, block after block, in order."""

    def __init__(self, ranked: Ranked, selection: Selection, variant: str, eta: Weights) -> None:
        self._ranked, self._selection = ranked, selection
        self._thresholds, self._remaining = as_arrays([selection])
        self._paper = variant == "paper"
        self._eta = np.asarray(eta, np.float64)
        self._voices = np.ones(len(eta))
        self._least = least_divisor(variant)

    def __call__(self, block: Block, out: Floats) -> None:
        ranks = _ranks(self._ranked, self._selection, block)
        selected = block.base, block.targets, ranks, self._thresholds, self._remaining
        if self._paper:
            _add_unopposed(*selected, self._eta, out)
        else:
            _add_agreeing(*selected, self._voices, self._eta, self._least, out)


def _ranks(ranked: Ranked, selection: Selection, block: Block) -> Ranks:
    """(n,), or none where they decide nothing."""
    return np.empty(0, np.uint32) if selection.everything else ranked.of(block)[0]


@njit(cache=True, nogil=True)
def _select_chunk(
    base: Floats,
    targets: Floats,
    ranks: Ranks,
    start: int,
    thresholds: npt.NDArray[np.int64],
    remaining: npt.NDArray[np.int64],
    keep: Floats,
    deltas: Floats,
) -> int:
    """dhat of the chunk at `start` into `deltas` (M, CHUNK), how many elements it has; counts down the ties that remain. Threshold -1: all are kept."""
    of_base = base[start : start + CHUNK]
    count = of_base.size
    whole = thresholds[0] < 0
    if not whole:
        rank, mask = ranks[start : start + CHUNK], keep[:count]
        least, left = np.uint32(thresholds[0]), remaining[0]
        equal = np.uint32(0)
        for i in range(rank.size):
            mask[i] = np.float32(1.0) if rank[i] >= least else np.float32(0.0)
            equal += np.uint32(rank[i] == least)
        if equal > left:
            for i in range(rank.size):
                if rank[i] == least:
                    if left > 0:
                        left -= 1
                    else:
                        mask[i] = np.float32(0.0)
            remaining[0] = left
        else:
            remaining[0] = left - equal
    for j in range(targets.shape[0]):
        target, delta = targets[j, start : start + CHUNK], deltas[j]
        for i in range(of_base.size):
            delta[i] = target[i] - of_base[i]
        if not whole:
            mask = keep[:count]
            for i in range(mask.size):
                delta[i] *= mask[i]
    return count


@njit(cache=True, nogil=True)
def _square_selected(
    base: Floats,
    targets: Floats,
    ranks: Ranks,
    thresholds: npt.NDArray[np.int64],
    remaining: npt.NDArray[np.int64],
    sums: Doubles,
) -> None:
    """Chunk sums of dhat_j^2."""
    keep, deltas = np.empty(CHUNK, np.float32), np.empty((targets.shape[0], CHUNK), np.float32)
    for chunk in range(sums.shape[1]):
        count = _select_chunk(base, targets, ranks, chunk * CHUNK, thresholds, remaining, keep, deltas)
        for j in range(targets.shape[0]):
            delta = deltas[j, :count]
            sums[j, chunk] = dot(delta, delta)


@njit(cache=True, nogil=True, error_model="numpy")
def _add_unopposed(
    base: Floats,
    targets: Floats,
    ranks: Ranks,
    thresholds: npt.NDArray[np.int64],
    remaining: npt.NDArray[np.int64],
    eta: Doubles,
    out: Floats,
) -> None:
    """The paper's erase and sum. The sign is that of a float64 sum: two large deltas of opposite sign may nearly cancel."""
    keep, deltas = np.empty(CHUNK, np.float32), np.empty((targets.shape[0], CHUNK), np.float32)
    signs, totals = np.empty(CHUNK, np.float64), np.empty(CHUNK, np.float64)
    for start in range(0, out.size, CHUNK):
        _select_chunk(base, targets, ranks, start, thresholds, remaining, keep, deltas)
        of_base, merged = base[start : start + CHUNK], out[start : start + CHUNK]
        sign, total = signs[: merged.size], totals[: merged.size]
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
        for i in range(sign.size):
            merged[i] = np.float32(np.float64(of_base[i]) + total[i])


@njit(cache=True, nogil=True)
def _add_agreeing(
    base: Floats,
    targets: Floats,
    ranks: Ranks,
    thresholds: npt.NDArray[np.int64],
    remaining: npt.NDArray[np.int64],
    voices: Doubles,
    eta: Doubles,
    least: float,
    out: Floats,
) -> None:
    """The two programs' erase and sum: an election with one voice each, divided by the eta of those that agree."""
    keep, deltas = np.empty(CHUNK, np.float32), np.empty((targets.shape[0], CHUNK), np.float32)
    for start in range(0, out.size, CHUNK):
        count = _select_chunk(base, targets, ranks, start, thresholds, remaining, keep, deltas)
        chunk = slice(start, start + count)
        add_elected(base[chunk], deltas[:, :count], voices, eta, True, SMALLEST, least, 1.0, out[chunk])
