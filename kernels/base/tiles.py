"""Register tiles: blocks of sums that stay in vector registers during a reduction, as Numba types.

LLVM finds vectors in a NumPy loop, but it does not keep a block of sums in registers across a reduction, and
that is most of a fast convolution. So we name the block: ``Tile(high, wide, cols)`` is that many vectors,
which LLVM keeps in registers as long as there are enough. One outer product updates a tile, with a row for
each voxel (a rectangle of ``high x wide``) and a column for each block of 16 output channels::

                    weights[0:16]   weights[16:32]        one load a column
    src[voxel 0]  [ sum  sum  ... | sum  sum  ...  ]
    src[voxel 1]  [ sum  sum  ... | sum  sum  ...  ]      one broadcast a row
    src[voxel 2]  [ sum  sum  ... | sum  sum  ...  ]      rows * cols fused multiply-adds

``rows * cols`` sums need ``rows + cols`` loads: the larger the tile, the less the load ports matter. 24 sums
leave 8 of AVX-512's 32 registers for the operands. LLVM lowers ``<16 x float>`` to two AVX2 or four NEON
registers by itself: one source serves all, only the tile's size changes (`machine.tile_vectors`).

The function that makes a tile takes its shape, compile-time constants (integers that a factory closes over);
all others read the shape from the type. Offsets and strides are as in `kernels.base.simd`.

Source: Goto and van de Geijn, "Anatomy of high-performance matrix multiplication" (2008), section 5;
Georganas et al., "Anatomy of high-performance deep learning convolutions on SIMD architectures" (2018).
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, models, register_model

from kernels.base.jit import kernel
from kernels.base.simd import (
    CONTRACT,
    LANES,
    VECTOR,
    activated,
    f32x16,
    fused_multiply_add,
    item_pointer,
    load_vector,
    splat,
    store_vector,
    stream_vector,
)


class Tile(types.Type):
    """Numba type of a register tile of ``high x wide`` rows and ``cols`` columns of vectors."""

    def __init__(self, high: int, wide: int, cols: int) -> None:
        self.shape = high, wide, cols
        self.count = math.prod(self.shape)
        super().__init__(name=f"Tile{self.shape}")


@register_model(Tile)
class _TileModel(models.PrimitiveModel):
    """LLVM's ``[count x <16 x float>]``: vector ``(h * wide + w) * cols + c``."""

    def __init__(self, manager: Any, numba_type: Tile) -> None:
        super().__init__(manager, numba_type, ir.ArrayType(VECTOR, numba_type.count))


def _shape(*sizes: Any) -> Tile:
    return Tile(*(size.literal_value for size in sizes))


def _vectors(builder: Any, tile: Any, tile_type: Tile) -> list[Any]:
    return [builder.extract_value(tile, i) for i in range(tile_type.count)]


def tile_of(builder: Any, vectors: list[Any]) -> Any:
    """LLVM value of a tile of some vectors, for those who write intrinsics."""
    tile = ir.Constant(ir.ArrayType(VECTOR, len(vectors)), ir.Undefined)
    for i, vector in enumerate(vectors):
        tile = builder.insert_value(tile, vector, i)
    return tile


def _offsets(builder: Any, start: Any, strides: Any, tile_type: Tile) -> Any:
    """Offsets of a tile's vectors in memory, row by row."""
    for indices in itertools.product(*map(range, tile_type.shape)):
        at = start
        for stride, index in zip(strides, indices, strict=True):
            at = builder.add(at, _times(builder, stride, index))
        yield at


def _times(builder: Any, value: Any, factor: int) -> Any:
    return builder.mul(value, ir.Constant(value.type, factor))


# --- making, loading and storing ----------------------------------------------------------------


@intrinsic(prefer_literal=True)
def tile_zero(typing_context: Any, high: Any, wide: Any, cols: Any) -> Any:
    """Tile of zeros."""
    tile_type = _shape(high, wide, cols)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(ir.ArrayType(VECTOR, tile_type.count), None)

    return tile_type(high, wide, cols), codegen


