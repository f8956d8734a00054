"""Passes over one chunk of bfloat16, written as vectors of 16 elements: several sums at a time in registers, where the compiler's own loops go through memory.

Called by compiled loops with addresses. What they give has the bits of the plain loops beside their callers, which take the other types and the chunks that
are not whole: each lane adds in the same order, and no product is fused with a sum. Where a processor has shorter vectors the compiler splits these.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fusion_ray.merging.blocks import CHUNK

LANES = 64  # of `kernels.fold`
SMALLEST_VARIANCE = 2.0**-149  # float32's smallest positive number: a variance below it still is not zero
_WIDTH = 16
_INT, _HALVES = ir.VectorType(ir.IntType(32), _WIDTH), ir.VectorType(ir.IntType(16), _WIDTH)
_FLOATS, _DOUBLES = ir.VectorType(ir.FloatType(), _WIDTH), ir.VectorType(ir.DoubleType(), _WIDTH)
_FLAGS = ir.VectorType(ir.IntType(1), _WIDTH)


class _Chunk:
    """What a pass is built of."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def place(self, address: Any, kind: ir.Type, item_bytes: int, start: int) -> Any:
        at = self.builder.add(address, ir.Constant(ir.IntType(64), item_bytes * start))
        return self.builder.inttoptr(at, kind.as_pointer())

    def load(self, address: Any, kind: ir.Type, item_bytes: int, start: int) -> Any:
        return self.builder.load(self.place(address, kind, item_bytes, start), align=item_bytes)

    def store(self, value: Any, address: Any, item_bytes: int, start: int) -> None:
        self.builder.store(value, self.place(address, value.type, item_bytes, start), align=item_bytes)

    def bits(self, address: Any, start: int) -> Any:
        """Of the float32 that stored bfloat16 are."""
        return self.builder.shl(self.builder.zext(self.load(address, _HALVES, 2, start), _INT), every(16))

    def floats(self, bits: Any) -> Any:
        return self.builder.bitcast(bits, _FLOATS)

    def counted(self, flags: Any) -> Any:
        return self.builder.zext(flags, _INT)

    def absolute(self, doubles: Any) -> Any:
        function = cgutils.get_or_insert_function(
            self.builder.module, ir.FunctionType(_DOUBLES, [_DOUBLES]), f"llvm.fabs.v{_WIDTH}f64"
        )
        return self.builder.call(function, [doubles])

    def total(self, counts: Any) -> Any:
        """The sum of 16 counts, as int64."""
        number = ir.Constant(ir.IntType(32), 0)
        for lane in range(_WIDTH):
            number = self.builder.add(number, self.builder.extract_element(counts, ir.Constant(ir.IntType(32), lane)))
        return self.builder.zext(number, ir.IntType(64))


def every(value: int) -> ir.Constant:
    return ir.Constant(_INT, [value] * _WIDTH)


ZEROS = ir.Constant(_FLOATS, [0.0] * _WIDTH)
NO_SUM = ir.Constant(_DOUBLES, [0.0] * _WIDTH)


