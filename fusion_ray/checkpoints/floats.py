"""Stored numbers to float32 and back, a block at a time. Called by the merge worker.

bfloat16 is the upper half of float32's bits; it is rounded to nearest, ties to even, as torch does. The loops release the interpreter's lock.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

from fusion_ray.checkpoints.dtypes import NUMPY_DTYPES
from fusion_ray.merging.blocks import Floats, Scratch
from fusion_ray.merging.kernels import chunks_of, dot_chunks

Bits = npt.NDArray[np.uint16]
_EXPONENT = np.uint32(0x7F800000)


@dataclass(frozen=True)
class Cast:
    """What casting a block came to: elements that differ from the base's as cast, sums of the squared differences from it by chunk, non-finite ones."""

    moved: int
    squares: npt.NDArray[np.float64]
    odd: int


def widen(stored: npt.NDArray[np.generic], dtype: str, out: Floats) -> None:
    """`stored` (n,) of the element type `dtype` into `out` (n,)."""
    if dtype == "BF16":
        _widen_bfloat16(stored.view(np.uint16), out)
    else:
        out[:] = stored


class Caster:
    """Casts one block after the other; what it gives may be overwritten by the next. Where blocks are of whole rows, and so start anywhere, sums are taken
    over the chunks of each row: the same for any size of block."""

    def __init__(self, row: int | None = None) -> None:
        self._row = row
        self._stored, self._written = Scratch(np.uint16), Scratch(np.float32)

    def cast(self, values: Floats, base: Floats, dtype: str) -> tuple[npt.NDArray[np.generic], Cast]:
        """`values` (n,) as they are stored in `dtype`, and how they differ from `base` (n,), which is cast too where they are compared."""
        if dtype == "BF16":
            stored: npt.NDArray[np.generic] = self._stored.take(1, values.size)[0]
            written = self._written.take(1, values.size)[0]
            moved, odd = map(int, _narrow_bfloat16(values, base, stored, written))
        else:
            stored, written, moved, odd = _narrow(values, base, dtype)
        row = self._row or values.size
        squares = np.empty((values.size // row, chunks_of(row)))
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


@njit(cache=True, nogil=True)
def _widen_bfloat16(stored: Bits, out: Floats) -> None:
    bits = out.view(np.uint32)
    for i in range(stored.size):
        bits[i] = np.uint32(stored[i]) << np.uint32(16)


@njit(inline="always")
def _rounded(bits):  # type: ignore[no-untyped-def]  # compiled: uint32 to uint32, the lower half zero
    return (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)


@njit(cache=True, nogil=True)
def _narrow_bfloat16(values: Floats, base: Floats, stored: Bits, written: Floats) -> tuple[np.int64, np.int64]:
    bits, base_bits, written_bits = values.view(np.uint32), base.view(np.uint32), written.view(np.uint32)
    moved, odd = np.uint32(0), np.uint32(0)
    for i in range(bits.size):
        rounded = _rounded(bits[i])
        odd += np.uint32((bits[i] & _EXPONENT) == _EXPONENT) | np.uint32((rounded & _EXPONENT) == _EXPONENT)
        written_bits[i] = rounded
    for i in range(bits.size):
        stored[i] = np.uint16(written_bits[i] >> np.uint32(16))
    for i in range(bits.size):
        base_rounded = _rounded(base_bits[i])
        both_zero = ((written_bits[i] | base_rounded) & np.uint32(0x7FFFFFFF)) == np.uint32(0)  # -0 is 0
        moved += np.uint32(written_bits[i] != base_rounded) & np.uint32(not both_zero)
    return np.int64(moved), np.int64(odd)