@intrinsic(prefer_literal=True)
def tile_fill(typing_context: Any, array: Any, offset: Any, high: Any, wide: Any, cols: Any) -> Any:
    """Tile whose rows are all ``array[offset : offset + 16 * cols]`` (a bias, say)."""
    tile_type = _shape(high, wide, cols)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, start = args[:2]
        row = []
        for c in range(tile_type.shape[2]):
            at = builder.add(start, ir.Constant(start.type, LANES * c))
            row.append(load_vector(context, builder, signature.args[0], array, at))
        return tile_of(builder, row * (tile_type.count // len(row)))

    return tile_type(array, types.intp, high, wide, cols), codegen


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
    tile_type, offset = _shape(high, wide, cols), types.intp

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, start, *strides = args[:5]
        item = context, builder, signature.args[0], array
        places = _offsets(builder, start, strides, tile_type)
        return tile_of(builder, [load_vector(*item, at) for at in places])

    return tile_type(array, offset, offset, offset, offset, high, wide, cols), codegen


@intrinsic
def tile_store(typing_context: Any, tile: Any, array: Any, offset: Any, row: Any, step: Any, col: Any) -> Any:
    """``array[offset + h * row + w * step + c * col :][:16] = tile[(h, w), c]``."""
    return types.void(tile, array, *[types.intp] * 4), _storing(store_vector)


@intrinsic
def tile_stream(
    typing_context: Any, tile: Any, array: Any, offset: Any, row: Any, step: Any, col: Any
) -> Any:
    """`tile_store` past the caches; see `simd.stream`."""
    return types.void(tile, array, *[types.intp] * 4), _storing(stream_vector)


def _storing(store: Callable[..., None]) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        tile, array, start, *strides = args
        places = _offsets(builder, start, strides, signature.args[0])
        for at, vector in zip(places, _vectors(builder, tile, signature.args[0]), strict=True):
            store(context, builder, signature.args[1], array, at, vector)
        return context.get_dummy_value()

    return codegen


@kernel
def put_tile(dst: Any, at: int, row: int, step: int, tile: Any, streams: bool) -> None:
    """Store a tile of one column, past the caches or not."""
    if streams:
        tile_stream(tile, dst, at, row, step, 0)
    else:
        tile_store(tile, dst, at, row, step, 0)


# --- arithmetic ---------------------------------------------------------------------------------


@intrinsic
def tile_rank1(
    typing_context: Any,
    tile: Any,
    src: Any,
    src_offset: Any,
    src_row: Any,
    src_step: Any,
    weights: Any,
    weights_offset: Any,
) -> Any:
    """Outer product ``tile[(h, w), c] += src[h, w] * weights[c]``, the heart of every fast kernel.

    ``src[h, w]`` is the scalar at ``src_offset + h * src_row + w * src_step``, and ``weights[c]`` the vector
    at ``weights_offset + 16 * c``. ``src_step`` should be a constant: the addresses of a row of the rectangle
    are then one register and ``wide`` displacements.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        tile, src, src_offset, src_row, src_step, weights, weights_offset = args
        high, wide, cols = signature.args[0].shape
        vectors: list[Any] = []
        sums: list[Any] = []
        for c in range(cols):
            at = builder.add(weights_offset, ir.Constant(weights_offset.type, LANES * c))
            vectors.append(load_vector(context, builder, signature.args[5], weights, at))
        for h, w in itertools.product(range(high), range(wide)):
            if w == 0:
                row = builder.add(src_offset, _times(builder, src_row, h))
                row = _unknown(builder, row) if h else row
            at = builder.add(row, _times(builder, src_step, w))
            pointer = item_pointer(context, builder, signature.args[1], src, at)
            scalar = splat(builder, builder.load(pointer))
            for vector in vectors:
                total = builder.extract_value(tile, len(sums))
                sums.append(fused_multiply_add(builder, scalar, vector, total))
        return tile_of(builder, sums)

    offset = types.intp
    return tile(tile, src, offset, offset, offset, weights, offset), codegen


def _unknown(builder: Any, index: Any) -> Any:
    """Return the same index, hidden from LLVM's optimiser.

    Where rows overlap, as those of a kernel's taps do, LLVM finds that the next step of a loop loads again
    what this step has, and keeps it in a register. Broadcasting from a register takes the port of a
    multiply-add; loading it again is free.
    """
    function = ir.FunctionType(index.type, [index.type])
    return builder.asm(function, "", "=r,0", [index], side_effect=True)


@intrinsic
def tile_fma(typing_context: Any, factor: Any, tile: Any, addend: Any) -> Any:
    """``factor * tile + addend`` in each vector; the factor is one vector, the addend one or a tile."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        factor, terms = args[0], _terms(builder, args[2], signature.args[2], signature.args[1])
        vectors = _vectors(builder, args[1], signature.args[1])
        pairs = zip(vectors, terms, strict=True)
        return tile_of(builder, [fused_multiply_add(builder, factor, x, term) for x, term in pairs])

    return tile(factor, tile, addend), codegen


@intrinsic
def tile_add(typing_context: Any, tile: Any, addend: Any) -> Any:
    """``tile + addend`` in each vector; the addend is one vector or a tile."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        terms = _terms(builder, args[1], signature.args[1], signature.args[0])
        pairs = zip(_vectors(builder, args[0], signature.args[0]), terms, strict=True)
        return tile_of(builder, [builder.fadd(x, term, flags=CONTRACT) for x, term in pairs])

    return tile(tile, addend), codegen


def _terms(builder: Any, addend: Any, addend_type: Any, tile_type: Tile) -> list[Any]:
    return [addend] * tile_type.count if addend_type == f32x16 else _vectors(builder, addend, addend_type)


@intrinsic
def tile_mask(typing_context: Any, tile: Any, test: Any, slopes: Any) -> Any:
    """Lanes of a tile where those of ``test`` are positive or NaN, else ``slopes`` times as much.

    Where a slope is 0, as ReLU's, the result is 0, also of infinity: as in the eager operators.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pairs = zip(*(_vectors(builder, each, signature.args[0]) for each in args[:2]), strict=True)
        return tile_of(builder, [activated(builder, by, value, args[2]) for value, by in pairs])

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
        terms = _vectors(builder, args[0], signature.args[0])
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
        for x, y in zip(*(_vectors(builder, each, signature.args[0]) for each in args), strict=True):
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
        vectors = _vectors(builder, args[0], tile)
        lanes = ir.VectorType(ir.IntType(32), LANES)
        for bit in (1, 2, 4, 8):
            # Lanes of the second operand of a shuffle are numbered from 16.
            upper = [LANES + (lane ^ bit) if lane & bit else lane for lane in range(LANES)]
            lower = [LANES + lane if lane & bit else lane ^ bit for lane in range(LANES)]
            for i in (i for i in range(LANES) if not i & bit):
                pair = vectors[i], vectors[i + bit]
                vectors[i] = builder.shuffle_vector(*pair, ir.Constant(lanes, upper))
                vectors[i + bit] = builder.shuffle_vector(*pair, ir.Constant(lanes, lower))
        return tile_of(builder, vectors)

    return tile(tile), codegen
