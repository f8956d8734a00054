"""Task vectors, thinned out and added up: what task arithmetic, TIES, DARE, Breadcrumbs, DELLA and two variants of SCE have in common.

With delta'_j what a method leaves of delta_j = theta_j - theta_v, and weights w_j:

    elect    s = sign(sum_j w_j delta'_j), zero counts as positive; only w_j delta'_j of that sign go on     (TIES, arXiv 2306.01708, section 3)
    merged   theta_v + scale * sum_j w_j delta'_j [/ sum_j w_j of those that go on, with `normalize`]

Without `elect` all go on, those that were thinned out too: `normalize` then divides by the sum of all weights. Called by the methods of this package.
"""

import math
from collections.abc import Callable

import numpy as np
from numba import njit

from fusion_ray.merging.blocks import CHUNK, Block, Blocks, Doubles, Floats, Scratch, TensorMerge, Weights
from fusion_ray.merging.kernels import add_weighted_deltas, as_float32

Thin = Callable[
    [Block, Floats], None
]  # writes what is left of the task vectors, (M, n) float32; called once a block, in order
LEAST_DIVISOR = 1e-8  # a smaller sum of weights divides nothing


def merge_task_vectors(
    blocks: Blocks,
    thin: Thin | None,
    *,
    weight: Weights,
    elect: bool,
    normalize: bool,
    scale: float,
) -> TensorMerge:
    """The merge of one tensor by the equations above; without `thin` task vectors are taken whole."""
    weights = applied_weights(weight, elect=elect, normalize=normalize, scale=scale)
    if thin is None and not elect:
        narrow = as_float32(weights)
        return TensorMerge(weights, lambda block, out: add_weighted_deltas(block.inputs, narrow, out))
    scratch = Scratch(np.float32)
    wide = np.asarray(weight if elect else weights, np.float64)

    def apply(block: Block, out: Floats) -> None:
        deltas = scratch.take(blocks.targets, block.size)
        if thin is None:
            take_deltas(block, deltas)
        else:
            thin(block, deltas)
        if elect:
            add_elected(block.base, deltas, wide, wide, normalize, LEAST_DIVISOR, 0.0, scale, out)
        else:
            add_all(block.base, deltas, wide, out)

    return TensorMerge(weights, apply)


def applied_weights(weight: Weights, *, elect: bool, normalize: bool, scale: float) -> Weights:
    """What the task vectors are multiplied by; where an election divides, before that."""
    total = math.fsum(weight) if normalize and not elect else 1.0
    return tuple(scale * each / (total if abs(total) >= LEAST_DIVISOR else 1.0) for each in weight)


def take_deltas(block: Block, deltas: Floats) -> None:
    """The task vectors whole."""
    np.subtract(block.targets, block.base, out=deltas)


@njit(cache=True, nogil=True, error_model="numpy")
def add_all(base: Floats, deltas: Floats, weights: Doubles, out: Floats) -> None:
    """out = base + sum_j weights_j deltas_j."""
    room = np.empty(CHUNK, np.float64)
    for start in range(0, out.size, CHUNK):
        of_base, merged = base[start : start + CHUNK], out[start : start + CHUNK]
        total = room[: merged.size]
        total[:] = 0.0
        for j in range(deltas.shape[0]):
            delta, weight = deltas[j, start : start + CHUNK], weights[j]
            for i in range(total.size):
                total[i] += weight * delta[i]
        for i in range(total.size):
            merged[i] = np.float32(np.float64(of_base[i]) + total[i])


@njit(cache=True, nogil=True, error_model="numpy")
def add_elected(
    base: Floats,
    deltas: Floats,
    voices: Doubles,
    weights: Doubles,
    normalize: bool,
    one_below: float,
    least: float,
    scale: float,
    out: Floats,
) -> None:
    """The elected merge. `voices` weigh the vote on the sign, `weights` the sum; a divisor below `one_below` counts as 1, any is at least `least`."""
    votes, totals, divisors = np.empty(CHUNK, np.float64), np.empty(CHUNK, np.float64), np.empty(CHUNK, np.float64)
    for start in range(0, out.size, CHUNK):
        of_base, merged = base[start : start + CHUNK], out[start : start + CHUNK]
        vote, total, divisor = votes[: merged.size], totals[: merged.size], divisors[: merged.size]
        vote[:] = 0.0
        total[:] = 0.0
        divisor[:] = 0.0
        for j in range(deltas.shape[0]):
            delta, voice = deltas[j, start : start + CHUNK], voices[j]
            for i in range(vote.size):
                vote[i] += voice * delta[i]
        for i in range(vote.size):
            vote[i] = 1.0 if vote[i] >= 0.0 else -1.0
        for j in range(deltas.shape[0]):
            delta, voice, weight = deltas[j, start : start + CHUNK], voices[j], weights[j]
            for i in range(vote.size):
                goes_on = 1.0 if voice * delta[i] * vote[i] > 0.0 else 0.0
                total[i] += goes_on * weight * delta[i]
                divisor[i] += goes_on * weight
        if normalize:
            for i in range(vote.size):
                by = 1.0 if abs(divisor[i]) < one_below else divisor[i]
                total[i] /= max(by, least) if least > 0.0 else by
        for i in range(vote.size):
            merged[i] = np.float32(np.float64(of_base[i]) + scale * total[i])
