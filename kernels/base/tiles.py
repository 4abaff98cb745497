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
from collections.abc import Iterator
from typing import Any

from llvmlite import ir
from numba.core import types

from kernels.base.jit import kernel
from kernels.base.simd import (
    CONTRACT,
    FLOAT,
    LANES,
    VECTOR,
    Tile,
    broadcast,
    f32x16,
    fma,
    instruction,
    where_positive,
)


def _shape(*arguments: Any) -> Tile:
    """Type of a tile whose sizes are the last three arguments."""
    return Tile(*(size.literal_value for size in arguments[-3:]))


def _tile(*arguments: Any) -> Any:
    """Type of a tile that is the first argument."""
    return arguments[0]


def _moved(builder: Any, start: Any, stride: Any, index: int) -> Any:
    """``start + stride * index``."""
    return builder.add(start, builder.mul(stride, ir.Constant(start.type, index)))


def _offsets(builder: Any, start: Any, strides: Any, shape: tuple[int, int, int]) -> Iterator[Any]:
    """Offsets of a tile's vectors in memory, row by row."""
    for indices in itertools.product(*map(range, shape)):
        at = start
        for stride, index in zip(strides, indices, strict=True):
            at = _moved(builder, at, stride, index)
        yield at


def _row(builder: Any, array: Any, start: Any, cols: int) -> list[Any]:
    """``cols`` vectors that follow each other in memory."""
    return [array.load(builder.add(start, ir.Constant(start.type, LANES * c))) for c in range(cols)]


# --- making, loading and storing ----------------------------------------------------------------

_INDEX = types.intp


@instruction(_shape, None, None, None, literal=True)
def tile_zero(builder: Any, high: int, wide: int, cols: int) -> Any:
    """Tile of zeros."""
    return ir.Constant(ir.ArrayType(VECTOR, high * wide * cols), None)


@instruction(_shape, None, _INDEX, None, None, None, literal=True)
def tile_fill(builder: Any, array: Any, offset: Any, high: int, wide: int, cols: int) -> Any:
    """Tile whose rows are all ``array[offset : offset + 16 * cols]`` (a bias, say)."""
    return _row(builder, array, offset, cols) * (high * wide)


@instruction(_shape, None, *[_INDEX] * 4, None, None, None, literal=True)
def tile_load(
    builder: Any, array: Any, offset: Any, row: Any, step: Any, col: Any, high: int, wide: int, cols: int
) -> Any:
    """Tile with ``tile[(h, w), c] = array[offset + h * row + w * step + c * col :][:16]``."""
    return [array.load(at) for at in _offsets(builder, offset, (row, step, col), (high, wide, cols))]


@instruction(types.void, None, None, *[_INDEX] * 4)
def tile_store(builder: Any, tile: Any, array: Any, offset: Any, row: Any, step: Any, col: Any) -> None:
    """``array[offset + h * row + w * step + c * col :][:16] = tile[(h, w), c]``."""
    for vector, at in zip(tile, _offsets(builder, offset, (row, step, col), tile.shape), strict=True):
        array.store(vector, at)


@instruction(types.void, None, None, *[_INDEX] * 4)
def tile_stream(builder: Any, tile: Any, array: Any, offset: Any, row: Any, step: Any, col: Any) -> None:
    """`tile_store` past the caches; see `simd.stream`."""
    for vector, at in zip(tile, _offsets(builder, offset, (row, step, col), tile.shape), strict=True):
        array.stream(vector, at)


@kernel
def put_tile(dst: Any, at: int, row: int, step: int, tile: Any, streams: bool) -> None:
    """Store a tile of one column, past the caches or not."""
    if streams:
        tile_stream(tile, dst, at, row, step, 0)
    else:
        tile_store(tile, dst, at, row, step, 0)


# --- arithmetic ---------------------------------------------------------------------------------


