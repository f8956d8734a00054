"""Stored numbers to float32 and back, a block at a time. Called by the merge worker.

bfloat16 is the upper half of float32's bits; it is rounded to nearest, ties to even, as torch does. The loops release the interpreter's lock.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

from fusion_ray.checkpoints.dtypes import NUMPY_DTYPES
from fusion_ray.merging import vectors
from fusion_ray.merging.blocks import CHUNK, Block, Floats, Inputs, Scratch
from fusion_ray.merging.kernels import LANES, chunks_of, dot, dot_chunks, fold, load, prefetch

Bits = npt.NDArray[np.uint16]
_EXPONENT = np.uint32(0x7F800000)


@dataclass(frozen=True)
class Cast:
    """What casting a block came to: elements that differ from the base's as cast, sums of the squared differences from it by chunk, non-finite ones."""

    moved: int
    squares: npt.NDArray[np.float64]
    odd: int


class Caster:
    """Casts one block after the other; what it gives may be overwritten by the next. Where blocks are of whole rows, and so start anywhere, sums are taken
    over the chunks of each row: the same for any size of block."""

    def __init__(self, row: int | None = None) -> None:
        self._row = row
        self._stored = Scratch(np.uint16)

    def cast(self, values: Floats, block: Block, dtype: str) -> tuple[npt.NDArray[np.generic], Cast]:
        """`values` (n,) as they are stored in `dtype`, and how they differ from the block's base, which is cast too where they are compared."""
        row = self._row or values.size
        squares = np.empty((values.size // row, chunks_of(row)))
        if dtype == "BF16":
            stored = self._stored.take(1, values.size)[0]
            moved, odd = _narrow_bfloat16(values, block.inputs, row, stored, squares)
            return stored, Cast(int(moved), squares.reshape(-1), int(odd))
        base = block.base
        stored, written, moved, odd = _narrow(values, base, dtype)
        for number, sums in enumerate(squares):
            of_row = slice(number * row, (number + 1) * row)
            dot_chunks(written[of_row], written[of_row], base[of_row], sums)
        return stored, Cast(moved, squares.reshape(-1), odd)


def _narrow(values: Floats, base: Floats, dtype: str) -> tuple[npt.NDArray[np.generic], Floats, int, int]:
    with np.errstate(over="ignore"):
        stored, of_base = values.astype(NUMPY_DTYPES[dtype]), base.astype(NUMPY_DTYPES[dtype])
    moved = int(np.count_nonzero(stored != of_base))
    odd = int(stored.size - np.count_nonzero(np.isfinite(stored)))
    return stored, stored.astype(np.float32, copy=False), moved, odd


@njit(inline="always")
def _rounded(bits):  # type: ignore[no-untyped-def]  # compiled: uint32 to uint32, the lower half zero
    return (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)


@njit(cache=True, nogil=True)
def _narrow_bfloat16(
    values: Floats, inputs: Inputs, row: int, stored: Bits, squares: npt.NDArray[np.float64]
) -> tuple[np.int64, np.int64]:
    """Rounds to `stored`, and takes what `Cast` holds while a chunk is in the nearest cache: `squares` (rows, chunks of a row)."""
    bits, room, lanes = values.view(np.uint32), np.empty((2, CHUNK), np.float32), np.empty(LANES, np.float64)
    moved, odd = np.int64(0), np.int64(0)
    for number in range(squares.shape[0]):
        for chunk in range(squares.shape[1]):
            start, stop = number * row + chunk * CHUNK, min(number * row + (chunk + 1) * CHUNK, (number + 1) * row)
            if inputs.bfloat16 and stop - start == CHUNK:
                prefetch(inputs, 0, start)
                found = vectors.narrow(
                    values.ctypes.data + 4 * start,
                    inputs.addresses[0] + 2 * start,
                    stored.ctypes.data + 2 * start,
                    lanes.ctypes.data,
                )
                moved += found & np.int64(0xFFFFFFFF)
                odd += found >> np.int64(32)
                squares[number, chunk] = fold(lanes)
                continue
            base, written = room[0, : stop - start], room[1, : stop - start]
            load(inputs, 0, start, base)
            of_moved, of_odd = _narrow_chunk(bits[start:stop], base, written, stored[start:stop])
            moved += of_moved
            odd += of_odd
            squares[number, chunk] = dot(written, written)
    return moved, odd


@njit(cache=True, nogil=True)
def _narrow_chunk(
    of_values: npt.NDArray[np.uint32], base: Floats, written: Floats, of_stored: Bits
) -> tuple[np.uint32, np.uint32]:
    """One chunk; `written` becomes what it differs from the base by."""
    of_base, written_bits = base.view(np.uint32), written.view(np.uint32)
    moved, odd = np.uint32(0), np.uint32(0)
    for i in range(of_values.size):
        rounded = _rounded(of_values[i])
        odd += np.uint32((of_values[i] & _EXPONENT) == _EXPONENT) | np.uint32((rounded & _EXPONENT) == _EXPONENT)
        written_bits[i] = rounded
    for i in range(of_values.size):
        of_stored[i] = np.uint16(written_bits[i] >> np.uint32(16))
    for i in range(of_values.size):
        base_rounded = _rounded(of_base[i])
        both_zero = ((written_bits[i] | base_rounded) & np.uint32(0x7FFFFFFF)) == np.uint32(0)  # -0 is 0
        moved += np.uint32(written_bits[i] != base_rounded) & np.uint32(not both_zero)
    for i in range(written.size):
        written[i] -= base[i]
    return moved, odd
