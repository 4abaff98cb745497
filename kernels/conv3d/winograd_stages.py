"""The three stages of a Winograd convolution on one brick: transform in, multiply, transform out.

Each is a function of compile-time constants (tile sizes, register tile), compiled once for each and
called by the kernels of `winograd` and `winograd_weights`. All work on one thread's scratchpad::

    slab[icb][d][h][w][16]  --transform_in-->  V[point][icb][tile][16]
    V, weights              --multiply------>  M[point][ocb][tile][16]
    M                       --transform_out->  dst[ocb][d][h][w][16]

They run only inside compiled kernels: the definitions below carry the signatures, the overloads the code.
"""

from typing import Any

from numba.core import types
from numba.extending import overload

from kernels.conv3d.cook_toom import OUTPUT, sizes
from kernels.conv3d.transform import transform_tile
from kernels.simd import LANES, load, store, tile_load, tile_rank1, tile_store, tile_zero


def _literals(*numbers: Any) -> list[int] | None:
    """Values of compile-time constants; None where one is not."""
    if not all(isinstance(number, types.IntegerLiteral) for number in numbers):
        return None
    return [number.literal_value for number in numbers]


def transform_in(
    own: Any,
    extent: Any,
    blocks: int,
    tiles: Any,
    V: int,
    S: int,
    cols: int,
    kind: int,
    md: int,
    mh: int,
    mw: int,
) -> None:
    """Transform every tile of a slab: ``V[point][block / cols][tile][cols]``, via scratch at S.

    The slab is at ``own[0:]``. ``cols`` blocks lie side by side for each tile, as a register tile of
    so many columns loads them.
    """
    raise NotImplementedError("runs only inside a compiled kernel")