@instruction(_tile, None, None, *[_INDEX] * 3, None, _INDEX)
def tile_rank1(
    builder: Any,
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
    (high, wide, cols), sums = tile.shape, iter(tile)
    vectors, result = _row(builder, weights, weights_offset, cols), []
    for h in range(high):
        row = _moved(builder, src_offset, src_row, h)
        row = _unknown(builder, row) if h else row
        for w in range(wide):
            scalar = builder.load(src.pointer(_moved(builder, row, src_step, w), FLOAT))
            value = broadcast.write(builder, scalar)
            result += [fma.write(builder, value, vector, next(sums)) for vector in vectors]
    return result


def _unknown(builder: Any, index: Any) -> Any:
    """Return the same index, hidden from LLVM's optimiser.

    Where rows overlap, as those of a kernel's taps do, LLVM finds that the next step of a loop loads again
    what this step has, and keeps it in a register. Broadcasting from a register takes the port of a
    multiply-add; loading it again is free.
    """
    function = ir.FunctionType(index.type, [index.type])
    return builder.asm(function, "", "=r,0", [index], side_effect=True)


@instruction(lambda factor, tile, addend: tile, f32x16, None, None)
def tile_fma(builder: Any, factor: Any, tile: Any, addend: Any) -> Any:
    """``factor * tile + addend`` in each vector; the factor is one vector, the addend one or a tile."""
    terms = zip(tile, _terms(addend, tile), strict=True)
    return [fma.write(builder, factor, vector, term) for vector, term in terms]


@instruction(_tile, None, None)
def tile_add(builder: Any, tile: Any, addend: Any) -> Any:
    """``tile + addend`` in each vector; the addend is one vector or a tile."""
    terms = zip(tile, _terms(addend, tile), strict=True)
    return [builder.fadd(vector, term, flags=CONTRACT) for vector, term in terms]


def _terms(addend: Any, tile: Any) -> list[Any]:
    return addend if isinstance(addend, list) else [addend] * len(tile)


@instruction(_tile, None, None, f32x16)
def tile_mask(builder: Any, tile: Any, test: Any, slopes: Any) -> Any:
    """Lanes of a tile where those of ``test`` are positive or NaN, else ``slopes`` times as much.

    Where a slope is 0, as ReLU's, the result is 0, also of infinity: as in the eager operators.
    """
    return [where_positive.write(builder, by, value, slopes) for value, by in zip(tile, test, strict=True)]


@instruction(f32x16, None)
def tile_first(builder: Any, tile: Any) -> Any:
    """First vector of a tile."""
    return tile[0]


@instruction(f32x16, None)
def tile_sum(builder: Any, tile: Any) -> Any:
    """Sum of the vectors of a tile, in pairs, and pairs of pairs."""
    terms = list(tile)
    while len(terms) > 1:
        pairs = [builder.fadd(a, b) for a, b in zip(terms[::2], terms[1::2], strict=False)]
        terms = pairs + terms[2 * len(pairs) :]
    return terms[0]


@instruction(f32x16, None, None)
def tile_dot(builder: Any, a: Any, b: Any) -> Any:
    """Sum over the vectors of two tiles of ``a * b``, in float32 from the first to the last."""
    total = ir.Constant(VECTOR, [0.0] * LANES)
    for x, y in zip(a, b, strict=True):
        total = fma.write(builder, x, y, total)
    return total


@instruction(_tile, None)
def tile_transpose(builder: Any, tile: Any) -> Any:
    """Transpose of a tile of 16 vectors: lane j of vector i becomes lane i of vector j.

    Four rounds, one for each bit of an index: vectors i and i + bit, where i lacks the bit, exchange the
    off-diagonal quarters of their lanes. For a bit of 1::

        a0 a1 a2 a3 ...      a0 b0 a2 b2 ...
        b0 b1 b2 b3 ...  ->  a1 b1 a3 b3 ...

    Source: Warren, "Hacker's Delight" (2012), section 7-3.
    """
    vectors, lanes = list(tile), ir.VectorType(ir.IntType(32), LANES)
    for bit in (1, 2, 4, 8):
        # Lanes of the second operand of a shuffle are numbered from 16.
        upper = [LANES + (lane ^ bit) if lane & bit else lane for lane in range(LANES)]
        lower = [LANES + lane if lane & bit else lane ^ bit for lane in range(LANES)]
        for i in (i for i in range(LANES) if not i & bit):
            pair = vectors[i], vectors[i + bit]
            vectors[i] = builder.shuffle_vector(*pair, ir.Constant(lanes, upper))
            vectors[i + bit] = builder.shuffle_vector(*pair, ir.Constant(lanes, lower))
    return vectors
