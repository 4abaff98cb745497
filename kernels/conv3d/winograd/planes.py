"""All of a tensor transformed along d and h, for those who work on it plane of points after plane.

    tensor[block][d][h][w][16]  --pack, in parallel-->  planes[point d, h][block][brick, row][w][16]

Each of the some 36 planes holds all windows of the tensor, brick after brick. With w still to be transformed,
36 / 16 of the tensor are written and read once; with all axes transformed it would be half as much again.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

from kernels.checks import Floats, Triple
from kernels.compiler import (
    call_worker,
    parallel_kernel,
    prange,
    run_workers,
    signed,
    worker_kernel,
)
from kernels.conv3d.bricks import Cut, Prologue, count_bricks, locate, pack_channel_block
from kernels.conv3d.slab import buffer_size
from kernels.conv3d.winograd.cutting import slab_extent, slab_planes
from kernels.conv3d.winograd.stages import slot_size
from kernels.machine import threads
from kernels.memory import scratchpad
from kernels.simd import LANES


class Planes(NamedTuple):
    """Planes of points of ``blocks`` channel blocks, ``apart`` floats from one to the next.

    A gradient's ``sums`` are 16 floats for each brick of each block, at this offset.
    """

    data: Floats
    apart: int
    blocks: int
    sums: int


def pack_planes(
    purpose: str,
    prologue: Prologue,
    size: Triple,
    before: Triple,
    cut: Cut,
    tile: Triple,
    kind: int,
    room: int,
) -> Planes:
    """Pack and transform all channel blocks of a prologue.

    Parameters
    ----------
    purpose : str
        Of the scratchpad that holds the planes.
    prologue : Prologue
    size, before : (d, h, w)
        Voxels of the tensor, and zeros before the first.
    cut : Cut
    tile : (md, mh, mw)
    kind : int
        The transform, one of `cook_toom`'s.
    room : int
        Channel blocks that each plane has room for.
    """
    extent = slab_extent(cut, tile, kind)
    apart, workers = slot_size(room * cut.bricks, math.prod(extent)), threads()
    planes = slab_planes(tile) * apart
    # Behind the last plane are the sums, and a buffer for each worker.
    sums = prologue.blocks * cut.bricks * LANES
    buffers = workers * buffer_size(cut.lines // tile[1], tile[0], tile[1], kind)
    slab = scratchpad(purpose, planes + sums + buffers)
    run_workers(
        pack_tensor,
        _make_pack(tile[0], tile[1], kind),
        prologue,
        size,
        before,
        cut,
        extent[2],
        slab,
        apart,
        planes,
        workers,
    )
    return Planes(slab, apart, prologue.blocks, planes)


@parallel_kernel
def pack_tensor(
    address: int,
    prologue: Prologue,
    size: Triple,
    before: Triple,
    cut: Cut,
    wide: int,
    slab: Floats,
    apart: int,
    sums: int,
    workers: int,
) -> None:
    """Driver of `pack_planes`: each worker its blocks of bricks."""
    for index in prange(workers):
        worker = signed(index)
        call_worker(address, worker, prologue, size, before, cut, wide, slab, apart, sums, workers)


@functools.cache
def _make_pack(md: int, mh: int, kind: int) -> Callable[..., None]:
    @worker_kernel
    def pack_blocks(
        worker: int,
        prologue: Prologue,
        size: Triple,
        before: Triple,
        cut: Cut,
        wide: int,
        slab: Floats,
        apart: int,
        sums: int,
        workers: int,
    ) -> None:
        bricks, extent = count_bricks(cut), (cut.planes // md, cut.lines // mh, wide)
        voxels = extent[0] * extent[1] * wide
        units = prologue.blocks * bricks
        buffers = sums + units * LANES
        buffer = buffers + worker * ((slab.size - buffers) // workers)
        for unit in range(worker, units, workers):
            block, brick = unit // bricks, unit % bricks
            n, first, _ = locate(cut, brick)
            start = (first[0] - before[0], first[1] - before[1], -before[2])
            at, own_sums = unit * voxels * LANES, sums + unit * LANES
            pack_channel_block(
                prologue,
                block,
                n,
                size,
                slab,
                at,
                apart,
                buffer,
                own_sums,
                start,
                extent,
                kind,
                md,
                mh,
            )

    return pack_blocks
