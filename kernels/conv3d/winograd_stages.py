"""How Winograd's minimal filtering is cut into bricks, and its steps on one plane of points.

`read` leaves a slab that is transformed along d and h, and `write` does the last transforms along h and d. So
each of the slab's some 36 planes of points is a convolution along w alone, F(mw), whose tiles stay in the
first-level cache::

    plane[icb][row][w][16]  --transform_in-->  V[point][icb][tile][16]
    V, weights              --multiply------>  M[point][ocb][tile][16]
    M                       --transform_out->  plane[ocb][row][w][16]
    V, E of the gradient    --accumulate---->  sums[point][ic][oc]         for the weight gradient

V and M share memory, M one point ahead: the product at a point is written where the point before was, which
no later step reads. The stride from point to point is an odd number of cache lines (`odd_lines`): at a
multiple of many lines, the points of a tile would meet in a few sets of the cache and evict each other.
"""

import functools
from typing import Any, NamedTuple

import numpy as np

from kernels.base.arguments import Floats, Triple
from kernels.base.jit import specialised
from kernels.base.machine import tile_vectors
from kernels.base.simd import LANES, address
from kernels.base.tiles import tile_load, tile_rank1, tile_store, tile_zero
from kernels.conv3d.bricks import Cut
from kernels.conv3d.prefetch import after, fetch, part_of
from kernels.conv3d.read import Slab, buffer_size
from kernels.conv3d.transform import transform_axis
from kernels.conv3d.write import Staged, finish_size
from kernels.ladder.cook_toom import INPUT, OUTPUT, sizes
from kernels.ladder.direct import tile_shape

# Bytes of a brick's transformed tiles. The second-level cache holds more, but V and M of a plane must stay in
# the first-level cache, and prefetched lines need room.
_CACHED = 400 * 1024
# Above this many bytes of transformed weights, each read of the weights should serve more tiles.
_CACHED_WEIGHTS = 1800 * 1024


def points(tile: Triple) -> int:
    """Points of F(tile): multiplications for each tile and pair of channels."""
    return slab_planes(tile) * sizes(INPUT, tile[2])[1]


def slab_planes(tile: Triple) -> int:
    """Planes of points of a slab."""
    return sizes(INPUT, tile[0])[1] * sizes(INPUT, tile[1])[1]


def kernel_of(tile: Triple) -> Triple:
    """Kernel of F(tile): 3 where the tile is above 1, else 1."""
    return 3 if tile[0] > 1 else 1, 3 if tile[1] > 1 else 1, 3 if tile[2] > 1 else 1