def _compiled(build: Callable[..., Any], arguments: int) -> Any:
    """An intrinsic of so many int64, addresses, that gives an int64."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        return build(_Chunk(builder), *given)

    return types.int64(*(types.int64,) * arguments), generate


@intrinsic
def sum_changes(typing_context, base, target, squares, absolutes):  # type: ignore[no-untyped-def]
    """For a chunk's two tensors of bfloat16: the squares and the absolutes of their differences added up by lane, to (LANES,) float64 each. How many are not
    zero."""

    def build(chunk: _Chunk, base: Any, target: Any, squares: Any, absolutes: Any) -> Any:
        builder, moved = chunk.builder, every(0)
        for group in range(0, LANES, _WIDTH):
            square, absolute = NO_SUM, NO_SUM
            for start in range(group, CHUNK, LANES):
                apart = builder.fsub(chunk.floats(chunk.bits(target, start)), chunk.floats(chunk.bits(base, start)))
                moved = builder.add(moved, chunk.counted(builder.fcmp_unordered("!=", apart, ZEROS)))
                wide = builder.fpext(apart, _DOUBLES)
                square = builder.fadd(square, builder.fmul(wide, wide))
                absolute = builder.fadd(absolute, chunk.absolute(wide))
            chunk.store(square, squares, 8, group)
            chunk.store(absolute, absolutes, 8, group)
        return chunk.total(moved)

    return _compiled(build, 4)


@intrinsic
def narrow(typing_context, values, base, stored, squares):  # type: ignore[no-untyped-def]
    """Round a chunk of float32 to bfloat16, to `stored`, and add up by lane the squares of what it then differs by from a base of bfloat16, to (LANES,)
    float64. How many differ, and 2^32 times how many are not finite."""

    def build(chunk: _Chunk, values: Any, base: Any, stored: Any, squares: Any) -> Any:
        builder, moved, odd = chunk.builder, every(0), every(0)
        exponent = every(0x7F800000)
        for group in range(0, LANES, _WIDTH):
            square = NO_SUM
            for start in range(group, CHUNK, LANES):
                bits = chunk.load(values, _INT, 4, start)
                even = builder.and_(builder.lshr(bits, every(16)), every(1))
                rounded = builder.and_(builder.add(builder.add(bits, every(0x7FFF)), even), every(0xFFFF0000))
                chunk.store(builder.trunc(builder.lshr(rounded, every(16)), _HALVES), stored, 2, start)
                is_odd = [
                    builder.icmp_unsigned("==", builder.and_(each, exponent), exponent) for each in (bits, rounded)
                ]
                odd = builder.add(odd, chunk.counted(builder.or_(*is_odd)))
                apart = builder.fsub(chunk.floats(rounded), chunk.floats(chunk.bits(base, start)))
                moved = builder.add(moved, chunk.counted(builder.fcmp_unordered("!=", apart, ZEROS)))
                wide = builder.fpext(apart, _DOUBLES)
                square = builder.fadd(square, builder.fmul(wide, wide))
            chunk.store(square, squares, 8, group)
        return builder.or_(chunk.total(moved), builder.shl(chunk.total(odd), ir.Constant(ir.IntType(64), 32)))

    return _compiled(build, 4)


def _variance_of(targets: int) -> Any:
    @intrinsic
    def variance(typing_context, addresses, start, ranks, scale):  # type: ignore[no-untyped-def]
        """`addresses` points to those (int64) of the base's and the targets' first elements of bfloat16, `start` is the chunk's; `ranks` (CHUNK,) uint32 get
        the bits of float32(scale * sum_{i<j} (delta_i - delta_j)^2), at least the smallest number where the sum is not zero."""

        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            addresses, start, ranks, scale = given
            long, number, chunk = ir.IntType(64), ir.IntType(32), _Chunk(builder)
            stored = [
                builder.add(
                    builder.load(
                        builder.inttoptr(builder.add(addresses, ir.Constant(long, 8 * model)), long.as_pointer())
                    ),
                    builder.mul(start, ir.Constant(long, 2)),
                )
                for model in range(targets + 1)
            ]
            wide = builder.insert_element(ir.Constant(_DOUBLES, ir.Undefined), scale, ir.Constant(number, 0))
            wide = builder.shuffle_vector(wide, ir.Constant(_DOUBLES, ir.Undefined), ir.Constant(_INT, [0] * _WIDTH))
            smallest = ir.Constant(_DOUBLES, [SMALLEST_VARIANCE] * _WIDTH)
            with cgutils.for_range(builder, ir.Constant(long, CHUNK // _WIDTH)) as loop:
                at = builder.mul(loop.index, ir.Constant(long, 2 * _WIDTH))
                here = [builder.add(each, at) for each in stored]
                base = chunk.floats(chunk.bits(here[0], 0))
                deltas = [
                    builder.fpext(builder.fsub(chunk.floats(chunk.bits(each, 0)), base), _DOUBLES) for each in here[1:]
                ]
                total = NO_SUM
                for i in range(targets):
                    for j in range(i + 1, targets):
                        apart = builder.fsub(deltas[i], deltas[j])
                        total = builder.fadd(total, builder.fmul(apart, apart))
                value = builder.fmul(total, wide)
                value = builder.select(builder.fcmp_ordered("<", value, smallest), smallest, value)
                value = builder.select(builder.fcmp_ordered(">", total, NO_SUM), builder.fptrunc(value, _FLOATS), ZEROS)
                chunk.store(
                    builder.bitcast(value, _INT), builder.add(ranks, builder.mul(at, ir.Constant(long, 2))), 4, 0
                )
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64, types.float64), generate

    return variance


variance_of_2, variance_of_3, variance_of_4 = _variance_of(2), _variance_of(3), _variance_of(4)
