"""Weight gradient in the Winograd domain where channels are many and tiles few.

The sums of all points and pairs of blocks would stream through the caches for each brick. So source and
gradient are packed first, as `planes`, and transformed along w. Then each pair, a block of input channels
and ``cols`` of output channels, is a small weight gradient by itself: its sums are made in registers and
taken back to 27 taps while they are in cache, and only these are written, where they belong::

    planes[block][row][w][16]  --transform_in-->  V, E[point][block][tile][16]
    V, E of a pair             --accumulate---->  sums of PW points              first-level cache
                               --transform----->  sums[plane][kw]                second-level cache
    sums                       --transform_tile->  taps  --unpack-->  diff_weights[oc][ic]

Loop nest: pack || planes of points: transform in || pairs of blocks | planes of points, points | register
tile | tiles. What the next point reads is fetched while registers multiply.
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
from kernels.conv3d.bias import add_voxels
from kernels.conv3d.bricks import Cut, Prologue, count_bricks, share
from kernels.conv3d.cook_toom import DIFF_DST, DIFF_WEIGHTS, INPUT, sizes
from kernels.conv3d.transform import scratch_vectors, transform_axis, transform_tile
from kernels.conv3d.winograd.cutting import points, slab_planes, tile_count
from kernels.conv3d.winograd.planes import Planes, pack_planes
from kernels.conv3d.winograd.stages import accumulate, slot_size, transform_in
from kernels.conv3d.winograd.sums import register_tile
from kernels.layout import WeightsOrder, unpack_weights_part, weights_order
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
    diff_weights: Floats,
    diff_bias: Doubles,
) -> None:
    """Gradients of weights and bias; arguments as of `weight_gradient.backward_weights`, one chunk."""
    ICB, OCB = prologue.blocks, gradient.blocks
    inputs, cols = register_tile(OCB)
    size, none = (cut.OD, cut.OH, cut.OW), (0, 0, 0)
    source = pack_planes("planes", prologue, src_size, before, cut, tile, INPUT, ICB)
    result = pack_planes("gradient planes", gradient, size, none, cut, tile, DIFF_DST, OCB)
    T = cut.bricks * tile_count(cut, tile)
    slots = points(tile) * (slot_size(ICB, T) + slot_size(OCB, T))
    transformed = scratchpad("winograd sums", slots)
    scratch = scratchpad("winograd", threads(), _scratch_size(tile, cols))
    order = weights_order(diff_weights.shape, adjoint=False)
    for worker in (_make_transform(*tile, cols), _make_pairs(*tile, inputs, cols)):
        run_workers(
            share_pairs,
            worker,
            source,
            result,
            cut,
            transformed,
            diff_weights.reshape(-1),
            order,
            diff_bias,
            scratch,
        )


def _scratch_size(tile: Triple, cols: int) -> int:
    """Floats of one worker's scratchpad: sums along w; sums of all planes; scratch; taps."""
    (_, KD), (_, KH), (PW, KW) = (sizes(DIFF_WEIGHTS, m) for m in tile)
    pair, scratch = LANES * cols * LANES, scratch_vectors(DIFF_WEIGHTS, *tile[:2], 1) * LANES
    sums = slab_planes(tile) * slot_size(KW * LANES, cols)
    return PW * pair + sums + scratch + KD * KH * KW * pair


@parallel_kernel
def share_pairs(
    address: int,
    source: Planes,
    result: Planes,
    cut: Cut,
    transformed: Floats,
    diff_weights: Floats,
    order: WeightsOrder,
    diff_bias: Doubles,
    scratch: Floats,
) -> None:
    """Driver of both stages' workers: each its share, with a row of ``scratch`` for itself."""
    for index in prange(scratch.shape[0]):
        worker = signed(index)
        call_worker(
            address,
            worker,
            source,
            result,
            cut,
            transformed,
            diff_weights,
            order,
            diff_bias,
            scratch,
        )


