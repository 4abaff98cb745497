"""The three stages of a Winograd convolution on one plane of points: transform in, multiply, transform out.

The slab is made transformed along d and h already (`slab`), and the last transforms along h and d are left
to the `epilogue`. So each of its some 36 planes of points is a convolution along w alone, F(mw), and its
tiles are all that has to be at hand: they stay in the first-level cache::

    plane[icb][row][w][16]  --transform_in-->  V[point][icb][tile][16]
    V, weights              --multiply------>  M[point][ocb][tile][16]
    M                       --transform_out->  plane[ocb][row][w][16]

V and M lie in the same slots, M one slot ahead: the product at a point is written where the point before
was, which nobody needs any more. `slot_size` keeps the points' distance an odd number of cache lines: were
it a multiple of many, those of a tile would meet in a few sets of the cache, and drive each other out.

They are functions of compile-time constants (tile sizes, register tile), compiled once for each and called
by the kernels of `convolution`, `weight_gradient`, `packing` and those of many channels.
"""

from typing import Any

from kernels.base.jit import kernel, specialised
from kernels.base.simd import LANES, LINE, prefetch
from kernels.base.tiles import tile_load, tile_rank1, tile_store, tile_zero
from kernels.conv3d.transform import transform_axis
from kernels.ladder.cook_toom import OUTPUT, sizes


@kernel
def slot_size(blocks: int, T: int) -> int:
    """Floats from one point to the next where each has ``T`` tiles of some blocks: an odd number of lines."""
    return (blocks * T | 1) * LANES


@specialised("kind", "mw")
def transform_in(
    own: Any,
    at: int,
    extent: Any,
    blocks: int,
    to: Any,
    V: int,
    slot: int,
    T: int,
    cols: int,
    kind: int,
    mw: int,
) -> Any:
    """Transform the rows of a plane along w: ``V[point][block / cols][tile][cols]``.

    The plane is at ``own[at:]``: ``extent`` windows along d and h, and voxels in a row, for each block.
    V is at ``to[V:]``, with ``slot`` floats from point to point and ``T`` tiles from block to block.
    ``cols`` blocks lie side by side for each tile, as a register tile of so many columns loads them.
    """
    K, MW = kind, mw
    voxels = sizes(K, MW)[0]

    def implementation(own, at, extent, blocks, to, V, slot, T, cols, kind, mw):  # type: ignore[no-untyped-def]
        rows, wide = extent[0] * extent[1], extent[2]
        tiles = (wide - voxels) // MW + 1
        for block in range(blocks):
            first = V + (block // cols * cols * T + block % cols) * LANES
            for row in range(rows):
                x = at + (block * rows + row) * wide * LANES
                y = first + row * tiles * cols * LANES
                for w in range(tiles):
                    line = tile_load(own, x + w * MW * LANES, 0, LANES, 0, 1, voxels, 1)
                    line = transform_axis(line, K, MW, 1)
                    tile_store(line, to, y + w * cols * LANES, 0, slot, 0)

    return implementation


@specialised("rows", "cols")
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
    soon: tuple[int, int, int],
    rows: int,
    cols: int,
) -> Any:
    """Multiply the tiles of one point by its weights: ``M[ocb]`` for blocks ``first`` to ``end``.

    Meanwhile the lines ``soon`` are fetched, as `ahead.part_of` returns them.
    """
    R, C = rows, cols

    def implementation(own, V, M, ICB, T, first, end, weights, at, soon, rows, cols):  # type: ignore[no-untyped-def]
        near, beside, count = soon
        step = 0
        for ocb in range(first, end, C):
            for row in range(0, T, R):
                # The last rows are moved back inside; their tiles are computed twice.
                t = min(row, T - R)
                sums = tile_zero(1, R, C)
                for icb in range(ICB):
                    x = V + (icb * T + t) * LANES
                    w = at + (ocb * ICB + icb * C) * LANES * LANES
                    line = LINE if step < count else 0
                    for ic in range(LANES):
                        y = w + ic * C * LANES
                        prefetch(near + ic * line)
                        prefetch(beside + ic * line)
                        sums = tile_rank1(sums, own, x + ic, 0, LANES, weights, y)
                    near += LANES * line
                    beside += LANES * line
                    step += LANES
                to = M + (ocb * T + t) * LANES
                tile_store(sums, own, to, 0, LANES, T * LANES)

    return implementation


