"""The three stages of a Winograd convolution on one brick: transform in, multiply, transform out.

Each is a function of compile-time constants (tile sizes, register tile), compiled once for each and
called by the kernels of `winograd` and `winograd_weights`. All work on one thread's scratchpad::

    slab[icb][d][h][w][16]  --transform_in-->  V[point][icb][tile][16]
    V, weights              --multiply------>  M[point][ocb][tile][16]
    M                       --transform_out->  brick[d][h][w][16] of one ocb, where the slab was

V and M lie in the same slots, M one slot ahead: the product at a point is written where the point before
was, which nobody needs any more.

They run only inside compiled kernels: the definitions below carry the signatures, the overloads the code.
"""

from typing import Any

from numba.core import types
from numba.extending import overload

from kernels.conv3d.cook_toom import OUTPUT, sizes
from kernels.conv3d.transform import transform_tile
from kernels.simd import LANES, tile_load, tile_rank1, tile_store, tile_zero


def literals(*numbers: Any) -> list[int] | None:
    """Values of compile-time constants; None where one is not."""
    if not all(isinstance(number, types.IntegerLiteral) for number in numbers):
        return None
    return [number.literal_value for number in numbers]


def transform_in(
    own: Any,
    extent: Any,
    blocks: int,
    tiles: Any,
    to: Any,
    V: int,
    slot: int,
    T: int,
    S: int,
    cols: int,
    kind: int,
    md: int,
    mh: int,
    mw: int,
) -> None:
    """Transform every tile of a slab: ``V[point][block / cols][tile][cols]``, via scratch at S.

    The slab is at ``own[0:]``, V at ``to[V:]``, with ``slot`` floats from point to point and ``T`` tiles
    from block to block. ``cols`` blocks lie side by side for each tile, as a register tile of so many
    columns loads them.
    """
    raise NotImplementedError("runs only inside a compiled kernel")


@overload(transform_in, prefer_literal=True)
def _transform_in(own, extent, blocks, tiles, to, V, slot, T, S, cols, kind, md, mh, mw):  # type: ignore[no-untyped-def]
    constants = literals(kind, md, mh, mw)
    if constants is None:
        return None
    K, MD, MH, MW = constants
    _, PH, PW = (sizes(K, m)[1] for m in (MD, MH, MW))

    def implementation(own, extent, blocks, tiles, to, V, slot, T, S, cols, kind, md, mh, mw):  # type: ignore[no-untyped-def]
        deep, high, wide = tiles
        line = extent[2] * LANES
        plane = extent[1] * line
        strides = (PH * PW * slot, PW * slot, slot)
        for block in range(blocks):
            for t in range(deep * high * wide):
                d, h, w = t // (high * wide) * MD, t // wide % high * MH, t % wide * MW
                at = (block * extent[0] + d) * plane + h * line + w * LANES
                v = V + (block // cols * cols * T + t * cols + block % cols) * LANES
                transform_tile(own, at, (plane, line, LANES), to, v, strides, own, S, K, MD, MH, MW)

    return implementation


def multiply(
    own: Any,
    V: int,
    M: int,
    ICB: int,
    T: int,
    first: int,
    end: int,
    weights: Any,
    at: int,
    rows: int,
    cols: int,
) -> None:
    """Multiply the tiles of one point by its weights: ``M[ocb]`` for blocks ``first`` to ``end``."""
    raise NotImplementedError("runs only inside a compiled kernel")


@overload(multiply, prefer_literal=True)
def _multiply(own, V, M, ICB, T, first, end, weights, at, rows, cols):  # type: ignore[no-untyped-def]
    constants = literals(rows, cols)
    if constants is None:
        return None
    R, C = constants

    def implementation(own, V, M, ICB, T, first, end, weights, at, rows, cols):  # type: ignore[no-untyped-def]
        for ocb in range(first, end, C):
            for row in range(0, T, R):
                # The last rows are moved back inside; their tiles are computed twice.
                t = min(row, T - R)
                sums = tile_zero(R, C)
                for icb in range(ICB):
                    x = V + (icb * T + t) * LANES
                    w = at + (ocb * ICB + icb * C) * LANES * LANES
                    for ic in range(LANES):
                        y = w + ic * C * LANES
                        sums = tile_rank1(sums, own, x + ic, 0, LANES, weights, y, 1, R, C)
                to = M + (ocb * T + t) * LANES
                tile_store(sums, own, to, 0, LANES, T * LANES, 1, R, C)

    return implementation


def accumulate(
    src: Any, V: int, E: int, T: int, sums: Any, at: int, fresh: bool, inputs: int, cols: int
) -> None:
    """Sum over tiles ``V[tile][ic] * E[tile][oc]`` of one block by ``cols`` blocks, at one point.

    Added to what ``sums[at:]`` holds, unless ``fresh``.
    """
    raise NotImplementedError("runs only inside a compiled kernel")


@overload(accumulate, prefer_literal=True)
def _accumulate(src, V, E, T, sums, at, fresh, inputs, cols):  # type: ignore[no-untyped-def]
    constants = literals(inputs, cols)
    if constants is None:
        return None
    R, C = constants

    def implementation(src, V, E, T, sums, at, fresh, inputs, cols):  # type: ignore[no-untyped-def]
        for ic in range(0, LANES, R):
            place = at + ic * C * LANES
            if fresh:  # noqa: SIM108 - a conditional expression of tiles is no tile to Numba
                tile = tile_zero(R, C)
            else:
                tile = tile_load(sums, place, 0, C * LANES, LANES, 1, R, C)
            for t in range(T):
                x, y = V + t * LANES + ic, E + t * C * LANES
                tile = tile_rank1(tile, src, x, 0, 1, src, y, 1, R, C)
            tile_store(tile, sums, place, 0, C * LANES, LANES, 1, R, C)

    return implementation


def transform_out(
    own: Any, M: int, slot: int, S: int, tiles: Any, ocb: int, md: int, mh: int, mw: int
) -> None:
    """Transform the tiles of one block into a brick at ``own[0:]``, via scratch at S."""
    raise NotImplementedError("runs only inside a compiled kernel")


@overload(transform_out, prefer_literal=True)
def _transform_out(own, M, slot, S, tiles, ocb, md, mh, mw):  # type: ignore[no-untyped-def]
    constants = literals(md, mh, mw)
    if constants is None:
        return None
    MD, MH, MW = constants
    K = OUTPUT
    _, PH, PW = (sizes(K, m)[0] for m in (MD, MH, MW))

    def implementation(own, M, slot, S, tiles, ocb, md, mh, mw):  # type: ignore[no-untyped-def]
        deep, high, wide = tiles
        T = deep * high * wide
        strides = (PH * PW * slot, PW * slot, slot)
        line = wide * MW * LANES
        voxel_strides = (high * MH * line, line, LANES)
        for t in range(T):
            d, h, w = t // (high * wide) * MD, t // wide % high * MH, t % wide * MW
            at = M + (ocb * T + t) * LANES
            to = (d * high * MH + h) * line + w * LANES
            transform_tile(own, at, strides, own, to, voxel_strides, own, S, K, MD, MH, MW)

    return implementation
