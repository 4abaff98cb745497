"""Winograd for layers of many channels and few tiles: tensors are transformed whole, and once.

There, weights and their gradient outweigh the tensors: transformed, they are eight times as many, and would
be written to memory and read again for a few tiles each. F(4, 4, 4) makes but 216 numbers of 64 values, so
`pack_points` transforms all of a tensor first::

    tensor[block][d][h][w][16]  --pack, d and h-->  slab of a brick             second-level cache
    slab                        --w------------->   points[point][block][tile][16]

`convolve` takes groups of output channels. A worker transforms the weights of a group and a block of input
channels in cache, and adds their products with all tiles to sums that stay there. It prefetches the next
block's weights while registers multiply::

    weights[oc][ic][27]         --d and h------->   U[plane][kw][ic]            second-level cache
    U of a plane                --w------------->   points of the plane         first-level cache
    V of a block                --multiply------>   M[point][tile] +=           second-level cache
    M                           --transform_out, `write`-->  destination

`backward_weights` takes pairs, a block of input channels and a group of output channels. A pair's sums are
made in registers and taken back to 27 taps in cache; only these are written::

    points of a pair            --accumulate---->   sums of PW points           first-level cache
                                --w------------->   sums[plane][kw]             second-level cache
                                --d and h------->   taps  --unpack-->  diff_weights[oc][ic]
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from kernels.base.arguments import Doubles, Floats, Triple
from kernels.base.buffers import scratchpad
from kernels.base.jit import specialised, worker_kernel
from kernels.base.layout import WeightsOrder, pack_weights_part, part_line, unpack_weights_part, weights_order
from kernels.base.machine import threads
from kernels.base.prefetch import Lines
from kernels.base.simd import LANES, address, fence, load, store
from kernels.base.workers import run_workers
from kernels.conv3d.bricks import Cut, count_bricks, locate, share
from kernels.conv3d.read import Inputs, Slab, Window, pack_channel_block
from kernels.conv3d.transform import Grid, scratch_vectors, transform_columns, transform_tile
from kernels.conv3d.winograd_stages import (
    Panel,
    Sums,
    Tiles,
    accumulate,
    lay_out,
    multiply,
    odd_lines,
    points,
    product_tile,
    slab_planes,
    sums_tile,
    tile_count,
    transform_in,
    transform_out,
)
from kernels.conv3d.write import Outputs, Staged, finish_block, finish_size
from kernels.ladder.cook_toom import DIFF_DST, DIFF_WEIGHTS, INPUT, WEIGHTS, sizes

# The transformed weights of a pair of blocks are written once and read once a brick; or made anew where they
# are used, and all tiles are transformed before. Above this many weights for each value of a tensor, the
# second moves fewer bytes.
_WEIGHTS_PER_TILE = 1.0
# Tiles that are multiplied at a time, of several bricks, and bytes of their sums in the second-level cache,
# which they share with weights.
_TILES, _CACHED = 32, 512 * 1024
# Tiles behind the last one that `multiply` may read; their products are not used.
_SPARE = 24


def by_groups(cut: Cut, tile: Triple, ICB: int, OCB: int) -> bool:
    """Whether to convolve group after group of output channels, not brick after brick."""
    tiles = cut.bricks * tile_count(cut, tile)
    return ICB * OCB * LANES * LANES > _WEIGHTS_PER_TILE * tiles * max(ICB, OCB) * LANES


class Packing(NamedTuple):
    """What the threads of `pack_points` share."""

    source: Inputs
    before: Triple
    cut: Cut
    extent: Triple
    slab: Slab
    to: Tiles
    sums: Floats
    scratch: Floats


def pack_points(
    purpose: str, source: Inputs, before: Triple, cut: Cut, tile: Triple, kind: int, cols: int
) -> tuple[Tiles, Floats]:
    """Pack and transform all channel blocks of a tensor.

    Parameters
    ----------
    purpose : str
        Of the scratchpad that holds the points.
    source : Inputs
    before : (d, h, w)
        Zeros before the first voxel.
    cut : Cut
    tile : (md, mh, mw)
    kind : {INPUT, DIFF_DST}
        The transform, one of `cook_toom`'s.
    cols : int
        Blocks that lie side by side for each tile.

    Returns
    -------
    Tiles
        Of all bricks.
    ndarray, shape=(blocks * bricks * 16,)
        Sums of each brick's voxels, of a gradient (DIFF_DST).
    """
    blocks, tiles = source.blocks, cut.bricks * tile_count(cut, tile)
    point = odd_lines(blocks, tiles)
    size = points(tile) * point + _SPARE * LANES
    data = scratchpad(purpose, size + blocks * cut.bricks * LANES)
    to, sums = Tiles(data[:size], 0, point, tiles, blocks), data[size:]
    layout = lay_out(cut, tile, 1, 1, 0)
    slab, extent = (layout.source, layout.extent) if kind == INPUT else (layout.inner, layout.inner_extent)
    scratch = scratchpad("winograd", threads(), layout.size)
    job = Packing(source, before, cut, extent, slab, to, sums, scratch)
    run_workers(_make_pack(tile, kind, cols), threads(), job)
    return to, sums


@functools.cache
def _make_pack(tile: Triple, kind: int, cols: int) -> Callable[..., None]:
    md, mh, mw = tile
    planes, PW = slab_planes(tile), sizes(INPUT, mw)[1]

    @worker_kernel
    def pack_blocks(worker: int, job: Any) -> None:
        own, slab, extent, to = job.scratch[worker], job.slab, job.extent, job.to
        bricks = count_bricks(job.cut)
        here = to.tiles // bricks
        begin, end = share(to.blocks * bricks, worker, job.scratch.shape[0])
        for unit in range(begin, end):
            block, brick = unit // bricks, unit % bricks
            n, first, _ = locate(job.cut, brick)
            start = (first[0] - job.before[0], first[1] - job.before[1], -job.before[2])
            pack_channel_block(job.source, block, Window(n, start, extent), own, slab, kind, md, mh)
            if kind == DIFF_DST:
                store(job.sums, unit * LANES, load(own, slab.sums))
            first_tile = block // cols * cols * to.tiles + block % cols + brick * here * cols
            for plane in range(planes):
                at = to.at + plane * PW * to.point + first_tile * LANES
                tiles = Tiles(to.data, at, to.point, to.tiles, 1)
                transform_in(Panel(own, slab.at + plane * slab.plane), extent, tiles, cols, kind, mw)

    return pack_blocks


class GroupLayout(NamedTuple):
    """What lies where in a thread's scratchpad of `convolve`, in floats: the sums M come first.

    Behind M are a pair's weights, at the end the results along w in their place. ``taps`` are those of one
    input channel, which are transformed in ``scratch`` to ``U``, and a plane of U to ``points``.
    """

    tiles: int  # of M, in whole register tiles
    point: int  # from a point of M to the next
    taps: int
    scratch: int
    U: int
    plane: int  # from a plane of U to the next
    points: int
    result_plane: int
    finish: int
    size: int


@functools.cache
def lay_out_group(tile: Triple, tiles: int, rows: int, cols: int) -> GroupLayout:
    """Lay out the scratchpad of a thread that multiplies ``tiles`` tiles at a time."""
    (KD, _), (KH, _), (KW, PW) = (sizes(WEIGHTS, m) for m in tile)
    whole = -(-tiles // rows) * rows
    point = odd_lines(cols, whole)
    taps = points(tile) * point
    scratch = taps + KD * KH * KW * LANES
    U, plane = scratch + scratch_vectors(WEIGHTS, *tile[:2], 1) * LANES, odd_lines(KW * LANES, cols)
    W = U + slab_planes(tile) * plane
    result_plane = odd_lines(1, tiles * tile[2])
    finish = max(W + PW * LANES * cols * LANES, taps + slab_planes(tile) * result_plane)
    size = finish + finish_size(*tile[:2])
    return GroupLayout(whole, point, taps, scratch, U, plane, W, result_plane, finish, size)


class Groups(NamedTuple):
    """What the threads of `convolve` share."""

    source: Tiles
    weights: Floats
    order: WeightsOrder
    outputs: Outputs
    cut: Cut
    at_once: int  # bricks
    layout: GroupLayout
    scratch: Floats


def convolve(
    source: Inputs,
    before: Triple,
    weights: Floats,
    order: WeightsOrder,
    outputs: Outputs,
    cut: Cut,
    tile: Triple,
) -> None:
    """Convolve blocked tensors, stride 1; arguments as of `winograd_bricks.convolve`, but for the weights.

    Parameters
    ----------
    weights : flat float32 array
        As a layer has them, (OC, IC, KD, KH, KW).
    order : WeightsOrder
        Theirs, or that of the adjoint convolution.
    """
    tiles, _ = pack_points("points", source, before, cut, tile, INPUT, 1)
    at_once = max(1, min(cut.bricks, _TILES // tile_count(cut, tile)))
    T = at_once * tile_count(cut, tile)
    rows, cols = product_tile(T, outputs.blocks)
    units = outputs.blocks // cols * -(-cut.bricks // at_once)
    if units < threads() or points(tile) * T * cols * LANES * 4 > _CACHED:
        rows, cols = product_tile(T, 1)
    layout = lay_out_group(tile, T, rows, cols)
    scratch = scratchpad("winograd", threads(), layout.size)
    job = Groups(tiles, weights, order, outputs, cut, at_once, layout, scratch)
    run_workers(_make_groups(tile, rows, cols), threads(), job)


@functools.cache
def _make_groups(tile: Triple, rows: int, cols: int) -> Callable[..., None]:
    md, mh, mw = tile
    planes, PW = slab_planes(tile), sizes(WEIGHTS, mw)[1]
    lanes, block = cols * LANES, LANES * cols * LANES

    @worker_kernel
    def convolve_groups(worker: int, job: Any) -> None:
        source, order, out, layout, cut = job.source, job.order, job.outputs, job.layout, job.cut
        bricks, groups = count_bricks(cut), out.blocks // cols
        here, chunks = source.tiles // bricks, -(-bricks // job.at_once)
        extent = (cut.planes // md, cut.lines // mh, -(-cut.OW // mw) * mw)
        own = job.scratch[worker]
        begin, end = share(groups * chunks, worker, job.scratch.shape[0])
        for unit in range(begin, end):
            group, first = unit // chunks, unit % chunks * job.at_once
            count = min(job.at_once, bricks - first)
            whole = -(-count * here // rows) * rows
            for icb in range(source.blocks):
                transform_weights(job, own, group, icb, md, mh, mw, cols)
                # Next are the weights of the next block, or of the next unit's first.
                following = unit * source.blocks + icb + 1
                next_group, next_icb = (
                    min(following // source.blocks // chunks, groups - 1),
                    following % source.blocks,
                )
                for p in range(planes * PW):
                    if p % PW == 0:
                        at = layout.U + p // PW * layout.plane
                        transform_columns(own, at, block, own, layout.points, block, lanes, WEIGHTS, mw)
                    x = p * source.point + (icb * source.tiles + first * here) * LANES
                    line = p * lanes * order.taps // (planes * PW)
                    ahead = address(job.weights, part_line(order, next_group, next_icb, LANES, lanes, line))
                    lines = Lines(ahead, address(source.data, x + source.point), count * here)
                    v = Tiles(source.data, x, source.point, whole, 1)
                    m = Tiles(own, p * layout.point, layout.point, layout.tiles, cols)
                    w = Panel(own, layout.points + p % PW * block)
                    multiply(v, w, m, (0, cols), icb == 0, lines, rows, cols)
            for c in range(cols):
                for plane in range(planes):
                    at = plane * PW * layout.point + c * layout.tiles * LANES
                    m = Tiles(own, at, layout.point, count * here, 1)
                    transform_out(m, 0, Panel(own, layout.taps + plane * layout.result_plane), mw)
                for k in range(count):
                    at = layout.taps + k * here * mw * LANES
                    staged = Staged(at, layout.result_plane, extent, layout.finish)
                    finish_block(out, cut, first + k, group * cols + c, own, staged, md, mh)
        fence()

    return convolve_groups


@specialised
def transform_weights(job: Any, own: Any, group: int, icb: int, md: int, mh: int, mw: int, cols: int) -> None:
    """Transform the weights of ``cols`` blocks by one along d and h: to U ``[plane][kw][ic][cols]``."""
    KH, KW, PH = sizes(WEIGHTS, mh)[0], sizes(WEIGHTS, mw)[0], sizes(WEIGHTS, mh)[1]
    layout, block = job.layout, LANES * cols * LANES
    strides, to_strides = (KH * KW * LANES, KW * LANES, 0), (PH * layout.plane, layout.plane, 0)
    for i in range(LANES * cols):
        ic, ocb = icb * LANES + i // cols, group * cols + i % cols
        pack_weights_part(job.weights, job.order, ocb, ic, own, layout.taps, 1, LANES)
        for kw in range(KW):
            src = Grid(own, layout.taps + kw * LANES, strides)
            to = Grid(own, layout.U + kw * block + i * LANES, to_strides)
            transform_tile(src, to, own, layout.scratch, WEIGHTS, md, mh, 1)


class PairLayout(NamedTuple):
    """What lies where in a thread's scratchpad of `backward_weights`, in floats: sums of PW points first."""

    sums: int  # of all planes, transformed along w
    plane: int  # from a plane to the next
    scratch: int
    taps: int
    size: int


