"""Vectors of 16 floats and register tiles, as types that Numba understands.

A NumPy loop leaves it to the compiler to find vectors and to keep sums in registers. It finds the
vectors; it does not keep a block of sums in registers across a reduction, and that is most of a fast
convolution. So we name both: ``f32x16`` is one vector, and ``Tile(n)`` is ``n`` of them, which LLVM
keeps in registers as long as there are enough. A tile of ``rows x cols`` vectors is updated by an
outer product, one row for each voxel and one column for each block of 16 output channels::

                    weights[0:16]   weights[16:32]        one load a column
    src[voxel 0]  [ sum  sum  ... | sum  sum  ...  ]
    src[voxel 1]  [ sum  sum  ... | sum  sum  ...  ]      one broadcast a row
    src[voxel 2]  [ sum  sum  ... | sum  sum  ...  ]      rows * cols fused multiply-adds

``rows * cols`` sums need ``rows + cols`` loads, so the larger the tile, the less the load ports
matter; 24 sums leave 8 of AVX-512's 32 registers for the operands. LLVM lowers ``<16 x float>`` to
two AVX2 or four NEON registers by itself: one source serves all, only the tile's size changes
(``machine.tile_vectors``).

Rows and columns are compile-time constants: integers that a factory closes over. Offsets and strides
count floats from the start of a C-contiguous array. Nothing is bounds-checked.

Source: Goto and van de Geijn, "Anatomy of high-performance matrix multiplication" (2008), section 5;
Georganas et al., "Anatomy of high-performance deep learning convolutions on SIMD architectures" (2018).
"""

import math
import operator
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, overload, register_model

LANES = 16

VECTOR = ir.VectorType(ir.FloatType(), LANES)
_LANE_INDEX = ir.VectorType(ir.IntType(32), LANES)
# A float array is aligned to its items at least; x86 loads unaligned vectors at no cost if they
# happen to be aligned, and `memory.empty` sees to it that ours are.
_ALIGN = 4
_CONTRACT = ("contract",)


class F32x16(types.Type):
    """Numba type of one vector of 16 single-precision floats."""

    def __init__(self) -> None:
        super().__init__(name="f32x16")


class Tile(types.Type):
    """Numba type of a register tile: ``count`` vectors of 16 floats."""

    def __init__(self, count: int) -> None:
        self.count = count
        super().__init__(name=f"Tile({count})")


f32x16 = F32x16()


@register_model(F32x16)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: F32x16) -> None:
        super().__init__(manager, numba_type, VECTOR)


@register_model(Tile)
class _TileModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: Tile) -> None:
        super().__init__(manager, numba_type, ir.ArrayType(VECTOR, numba_type.count))


# --- LLVM pieces that the intrinsics are made of ------------------------------------------------


def item_pointer(context: Any, builder: Any, array_type: Any, array: Any, offset: Any) -> Any:
    """Pointer to an item of a C-contiguous array, for those who write intrinsics."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [offset])


def _load(context: Any, builder: Any, array_type: Any, array: Any, offset: Any) -> Any:
    pointer = item_pointer(context, builder, array_type, array, offset)
    return builder.load(builder.bitcast(pointer, VECTOR.as_pointer()), align=_ALIGN)


def _store(context: Any, builder: Any, array_type: Any, array: Any, offset: Any, vector: Any) -> None:
    pointer = item_pointer(context, builder, array_type, array, offset)
    builder.store(vector, builder.bitcast(pointer, VECTOR.as_pointer()), align=_ALIGN)


def _stream(context: Any, builder: Any, array_type: Any, array: Any, offset: Any, vector: Any) -> None:
    pointer = item_pointer(context, builder, array_type, array, offset)
    line = builder.bitcast(pointer, VECTOR.as_pointer())
    store = builder.store(vector, line, align=LANES * 4)
    hint = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
    store.set_metadata("nontemporal", hint)


def splat(builder: Any, scalar: Any) -> Any:
    """LLVM value of a scalar in all lanes, for those who write intrinsics."""
    undefined = ir.Constant(VECTOR, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_LANE_INDEX, [0] * LANES))


def fused_multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """LLVM value of ``a * b + c``, for those who write intrinsics."""
    signature = ir.FunctionType(VECTOR, [VECTOR] * 3)
    function = cgutils.get_or_insert_function(builder.module, signature, "llvm.fma.v16f32")
    return builder.call(function, [a, b, c])


def _times(builder: Any, value: Any, factor: int) -> Any:
    return builder.mul(value, ir.Constant(value.type, factor))


def _unknown(builder: Any, index: Any) -> Any:
    """The same index, but LLVM does not know.

    Where rows overlap, as those of a kernel's taps do, LLVM finds that the next step of a loop will load
    again what this one has, and keeps it. To broadcast it from a register takes the port of a
    multiply-add, where to load it again is free.
    """
    function = ir.FunctionType(index.type, [index.type])
    return builder.asm(function, "", "=r,0", [index], side_effect=True)


# --- one vector ---------------------------------------------------------------------------------


@intrinsic
def load(typing_context: Any, array: Any, offset: Any) -> Any:
    """``array[offset : offset + 16]`` as a vector."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _load(context, builder, signature.args[0], args[0], args[1])

    return f32x16(array, types.intp), codegen


