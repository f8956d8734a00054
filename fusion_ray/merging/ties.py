"""TIES (arXiv 2306.01708): trim each task vector to its largest elements, elect a sign at every position, add up what agrees with it (`task_vectors.py`).

Trim keeps of target j the int(density_j * n) elements of the tensor that are largest by magnitude, exactly (`selection.py`); ties go to the lowest positions.
"""

import numpy as np
import numpy.typing as npt
from numba import njit

from fusion_ray.merging.blocks import CHUNK, Block, Blocks, Floats, Inputs, TensorMerge, Weights
from fusion_ray.merging.kernels import load, load_delta
from fusion_ray.merging.selection import EVERYTHING, Ranked, as_arrays, rank_magnitudes, select_top
from fusion_ray.merging.task_vectors import Thin, merge_task_vectors


def ties(
    blocks: Blocks,
    weights: Weights | None = None,
    *,
    weight: Weights,
    density: Weights,
    normalize: bool = True,
    scale: float = 1.0,
) -> TensorMerge:
    """`weight` and `density` (0 to 1) hold one number a target. `weights` is not used."""
    return merge_task_vectors(
        blocks, trim(blocks, density), weight=weight, elect=True, normalize=normalize, scale=scale
    )


def trim(blocks: Blocks, density: Weights) -> Thin | None:
    """Keeps the largest elements; at least one where the density is above zero. Two passes over the tensor, none where all densities are 1."""
    if all(each >= 1 for each in density):
        return None

    kept = [kept_of(each, blocks.size) for each in density]
    found = select_top(Ranked(blocks, rank_magnitudes, rows=blocks.targets), count=lambda target, nonzero: kept[target])
    selections = [EVERYTHING if each >= 1 else selection for each, selection in zip(density, found, strict=True)]
    thresholds, remaining = as_arrays(selections)

    def thin(block: Block, deltas: Floats) -> None:
        keep_largest(block.inputs, thresholds, remaining, deltas)

    return thin


def kept_of(density: float, size: int) -> int:
    """How many of so many elements trimming keeps."""
    return max(1, int(density * size)) if density > 0 else 0


@njit(cache=True, nogil=True)
def keep_largest(
    inputs: Inputs,
    thresholds: npt.NDArray[np.int64],
    remaining: npt.NDArray[np.int64],
    deltas: Floats,
) -> None:
    """deltas = the task vectors where their magnitude's bits are above the threshold, or equal to it while ties `remaining` last; else 0."""
    room = np.empty(CHUNK, np.float32)
    for start in range(0, deltas.shape[1], CHUNK):
        base = room[: min(CHUNK, deltas.shape[1] - start)]
        load(inputs, 0, start, base)
        for j in range(deltas.shape[0]):
            delta = deltas[j, start : start + CHUNK]
            bits = delta.view(np.uint32)
            load_delta(inputs, j, start, base, delta)
            if thresholds[j] < 0:
                continue
            least, left = np.uint32(thresholds[j]), remaining[j]
            equal = np.uint32(0)
            for i in range(bits.size):
                rank = bits[i] & np.uint32(0x7FFFFFFF)
                equal += np.uint32(rank == least)
                bits[i] = bits[i] if rank >= least else np.uint32(0)
            if equal <= left:
                remaining[j] = left - equal
                continue
            for i in range(bits.size):
                if bits[i] & np.uint32(0x7FFFFFFF) == least:
                    if left == 0:
                        bits[i] = np.uint32(0)
                    else:
                        left -= 1
            remaining[j] = left