@specialised("rows", "cols")
def multiply_block(
    src: Any,
    V: int,
    T: int,
    weights: Any,
    at: int,
    sums: Any,
    M: int,
    apart: int,
    fresh: bool,
    soon: tuple[int, int, int],
    rows: int,
    cols: int,
) -> Any:
    """Multiply the tiles of one block of input channels, at one point, by its weights: ``M[cols][tile]``.

    Added to what ``sums[M:]`` holds, unless ``fresh``; ``apart`` floats from a block of output channels to
    the next. Tiles are met in whole ``rows``, also behind the last. ``soon`` as in `multiply`.
    """
    R, C = rows, cols

    def implementation(src, V, T, weights, at, sums, M, apart, fresh, soon, rows, cols):  # type: ignore[no-untyped-def]
        near, beside, count = soon
        step = 0
        for t in range(0, T, R):
            place = M + t * LANES
            if fresh:  # noqa: SIM108 - a conditional expression of tiles is no tile to Numba
                tile = tile_zero(1, R, C)
            else:
                tile = tile_load(sums, place, 0, LANES, apart, 1, R, C)
            line = LINE if step < count else 0
            for ic in range(LANES):
                x, y = V + t * LANES + ic, at + ic * C * LANES
                prefetch(near + ic * line)
                prefetch(beside + ic * line)
                tile = tile_rank1(tile, src, x, 0, LANES, weights, y)
            near += LANES * line
            beside += LANES * line
            step += LANES
            tile_store(tile, sums, place, 0, LANES, apart)

    return implementation


@specialised("inputs", "cols")
def accumulate(
    src: Any,
    V: int,
    gradient: Any,
    E: int,
    T: int,
    sums: Any,
    at: int,
    fresh: bool,
    soon: tuple[int, int, int],
    inputs: int,
    cols: int,
) -> Any:
    """Sum over tiles ``V[tile][ic] * E[tile][oc]`` of one block by ``cols`` blocks, at one point.

    Added to what ``sums[at:]`` holds, unless ``fresh``. ``soon`` as in `multiply`.
    """
    R, C = inputs, cols

    def implementation(src, V, gradient, E, T, sums, at, fresh, soon, inputs, cols):  # type: ignore[no-untyped-def]
        near, beside, count = soon
        for ic in range(0, LANES, R):
            place = at + ic * C * LANES
            if fresh:  # noqa: SIM108 - a conditional expression of tiles is no tile to Numba
                tile = tile_zero(1, R, C)
            else:
                tile = tile_load(sums, place, 0, C * LANES, LANES, 1, R, C)
            line = LINE if ic // R * T < count else 0
            for t in range(T):
                x, y = V + t * LANES + ic, E + t * C * LANES
                prefetch(near + t * line)
                prefetch(beside + t * line)
                tile = tile_rank1(tile, src, x, 0, 1, gradient, y)
            near += T * line
            beside += T * line
            tile_store(tile, sums, place, 0, C * LANES, LANES)

    return implementation


@specialised("mw")
def transform_out(
    own: Any, M: int, slot: int, dst: Any, to: int, rows: int, tiles: int, ocb: int, mw: int
) -> Any:
    """Transform the tiles of one block along w into the rows of a plane at ``dst[to:]``."""
    MW = mw
    K = OUTPUT
    points = sizes(K, MW)[0]

    def implementation(own, M, slot, dst, to, rows, tiles, ocb, mw):  # type: ignore[no-untyped-def]
        T = rows * tiles
        for t in range(T):
            line = tile_load(own, M + (ocb * T + t) * LANES, 0, slot, 0, 1, points, 1)
            line = transform_axis(line, K, MW, 1)
            tile_store(line, dst, to + (ocb * T + t) * MW * LANES, 0, LANES, 0)

    return implementation
