"""How a Winograd convolution is cut: bricks of tiles, planes of points, the register tile of its products."""

import functools

import numpy as np

from kernels.base.arguments import Triple
from kernels.base.machine import tile_vectors
from kernels.base.simd import LANES
from kernels.conv3d.bricks import Cut
from kernels.ladder.cook_toom import INPUT, sizes

# Bytes of a brick's transformed tiles. The second-level cache holds more; but a plane of them, as V and M,
# has to stay in the first, and what is fetched ahead needs room.
_CACHED = 400 * 1024
# Bytes of transformed weights above which they are worth reading for more tiles at a time.
_CACHED_WEIGHTS = 1800 * 1024
# The transformed weights of a pair of blocks are written once and read once a brick, or made anew where they
# are used, and all tiles transformed before: beyond this many weights for each value, the latter is less.
_WEIGHTS_PER_TILE = 1.0


def points(tile: Triple) -> int:
    """Points of F(tile): multiplications for each tile and pair of channels."""
    pd, ph, pw = (sizes(INPUT, m)[1] for m in tile)
    return pd * ph * pw


@functools.cache
def gemm_tile(count: int, OCB: int) -> tuple[int, int]:
    """Rows (tiles) and columns (blocks of output channels) of the register tile of the product."""
    best, best_cost = (1, 1), float("inf")
    for cols in (1, 2):
        for rows in (24, 12, 9, 8, 6, 3, 1):
            if OCB % cols or rows > count or rows * cols > tile_vectors():
                continue
            cost = -(-count // rows) * (OCB // cols) * max(rows * cols, rows + cols, 8)
            if cost < best_cost:
                best, best_cost = (rows, cols), cost
    return best


def cut_output(dst_size: tuple[int, int, int, int], tile: Triple, ICB: int, OCB: int, kept: int = 0) -> Cut:
    """Bricks of whole rows of tiles: as many tiles as the cache holds, more where weights are large.

    ``kept`` channel blocks are held transformed: by default those of source or result, which take turns.
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


def kernel_of(tile: Triple) -> Triple:
    """Kernel of F(tile): 3 where the tile is above 1, else 1."""
    return 3 if tile[0] > 1 else 1, 3 if tile[1] > 1 else 1, 3 if tile[2] > 1 else 1


def slab_extent(cut: Cut, tile: Triple, kind: int) -> Triple:
    """Windows of a brick along d and h, and voxels in a row of its slab.

    Parameters
    ----------
    cut : Cut
    tile : (md, mh, mw)
    kind : {INPUT, DIFF_DST}
        What the slab is of: INPUT has a halo.
    """
    tiles = -(-cut.OW // tile[2])
    halo = sizes(kind, tile[2])[0] - tile[2]
    return cut.planes // tile[0], cut.lines // tile[1], tiles * tile[2] + halo


def slab_planes(tile: Triple) -> int:
    """Planes of points of a slab."""
    return sizes(INPUT, tile[0])[1] * sizes(INPUT, tile[1])[1]


def by_groups(cut: Cut, tile: Triple, ICB: int, OCB: int) -> bool:
    """Whether to convolve group after group of output channels, not brick after brick."""
    tiles = cut.bricks * tile_count(cut, tile)
    return ICB * OCB * LANES * LANES > _WEIGHTS_PER_TILE * tiles * max(ICB, OCB) * LANES
