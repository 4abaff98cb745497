"""Weight gradient in the Winograd domain where channels are many and tiles few.

The sums of all points and pairs of blocks would stream through the caches for each brick. So source and
gradient are packed first, all bricks of them, transformed along d and h: some 36 planes of points. Each
plane is a weight gradient along w alone, of all tiles at once: its sums are made in registers, transformed
back along w, and written only once::

    slabs[plane][block][row][w][16]  --transform_in-->  V, E[point][block][tile][16]        a plane, in cache
    V, E                             --accumulate---->  sums of a pair of blocks, PW points  first-level cache
                                     --transform----->  sums[plane][pair][kw]
    sums                             --transform_back, d and h-->  panel

Loop nest: blocks, bricks: pack || planes of points | transform in | pairs of blocks, points | register tile |
tiles || pairs: transform back. What the next plane reads is fetched while registers multiply (`ahead`).

The slabs lie in memory, or in a large cache: 36 / 16 of the tensors, written and read once. With all three
axes transformed they would be half as large again, and the sums twice as large.
"""

import functools
import math
from collections.abc import Callable

from kernels.compiler import run_workers, worker_kernel
from kernels.conv3d.ahead import part_of
from kernels.conv3d.bricks import (
    Cut,
    Prologue,
    add_voxels,
    count_bricks,
    locate,
    pack_channel_block,
)
from kernels.conv3d.cook_toom import DIFF_DST, DIFF_WEIGHTS, INPUT, sizes
from kernels.conv3d.epilogue import Doubles
from kernels.conv3d.shapes import Triple
from kernels.conv3d.slab import buffer_size
from kernels.conv3d.transform import transform_axis
from kernels.conv3d.weight_sums import gather_bricks, point_of_sums, register_tile, transform_back
from kernels.conv3d.winograd_convolve import slab_extent, slab_planes, tile_count
from kernels.conv3d.winograd_stages import accumulate, slot_size, transform_in
from kernels.layout import Floats
from kernels.machine import threads
from kernels.memory import scratchpad
from kernels.simd import LANES, address, tile_load, tile_store