@overload(transform_in, prefer_literal=True)
def _transform_in(own, extent, blocks, tiles, V, S, cols, kind, md, mh, mw):  # type: ignore[no-untyped-def]
    constants = _literals(kind, md, mh, mw)
    if constants is None:
        return None
    K, MD, MH, MW = constants
    _, PH, PW = (sizes(K, m)[1] for m in (MD, MH, MW))

    def implementation(own, extent, blocks, tiles, V, S, cols, kind, md, mh, mw):  # type: ignore[no-untyped-def]
        deep, high, wide = tiles
        T = deep * high * wide
        line = extent[2] * LANES
        plane = extent[1] * line
        step = blocks * T * LANES
        strides = (PH * PW * step, PW * step, step)
        for block in range(blocks):
            for t in range(T):
                d, h, w = t // (high * wide) * MD, t // wide % high * MH, t % wide * MW
                at = (block * extent[0] + d) * plane + h * line + w * LANES
                to = V + (block // cols * cols * T + t * cols + block % cols) * LANES
                transform_tile(
                    own, at, (plane, line, LANES), own, to, strides, own, S, K, MD, MH, MW
                )

    return implementation


def multiply(
    own: Any,
    V: int,
    M: int,
    ICB: int,
    OCB: int,
    T: int,
    first: int,
    end: int,
    weights: Any,
    points: int,
    rows: int,
    cols: int,
) -> None:
    """Multiply tiles by weights at each point: ``M[point][ocb]`` for blocks ``first`` to ``end``."""
    raise NotImplementedError("runs only inside a compiled kernel")


@overload(multiply, prefer_literal=True)
def _multiply(  # type: ignore[no-untyped-def]
    own, V, M, ICB, OCB, T, first, end, weights, points, rows, cols
):
    constants = _literals(rows, cols)
    if constants is None:
        return None
    R, C = constants

    def implementation(  # type: ignore[no-untyped-def]
        own, V, M, ICB, OCB, T, first, end, weights, points, rows, cols
    ):
        for point in range(points):
            for ocb in range(first, end, C):
                for row in range(0, T, R):
                    # The last rows are moved back inside; their tiles are computed twice.
                    t = min(row, T - R)
                    sums = tile_zero(R, C)
                    for icb in range(ICB):
                        x = V + ((point * ICB + icb) * T + t) * LANES
                        w = ((point * OCB + ocb) * ICB + icb * C) * LANES * LANES
                        for ic in range(LANES):
                            at = w + ic * C * LANES
                            sums = tile_rank1(sums, own, x + ic, 0, LANES, weights, at, 1, R, C)
                    to = M + ((point * OCB + ocb) * T + t) * LANES
                    tile_store(sums, own, to, 0, LANES, T * LANES, 1, R, C)

    return implementation


def accumulate(
    own: Any,
    V: int,
    E: int,
    ICB: int,
    OCB: int,
    T: int,
    first: int,
    end: int,
    sums: Any,
    points: int,
    inputs: int,
    cols: int,
) -> None:
    """Add ``V[point][icb][tile][ic] * E[point][ocb][tile][oc]``, summed over tiles, to ``sums``."""
    raise NotImplementedError("runs only inside a compiled kernel")


@overload(accumulate, prefer_literal=True)
def _accumulate(  # type: ignore[no-untyped-def]
    own, V, E, ICB, OCB, T, first, end, sums, points, inputs, cols
):
    constants = _literals(inputs, cols)
    if constants is None:
        return None
    R, C = constants

    def implementation(  # type: ignore[no-untyped-def]
        own, V, E, ICB, OCB, T, first, end, sums, points, inputs, cols
    ):
        for point in range(points):
            for ocb in range(first, end, C):
                for icb in range(ICB):
                    for ic in range(0, LANES, R):
                        at = (((point * OCB + ocb) * ICB + icb * C) * LANES + ic * C) * LANES
                        tile = tile_load(sums, at, 0, C * LANES, LANES, 1, R, C)
                        x = V + (point * ICB + icb) * T * LANES + ic
                        y = E + ((point * OCB) + ocb) * T * LANES
                        for t in range(T):
                            step = t * LANES
                            tile = tile_rank1(tile, own, x + step, 0, 1, own, y + step * C, 1, R, C)
                        tile_store(tile, sums, at, 0, C * LANES, LANES, 1, R, C)

    return implementation


def transform_out(
    own: Any,
    M: int,
    S: int,
    tiles: Any,
    OCB: int,
    epilogue: Any,
    cut: Any,
    n: int,
    start: Any,
    first: int,
    end: int,
    md: int,
    mh: int,
    mw: int,
) -> None:
    """Transform the tiles of blocks ``first`` to ``end`` into the destination, clipped to its size."""
    raise NotImplementedError("runs only inside a compiled kernel")


@overload(transform_out, prefer_literal=True)
def _transform_out(  # type: ignore[no-untyped-def]
    own, M, S, tiles, OCB, epilogue, cut, n, start, first, end, md, mh, mw
):
    constants = _literals(md, mh, mw)
    if constants is None:
        return None
    MD, MH, MW = constants
    K = OUTPUT
    _, PH, PW = (sizes(K, m)[0] for m in (MD, MH, MW))
    clipped = (MD * MH * MW + 3) * LANES

    def implementation(  # type: ignore[no-untyped-def]
        own, M, S, tiles, OCB, epilogue, cut, n, start, first, end, md, mh, mw
    ):
        deep, high, wide = tiles
        T = deep * high * wide
        step = OCB * T * LANES
        strides = (PH * PW * step, PW * step, step)
        voxel_strides = (cut.OH * cut.OW * LANES, cut.OW * LANES, LANES)
        tile_strides = (MH * MW * LANES, MW * LANES, LANES)
        voxels = cut.OD * cut.OH * cut.OW * LANES
        for ocb in range(first, end):
            if ocb < epilogue.blocks_a:
                dst, block = epilogue.dst_a, n * epilogue.blocks_a + ocb
            else:
                blocks_b = OCB - epilogue.blocks_a
                dst, block = epilogue.dst_b, n * blocks_b + ocb - epilogue.blocks_a
            for t in range(T):
                d = start[0] + t // (high * wide) * MD
                h = start[1] + t // wide % high * MH
                w = t % wide * MW
                at = M + (ocb * T + t) * LANES
                to = block * voxels + ((d * cut.OH + h) * cut.OW + w) * LANES
                if d + MD <= cut.OD and h + MH <= cut.OH and w + MW <= cut.OW:
                    transform_tile(own, at, strides, dst, to, voxel_strides, own, S, K, MD, MH, MW)
                    continue
                # A tile that sticks out goes to scratch, and what is inside goes on from there.
                clip = own.size - clipped
                transform_tile(own, at, strides, own, clip, tile_strides, own, S, K, MD, MH, MW)
                for i in range(min(MD, cut.OD - d)):
                    for j in range(min(MH, cut.OH - h)):
                        for k in range(min(MW, cut.OW - w)):
                            value = load(own, clip + ((i * MH + j) * MW + k) * LANES)
                            store(dst, to + ((i * cut.OH + j) * cut.OW + k) * LANES, value)

    return implementation
