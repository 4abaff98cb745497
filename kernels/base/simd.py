"""Vectors of 16 floats as a type that Numba understands; `kernels.base.tiles` makes register tiles of them.

A NumPy loop leaves it to the compiler to find vectors. Here ``f32x16`` names one: LLVM's ``<16 x float>``, a
register of AVX-512, two of AVX2 or four of NEON. Each operation is an `instruction`, a function that writes
the LLVM instructions that a call in a kernel stands for::

    fma(a, b, c)   in a kernel   ->   fma(builder, a, b, c)   ->   %d = call @llvm.fma.v16f32(a, b, c)

Offsets and strides count floats from the start of a C-contiguous array. Nothing is bounds-checked.
"""

import inspect
import math
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

FLOAT = ir.FloatType()
VECTOR = ir.VectorType(FLOAT, LANES)
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


class Tile(types.Type):
    """Numba type of a register tile of ``high x wide`` rows and ``cols`` columns of vectors."""

    def __init__(self, high: int, wide: int, cols: int) -> None:
        self.shape = high, wide, cols
        self.count = math.prod(self.shape)
        super().__init__(name=f"Tile{self.shape}")


f32x16 = F32x16()


@register_model(F32x16)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: F32x16) -> None:
        super().__init__(manager, numba_type, VECTOR)


@register_model(Tile)
class _TileModel(models.PrimitiveModel):
    """LLVM's ``[count x <16 x float>]``: vector ``(h * wide + w) * cols + c``."""

    def __init__(self, manager: Any, numba_type: Tile) -> None:
        super().__init__(manager, numba_type, ir.ArrayType(VECTOR, numba_type.count))


# --- how an instruction is written --------------------------------------------------------------


class Items:
    """An array that an instruction is called with, as pointers to its items."""

    def __init__(self, builder: Any, data: Any) -> None:
        self.builder, self.data = builder, data

    def pointer(self, offset: Any, to: Any = VECTOR) -> Any:
        """Pointer to what starts at an item, of an LLVM type."""
        return self.builder.bitcast(self.builder.gep(self.data, [offset]), to.as_pointer())

    def load(self, offset: Any) -> Any:
        """Vector that starts at an item."""
        return self.builder.load(self.pointer(offset), align=_ALIGN)

    def store(self, vector: Any, offset: Any) -> None:
        """Store a vector to an item and those behind it."""
        self.builder.store(vector, self.pointer(offset), align=_ALIGN)

    def stream(self, vector: Any, offset: Any) -> None:
        """`store` past the caches."""
        store = self.builder.store(vector, self.pointer(offset), align=LINE)
        store.set_metadata("nontemporal", self.builder.module.add_metadata([_INT(1)]))


class Vectors(list[Any]):
    """The vectors of a tile that an instruction is called with, and the tile's ``shape``."""

    def __init__(self, builder: Any, tile: Any, shape: tuple[int, int, int]) -> None:
        super().__init__(builder.extract_value(tile, i) for i in range(math.prod(shape)))
        self.shape = shape


