"""All of a tensor transformed, once, for those who meet each value many times: channels are many.

    tensor[block][d][h][w][16]  --pack, d and h-->  slab of a brick     second-level cache
    slab                        --w------------->  points[point][block][tile][16]

F(4, 4, 4) makes 216 numbers of 64. That is little where tiles are few; there the weights, or their gradient,
are what takes room.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

from kernels.base.arguments import Floats, Triple
from kernels.base.buffers import scratchpad
from kernels.base.jit import call_worker, parallel_kernel, prange, run_workers, signed, worker_kernel
from kernels.base.machine import threads
from kernels.base.simd import LANES, load, store
from kernels.conv3d.bricks import Cut, count_bricks, locate, share
from kernels.conv3d.read import Inputs, Slab, Window, buffer_size, pack_channel_block
from kernels.conv3d.winograd.cutting import points, slab_extent, slab_planes, tile_count
from kernels.conv3d.winograd.stages import slot_size, transform_in
from kernels.ladder.cook_toom import DIFF_DST, INPUT, sizes

# Tiles behind the last one that may be read, and are not used.
_SPARE = 24


class Points(NamedTuple):
    """A transformed tensor: ``slot`` floats from point to point, ``tiles`` of each of ``blocks`` blocks.

    Some blocks may lie side by side for each tile; see `pack_points`. A gradient's ``sums`` are 16 floats for
    each brick of each block, at this offset.
    """

    data: Floats
    slot: int
    blocks: int
    tiles: int
    sums: int


def pack_points(
    purpose: str, prologue: Inputs, size: Triple, before: Triple, cut: Cut, tile: Triple, kind: int, cols: int
) -> Points:
    """Pack and transform all channel blocks of a prologue.

    Parameters
    ----------
    purpose : str
        Of the scratchpad that holds the points.
    prologue : Inputs
    size, before : (d, h, w)
        Voxels of the tensor, and zeros before the first.
    cut : Cut
    tile : (md, mh, mw)
    kind : {INPUT, DIFF_DST}
        The transform, one of `cook_toom`'s.
    cols : int
        Blocks that lie side by side for each tile.
    """
    blocks, tiles = prologue.blocks, cut.bricks * tile_count(cut, tile)
    slot, extent = slot_size(blocks, tiles), slab_extent(cut, tile, kind)
    sums = points(tile) * slot + _SPARE * LANES
    data = scratchpad(purpose, sums + blocks * cut.bricks * LANES)
    packed = Points(data, slot, blocks, tiles, sums)
    # A brick of one block, and the buffer of a strip of it; then its sums.
    apart = slot_size(1, math.prod(extent))
    own = slab_planes(tile) * apart + buffer_size(extent[1], tile[0], tile[1], kind) + LANES
    scratch = scratchpad("winograd", threads(), own)
    run_workers(
        share_units, _make_pack(*tile, kind, cols), prologue, size, before, cut, extent, packed, scratch
    )
    return packed


@parallel_kernel
def share_units(
    address: int,
    prologue: Inputs,
    size: Triple,
    before: Triple,
    cut: Cut,
    extent: Triple,
    packed: Points,
    scratch: Floats,
) -> None:
    """Driver of `pack_points`: each worker its blocks of bricks, with a row of ``scratch`` for itself."""
    for index in prange(scratch.shape[0]):
        worker = signed(index)
        call_worker(address, worker, prologue, size, before, cut, extent, packed, scratch)


@functools.cache
def _make_pack(md: int, mh: int, mw: int, kind: int, cols: int) -> Callable[..., None]:
    planes, PW = slab_planes((md, mh, mw)), sizes(INPUT, mw)[1]

    @worker_kernel
    def pack_blocks(
        worker: int,
        prologue: Inputs,
        size: Triple,
        before: Triple,
        cut: Cut,
        extent: Triple,
        packed: Points,
        scratch: Floats,
    ) -> None:
        data, slot, blocks, T, _ = packed
        bricks = count_bricks(cut)
        here, apart = T // bricks, slot_size(1, extent[0] * extent[1] * extent[2])
        own, buffer = scratch[worker], planes * apart
        begin, end = share(blocks * bricks, worker, scratch.shape[0])
        for unit in range(begin, end):
            block, brick = unit // bricks, unit % bricks
            n, first, _ = locate(cut, brick)
            start = (first[0] - before[0], first[1] - before[1], -before[2])
            sums = own.size - LANES
            window, slab = Window(n, start, extent), Slab(0, apart, buffer, sums)
            pack_channel_block(prologue, block, window, own, slab, kind, md, mh)
            if kind == DIFF_DST:
                store(data, packed.sums + unit * LANES, load(own, sums))
            to = (block // cols * cols * T + block % cols + brick * here * cols) * LANES
            for plane in range(planes):
                at = to + plane * PW * slot
                transform_in(own, plane * apart, extent, 1, data, at, slot, T, cols, kind, mw)

    return pack_blocks
