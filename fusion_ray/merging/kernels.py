"""Compiled loops that several merge methods share: weighted sums, and sums in float64 over chunks. Called by the methods of this package.

Every loop goes chunk by chunk, so that what it computes of a chunk stays in the nearest cache, and releases the interpreter's lock, so that tensors are
merged side by side in threads. A chunk is a slice that is indexed from 0: with an offset in the index the compiler cannot tell that it is not negative, and
makes the loop ten times slower. Sums run over 64 lanes in a fixed order: the same bits on any processor. Legend of letters: M targets, n elements.
"""

import numpy as np
import numpy.typing as npt
from numba import njit

from fusion_ray.merging.blocks import CHUNK, Doubles, Floats

LANES = 64


@njit(cache=True, nogil=True, error_model="numpy")
def sum_weighted(targets: Floats, weights: Floats, out: Floats) -> None:
    """out = sum_j weights_j targets_j, added in order in float32."""
    for start in range(0, out.size, CHUNK):
        total = out[start : start + CHUNK]
        total[:] = 0.0
        for j in range(targets.shape[0]):
            target, weight = targets[j, start : start + CHUNK], weights[j]
            for i in range(total.size):
                total[i] += weight * target[i]


@njit(cache=True, nogil=True, error_model="numpy")
def add_weighted_deltas(base: Floats, targets: Floats, weights: Floats, out: Floats) -> None:
    """out = base + sum_j weights_j (targets_j - base), the sum taken first: where nobody moved, exactly the base."""
    for start in range(0, out.size, CHUNK):
        total, of_base = out[start : start + CHUNK], base[start : start + CHUNK]
        total[:] = 0.0
        for j in range(targets.shape[0]):
            target, weight = targets[j, start : start + CHUNK], weights[j]
            for i in range(total.size):
                total[i] += weight * (target[i] - of_base[i])
        for i in range(total.size):
            total[i] += of_base[i]


@njit(cache=True, nogil=True, error_model="numpy")
def dot_chunks(first: Floats, second: Floats, base: Floats, sums: Doubles) -> None:
    """sums[c] = sum over chunk c of (first - base)(second - base) in float64; the differences are float32."""
    a, b = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    for chunk in range(sums.size):
        start = chunk * CHUNK
        of_base = base[start : start + CHUNK]
        one, other = first[start : start + CHUNK], second[start : start + CHUNK]
        for i in range(of_base.size):
            a[i] = one[i] - of_base[i]
            b[i] = other[i] - of_base[i]
        sums[chunk] = dot(a[: of_base.size], b[: of_base.size])


@njit(cache=True, nogil=True)
def dot(first: Floats, second: Floats) -> float:
    """The inner product of a chunk (n,) in float64: LANES sums side by side, then those in order."""
    lanes = np.zeros(LANES, np.float64)
    whole = first.size // LANES
    one, other = first[: whole * LANES].reshape(whole, LANES), second[: whole * LANES].reshape(whole, LANES)
    for row in range(whole):
        a, b = one[row], other[row]
        for lane in range(LANES):
            lanes[lane] += np.float64(a[lane]) * np.float64(b[lane])
    a, b = first[whole * LANES :], second[whole * LANES :]
    for lane in range(a.size):
        lanes[lane] += np.float64(a[lane]) * np.float64(b[lane])
    total = 0.0
    for lane in range(LANES):
        total += lanes[lane]
    return total


def chunks_of(size: int) -> int:
    return -(-size // CHUNK)


def as_float32(weights: "tuple[float, ...] | list[float] | npt.NDArray[np.float64]") -> Floats:
    return np.asarray(weights, np.float32)