def instruction(returns: Any, *parameters: Any, literal: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """Let kernels call a function that writes LLVM instructions, ``write(builder, *arguments)``.

    Other instructions use it as ``name.write``. It gets an LLVM value for each argument, but `Items` of an
    array, `Vectors` of a tile and the integer itself of a constant. It returns an LLVM value, a list of
    vectors that make a tile, or None.

    Parameters
    ----------
    returns : Numba type, or callable
        Type of the result; a callable gets the types of the arguments.
    *parameters : Numba type or None
        Type that each argument is cast to; None leaves it as it is.
    literal : bool
        Whether integers are constants where the caller knows them at compile time.
    """

    def decorate(write: Callable[..., Any]) -> Any:
        def typing(typing_context: Any, *given: Any) -> Any:
            wanted = [have if want is None else want for want, have in zip(parameters, given, strict=True)]
            result = returns if isinstance(returns, types.Type) else returns(*given)
            return result(*wanted), codegen

        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            pairs = zip(signature.args, values, strict=True)
            found = write(builder, *(_argument(context, builder, *pair) for pair in pairs))
            if isinstance(found, list):
                tile = ir.Constant(ir.ArrayType(VECTOR, len(found)), ir.Undefined)
                for i, vector in enumerate(found):
                    tile = builder.insert_value(tile, vector, i)
                return tile
            return context.get_dummy_value() if found is None else found

        # Numba binds a call to the names of the parameters.
        typing.__signature__ = inspect.signature(write)  # type: ignore[attr-defined]
        typing.__name__, typing.__doc__ = write.__name__, write.__doc__
        made = intrinsic(prefer_literal=literal)(typing)
        made.write = write
        return made

    return decorate


def _argument(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    if isinstance(kind, types.Array):
        return Items(builder, context.make_array(kind)(context, builder, value).data)
    if isinstance(kind, types.IntegerLiteral):
        return kind.literal_value
    return Vectors(builder, value, kind.shape) if isinstance(kind, Tile) else value


def splat(builder: Any, scalar: Any, vector_type: Any = VECTOR) -> Any:
    """LLVM value of a scalar in all lanes."""
    undefined = ir.Constant(vector_type, ir.Undefined)
    first = builder.insert_element(undefined, scalar, _INT(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_LANE_INDEX, [0] * LANES))


# --- loads and stores ---------------------------------------------------------------------------


@instruction(f32x16, None, types.intp)
def load(builder: Any, array: Any, offset: Any) -> Any:
    """``array[offset : offset + 16]`` as a vector."""
    return array.load(offset)


@instruction(types.void, None, types.intp, f32x16)
def store(builder: Any, array: Any, offset: Any, vector: Any) -> None:
    """``array[offset : offset + 16] = vector``."""
    array.store(vector, offset)


@instruction(types.void, None, types.intp, f32x16)
def stream(builder: Any, array: Any, offset: Any, vector: Any) -> None:
    """`store` to memory past the caches: for a whole cache line that is not read again at once.

    A store reads the line into the cache before it changes the line; this one does not, which saves a third
    of the traffic of a copy. The address must be a multiple of 64. `fence` once at the end.
    """
    array.stream(vector, offset)


@instruction(types.void)
def fence(builder: Any) -> None:
    """Other threads see all earlier stores, streamed ones too, before any later one."""
    builder.fence("seq_cst")


@kernel
def put_vector(dst: Any, at: int, vector: Any, streams: bool) -> None:
    """Store a vector, past the caches or not; `fence` once at the end of what streams."""
    if streams:
        stream(dst, at, vector)
    else:
        store(dst, at, vector)


@instruction(types.int64, None, types.intp)
def address(builder: Any, array: Any, offset: Any) -> Any:
    """Address of ``array[offset]``, inside the array or not: for `prefetch`."""
    return builder.ptrtoint(array.pointer(offset), ir.IntType(64))


@instruction(types.void, types.int64)
def prefetch(builder: Any, place: Any) -> None:
    """Prefetch the cache line at an `address` into the second-level cache; any address is safe."""
    pointer = builder.inttoptr(place, ir.IntType(8).as_pointer())
    # For reading, second level, data: the first level is full of what the kernel works on.
    hints = [_INT(hint) for hint in (0, 2, 1)]
    function = ir.FunctionType(ir.VoidType(), [pointer.type, _INT, _INT, _INT])
    name = "llvm.prefetch.p0i8"
    builder.call(cgutils.get_or_insert_function(builder.module, function, name), [pointer, *hints])


@instruction(types.void, None, types.intp, f32x16)
def add_to_doubles(builder: Any, array: Any, offset: Any, vector: Any) -> None:
    """``array[offset : offset + 16] += vector`` in a float64 array."""
    pointer = array.pointer(offset, _DOUBLES)
    total = builder.fadd(builder.load(pointer, align=8), builder.fpext(vector, _DOUBLES))
    builder.store(total, pointer, align=8)


@instruction(f32x16, None, types.intp)
def load_bytes(builder: Any, array: Any, offset: Any) -> Any:
    """``array[offset : offset + 16]`` of a uint8 array, as floats."""
    return builder.uitofp(builder.load(array.pointer(offset, _BYTES), align=1), VECTOR)


@instruction(f32x16, None, types.intp, types.intp)
def load_first_bytes(builder: Any, array: Any, offset: Any, count: Any) -> Any:
    """The first ``count`` lanes of `load_bytes`, then -1; memory past ``count`` is not touched."""
    pointer = array.pointer(offset, _BYTES)
    limit = splat(builder, builder.trunc(count, _INT), _LANE_INDEX)
    inside = builder.icmp_signed("<", ir.Constant(_LANE_INDEX, list(range(LANES))), limit)
    function = ir.FunctionType(_BYTES, [pointer.type, _INT, ir.VectorType(ir.IntType(1), LANES), _BYTES])
    name = "llvm.masked.load.v16i8.p0v16i8"
    masked_load = cgutils.get_or_insert_function(builder.module, function, name)
    found = builder.call(masked_load, [pointer, _INT(1), inside, ir.Constant(_BYTES, [0] * LANES)])
    return builder.select(inside, builder.uitofp(found, VECTOR), ir.Constant(VECTOR, [-1.0] * LANES))


@instruction(types.void, None, types.intp, f32x16)
def store_bytes(builder: Any, array: Any, offset: Any, vector: Any) -> None:
    """``array[offset : offset + 16] = vector`` in a uint8 array; whole numbers from 0 to 255."""
    builder.store(builder.fptoui(vector, _BYTES), array.pointer(offset, _BYTES), align=1)


# --- arithmetic ---------------------------------------------------------------------------------


@instruction(f32x16, types.float32)
def broadcast(builder: Any, scalar: Any) -> Any:
    """The same float32 in all 16 lanes."""
    return splat(builder, scalar)


@instruction(f32x16, f32x16, f32x16, f32x16)
def fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """``a * b + c`` with one rounding."""
    signature = ir.FunctionType(VECTOR, [VECTOR] * 3)
    function = cgutils.get_or_insert_function(builder.module, signature, "llvm.fma.v16f32")
    return builder.call(function, [a, b, c])


@instruction(f32x16, f32x16, f32x16, f32x16)
def where_positive(builder: Any, test: Any, value: Any, slopes: Any) -> Any:
    """Lanes of ``value`` where ``test`` is positive or NaN, else ``slopes`` times as much.

    Where a slope is 0, as ReLU's, the result is 0, also of infinity: as in the eager operators.
    """
    zero = ir.Constant(VECTOR, [0.0] * LANES)
    # A slope of 0 times inf would be NaN. The comparison is the same for all of a loop, which does it once.
    leaks = builder.fcmp_unordered("!=", slopes, zero)
    below = builder.select(leaks, builder.fmul(slopes, value), zero)
    return builder.select(builder.fcmp_unordered(">", test, zero), value, below)


@instruction(f32x16, f32x16, f32x16, f32x16, f32x16)
def where_above(builder: Any, x: Any, y: Any, a: Any, b: Any) -> Any:
    """Lanes of ``a`` where ``x`` beats ``y`` as a maximum, else of ``b``; NaN beats numbers only."""
    above = builder.and_(builder.fcmp_unordered(">", x, y), builder.fcmp_ordered("ord", y, y))
    return builder.select(above, a, b)


@instruction(f32x16, f32x16, f32x16, f32x16, f32x16)
def where_equal(builder: Any, x: Any, y: Any, a: Any, b: Any) -> Any:
    """Lanes of ``a`` where ``x == y``, else of ``b``."""
    return builder.select(builder.fcmp_ordered("==", x, y), a, b)


@kernel
def read(x: Any, scale: Any, shift: Any, slope: Any) -> Any:
    """Value of a deferred vector: ``act(scale * x + shift)``."""
    v = fma(scale, x, shift)
    return where_positive(v, v, slope)


def _define_operator(symbol: Any, opcode: str) -> None:
    def write(builder: Any, a: Any, b: Any) -> Any:
        return getattr(builder, opcode)(a, b, flags=CONTRACT)

    apply = instruction(f32x16, f32x16, f32x16)(write)

    # Without annotations: Numba compares the signatures of the two to the letter.
    @overload(symbol)
    def resolve(a, b):  # type: ignore[no-untyped-def]
        if isinstance(a, F32x16) and isinstance(b, F32x16):
            return lambda a, b: apply(a, b)
        return None


_define_operator(operator.add, "fadd")
_define_operator(operator.sub, "fsub")
_define_operator(operator.mul, "fmul")