@functools.cache
def _make_transform(md: int, mh: int, mw: int, cols: int) -> Callable[..., None]:
    planes, PW = slab_planes((md, mh, mw)), sizes(INPUT, mw)[1]
    halo = sizes(INPUT, mw)[0] - mw

    @worker_kernel
    def transform_share(
        worker: int,
        source: Planes,
        result: Planes,
        cut: Cut,
        transformed: Floats,
        diff_weights: Floats,
        order: WeightsOrder,
        diff_bias: Doubles,
        scratch: Floats,
    ) -> None:
        # The weights are given to both stages; this one needs none.
        ICB, OCB, bricks = source.blocks, result.blocks, count_bricks(cut)
        tiles, rows = -(-cut.OW // mw), cut.planes // md * (cut.lines // mh)
        inner, extent = (bricks, rows, tiles * mw), (bricks, rows, tiles * mw + halo)
        T = bricks * rows * tiles
        slot_v, slot_e = slot_size(ICB, T), slot_size(OCB, T)
        for plane in range(worker, planes, scratch.shape[0]):
            x, g = plane * source.apart, plane * result.apart
            v = plane * PW * slot_v
            e = planes * PW * slot_v + plane * PW * slot_e
            transform_in(source.data, x, extent, ICB, transformed, v, slot_v, T, 1, INPUT, mw)
            transform_in(result.data, g, inner, OCB, transformed, e, slot_e, T, cols, DIFF_DST, mw)
            if plane == 0:
                diff_bias[0] = 0.0
                add_voxels(result.data, result.sums, bricks, bricks, 1, diff_bias[0], scratch[0])

    return transform_share


@functools.cache
def _make_pairs(md: int, mh: int, mw: int, inputs: int, cols: int) -> Callable[..., None]:
    planes, PH, PW = slab_planes((md, mh, mw)), sizes(INPUT, mh)[1], sizes(INPUT, mw)[1]
    _, KH, KW = (sizes(DIFF_WEIGHTS, m)[1] for m in (md, mh, mw))
    kind, lanes, pair = DIFF_WEIGHTS, cols * LANES, LANES * cols * LANES
    # Sums along w, the sums of all planes an odd number of lines apart, scratch, taps.
    row, apart, S = KW * pair, slot_size(KW * LANES, cols), PW * pair
    W = S + planes * apart
    taps = W + scratch_vectors(kind, md, mh, 1) * LANES

    @worker_kernel
    def sum_share(
        worker: int,
        source: Planes,
        result: Planes,
        cut: Cut,
        transformed: Floats,
        diff_weights: Floats,
        order: WeightsOrder,
        diff_bias: Doubles,
        scratch: Floats,
    ) -> None:
        ICB, OCB = source.blocks, result.blocks
        tiles = count_bricks(cut) * (cut.planes // md) * (cut.lines // mh)
        T = tiles * -(-cut.OW // mw)
        slot_v, slot_e = slot_size(ICB, T), slot_size(OCB, T)
        E = planes * PW * slot_v
        own = scratch[worker]
        begin, end = share(OCB // cols * ICB, worker, scratch.shape[0])
        for part in range(begin, end):
            group, icb = part // ICB, part % ICB
            v, e = icb * T * LANES, E + group * T * lanes
            for point in range(planes * PW):
                next_e = address(transformed, e + (point + 1) * slot_e)
                next_v = address(transformed, v + (point + 1) * slot_v)
                soon = (next_e, next_v, T * cols)
                x, y, to = v + point * slot_v, e + point * slot_e, point % PW * pair
                accumulate(transformed, x, y, T, own, to, True, soon, inputs, cols)
                if point % PW < PW - 1:
                    continue
                to = S + point // PW * apart
                for lane in range(0, pair, LANES):
                    line = tile_load(own, lane, 0, pair, 0, 1, PW, 1)
                    line = transform_axis(line, kind, mw, 1, 1)
                    tile_store(line, own, to + lane, 0, pair, 0, 1, KW, 1)
            for i in range(0, row, LANES):
                strides, to_strides = (PH * apart, apart, 0), (KH * row, row, 0)
                transform_tile(
                    own, S + i, strides, own, taps + i, to_strides, own, W, kind, md, mh, 1
                )
            unpack_weights_part(own, taps, 1, 0, diff_weights, order, group, icb, LANES, lanes)

    return sum_share
