"""Winograd for layers of many channels and few tiles: tensors are transformed whole, and once.

There, weights and their gradient outweigh the tensors: transformed, they are eight times as many, and would
be written to memory and read again for a few tiles each. So `pack_points` transforms the tensors first, 216
numbers of 64 values for F(4, 4, 4), and a worker takes a *pair*: a block of input channels and a group of
``cols`` blocks of output channels. What it transforms of weights stays in cache::

    pack_points       tensor --pack, d and h-->  slab  --w-->  points[point][block][tile][16]

    convolve          weights[oc][ic][27]  --d and h-->  planes[plane][kw][ic]  --w-->  points of a plane
                      V of a block         --multiply by these-->  M[point][tile] +=
                      M of all blocks      --transform_out, `write`-->  destination

    backward_weights  V and E of a pair    --accumulate-->  points of a plane  --w-->  planes[plane][kw][ic]
                      planes               --d and h-->  taps  --unpack-->  diff_weights[oc][ic][27]

While registers multiply, a worker prefetches the weights of its next pair, or the next point of V and E.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from kernels.base.arguments import Doubles, Floats, Triple
from kernels.base.buffers import scratchpad
from kernels.base.jit import specialised, worker_kernel
from kernels.base.layout import (
    Part,
    WeightsOrder,
    pack_weights_part,
    part_line,
    unpack_weights_part,
    weights_order,
)
from kernels.base.machine import threads
from kernels.base.simd import LANES, address, fence, load, store
from kernels.base.workers import run_workers
from kernels.conv3d import winograd_stages as stages
from kernels.conv3d.bricks import Cut, Plan, count_bricks, locate, share
from kernels.conv3d.prefetch import Lines
from kernels.conv3d.read import Inputs, Slab, Window, pack_channel_block
from kernels.conv3d.transform import Grid, scratch_vectors, transform_columns, transform_tile
from kernels.conv3d.winograd_stages import Panel, Sums, Tiles, odd_lines, slab_planes, tile_count
from kernels.conv3d.write import Outputs, Staged, finish_block, finish_size
from kernels.ladder.cook_toom import DIFF_DST, DIFF_WEIGHTS, INPUT, WEIGHTS, sizes

# Two schedules: write the transformed weights once and read them once a brick; or transform all tiles first,
# and weights where they are used. Above this many weights for each value the second moves fewer bytes.
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


def packed_shape(p: Plan) -> tuple[int, int]:
    """Shape of the weights as a layer has them: nothing is packed."""
    return sum(p.channels_in) * sum(p.channels_out), math.prod(p.kernel)


def pack(p: Plan, weights: Floats, packed: Floats, *, adjoint: bool) -> None:
    """Copy weights to `packed_shape`."""
    np.copyto(packed, weights.reshape(packed.shape))


class _Packing(NamedTuple):
    source: Inputs
    before: Triple
    cut: Cut
    extent: Triple
    slab: Slab
    to: Tiles
    sums: Floats
    scratch: Floats


def pack_points(p: Plan, source: Inputs, kind: int, cols: int) -> tuple[Tiles, Floats]:
    """Pack and transform all channel blocks of a tensor, into a scratchpad.

    The transform is of ``kind`` INPUT or DIFF_DST, and ``cols`` blocks lie side by side for each tile. This
    returns the points, and of a gradient the sums of each brick's voxels, of shape (blocks * bricks * 16,).
    """
    cut, tile, blocks, tiles = p.cut, p.form, source.blocks, p.cut.bricks * tile_count(p.cut, p.form)
    point = odd_lines(blocks, tiles)
    size = stages.points(tile) * point + _SPARE * LANES
    data = scratchpad(f"points {kind}", size + blocks * cut.bricks * LANES)
    to, sums = Tiles(data[:size], 0, point, tiles, blocks), data[size:]
    layout = stages.lay_out(cut, tile, 1, 1, 0)
    slab, extent, before = layout.source, layout.extent, p.before
    if kind == DIFF_DST:
        slab, extent, before = layout.inner, layout.inner_extent, (0, 0, 0)
    scratch = scratchpad("winograd", threads(), layout.size)
    job = _Packing(source, before, cut, extent, slab, to, sums, scratch)
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
                stages.transform_in(Panel(own, slab.at + plane * slab.plane), extent, tiles, cols, kind, mw)

    return pack_blocks


class _Pair(NamedTuple):
    """Where a pair's weights are in a thread's scratchpad: offsets and strides in floats."""

    taps: int
    scratch: int  # of the transforms
    planes: int  # transformed along d and h
    plane: int  # from one to the next
    points: int  # of a plane, transformed along w, too
    end: int


@functools.cache
def _lay_out_pair(tile: Triple, kind: int, cols: int, vectors: int, at: int) -> _Pair:
    """Lay out a pair from an offset on, with so many vectors of each tap; ``kind`` is the transforms'."""
    (KD, _), (KH, _), (KW, PW) = (sizes(WEIGHTS, m) for m in tile)
    scratch, plane = at + KD * KH * KW * vectors * LANES, odd_lines(KW * LANES, cols)
    planes = scratch + scratch_vectors(kind, *tile[:2], 1) * LANES
    points = planes + slab_planes(tile) * plane
    return _Pair(at, scratch, planes, plane, points, points + PW * LANES * cols * LANES)


