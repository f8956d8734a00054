"""Compiled loops that several merge methods share: reading a block, weighted sums, and sums in float64 over chunks. Called by the methods of this package.

Every loop goes chunk by chunk, so that what it computes of a chunk stays in the nearest cache, and releases the interpreter's lock, so that tensors are
merged side by side in threads. A chunk is a slice that is indexed from 0: with an offset in the index the compiler cannot tell that it is not negative, and
makes the loop ten times slower; so does an array that is not contiguous. Sums run over 64 lanes in a fixed order: the same bits on any processor. Legend of
letters: M targets, n elements.
"""

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from fusion_ray.merging.blocks import CHUNK, Doubles, Floats, Inputs

LANES = 64


@intrinsic
def _as_pointer(typing_context, address):  # type: ignore[no-untyped-def]  # compiled: int64 to a pointer
    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


@intrinsic
def _prefetch(typing_context, address):  # type: ignore[no-untyped-def]  # compiled: asks for the cache line at an address; any address will do
    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        pointer, number = context.get_value_type(types.voidptr), ir.IntType(32)
        of = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, of, "llvm.prefetch.p0i8")
        to_read, keep, data = (ir.Constant(number, value) for value in (0, 3, 1))
        builder.call(function, [builder.inttoptr(arguments[0], pointer), to_read, keep, data])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@njit(cache=True, nogil=True)
def prefetch(inputs: Inputs, model: int, start: int) -> None:
    """Ask for the chunk of bfloat16 after the one at `start`."""
    after = inputs.addresses[model] + 2 * (start + CHUNK)
    for line in range(0, 2 * CHUNK, 64):
        _prefetch(after + line)


@njit(cache=True, nogil=True)
def load(inputs: Inputs, model: int, start: int, out: Floats) -> None:
    """out = the elements of one model (0: the base) from `start` on, as many as it has room for, in float32."""
    if inputs.bfloat16:
        prefetch(inputs, model, start)
        address = inputs.addresses[model] + 2 * start
        stored = carray(_as_pointer(address), out.size, np.uint16)
        bits = out.view(np.uint32)
        for i in range(out.size):
            bits[i] = np.uint32(stored[i]) << np.uint32(16)
    else:
        floats = carray(_as_pointer(inputs.addresses[model] + 4 * start), out.size, np.float32)
        for i in range(out.size):
            out[i] = floats[i]


@njit(cache=True, nogil=True)
def gather(inputs: Inputs, model: int, start: int, places: npt.NDArray[np.int64], out: Floats) -> None:
    """out = the elements of one model at the first `places` after `start`, as many as it has room for."""
    if inputs.bfloat16:
        stored = carray(_as_pointer(inputs.addresses[model] + 2 * start), CHUNK, np.uint16)
        bits = out.view(np.uint32)
        for s in range(out.size):
            bits[s] = np.uint32(stored[places[s]]) << np.uint32(16)
    else:
        floats = carray(_as_pointer(inputs.addresses[model] + 4 * start), CHUNK, np.float32)
        for s in range(out.size):
            out[s] = floats[places[s]]


@njit(cache=True, nogil=True)
def load_delta(inputs: Inputs, target: int, start: int, base: Floats, out: Floats) -> None:
    """out = what a target (from 0) differs by from `base` (n,), which lies from `start` on."""
    load(inputs, target + 1, start, out)
    for i in range(out.size):
        out[i] -= base[i]


@njit(cache=True, nogil=True)
def gather_delta(
    inputs: Inputs, target: int, start: int, places: npt.NDArray[np.int64], base: Floats, out: Floats
) -> None:
    """out = what a target (from 0) differs by from `base` (n,) at the first `places` after `start`."""
    gather(inputs, target + 1, start, places, out)
    for s in range(out.size):
        out[s] -= base[s]


@njit(cache=True, nogil=True, error_model="numpy")
def sum_weighted(inputs: Inputs, weights: Floats, out: Floats) -> None:
    """out = sum_j weights_j targets_j, added in order in float32."""
    room = np.empty(CHUNK, np.float32)
    for start in range(0, out.size, CHUNK):
        total = out[start : start + CHUNK]
        target = room[: total.size]
        total[:] = 0.0
        for j in range(weights.size):
            load(inputs, j + 1, start, target)
            weight = weights[j]
            for i in range(total.size):
                total[i] += weight * target[i]


@njit(cache=True, nogil=True, error_model="numpy")
def add_weighted_deltas(inputs: Inputs, weights: Floats, out: Floats) -> None:
    """out = base + sum_j weights_j (targets_j - base), the sum taken first: where nobody moved, exactly the base."""
    room = np.empty((2, CHUNK), np.float32)
    for start in range(0, out.size, CHUNK):
        total = out[start : start + CHUNK]
        base, delta = room[0, : total.size], room[1, : total.size]
        load(inputs, 0, start, base)
        total[:] = 0.0
        for j in range(weights.size):
            load_delta(inputs, j, start, base, delta)
            weight = weights[j]
            for i in range(total.size):
                total[i] += weight * delta[i]
        for i in range(total.size):
            total[i] += base[i]


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
    """The inner product of a chunk (n,) in float64: LANES sums side by side, then those folded."""
    lanes = np.zeros(LANES, np.float64)
    pairs = first.size // (2 * LANES)  # of rows: each lane is read and written half as often
    one, other = (
        first[: pairs * 2 * LANES].reshape(pairs, 2 * LANES),
        second[: pairs * 2 * LANES].reshape(pairs, 2 * LANES),
    )
    for pair in range(pairs):
        a, b = one[pair], other[pair]
        for lane in range(LANES):
            upper = np.float64(a[lane]) * np.float64(b[lane])
            lower = np.float64(a[lane + LANES]) * np.float64(b[lane + LANES])
            lanes[lane] = (lanes[lane] + upper) + lower
    for start in range(pairs * 2 * LANES, first.size, LANES):
        a, b = first[start : start + LANES], second[start : start + LANES]
        for lane in range(a.size):
            lanes[lane] += np.float64(a[lane]) * np.float64(b[lane])
    return fold(lanes)


@njit(cache=True, nogil=True)
def square_at(values: Floats, places: npt.NDArray, lanes: Doubles) -> float:
    """What `dot` gives for a chunk with itself that has these values at its `places` and zeros elsewhere. Writes over `lanes` (LANES,)."""
    lanes[:] = 0.0
    for s in range(values.size):
        value = np.float64(values[s])
        lanes[np.uint32(places[s]) % np.uint32(LANES)] += value * value
    return fold(lanes)


@njit(cache=True, nogil=True)
def fold(lanes: Doubles) -> float:
    """The sum of LANES (64) numbers: the upper half is added to the lower one until one is left. Writes over them."""
    for lane in range(32):  # a number that the compiler knows: no loop is left of it
        lanes[lane] += lanes[lane + 32]
    for lane in range(16):
        lanes[lane] += lanes[lane + 16]
    for lane in range(8):
        lanes[lane] += lanes[lane + 8]
    for lane in range(4):
        lanes[lane] += lanes[lane + 4]
    return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3])


def chunks_of(size: int) -> int:
    return -(-size // CHUNK)


def as_float32(weights: "tuple[float, ...] | list[float] | npt.NDArray[np.float64]") -> Floats:
    return np.asarray(weights, np.float32)
