"""Random numbers that belong to an element, whatever reads it: a function of the seed, the tensor's name, the target's number and the element's position.

SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) as a counter: element i of a stream has the i-th output of the generator that starts at the stream's key.
Called by `dare.py` and `della.py`.
"""

import hashlib

import numpy as np
import numpy.typing as npt
from numba import njit

from fusion_ray.merging.blocks import CHUNK, Block, Doubles, Floats, Inputs
from fusion_ray.merging.kernels import load, load_delta

GAMMA = np.uint64(0x9E3779B97F4A7C15)
FIRST = np.uint64(0xBF58476D1CE4E5B9)
SECOND = np.uint64(0x94D049BB133111EB)
BITS = 53  # of a random number; as a fraction it is exact in float64


def stream_keys(seed: int, name: str, targets: int) -> npt.NDArray[np.uint64]:
    """(M,) the key of each target's stream for the tensor `name`."""
    keys = [hashlib.sha256(f"{seed}\0{name}\0{target}".encode()).digest()[:8] for target in range(targets)]
    return np.array([int.from_bytes(key, "little") for key in keys], np.uint64)


def uniform(key: int, start: int, count: int) -> Doubles:
    """(count,) numbers in [0, 1) of the elements from `start` on: what the compiled loops compare with, for tests and for looking."""
    out = np.empty(count, np.float64)
    _uniform(np.uint64(key), start, out)
    return out


def keep_by_chance(
    block: Block, keys: npt.NDArray[np.uint64], density: Doubles, factors: Doubles, deltas: Floats
) -> None:
    """(M, n) deltas = factors_j times the task vector where the element's number is below density_j, else 0."""
    limits = np.array([limit_of(each) for each in density.tolist()], np.uint64)
    _keep(block.inputs, keys, np.uint64(block.start), limits, factors, deltas)


def limit_of(density: float) -> int:
    """Below it lie the random bits of that share of the elements."""
    return int(density * (1 << BITS))


@njit(inline="always")
def random_bits(key, position):  # type: ignore[no-untyped-def]  # compiled: uint64 to uint64
    value = key + (position + np.uint64(1)) * GAMMA
    value = (value ^ (value >> np.uint64(30))) * FIRST
    value = (value ^ (value >> np.uint64(27))) * SECOND
    return (value ^ (value >> np.uint64(31))) >> np.uint64(64 - BITS)


@njit(cache=True, nogil=True)
def _uniform(key: np.uint64, start: int, out: Doubles) -> None:
    for i in range(out.size):
        out[i] = np.float64(random_bits(key, np.uint64(start + i))) / np.float64(1 << BITS)


@njit(cache=True, nogil=True)
def _keep(
    inputs: Inputs,
    keys: npt.NDArray[np.uint64],
    first: np.uint64,
    limits: npt.NDArray[np.uint64],
    factors: Doubles,
    deltas: Floats,
) -> None:
    room = np.empty(CHUNK, np.float32)
    for start in range(0, deltas.shape[1], CHUNK):
        base = room[: min(CHUNK, deltas.shape[1] - start)]
        load(inputs, 0, start, base)
        position = first + np.uint64(start)
        for j in range(deltas.shape[0]):
            delta, key, limit, factor = deltas[j, start : start + CHUNK], keys[j], limits[j], np.float32(factors[j])
            load_delta(inputs, j, start, base, delta)
            for i in range(base.size):
                kept = random_bits(key, position + np.uint64(i)) < limit
                delta[i] = delta[i] * factor if kept else np.float32(0.0)