@functools.cache
def lay_out_pair(tile: Triple, cols: int) -> PairLayout:
    """Lay out the scratchpad of a thread that takes pairs of a block and ``cols`` blocks."""
    (_, KD), (_, KH), (PW, KW) = (sizes(DIFF_WEIGHTS, m) for m in tile)
    pair, plane = LANES * cols * LANES, odd_lines(KW * LANES, cols)
    scratch = PW * pair + slab_planes(tile) * plane
    taps = scratch + scratch_vectors(DIFF_WEIGHTS, *tile[:2], 1) * LANES
    return PairLayout(PW * pair, plane, scratch, taps, taps + KD * KH * KW * pair)


class Pairs(NamedTuple):
    """What the threads of `backward_weights` share."""

    source: Tiles
    result: Tiles
    diff_weights: Floats
    order: WeightsOrder
    layout: PairLayout
    scratch: Floats


def backward_weights(
    source: Inputs,
    before: Triple,
    gradient: Inputs,
    cut: Cut,
    tile: Triple,
    diff_weights: Floats,
    diff_bias: Doubles,
) -> None:
    """Gradients of weights and bias; arguments as of `winograd_bricks.backward_weights`, one chunk."""
    rows, cols = sums_tile(gradient.blocks)
    tiles, _ = pack_points("points", source, before, cut, tile, INPUT, 1)
    result, sums = pack_points("gradient points", gradient, (0, 0, 0), cut, tile, DIFF_DST, cols)
    layout, order = lay_out_pair(tile, cols), weights_order(diff_weights.shape, adjoint=False)
    scratch = scratchpad("winograd", threads(), layout.size)
    job = Pairs(tiles, result, diff_weights.reshape(-1), order, layout, scratch)
    run_workers(_make_pairs(tile, rows, cols), threads(), job)
    by_brick = sums.reshape(gradient.blocks, cut.bricks, LANES)
    diff_bias[0] = by_brick.sum(axis=1, dtype=np.float64).reshape(-1)


