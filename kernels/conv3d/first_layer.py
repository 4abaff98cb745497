"""Winograd along d and h, direct along w: a first layer, whose few channels are not blocked.

Four channels would fill a quarter of a block. Channels last, they lie side by side along a row, so a vector
is four voxels (of four channels), which the transforms along d and h take like any other vector. Along w
nothing is transformed: taps and channels (kw, ic) of an output voxel are one run of memory, as in `direct`::

    row of a plane    | zeros | v0 v1 v2 v3 | v4 ...              v: channels of a voxel
    output voxel 0      ... [-- kw, ic --]
    output voxel 1            [-- kw, ic --]

F(4, 4) along d and h takes 36 * KW * IC multiplications for 16 voxels, a quarter of direct's, and packs a
quarter of what 16 channels would. Rows must be whole vectors: W * IC a multiple of 16.

`winograd_bricks` packs and writes these bricks like all others; here is what it does with a plane of points.

Loop nest: ocb, rows, w tiles | kw and ic | register tile. Weight gradient: ocb, ic | rows, w | register tile.

Source: as `winograd` and `direct`.
"""

from typing import Any

from kernels.base.arguments import Triple
from kernels.base.jit import specialised
from kernels.base.simd import LANES
from kernels.base.tiles import tile_load, tile_rank1, tile_store, tile_zero
from kernels.conv3d.bricks import Plan
from kernels.conv3d.prefetch import after, fetch, part_of
from kernels.conv3d.read import Inputs
from kernels.conv3d.winograd_stages import kernel_of, slab_planes
from kernels.ladder.direct import tile_shape


def supports(size: tuple[int, int, int, int], kernel: Triple, tile: Triple, width: int) -> bool:
    """Whether rows are whole vectors, and the tile is (md, mh, 1), mh above 1, of this kernel's d and h."""
    fits = kernel[:2] == kernel_of(tile)[:2]
    return fits and tile[2] == 1 and tile[1] > 1 and size[3] * width % LANES == 0


def packed_shape(p: Plan) -> tuple[int, int, int, int, int]:
    """Shape of the transformed weights: ``(planes of points, groups, 1, KW * width, cols * 16)``."""
    cols = tile_shape(p.cut.OW, p.blocks_out).cols
    return slab_planes(p.form), p.blocks_out // cols, 1, p.kernel[2] * p.width, cols * LANES


def as_vectors(source: Inputs) -> Inputs:
    """The same memory as a tensor of one block, whose voxels are vectors."""
    D, H, W = source.size
    return source._replace(size=(D, H, W * source.width // LANES), width=LANES)


@specialised
def multiply_rows(job: Any, own: Any, plane: int, wide: int, cols: int, width: int) -> None:
    """Convolve a plane of points along w, into the plane of products."""
    layout, run, groups = job.layout, job.run, job.outputs.blocks // cols
    deep, high, OW = layout.inner_extent
    block = deep * high * OW * LANES
    first = layout.source.at + plane * layout.source.plane + LANES - job.before[2] * width
    to = layout.result.at + plane * layout.result.plane
    for i in range(groups * deep * high):
        group, row = i // (deep * high), i % (deep * high)
        at = (plane * groups + group) * run * cols * LANES
        for w_tile in range(0, OW, wide):
            # The last tile is moved back inside; its voxels are computed twice.
            w = min(w_tile, OW - wide)
            x = first + row * layout.extent[2] * LANES + w * width
            sums = tile_zero(1, wide, cols)
            for k in range(run):
                sums = tile_rank1(sums, own, x + k, 0, width, job.weights, at + k * cols * LANES)
            tile_store(sums, own, to + group * cols * block + (row * OW + w) * LANES, 0, LANES, block)


@specialised
def accumulate_rows(
    job: Any, own: Any, plane: int, sums: Any, ahead: Any, KW: int, inputs: int, width: int
) -> None:
    """Add a plane's products of source and gradient to the sums ``[ocb][kw][ic][16]``."""
    layout, OCB = job.layout, job.inner.blocks
    deep, high, OW = layout.inner_extent
    first = layout.source.at + plane * layout.source.plane + LANES - job.before[2] * width
    gradient = layout.inner.at + plane * layout.inner.plane
    for ocb in range(OCB):
        for ic in range(0, width, inputs):
            to = sums.at + (ocb * KW * width + ic) * LANES
            if sums.fresh:
                tile = tile_zero(KW, inputs, 1)
            else:
                tile = tile_load(sums.data, to, width * LANES, LANES, 0, KW, inputs, 1)
            lines = part_of(ahead, ocb, OCB, 0)
            for row in range(deep * high):
                x = first + row * layout.extent[2] * LANES + ic
                y = gradient + (ocb * deep * high + row) * OW * LANES
                # Two voxels for each line that is prefetched: rows of few channels are even.
                for w in range(0, OW, 2):
                    fetch(lines, 0)
                    lines = after(lines, 1)
                    tile = tile_rank1(tile, own, x + w * width, width, 1, own, y + w * LANES)
                    tile = tile_rank1(tile, own, x + (w + 1) * width, width, 1, own, y + (w + 1) * LANES)
            tile_store(tile, sums.data, to, width * LANES, LANES, 0)