class _Groups(NamedTuple):
    source: Tiles
    weights: Floats
    order: WeightsOrder
    outputs: Outputs
    cut: Cut
    bricks: int  # that are multiplied at a time
    tiles: int  # of M, in whole register tiles; M comes first in the scratchpad
    point: int  # from a point of M to the next
    pair: _Pair
    result: int  # from plane to plane of results along w, which in the end replace the pair's weights
    finish: int
    scratch: Floats


def convolve(p: Plan, source: Inputs, weights: Floats, outputs: Outputs, *, adjoint: bool) -> None:
    """Convolve blocked tensors; see `bricks`."""
    cut, tile, ends = p.cut, p.form, (sum(p.channels_in), sum(p.channels_out))
    order = weights_order((*(ends if adjoint else ends[::-1]), *p.kernel), adjoint=adjoint)
    points, _ = pack_points(p, source, INPUT, 1)
    bricks = max(1, min(cut.bricks, _TILES // tile_count(cut, tile)))
    T = bricks * tile_count(cut, tile)
    rows, cols = stages.product_tile(T, outputs.blocks)
    units = outputs.blocks // cols * -(-cut.bricks // bricks)
    if units < threads() or stages.points(tile) * T * cols * LANES * 4 > _CACHED:
        rows, cols = stages.product_tile(T, 1)
    whole = -(-T // rows) * rows
    point = odd_lines(cols, whole)
    pair = _lay_out_pair(tile, WEIGHTS, cols, 1, stages.points(tile) * point)
    result = odd_lines(1, T * tile[2])
    finish = max(pair.end, pair.taps + slab_planes(tile) * result)
    scratch = scratchpad("winograd", threads(), finish + finish_size(*tile[:2]))
    flat, counts = weights.reshape(-1), (bricks, whole, point)
    job = _Groups(points, flat, order, outputs, cut, *counts, pair, result, finish, scratch)
    run_workers(_make_groups(tile, rows, cols), threads(), job)


@functools.cache
def _make_groups(tile: Triple, rows: int, cols: int) -> Callable[..., None]:
    md, mh, mw = tile
    planes, PW, lanes, block = slab_planes(tile), sizes(WEIGHTS, mw)[1], cols * LANES, LANES * cols * LANES

    @worker_kernel
    def convolve_groups(worker: int, job: Any) -> None:
        source, order, out, cut, pair = job.source, job.order, job.outputs, job.cut, job.pair
        bricks, groups, own = count_bricks(cut), out.blocks // cols, job.scratch[worker]
        here, chunks = source.tiles // bricks, -(-bricks // job.bricks)
        extent = (cut.planes // md, cut.lines // mh, -(-cut.OW // mw) * mw)
        begin, end = share(groups * chunks, worker, job.scratch.shape[0])
        for unit in range(begin, end):
            group, first = unit // chunks, unit % chunks * job.bricks
            count = min(job.bricks, bricks - first)
            whole = -(-count * here // rows) * rows
            for icb in range(source.blocks):
                transform_weights(job, own, group, icb, md, mh, mw, cols)
                # Next are the weights of the next block, or of the next unit's first.
                step = unit * source.blocks + icb + 1
                next_group = min(step // source.blocks // chunks, groups - 1)
                upcoming = Part(next_group, step % source.blocks, LANES, lanes)
                for p in range(planes * PW):
                    if p % PW == 0:
                        at = pair.planes + p // PW * pair.plane
                        transform_columns(own, at, block, own, pair.points, block, lanes, WEIGHTS, mw)
                    x = p * source.point + (icb * source.tiles + first * here) * LANES
                    line = p * lanes * order.taps // (planes * PW)
                    near = address(job.weights, part_line(order, upcoming, line))
                    lines = Lines(near, address(source.data, x + source.point), count * here)
                    v = Tiles(source.data, x, source.point, whole, 1)
                    m = Tiles(own, p * job.point, job.point, job.tiles, cols)
                    weights = Panel(own, pair.points + p % PW * block)
                    stages.multiply(v, weights, m, (0, cols), icb == 0, lines, rows, cols)
            for c in range(cols):
                for plane in range(planes):
                    at = plane * PW * job.point + c * job.tiles * LANES
                    m = Tiles(own, at, job.point, count * here, 1)
                    stages.transform_out(m, 0, Panel(own, pair.taps + plane * job.result), mw)
                for k in range(count):
                    staged = Staged(pair.taps + k * here * mw * LANES, job.result, extent, job.finish)
                    finish_block(out, cut, first + k, group * cols + c, own, staged, md, mh)
        fence()

    return convolve_groups


@specialised
def transform_weights(job: Any, own: Any, group: int, icb: int, md: int, mh: int, mw: int, cols: int) -> None:
    """Transform the weights of ``cols`` blocks by one along d and h: to the pair's planes."""
    KH, KW, PH = sizes(WEIGHTS, mh)[0], sizes(WEIGHTS, mw)[0], sizes(WEIGHTS, mh)[1]
    pair = job.pair
    strides, to_strides = (KH * KW * LANES, KW * LANES, 0), (PH * pair.plane, pair.plane, 0)
    for i in range(LANES * cols):
        part = Part(group * cols + i % cols, icb * LANES + i // cols, 1, LANES)
        pack_weights_part(job.weights, job.order, part, own, pair.taps)
        for kw in range(KW):
            src = Grid(own, pair.taps + kw * LANES, strides)
            to = Grid(own, pair.planes + (kw * LANES * cols + i) * LANES, to_strides)
            transform_tile(src, to, own, pair.scratch, WEIGHTS, md, mh, 1)


class _Pairs(NamedTuple):
    source: Tiles
    result: Tiles
    diff_weights: Floats
    order: WeightsOrder
    pair: _Pair
    scratch: Floats


def backward_weights(p: Plan, source: Inputs, gradient: Inputs, diff_weights: Floats) -> Doubles:
    """Gradients of weights and bias; see `bricks`."""
    tile, (rows, cols) = p.form, stages.sums_tile(gradient.blocks)
    points, _ = pack_points(p, source, INPUT, 1)
    result, sums = pack_points(p, gradient, DIFF_DST, cols)
    order = weights_order(diff_weights.shape, adjoint=False)
    pair = _lay_out_pair(tile, DIFF_WEIGHTS, cols, LANES * cols, 0)
    scratch = scratchpad("winograd", threads(), pair.end)
    job = _Pairs(points, result, diff_weights.reshape(-1), order, pair, scratch)
    run_workers(_make_pairs(tile, rows, cols), threads(), job)
    by_brick = sums.reshape(gradient.blocks, p.cut.bricks, LANES)
    return by_brick.sum(axis=1, dtype=np.float64).reshape(1, -1)


@functools.cache
def _make_pairs(tile: Triple, rows: int, cols: int) -> Callable[..., None]:
    md, mh, mw = tile
    planes, PH, PW = slab_planes(tile), sizes(INPUT, mh)[1], sizes(INPUT, mw)[1]
    KH, KW = sizes(DIFF_WEIGHTS, mh)[1], sizes(DIFF_WEIGHTS, mw)[1]
    kind, lanes, block = DIFF_WEIGHTS, cols * LANES, LANES * cols * LANES

    @worker_kernel
    def sum_pairs(worker: int, job: Any) -> None:
        source, result, pair, own = job.source, job.result, job.pair, job.scratch[worker]
        strides, to_strides = (PH * pair.plane, pair.plane, 0), (KH * KW * block, KW * block, 0)
        T = source.tiles
        begin, end = share(result.blocks // cols * source.blocks, worker, job.scratch.shape[0])
        for part in range(begin, end):
            group, icb = part // source.blocks, part % source.blocks
            for p in range(planes * PW):
                x, y = p * source.point + icb * T * LANES, p * result.point + group * T * lanes
                near, other = address(result.data, y + result.point), address(source.data, x + source.point)
                v, e = Tiles(source.data, x, 0, T, 1), Tiles(result.data, y, 0, T, cols)
                sums = Sums(own, pair.points + p % PW * block, True)
                stages.accumulate(v, e, sums, Lines(near, other, T * cols), rows, cols)
                if p % PW == PW - 1:
                    to = pair.planes + p // PW * pair.plane
                    transform_columns(own, pair.points, block, own, to, block, lanes, kind, mw)
            for i in range(0, KW * block, LANES):
                src, dst = Grid(own, pair.planes + i, strides), Grid(own, pair.taps + i, to_strides)
                transform_tile(src, dst, own, pair.scratch, kind, md, mh, 1)
            here = Part(group, icb, LANES, lanes)
            unpack_weights_part(own, pair.taps, (1, 0), job.diff_weights, job.order, here)

    return sum_pairs