@functools.cache
def _make_pairs(tile: Triple, rows: int, cols: int) -> Callable[..., None]:
    md, mh, mw = tile
    planes, PH, PW = slab_planes(tile), sizes(INPUT, mh)[1], sizes(INPUT, mw)[1]
    KH, KW = sizes(DIFF_WEIGHTS, mh)[1], sizes(DIFF_WEIGHTS, mw)[1]
    kind, lanes, pair = DIFF_WEIGHTS, cols * LANES, LANES * cols * LANES
    row = KW * pair

    @worker_kernel
    def sum_pairs(worker: int, job: Any) -> None:
        source, result, layout = job.source, job.result, job.layout
        T, own = source.tiles, job.scratch[worker]
        strides, to_strides = (PH * layout.plane, layout.plane, 0), (KH * row, row, 0)
        begin, end = share(result.blocks // cols * source.blocks, worker, job.scratch.shape[0])
        for part in range(begin, end):
            group, icb = part // source.blocks, part % source.blocks
            for p in range(planes * PW):
                x = p * source.point + icb * T * LANES
                y = p * result.point + group * T * lanes
                ahead = address(result.data, y + result.point), address(source.data, x + source.point)
                v, e = Tiles(source.data, x, 0, T, 1), Tiles(result.data, y, 0, T, cols)
                sums = Sums(own, p % PW * pair, True)
                accumulate(v, e, sums, Lines(ahead[0], ahead[1], T * cols), rows, cols)
                if p % PW == PW - 1:
                    to = layout.sums + p // PW * layout.plane
                    transform_columns(own, 0, pair, own, to, pair, lanes, kind, mw)
            for i in range(0, row, LANES):
                src, to = Grid(own, layout.sums + i, strides), Grid(own, layout.taps + i, to_strides)
                transform_tile(src, to, own, layout.scratch, kind, md, mh, 1)
            unpack_weights_part(own, layout.taps, 1, 0, job.diff_weights, job.order, group, icb, LANES, lanes)

    return sum_pairs
