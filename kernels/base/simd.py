"""Vectors of 16 floats as a type that Numba understands; `kernels.base.tiles` makes register tiles of them.

A NumPy loop leaves it to the compiler to find vectors. Here ``f32x16`` names one: LLVM's ``<16 x float>``, a
register of AVX-512, two of AVX2 or four of NEON. Each operation is an *intrinsic*: a function whose
``codegen`` writes the LLVM instructions that a call stands for::

    fma(a, b, c)   in a kernel   ->   codegen(..., args=[a, b, c])   ->   %d = call @llvm.fma.v16f32(a, b, c)

Offsets and strides count floats from the start of a C-contiguous array. Nothing is bounds-checked.
"""

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, overload, register_model

from kernels.base.jit import kernel

LANES = 16
#: Bytes of a cache line, which one vector fills.
LINE = 4 * LANES

VECTOR = ir.VectorType(ir.FloatType(), LANES)
CONTRACT = ("contract",)
_INT = ir.IntType(32)
_LANE_INDEX = ir.VectorType(_INT, LANES)
_BYTES = ir.VectorType(ir.IntType(8), LANES)
_DOUBLES = ir.VectorType(ir.DoubleType(), LANES)
# A float array is aligned to its items at least. x86 loads unaligned vectors at no cost if they happen to be
# aligned, and `buffers.empty` aligns ours.
_ALIGN = 4


class F32x16(types.Type):
    """Numba type of one vector of 16 single-precision floats."""

    def __init__(self) -> None:
        super().__init__(name="f32x16")


f32x16 = F32x16()


@register_model(F32x16)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: F32x16) -> None:
        super().__init__(manager, numba_type, VECTOR)


# --- LLVM pieces, for those who write intrinsics ------------------------------------------------


def item_pointer(context: Any, builder: Any, array_type: Any, array: Any, offset: Any) -> Any:
    """Pointer to an item of a C-contiguous array."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [offset])


def _pointer(*item: Any, to: Any = VECTOR) -> Any:
    """`item_pointer`, to a vector that starts there."""
    return item[1].bitcast(item_pointer(*item), to.as_pointer())


def load_vector(context: Any, builder: Any, array_type: Any, array: Any, offset: Any) -> Any:
    """LLVM value of `load`."""
    return builder.load(_pointer(context, builder, array_type, array, offset), align=_ALIGN)


def store_vector(context: Any, builder: Any, array_type: Any, array: Any, offset: Any, vector: Any) -> None:
    """Write the instructions of `store`."""
    builder.store(vector, _pointer(context, builder, array_type, array, offset), align=_ALIGN)


def stream_vector(context: Any, builder: Any, array_type: Any, array: Any, offset: Any, vector: Any) -> None:
    """Write the instructions of `stream`."""
    store = builder.store(vector, _pointer(context, builder, array_type, array, offset), align=LINE)
    store.set_metadata("nontemporal", builder.module.add_metadata([_INT(1)]))


def splat(builder: Any, scalar: Any, vector_type: Any = VECTOR) -> Any:
    """LLVM value of a scalar in all lanes."""
    undefined = ir.Constant(vector_type, ir.Undefined)
    first = builder.insert_element(undefined, scalar, _INT(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_LANE_INDEX, [0] * LANES))


def fused_multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """LLVM value of ``a * b + c``."""
    signature = ir.FunctionType(VECTOR, [VECTOR] * 3)
    function = cgutils.get_or_insert_function(builder.module, signature, "llvm.fma.v16f32")
    return builder.call(function, [a, b, c])


def activated(builder: Any, test: Any, value: Any, slopes: Any) -> Any:
    """LLVM value of `where_positive`."""
    zero = ir.Constant(VECTOR, [0.0] * LANES)
    # A slope of 0 times inf would be NaN. The comparison is the same for all of a loop, which does it once.
    leaks = builder.fcmp_unordered("!=", slopes, zero)
    below = builder.select(leaks, builder.fmul(slopes, value), zero)
    return builder.select(builder.fcmp_unordered(">", test, zero), value, below)


# --- loads and stores ---------------------------------------------------------------------------


@intrinsic
def load(typing_context: Any, array: Any, offset: Any) -> Any:
    """``array[offset : offset + 16]`` as a vector."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return load_vector(context, builder, signature.args[0], *args)

    return f32x16(array, types.intp), codegen


@intrinsic
def store(typing_context: Any, array: Any, offset: Any, vector: Any) -> Any:
    """``array[offset : offset + 16] = vector``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        store_vector(context, builder, signature.args[0], *args)
        return context.get_dummy_value()

    return types.void(array, types.intp, f32x16), codegen


@intrinsic
def stream(typing_context: Any, array: Any, offset: Any, vector: Any) -> Any:
    """`store` to memory past the caches: for a whole cache line that is not read again at once.

    A store reads the line into the cache before it changes the line; this one does not, which saves a third
    of the traffic of a copy. The address must be a multiple of 64. `fence` once at the end.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        stream_vector(context, builder, signature.args[0], *args)
        return context.get_dummy_value()

    return types.void(array, types.intp, f32x16), codegen


@intrinsic
def fence(typing_context: Any) -> Any:
    """Other threads see all earlier stores, streamed ones too, before any later one."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@kernel
def put_vector(dst: Any, at: int, vector: Any, streams: bool) -> None:
    """Store a vector, past the caches or not; `fence` once at the end of what streams."""
    if streams:
        stream(dst, at, vector)
    else:
        store(dst, at, vector)


@intrinsic
def address(typing_context: Any, array: Any, offset: Any) -> Any:
    """Address of ``array[offset]``, inside the array or not: for `prefetch`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ptrtoint(item_pointer(context, builder, signature.args[0], *args), ir.IntType(64))

    return types.int64(array, types.intp), codegen