@intrinsic
def store(typing_context: Any, array: Any, offset: Any, vector: Any) -> Any:
    """``array[offset : offset + 16] = vector``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _store(context, builder, signature.args[0], args[0], args[1], args[2])
        return context.get_dummy_value()

    return types.void(array, types.intp, f32x16), codegen


@intrinsic
def stream(typing_context: Any, array: Any, offset: Any, vector: Any) -> Any:
    """`store` to memory past the caches: for what fills a whole cache line and is not read soon.

    A store reads the line into the cache before it changes it; this one does not, which saves a third
    of the traffic of a copy. The address must be a multiple of 64. `fence` once at the end.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _stream(context, builder, signature.args[0], args[0], args[1], args[2])
        return context.get_dummy_value()

    return types.void(array, types.intp, f32x16), codegen


@intrinsic
def fence(typing_context: Any) -> Any:
    """What was stored before, streamed too, is seen by other threads before what is stored after."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def address(typing_context: Any, array: Any, offset: Any) -> Any:
    """Where ``array[offset]`` is, or would be: for `prefetch`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = item_pointer(context, builder, signature.args[0], args[0], args[1])
        return builder.ptrtoint(pointer, ir.IntType(64))

    return types.int64(array, types.intp), codegen


@intrinsic
def prefetch(typing_context: Any, place: Any) -> Any:
    """Have the cache line at an `address` brought near, if there is one."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        # For reading, data, into the second-level cache: the first is full of what is being worked on.
        hints = [ir.Constant(number, hint) for hint in (0, 2, 1)]
        function = ir.FunctionType(ir.VoidType(), [pointer.type, number, number, number])
        name = "llvm.prefetch.p0i8"
        builder.call(cgutils.get_or_insert_function(builder.module, function, name), [pointer, *hints])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def broadcast(typing_context: Any, scalar: Any) -> Any:
    """The same float32 in all 16 lanes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return splat(builder, args[0])

    return f32x16(types.float32), codegen


