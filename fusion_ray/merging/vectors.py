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

    def compressed(self, values: Any, flags: Any) -> Any:
        """The flagged elements first, in order; the others are anything."""
        kind = values.type
        name = f"llvm.experimental.vector.compress.v{_WIDTH}{'f32' if kind == _FLOATS else 'i32'}"
        function = cgutils.get_or_insert_function(
            self.builder.module, ir.FunctionType(kind, [kind, _FLAGS, kind]), name
        )
        return self.builder.call(function, [values, flags, ir.Constant(kind, ir.Undefined)])

    def flagged(self, flags: Any) -> Any:
        """How many, as int64."""
        bits = self.builder.bitcast(flags, ir.IntType(_WIDTH))
        return self.builder.zext(self.builder.ctpop(bits), ir.IntType(64))

    def stored(self, addresses: Any, start: Any, models: int) -> list[Any]:
        """The addresses of the chunk of bfloat16 that begins at element `start`, of so many models; `addresses` points to those of their first elements."""
        builder, long = self.builder, ir.IntType(64)
        offset = builder.mul(start, ir.Constant(long, 2))
        places = [builder.add(addresses, ir.Constant(long, 8 * model)) for model in range(models)]
        return [builder.add(builder.load(builder.inttoptr(place, long.as_pointer())), offset) for place in places]

    def repeated(self, value: Any, kind: ir.VectorType) -> Any:
        """One number in every lane."""
        undefined = ir.Constant(kind, ir.Undefined)
        first = self.builder.insert_element(undefined, value, ir.Constant(ir.IntType(32), 0))
        return self.builder.shuffle_vector(first, undefined, every(0))

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
            long, chunk = ir.IntType(64), _Chunk(builder)
            stored = chunk.stored(addresses, start, targets + 1)
            wide = chunk.repeated(scale, _DOUBLES)
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


NOTED = CHUNK + _WIDTH  # numbers of a row that `note` writes: what is beyond the noted ones is anything


def _note_of(targets: int) -> Any:
    @intrinsic
    def note(typing_context, addresses, start, ranks, least, rows):  # type: ignore[no-untyped-def]
        """Of a chunk of bfloat16 as `variance` takes it and its (CHUNK,) `ranks`, the positions whose rank is `least` or more, in order: to the 3 + M `rows`
        (NOTED,) their ranks, their places (uint32), their base and their deltas (float32). How many."""

        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            addresses, start, ranks, least, rows = given
            long, chunk = ir.IntType(64), _Chunk(builder)
            stored = chunk.stored(addresses, start, targets + 1)
            least = chunk.repeated(builder.trunc(least, ir.IntType(32)), _INT)
            lanes = ir.Constant(_INT, list(range(_WIDTH)))
            noted = cgutils.alloca_once_value(builder, ir.Constant(long, 0))
            with cgutils.for_range(builder, ir.Constant(long, CHUNK // _WIDTH)) as loop:
                at = builder.mul(loop.index, ir.Constant(long, 2 * _WIDTH))
                rank = chunk.load(builder.add(ranks, builder.mul(at, ir.Constant(long, 2))), _INT, 4, 0)
                flags = builder.icmp_unsigned(">=", rank, least)
                first = builder.trunc(builder.mul(loop.index, ir.Constant(long, _WIDTH)), ir.IntType(32))
                base, *others = [chunk.floats(chunk.bits(builder.add(each, at), 0)) for each in stored]
                numbers = [rank, builder.add(chunk.repeated(first, _INT), lanes), base]
                numbers += [builder.fsub(each, base) for each in others]
                count = builder.load(noted)
                into = builder.add(rows, builder.mul(count, ir.Constant(long, 4)))
                for row, values in enumerate(numbers):
                    chunk.store(chunk.compressed(values, flags), into, 4, row * NOTED)
                builder.store(builder.add(count, chunk.flagged(flags)), noted)
            return builder.load(noted)

        return types.int64(*(types.int64,) * 5), generate

    return note


note_of_2, note_of_3, note_of_4 = _note_of(2), _note_of(3), _note_of(4)