@intrinsic
def prefetch(typing_context: Any, place: Any) -> Any:
    """Prefetch the cache line at an `address` into the second-level cache; any address is safe."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(8).as_pointer())
        # For reading, second level, data: the first level is full of what the kernel works on.
        hints = [_INT(hint) for hint in (0, 2, 1)]
        function = ir.FunctionType(ir.VoidType(), [pointer.type, _INT, _INT, _INT])
        name = "llvm.prefetch.p0i8"
        builder.call(cgutils.get_or_insert_function(builder.module, function, name), [pointer, *hints])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def add_to_doubles(typing_context: Any, array: Any, offset: Any, vector: Any) -> Any:
    """``array[offset : offset + 16] += vector`` in a float64 array."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[0], *args[:2], to=_DOUBLES)
        total = builder.fadd(builder.load(pointer, align=8), builder.fpext(args[2], _DOUBLES))
        builder.store(total, pointer, align=8)
        return context.get_dummy_value()

    return types.void(array, types.intp, f32x16), codegen


@intrinsic
def load_bytes(typing_context: Any, array: Any, offset: Any) -> Any:
    """``array[offset : offset + 16]`` of a uint8 array, as floats."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[0], *args, to=_BYTES)
        return builder.uitofp(builder.load(pointer, align=1), VECTOR)

    return f32x16(array, types.intp), codegen


@intrinsic
def load_first_bytes(typing_context: Any, array: Any, offset: Any, count: Any) -> Any:
    """The first ``count`` lanes of `load_bytes`, then -1; memory past ``count`` is not touched."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[0], *args[:2], to=_BYTES)
        limit = splat(builder, builder.trunc(args[2], _INT), _LANE_INDEX)
        inside = builder.icmp_signed("<", ir.Constant(_LANE_INDEX, list(range(LANES))), limit)
        mask = ir.VectorType(ir.IntType(1), LANES)
        function = ir.FunctionType(_BYTES, [pointer.type, _INT, mask, _BYTES])
        masked_load = cgutils.get_or_insert_function(
            builder.module, function, "llvm.masked.load.v16i8.p0v16i8"
        )
        found = builder.call(masked_load, [pointer, _INT(1), inside, ir.Constant(_BYTES, [0] * LANES)])
        return builder.select(inside, builder.uitofp(found, VECTOR), ir.Constant(VECTOR, [-1.0] * LANES))

    return f32x16(array, types.intp, types.intp), codegen


@intrinsic
def store_bytes(typing_context: Any, array: Any, offset: Any, vector: Any) -> Any:
    """``array[offset : offset + 16] = vector`` in a uint8 array; whole numbers from 0 to 255."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[0], *args[:2], to=_BYTES)
        builder.store(builder.fptoui(args[2], _BYTES), pointer, align=1)
        return context.get_dummy_value()

    return types.void(array, types.intp, f32x16), codegen


# --- arithmetic ---------------------------------------------------------------------------------


def _of_vectors(emit: Callable[..., Any]) -> Any:
    """Intrinsic ``f(*vectors)`` from ``emit(builder, *values)``, which writes its LLVM instructions."""

    @intrinsic
    def operation(typing_context: Any, *vectors: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return emit(builder, *(builder.extract_value(args[0], i) for i in range(len(vectors))))

        if all(vector == f32x16 for vector in vectors):
            return f32x16(types.UniTuple(f32x16, len(vectors))), codegen  # type: ignore[attr-defined]
        return None

    operation.__doc__ = emit.__doc__
    return operation


@_of_vectors
def fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """``a * b + c`` with one rounding."""
    return fused_multiply_add(builder, a, b, c)


@_of_vectors
def where_positive(builder: Any, test: Any, value: Any, slopes: Any) -> Any:
    """Lanes of ``value`` where ``test`` is positive or NaN, else ``slopes`` times as much.

    Where a slope is 0, as ReLU's, the result is 0, also of infinity: as in the eager operators.
    """
    return activated(builder, test, value, slopes)


@_of_vectors
def where_above(builder: Any, x: Any, y: Any, a: Any, b: Any) -> Any:
    """Lanes of ``a`` where ``x`` beats ``y`` as a maximum, else of ``b``; NaN beats numbers only."""
    above = builder.and_(builder.fcmp_unordered(">", x, y), builder.fcmp_ordered("ord", y, y))
    return builder.select(above, a, b)


@_of_vectors
def where_equal(builder: Any, x: Any, y: Any, a: Any, b: Any) -> Any:
    """Lanes of ``a`` where ``x == y``, else of ``b``."""
    return builder.select(builder.fcmp_ordered("==", x, y), a, b)


@kernel
def read(x: Any, scale: Any, shift: Any, slope: Any) -> Any:
    """Value of a deferred vector: ``act(scale * x + shift)``."""
    v = fma(scale, x, shift)
    return where_positive(v, v, slope)


@intrinsic
def broadcast(typing_context: Any, scalar: Any) -> Any:
    """The same float32 in all 16 lanes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return splat(builder, args[0])

    return f32x16(types.float32), codegen


def _define_operator(symbol: Any, instruction: str) -> None:
    apply = _of_vectors(lambda builder, a, b: getattr(builder, instruction)(a, b, flags=CONTRACT))

    # Without annotations: Numba compares the signatures of the two to the letter.
    @overload(symbol)
    def resolve(a, b):  # type: ignore[no-untyped-def]
        if isinstance(a, F32x16) and isinstance(b, F32x16):
            return lambda a, b: apply(a, b)
        return None


_define_operator(operator.add, "fadd")
_define_operator(operator.sub, "fsub")
_define_operator(operator.mul, "fmul")