@intrinsic
def fma(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """``a * b + c`` with one rounding."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return fused_multiply_add(builder, *args)

    return f32x16(f32x16, f32x16, f32x16), codegen


@intrinsic
def where_positive(typing_context: Any, test: Any, value: Any, slopes: Any) -> Any:
    """Lanes of ``value`` where ``test`` is positive or NaN, else ``slopes`` times it; see `tile_mask`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _activated(builder, *args)

    return f32x16(f32x16, f32x16, f32x16), codegen


def _activated(builder: Any, test: Any, value: Any, slopes: Any) -> Any:
    zero = ir.Constant(VECTOR, [0.0] * LANES)
    # A slope of 0 times inf would be NaN. The comparison is the same for all of a loop, which does it once.
    leaks = builder.fcmp_unordered("!=", slopes, zero)
    below = builder.select(leaks, builder.fmul(slopes, value), zero)
    return builder.select(builder.fcmp_unordered(">", test, zero), value, below)


def _binary(name: str) -> Any:
    @intrinsic
    def apply(typing_context: Any, a: Any, b: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return getattr(builder, name)(*args, flags=_CONTRACT)

        return f32x16(f32x16, f32x16), codegen

    return apply


_add, _sub, _mul = _binary("fadd"), _binary("fsub"), _binary("fmul")


def _define_operator(symbol: Any, apply: Any) -> None:
    # Without annotations: Numba compares the signatures of the two to the letter.
    @overload(symbol)
    def resolve(a, b):  # type: ignore[no-untyped-def]
        if isinstance(a, F32x16) and isinstance(b, F32x16):
            return lambda a, b: apply(a, b)
        return None


_define_operator(operator.add, _add)
_define_operator(operator.sub, _sub)
_define_operator(operator.mul, _mul)


# --- register tiles -----------------------------------------------------------------------------


@intrinsic(prefer_literal=True)
def tile_zero(typing_context: Any, rows: Any, cols: Any) -> Any:
    """Tile of zeros."""
    tile_type = Tile(rows.literal_value * cols.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(ir.ArrayType(VECTOR, tile_type.count), None)

    return tile_type(rows, cols), codegen


@intrinsic(prefer_literal=True)
def tile_fill(typing_context: Any, array: Any, offset: Any, rows: Any, cols: Any) -> Any:
    """Tile whose rows are all ``array[offset : offset + 16 * cols]`` (a bias, say)."""
    R, C = rows.literal_value, cols.literal_value
    tile_type = Tile(R * C)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        tile = ir.Constant(ir.ArrayType(VECTOR, R * C), ir.Undefined)
        array_type, start = signature.args[0], args[1]
        for c in range(C):
            at = builder.add(start, ir.Constant(start.type, LANES * c))
            vector = _load(context, builder, array_type, args[0], at)
            for r in range(R):
                tile = builder.insert_value(tile, vector, r * C + c)
        return tile

    return tile_type(array, types.intp, rows, cols), codegen


@intrinsic(prefer_literal=True)
def tile_fma(typing_context: Any, factor: Any, tile: Any, addend: Any) -> Any:
    """``factor * tile + addend`` in each vector; the factor is one vector, the addend one or a tile."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        factor, tile, addend = args
        for i in range(signature.args[1].count):
            term = addend if signature.args[2] == f32x16 else builder.extract_value(addend, i)
            value = fused_multiply_add(builder, factor, builder.extract_value(tile, i), term)
            tile = builder.insert_value(tile, value, i)
        return tile

    return tile(factor, tile, addend), codegen


@intrinsic(prefer_literal=True)
def tile_add(typing_context: Any, tile: Any, addend: Any) -> Any:
    """``tile + addend`` in each vector; the addend is one vector or a tile."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        tile, addend = args
        for i in range(signature.args[0].count):
            term = addend if signature.args[1] == f32x16 else builder.extract_value(addend, i)
            value = builder.fadd(builder.extract_value(tile, i), term, flags=_CONTRACT)
            tile = builder.insert_value(tile, value, i)
        return tile

    return tile(tile, addend), codegen


@intrinsic(prefer_literal=True)
def tile_mask(typing_context: Any, tile: Any, test: Any, slopes: Any) -> Any:
    """Lanes of a tile where those of ``test`` are positive or NaN, else ``slopes`` times as much.

    Where a slope is 0, as ReLU's, that is 0, also of infinity. So it is what the eager operators do.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        tile, test, slopes = args
        for i in range(signature.args[0].count):
            value, by = builder.extract_value(tile, i), builder.extract_value(test, i)
            tile = builder.insert_value(tile, _activated(builder, by, value, slopes), i)
        return tile

    return tile(tile, tile, f32x16), codegen


@intrinsic
def tile_first(typing_context: Any, tile: Any) -> Any:
    """First vector of a tile."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.extract_value(args[0], 0)

    return f32x16(tile), codegen


@intrinsic
def tile_sum(typing_context: Any, tile: Any) -> Any:
    """Sum of the vectors of a tile, in pairs, and pairs of pairs."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        terms = [builder.extract_value(args[0], i) for i in range(signature.args[0].count)]
        while len(terms) > 1:
            pairs = [builder.fadd(a, b) for a, b in zip(terms[::2], terms[1::2], strict=False)]
            terms = pairs + terms[2 * len(pairs) :]
        return terms[0]

    return f32x16(tile), codegen


@intrinsic
def tile_dot(typing_context: Any, a: Any, b: Any) -> Any:
    """Sum over the vectors of two tiles of ``a * b``, in float32 from the first to the last."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        total = ir.Constant(VECTOR, [0.0] * LANES)
        for i in range(signature.args[0].count):
            x, y = (builder.extract_value(tile, i) for tile in args)
            total = fused_multiply_add(builder, x, y, total)
        return total

    return f32x16(a, b), codegen


@intrinsic
def tile_transpose(typing_context: Any, tile: Any) -> Any:
    """Transpose of a tile of 16 vectors: lane j of vector i becomes lane i of vector j.

    Four rounds, one for each bit of an index: vectors i and i + bit, where i lacks the bit, exchange the
    off-diagonal quarters of their lanes. For a bit of 1::

        a0 a1 a2 a3 ...      a0 b0 a2 b2 ...
        b0 b1 b2 b3 ...  ->  a1 b1 a3 b3 ...

    Source: Warren, "Hacker's Delight" (2012), section 7-3.
    """
    if tile.count != LANES:
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vectors = [builder.extract_value(args[0], i) for i in range(LANES)]
        lanes = ir.VectorType(ir.IntType(32), LANES)
        for bit in (1, 2, 4, 8):
            # Lanes of the second operand of a shuffle are numbered from 16.
            upper = [LANES + (lane ^ bit) if lane & bit else lane for lane in range(LANES)]
            lower = [LANES + lane if lane & bit else lane ^ bit for lane in range(LANES)]
            for i in (i for i in range(LANES) if not i & bit):
                pair = vectors[i], vectors[i + bit]
                vectors[i] = builder.shuffle_vector(*pair, ir.Constant(lanes, upper))
                vectors[i + bit] = builder.shuffle_vector(*pair, ir.Constant(lanes, lower))
        tile = args[0]
        for i, vector in enumerate(vectors):
            tile = builder.insert_value(tile, vector, i)
        return tile

    return tile(tile), codegen


def _tile_offsets(builder: Any, start: Any, strides: Any, high: int, wide: int, cols: int) -> Any:
    """Offsets of a tile's vectors in memory, row by row."""
    for h in range(high):
        for w in range(wide):
            for c in range(cols):
                at = start
                for stride, index in zip(strides, (h, w, c), strict=True):
                    at = builder.add(at, _times(builder, stride, index))
                yield at


@intrinsic(prefer_literal=True)
def tile_load(
    typing_context: Any,
    array: Any,
    offset: Any,
    row: Any,
    step: Any,
    col: Any,
    high: Any,
    wide: Any,
    cols: Any,
) -> Any:
    """Tile with ``tile[(h, w), c] = array[offset + h * row + w * step + c * col :][:16]``."""
    size = high.literal_value, wide.literal_value, cols.literal_value
    tile_type = Tile(math.prod(size))

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, start, *strides = args[:5]
        tile = ir.Constant(ir.ArrayType(VECTOR, tile_type.count), ir.Undefined)
        for i, at in enumerate(_tile_offsets(builder, start, strides, *size)):
            vector = _load(context, builder, signature.args[0], array, at)
            tile = builder.insert_value(tile, vector, i)
        return tile

    offset = types.intp
    return tile_type(array, offset, offset, offset, offset, high, wide, cols), codegen


@intrinsic(prefer_literal=True)
def tile_store(
    typing_context: Any,
    tile: Any,
    array: Any,
    offset: Any,
    row: Any,
    step: Any,
    col: Any,
    high: Any,
    wide: Any,
    cols: Any,
) -> Any:
    """``array[offset + h * row + w * step + c * col :][:16] = tile[(h, w), c]``."""
    size = high.literal_value, wide.literal_value, cols.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        tile, array, start, *strides = args[:6]
        for i, at in enumerate(_tile_offsets(builder, start, strides, *size)):
            vector = builder.extract_value(tile, i)
            _store(context, builder, signature.args[1], array, at, vector)
        return context.get_dummy_value()

    offset = types.intp
    return types.void(tile, array, offset, offset, offset, offset, high, wide, cols), codegen


@intrinsic(prefer_literal=True)
def tile_stream(
    typing_context: Any, tile: Any, array: Any, offset: Any, row: Any, step: Any, high: Any, wide: Any
) -> Any:
    """`tile_store` of one column past the caches; see `stream`."""
    size = high.literal_value, wide.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        tile, array, start, row, step = args[:5]
        strides = row, step, step
        for i, at in enumerate(_tile_offsets(builder, start, strides, *size, 1)):
            vector = builder.extract_value(tile, i)
            _stream(context, builder, signature.args[1], array, at, vector)
        return context.get_dummy_value()

    offset = types.intp
    return types.void(tile, array, offset, offset, offset, high, wide), codegen


@intrinsic(prefer_literal=True)
def tile_rank1(
    typing_context: Any,
    tile: Any,
    src: Any,
    src_offset: Any,
    src_row: Any,
    src_step: Any,
    weights: Any,
    weights_offset: Any,
    high: Any,
    wide: Any,
    cols: Any,
) -> Any:
    """Outer product ``tile[(h, w), c] += src[h, w] * weights[c]``, the heart of every fast kernel.

    The rows of the tile are a small rectangle, ``high x wide``: ``src[h, w]`` is the scalar at
    ``src_offset + h * src_row + w * src_step``, and ``weights[c]`` the vector at
    ``weights_offset + 16 * c``. ``src_step`` should be a constant too: the ``wide`` addresses are then
    one register and ``wide`` displacements.
    """
    H, W, C = high.literal_value, wide.literal_value, cols.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        tile, src, src_offset, src_row, src_step, weights, weights_offset = args[:7]
        vectors = []
        for c in range(C):
            at = builder.add(weights_offset, ir.Constant(weights_offset.type, LANES * c))
            vectors.append(_load(context, builder, signature.args[5], weights, at))
        for h in range(H):
            row = builder.add(src_offset, _times(builder, src_row, h))
            if h:
                row = _unknown(builder, row)
            for w in range(W):
                at = builder.add(row, _times(builder, src_step, w))
                pointer = item_pointer(context, builder, signature.args[1], src, at)
                scalar = splat(builder, builder.load(pointer))
                for c in range(C):
                    index = (h * W + w) * C + c
                    total = fused_multiply_add(
                        builder, scalar, vectors[c], builder.extract_value(tile, index)
                    )
                    tile = builder.insert_value(tile, total, index)
        return tile

    offset = types.intp
    return tile(tile, src, offset, offset, offset, weights, offset, high, wide, cols), codegen
