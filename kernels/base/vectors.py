"""Vector operations that only the fused kernels need; the others are in `kernels.base.simd`."""

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from kernels.base.jit import kernel
from kernels.base.simd import LANES, VECTOR, f32x16, fma, item_pointer, where_positive

_BYTES = ir.VectorType(ir.IntType(8), LANES)
_DOUBLES = ir.VectorType(ir.DoubleType(), LANES)


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, offset: Any, to: Any) -> Any:
    item = item_pointer(context, builder, array_type, array, offset)
    return builder.bitcast(item, to.as_pointer())


@kernel
def read(x: Any, scale: Any, shift: Any, slope: Any) -> Any:
    """What a deferred vector means: ``act(scale * x + shift)``."""
    v = fma(scale, x, shift)
    return where_positive(v, v, slope)


@intrinsic
def add_to_doubles(typing_context: Any, array: Any, offset: Any, vector: Any) -> Any:
    """``array[offset : offset + 16] += vector`` in a float64 array."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[0], args[0], args[1], _DOUBLES)
        total = builder.fadd(builder.load(pointer, align=8), builder.fpext(args[2], _DOUBLES))
        builder.store(total, pointer, align=8)
        return context.get_dummy_value()

    return types.void(array, types.intp, f32x16), codegen


@intrinsic
def load_bytes(typing_context: Any, array: Any, offset: Any) -> Any:
    """``array[offset : offset + 16]`` of a uint8 array, as floats."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[0], args[0], args[1], _BYTES)
        return builder.uitofp(builder.load(pointer, align=1), VECTOR)

    return f32x16(array, types.intp), codegen


@intrinsic
def load_first_bytes(typing_context: Any, array: Any, offset: Any, count: Any) -> Any:
    """The first ``count`` lanes of `load_bytes`, then -1; memory past ``count`` is not touched."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, offset, count = args
        pointer = _pointer(context, builder, signature.args[0], array, offset, _BYTES)
        number, bit = ir.IntType(32), ir.IntType(1)
        places = ir.VectorType(number, LANES)
        one = ir.Constant(places, ir.Undefined)
        one = builder.insert_element(one, builder.trunc(count, number), number(0))
        limit = builder.shuffle_vector(one, one, ir.Constant(places, [0] * LANES))
        inside = builder.icmp_signed("<", ir.Constant(places, list(range(LANES))), limit)
        mask = ir.VectorType(bit, LANES)
        function = ir.FunctionType(_BYTES, [pointer.type, number, mask, _BYTES])
        name = "llvm.masked.load.v16i8.p0v16i8"
        load = cgutils.get_or_insert_function(builder.module, function, name)
        beyond = ir.Constant(_BYTES, [0] * LANES)
        found = builder.call(load, [pointer, number(1), inside, beyond])
        nothing = ir.Constant(VECTOR, [-1.0] * LANES)
        return builder.select(inside, builder.uitofp(found, VECTOR), nothing)

    return f32x16(array, types.intp, types.intp), codegen


@intrinsic
def store_bytes(typing_context: Any, array: Any, offset: Any, vector: Any) -> Any:
    """``array[offset : offset + 16] = vector`` in a uint8 array; whole numbers from 0 to 255."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[0], args[0], args[1], _BYTES)
        builder.store(builder.fptoui(args[2], _BYTES), pointer, align=1)
        return context.get_dummy_value()

    return types.void(array, types.intp, f32x16), codegen


@intrinsic
def where_above(typing_context: Any, x: Any, y: Any, a: Any, b: Any) -> Any:
    """Lanes of ``a`` where ``x`` beats ``y`` as a maximum, else of ``b``; NaN beats numbers only."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, y, a, b = args
        above = builder.and_(builder.fcmp_unordered(">", x, y), builder.fcmp_ordered("ord", y, y))
        return builder.select(above, a, b)

    return f32x16(f32x16, f32x16, f32x16, f32x16), codegen


@intrinsic
def where_equal(typing_context: Any, x: Any, y: Any, a: Any, b: Any) -> Any:
    """Lanes of ``a`` where ``x == y``, else of ``b``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, y, a, b = args
        return builder.select(builder.fcmp_ordered("==", x, y), a, b)

    return f32x16(f32x16, f32x16, f32x16, f32x16), codegen