def backward_weights(
    prologue: Prologue,
    src_size: Triple,
    before: Triple,
    gradient: Prologue,
    cut: Cut,
    tile: Triple,
    panel: Floats,
    diff_bias: Doubles,
) -> None:
    """Gradients of weights and bias; arguments as of `winograd_weights.backward_weights`, one chunk."""
    ICB, OCB = prologue.blocks, gradient.blocks
    inputs, cols = register_tile(OCB)
    KW = sizes(DIFF_WEIGHTS, tile[2])[1]
    parts, block = ICB * (OCB // cols), KW * LANES * cols * LANES
    workers, planes = threads(), slab_planes(tile)
    apart, gradient_apart = (
        slot_size(count * cut.bricks, math.prod(slab_extent(cut, tile, kind)))
        for count, kind in ((ICB, INPUT), (OCB, DIFF_DST))
    )
    slabs, sums = planes * (apart + gradient_apart), planes * parts * block
    buffer = buffer_size(cut.lines // tile[1], tile[0], tile[1], INPUT)
    room = slabs + sums + workers * buffer
    shared = scratchpad("winograd planes", room)[:room]
    size = _scratch_size(cut, tile, ICB, OCB)
    scratch = scratchpad("winograd", workers * size)[: workers * size].reshape(workers, size)
    for make in (_make_pack, _make_sums):
        run_workers(
            gather_bricks,
            make(*tile, inputs, cols),
            prologue,
            src_size,
            before,
            gradient,
            cut,
            shared,
            diff_bias,
            scratch,
        )
    # What is transformed back along w already has no points there: its taps are part of a block.
    whole = shared[slabs : slabs + sums].reshape(1, sums)
    transform_back((*tile[:2], 1), whole, panel.reshape(-1), parts, block)


def _scratch_size(cut: Cut, tile: Triple, ICB: int, OCB: int) -> int:
    """Floats of one worker's scratchpad: both transformed in a plane, sums of a pair, sums of a block."""
    T, PW = cut.bricks * tile_count(cut, tile), sizes(INPUT, tile[2])[1]
    pair = LANES * register_tile(OCB)[1] * LANES
    return PW * (slot_size(ICB, T) + slot_size(OCB, T) + pair) + LANES


@functools.cache
def _make_pack(md: int, mh: int, mw: int, inputs: int, cols: int) -> Callable[..., None]:
    planes, halo = slab_planes((md, mh, mw)), sizes(INPUT, mw)[0] - mw
    KW, pair = sizes(DIFF_WEIGHTS, mw)[1], LANES * cols * LANES

    @worker_kernel
    def pack_blocks(
        worker: int,
        prologue: Prologue,
        src_size: Triple,
        before: Triple,
        gradient: Prologue,
        cut: Cut,
        shared: Floats,
        diff_bias: Doubles,
        scratch: Floats,
    ) -> None:
        ICB, OCB, bricks = prologue.blocks, gradient.blocks, count_bricks(cut)
        inner = (cut.planes // md, cut.lines // mh, -(-cut.OW // mw) * mw)
        extent = (inner[0], inner[1], inner[2] + halo)
        voxels, inner_voxels = extent[0] * extent[1] * extent[2], inner[0] * inner[1] * inner[2]
        apart = slot_size(ICB * bricks, voxels)
        gradient_apart = slot_size(OCB * bricks, inner_voxels)
        G = planes * apart
        sums = G + planes * gradient_apart
        buffers = sums + planes * ICB * (OCB // cols) * KW * pair
        buffer = buffers + worker * ((shared.size - buffers) // scratch.shape[0])
        size = (cut.OD, cut.OH, cut.OW)
        for unit in range(worker, (ICB + OCB) * bricks, scratch.shape[0]):
            block, brick = unit // bricks, unit % bricks
            n, start, _ = locate(cut, brick)
            if block < ICB:
                origin = (start[0] - before[0], start[1] - before[1], -before[2])
                at = unit * voxels * LANES
                pack_channel_block(
                    prologue,
                    block,
                    n,
                    src_size,
                    shared,
                    at,
                    apart,
                    buffer,
                    origin,
                    extent,
                    INPUT,
                    md,
                    mh,
                )
            else:
                at = G + (unit - ICB * bricks) * inner_voxels * LANES
                pack_channel_block(
                    gradient,
                    block - ICB,
                    n,
                    size,
                    shared,
                    at,
                    gradient_apart,
                    buffer,
                    start,
                    inner,
                    DIFF_DST,
                    md,
                    mh,
                )

    return pack_blocks


@functools.cache
def _make_sums(md: int, mh: int, mw: int, inputs: int, cols: int) -> Callable[..., None]:
    planes, PW = slab_planes((md, mh, mw)), sizes(INPUT, mw)[1]
    halo, KW = sizes(INPUT, mw)[0] - mw, sizes(DIFF_WEIGHTS, mw)[1]
    plane_of_sums, one = point_of_sums(md, mh, mw)
    kind, pair = DIFF_WEIGHTS, LANES * cols * LANES

    @worker_kernel
    def sum_planes(
        worker: int,
        prologue: Prologue,
        src_size: Triple,
        before: Triple,
        gradient: Prologue,
        cut: Cut,
        shared: Floats,
        diff_bias: Doubles,
        scratch: Floats,
    ) -> None:
        ICB, OCB, groups = prologue.blocks, gradient.blocks, gradient.blocks // cols
        tiles, rows = -(-cut.OW // mw), cut.planes // md * (cut.lines // mh)
        inner = (count_bricks(cut), rows, tiles * mw)
        extent = (inner[0], rows, tiles * mw + halo)
        T = inner[0] * rows * tiles
        apart = slot_size(ICB, inner[0] * rows * extent[2])
        gradient_apart = slot_size(OCB, inner[0] * rows * inner[2])
        G = planes * apart
        sums = G + planes * gradient_apart
        slot_v, slot_e = slot_size(ICB, T), slot_size(OCB, T)
        own = scratch[worker]
        S = own.size - LANES
        V, E = 0, PW * slot_v
        P = E + PW * slot_e
        workers = scratch.shape[0]
        for plane in range(worker, planes, workers):
            g = G + plane * gradient_apart
            transform_in(shared, plane * apart, extent, ICB, own, V, slot_v, T, 1, INPUT, mw)
            transform_in(shared, g, inner, OCB, own, E, slot_e, T, cols, DIFF_DST, mw)
            if plane == plane_of_sums:
                diff_bias[0] = 0.0
                add_voxels(own, E + one * slot_e, T, T, cols, diff_bias[0], own[S:])
            then = min(plane + workers, planes - 1)
            near = address(shared, then * apart), address(shared, G + then * gradient_apart)
            soon = (near[0], near[1], max(apart, gradient_apart) // LANES)
            for i in range(groups * ICB * PW):
                group, icb, point = i // (ICB * PW), i // PW % ICB, i % PW
                v = V + point * slot_v + icb * T * LANES
                e = E + point * slot_e + group * T * cols * LANES
                fetched = part_of(soon, i, groups * ICB * PW, 0)
                accumulate(own, v, e, T, own, P + point * pair, True, fetched, inputs, cols)
                if point < PW - 1:
                    continue
                to = sums + (plane * groups * ICB + i // PW) * KW * pair
                for lane in range(0, pair, LANES):
                    line = tile_load(own, P + lane, 0, pair, 0, 1, PW, 1)
                    line = transform_axis(line, kind, mw, 1, 1)
                    tile_store(line, shared, to + lane, 0, pair, 0, 1, KW, 1)

    return sum_planes