def cut_output(dst_size: tuple[int, int, int, int], tile: Triple, ICB: int, OCB: int, kept: int = 0) -> Cut:
    """Bricks of whole rows of tiles: as many tiles as the cache holds, more where weights are large.

    ``kept`` is the number of channel blocks that are in cache, transformed, at one time: all blocks for a
    weight gradient; by default those of source or result, which share memory.
    """
    MB, OD, OH, OW = dst_size
    per_tile = points(tile) * (kept or max(ICB, OCB)) * LANES * 4
    weights = points(tile) * ICB * OCB * LANES * LANES * 4
    most = max(_CACHED // per_tile, 12 if weights <= _CACHED_WEIGHTS else 48)
    wide = -(-OW // tile[2])
    high_all, deep_all = -(-OH // tile[1]), -(-OD // tile[0])
    high = int(np.clip(most // wide, 1, high_all))
    # Bricks of like size: 9 rows of tiles as 5 + 4, not 8 + 1.
    high = -(-high_all // -(-high_all // high))
    deep = int(np.clip(most // (wide * high), 1, deep_all))
    deep = -(-deep_all // -(-deep_all // deep))
    return Cut(MB, OD, OH, OW, deep * tile[0], high * tile[1])


def tile_count(cut: Cut, tile: Triple) -> int:
    """Tiles of a brick."""
    return cut.planes // tile[0] * (cut.lines // tile[1]) * -(-cut.OW // tile[2])


def product_tile(count: int, OCB: int) -> tuple[int, int]:
    """Rows (tiles) and columns (blocks of output channels) of the register tile of `multiply`."""
    return tile_shape(count, OCB, (24, 12, 9, 8, 6, 3, 1), 2)


def sums_tile(OCB: int) -> tuple[int, int]:
    """Rows (input channels) and columns (blocks of output channels) of the register tile of `accumulate`."""
    if OCB % 2 == 0 and tile_vectors() >= 16:
        return 8, 2
    return (16, 1) if tile_vectors() >= 16 else (4, 1) if tile_vectors() >= 4 else (2, 1)


def odd_lines(blocks: int, count: int) -> int:
    """Floats from one point to the next, for ``count`` vectors of some blocks: an odd number of lines."""
    return (blocks * count | 1) * LANES


class Layout(NamedTuple):
    """What lies where in a thread's scratchpad: offsets and strides in floats.

    ``source`` and ``inner`` are the slabs of what is read with a halo and without, ``extent`` and
    ``inner_extent`` their windows along d and h and voxels in a row. ``result`` is the slab of products, in
    the place of one of the two. ``V`` and ``E`` are the points of a plane of each, with ``tiles`` tiles; the
    stride from point to point is ``point`` for V, and for M one point before, and ``inner_point`` for E.
    """

    source: Slab
    inner: Slab
    result: Staged
    extent: Triple
    inner_extent: Triple
    tiles: int
    V: int
    point: int
    E: int
    inner_point: int
    size: int


@functools.cache
def lay_out(cut: Cut, tile: Triple, source: int, inner: int, results: int, width: int = LANES) -> Layout:
    """Lay out the scratchpad of a thread that takes bricks.

    ``source``, ``inner`` and ``results`` are channel blocks, 0 where there are none. A first layer's source
    has ``width`` channels and is read as vectors, with a vector of zeros at both ends of a row.
    """
    few, planes = width < LANES, slab_planes(tile)
    wide = -(-cut.OW // tile[2]) * tile[2]
    extent = inner_extent = cut.planes // tile[0], cut.lines // tile[1], wide
    halo = cut.OW * width // LANES + 2 if few else wide + sizes(INPUT, tile[2])[0] - tile[2]
    extent = (*extent[:2], halo)
    voxels, inner_voxels = (deep * high * wide for deep, high, wide in (extent, inner_extent))
    # Products go to where the inner slab's values were, which no later step reads, or to the source's.
    inner_blocks = inner or (results if few else 0)
    plane = odd_lines(source if inner_blocks else max(source, results), voxels)
    inner_plane = odd_lines(inner_blocks, inner_voxels) if inner_blocks else 0
    M = planes * (plane + inner_plane)
    tiles, PW = tile_count(cut, tile), 0 if few else sizes(INPUT, tile[2])[1]
    point, inner_point = odd_lines(max(source, results), tiles), odd_lines(inner, tiles)
    V = M + (point if results and not few else 0)
    E = V + PW * point
    # A strip's buffer is needed before V, M and E.
    strip = buffer_size(extent[1], tile[0], tile[1], INPUT)
    finish = max(E + (PW * inner_point if inner else 0), M + strip)
    sums = finish + finish_size(tile[0], tile[1])
    from_source, from_inner = Slab(0, plane, M, 0), Slab(planes * plane, inner_plane, M, sums)
    at = from_inner if inner_blocks else from_source
    result = Staged(at.at, at.plane, inner_extent, finish)
    size = sums + (inner + 1) * LANES
    return Layout(
        from_source, from_inner, result, extent, inner_extent, tiles, V, point, E, inner_point, size
    )


class Tiles(NamedTuple):
    """Transformed tiles of ``blocks`` channel blocks: ``tiles`` vectors of a block, then those of the next.

    Those of the first point are at ``at``, those of the next ``point`` floats later. Some blocks may lie side
    by side for each tile.
    """

    data: Floats
    at: int
    point: int
    tiles: int
    blocks: int


class Panel(NamedTuple):
    """Memory from an offset on."""

    data: Floats
    at: int


class Sums(NamedTuple):
    """Sums of products, ``[group][ICB][16][cols * 16]`` at ``at``; they are 0 at first if ``fresh``."""

    data: Floats
    at: int
    fresh: bool


@specialised
def transform_in(plane: Any, extent: Any, to: Any, cols: int, kind: int, mw: int) -> None:
    """Transform the rows of a plane along w: to `Tiles` ``[point][block / cols][tile][cols]``.

    The plane has ``extent`` windows along d and h, and voxels in a row, for each block. ``cols`` blocks lie
    side by side for each tile, as a register tile of so many columns loads them.
    """
    voxels = sizes(kind, mw)[0]
    rows, wide = extent[0] * extent[1], extent[2]
    tiles = (wide - voxels) // mw + 1
    for block in range(to.blocks):
        first = to.at + (block // cols * cols * to.tiles + block % cols) * LANES
        for row in range(rows):
            x = plane.at + (block * rows + row) * wide * LANES
            y = first + row * tiles * cols * LANES
            for w in range(tiles):
                line = tile_load(plane.data, x + w * mw * LANES, 0, LANES, 0, 1, voxels, 1)
                tile_store(transform_axis(line, kind, mw, 1), to.data, y + w * cols * LANES, 0, to.point, 0)


@specialised
def multiply(
    v: Any, weights: Any, m: Any, results: Any, fresh: bool, ahead: Any, rows: int, cols: int
) -> None:
    """Multiply the tiles of one point by its weights, a `Panel` ``[group][ICB][16][cols * 16]``.

    This makes blocks ``results[0]`` to ``results[1]`` of the `Tiles` ``m``, and adds to what is there unless
    ``fresh``. Meanwhile the lines ``ahead`` are prefetched.
    """
    ICB, T, col = v.blocks, v.tiles, m.tiles * LANES
    for ocb in range(results[0], results[1], cols):
        for row in range(0, T, rows):
            # The last rows are moved back inside; their tiles are computed twice.
            t = min(row, T - rows)
            to = m.at + (ocb * m.tiles + t) * LANES
            if fresh:  # noqa: SIM108 - a conditional expression of tiles is no tile to Numba
                sums = tile_zero(1, rows, cols)
            else:
                sums = tile_load(m.data, to, 0, LANES, col, 1, rows, cols)
            for icb in range(ICB):
                x = v.at + (icb * T + t) * LANES
                w = weights.at + (ocb * ICB + icb * cols) * LANES * LANES
                for ic in range(LANES):
                    fetch(ahead, ic)
                    sums = tile_rank1(sums, v.data, x + ic, 0, LANES, weights.data, w + ic * cols * LANES)
                ahead = after(ahead, LANES)
            tile_store(sums, m.data, to, 0, LANES, col)


@specialised
def accumulate(v: Any, e: Any, sums: Any, ahead: Any, rows: int, cols: int) -> None:
    """Sum over tiles ``v[tile][ic] * e[tile][oc]`` at one point: each block by each group of ``cols`` blocks.

    Meanwhile the lines ``ahead`` are prefetched, and the next pair's sums.
    """
    T, parts, size = v.tiles, e.blocks // cols * v.blocks, LANES * cols * LANES
    for part in range(parts):
        group, icb = part // v.blocks, part % v.blocks
        first = sums.at + part * size
        lines = part_of(ahead, part, parts, address(sums.data, first + size))
        for ic in range(0, LANES, rows):
            to = first + ic * cols * LANES
            if sums.fresh:
                tile = tile_zero(1, rows, cols)
            else:
                tile = tile_load(sums.data, to, 0, cols * LANES, LANES, 1, rows, cols)
            x, y = v.at + icb * T * LANES + ic, e.at + group * T * cols * LANES
            for t in range(T):
                fetch(lines, t)
                tile = tile_rank1(tile, v.data, x + t * LANES, 0, 1, e.data, y + t * cols * LANES)
            lines = after(lines, T)
            tile_store(tile, sums.data, to, 0, cols * LANES, LANES)


@specialised
def transform_out(m: Any, block: int, to: Any, mw: int) -> None:
    """Transform the tiles of one block along w, into the rows of a plane."""
    points = sizes(OUTPUT, mw)[0]
    for t in range(block * m.tiles, (block + 1) * m.tiles):
        line = tile_load(m.data, m.at + t * LANES, 0, m.point, 0, 1, points, 1)
        tile_store(transform_axis(line, OUTPUT, mw, 1), to.data, to.at + t * mw * LANES, 0, LANES, 0)
