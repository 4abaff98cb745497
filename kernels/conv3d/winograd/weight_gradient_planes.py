"""Weight gradient in the Winograd domain where channels are many and tiles few.

The sums of all points and pairs of blocks would stream through the caches for each brick. So source and
gradient are packed first, as `planes`. Each plane is a weight gradient along w alone, of all tiles at once:
its sums are made in registers, transformed back along w, and written only once::

    planes[block][row][w][16]  --transform_in-->  V, E[point][block][tile][16]        a plane, in cache
    V, E                       --accumulate---->  sums of a pair of blocks, PW points  first-level cache
                               --transform----->  sums[plane][pair][kw]
    sums                       --transform_back, d and h-->  panel

Loop nest: pack || planes of points | transform in | pairs of blocks, points | register tile | tiles || pairs:
transform back. What the next plane reads is fetched while registers multiply (`ahead`).
"""

import functools
from collections.abc import Callable

from kernels.checks import Doubles, Floats, Triple
from kernels.compiler import (
    call_worker,
    parallel_kernel,
    prange,
    run_workers,
    signed,
    worker_kernel,
)
from kernels.conv3d.ahead import part_of
from kernels.conv3d.bias import add_voxels
from kernels.conv3d.bricks import Cut, Prologue, count_bricks
from kernels.conv3d.cook_toom import DIFF_DST, DIFF_WEIGHTS, INPUT, sizes
from kernels.conv3d.transform import transform_axis
from kernels.conv3d.winograd.cutting import slab_planes, tile_count
from kernels.conv3d.winograd.planes import Planes, pack_planes
from kernels.conv3d.winograd.stages import accumulate, slot_size, transform_in
from kernels.conv3d.winograd.sums import register_tile, transform_back
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
    """Gradients of weights and bias; arguments as of `weight_gradient.backward_weights`, one chunk."""
    ICB, OCB = prologue.blocks, gradient.blocks
    inputs, cols = register_tile(OCB)
    size, none = (cut.OD, cut.OH, cut.OW), (0, 0, 0)
    source = pack_planes("planes", prologue, src_size, before, cut, tile, INPUT, ICB)
    result = pack_planes("gradient planes", gradient, size, none, cut, tile, DIFF_DST, OCB)
    workers, KW = threads(), sizes(DIFF_WEIGHTS, tile[2])[1]
    parts, block = ICB * (OCB // cols), KW * LANES * cols * LANES
    sums = scratchpad("winograd sums", 1, slab_planes(tile) * parts * block)
    scratch = scratchpad("winograd", workers, _scratch_size(cut, tile, ICB, OCB))
    run_workers(
        sum_planes,
        _make_sums(*tile, inputs, cols),
        source,
        result,
        cut,
        sums.reshape(-1),
        diff_bias,
        scratch,
    )
    # What is transformed back along w already has no points there: its taps are part of a block.
    transform_back((*tile[:2], 1), sums, panel.reshape(-1), parts, block)


def _scratch_size(cut: Cut, tile: Triple, ICB: int, OCB: int) -> int:
    """Floats of one worker's scratchpad: both transformed in a plane, sums of a pair, sums of a block."""
    T, PW = cut.bricks * tile_count(cut, tile), sizes(INPUT, tile[2])[1]
    pair = LANES * register_tile(OCB)[1] * LANES
    return PW * (slot_size(ICB, T) + slot_size(OCB, T) + pair) + LANES


@parallel_kernel
def sum_planes(
    address: int,
    source: Planes,
    result: Planes,
    cut: Cut,
    sums: Floats,
    diff_bias: Doubles,
    scratch: Floats,
) -> None:
    """Driver of the sums' workers: each its planes, with a row of ``scratch`` for itself."""
    for index in prange(scratch.shape[0]):
        worker = signed(index)
        call_worker(address, worker, source, result, cut, sums, diff_bias, scratch)


@functools.cache
def _make_sums(md: int, mh: int, mw: int, inputs: int, cols: int) -> Callable[..., None]:
    planes, PW = slab_planes((md, mh, mw)), sizes(INPUT, mw)[1]
    halo, KW = sizes(INPUT, mw)[0] - mw, sizes(DIFF_WEIGHTS, mw)[1]
    kind, pair = DIFF_WEIGHTS, LANES * cols * LANES

    @worker_kernel
    def sum_share(
        worker: int,
        source: Planes,
        result: Planes,
        cut: Cut,
        sums: Floats,
        diff_bias: Doubles,
        scratch: Floats,
    ) -> None:
        ICB, OCB = source.blocks, result.blocks
        groups, bricks = OCB // cols, count_bricks(cut)
        tiles, rows = -(-cut.OW // mw), cut.planes // md * (cut.lines // mh)
        inner, extent = (bricks, rows, tiles * mw), (bricks, rows, tiles * mw + halo)
        T = bricks * rows * tiles
        slot_v, slot_e = slot_size(ICB, T), slot_size(OCB, T)
        own = scratch[worker]
        S = own.size - LANES
        V, E = 0, PW * slot_v
        P = E + PW * slot_e
        for plane in range(worker, planes, scratch.shape[0]):
            x, g = plane * source.apart, plane * result.apart
            transform_in(source.data, x, extent, ICB, own, V, slot_v, T, 1, INPUT, mw)
            transform_in(result.data, g, inner, OCB, own, E, slot_e, T, cols, DIFF_DST, mw)
            if plane == 0:
                diff_bias[0] = 0.0
                add_voxels(result.data, result.sums, bricks, bricks, 1, diff_bias[0], own[S:])
            following = min(plane + scratch.shape[0], planes - 1)
            next_x = address(source.data, following * source.apart)
            next_g = address(result.data, following * result.apart)
            soon = (next_x, next_g, max(source.apart, result.apart) // LANES)
            for i in range(groups * ICB * PW):
                group, icb, point = i // (ICB * PW), i // PW % ICB, i % PW
                v = V + point * slot_v + icb * T * LANES
                e = E + point * slot_e + group * T * cols * LANES
                fetched = part_of(soon, i, groups * ICB * PW, 0)
                accumulate(own, v, e, T, own, P + point * pair, True, fetched, inputs, cols)
                if point < PW - 1:
                    continue
                to = (plane * groups * ICB + i // PW) * KW * pair
                for lane in range(0, pair, LANES):
                    line = tile_load(own, P + lane, 0, pair, 0, 1, PW, 1)
                    line = transform_axis(line, kind, mw, 1, 1)
                    tile_store(line, sums, to + lane, 0, pair, 0, 1, KW, 1)

    return sum_share
