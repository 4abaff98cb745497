"""Winograd convolution of blocked tensors, brick by brick, with prologue and epilogue.

The idea and the equation are told in `winograd`, the stages in `stages`. Loop nest: bricks and
parts of the output channels | slab | planes of points | icb, tiles: transform in | points along w, groups,
icb, ic: register tile | ocb, tiles: transform out || ocb: epilogue.
"""

import functools
import math
from collections.abc import Callable

import numpy as np

from kernels.base.arguments import Floats, Triple
from kernels.base.buffers import scratchpad
from kernels.base.jit import parallel_kernel, prange, run_workers, signed, worker_kernel
from kernels.base.layout import WeightsOrder, pack_weights_part, weights_order
from kernels.base.machine import threads
from kernels.base.prefetch import Region, part_of, tensors, upcoming
from kernels.base.simd import LANES, address, fence, load
from kernels.base.streaming import at_lines, put_vector
from kernels.conv3d.bricks import (
    EMPTY,
    Cut,
    convolve_bricks,
    count_bricks,
    locate,
    next_brick,
    share,
    source_tensors,
)
from kernels.conv3d.read import Inputs, Slab, Window, buffer_size, pack_brick
from kernels.conv3d.transform import scratch_vectors, transform_tile
from kernels.conv3d.winograd.cutting import gemm_tile, kernel_of, points, slab_extent, slab_planes, tile_count
from kernels.conv3d.winograd.stages import multiply, slot_size, transform_in, transform_out
from kernels.conv3d.write import Outputs, Staged, finish_block, finish_size
from kernels.ladder.cook_toom import INPUT, WEIGHTS, sizes


def packed_shape(cut: Cut, tile: Triple, ICB: int, OCB: int) -> tuple[int, int, int, int, int]:
    """Shape of the transformed weights: ``(points, groups, ICB, 16, cols * 16)``."""
    _, cols = gemm_tile(tile_count(cut, tile), OCB)
    return points(tile), OCB // cols, ICB, LANES, cols * LANES


def pack_weights(weights: Floats, tile: Triple, dst: Floats, *, adjoint: bool = False) -> None:
    """Block weights and transform them into the Winograd domain.

    Parameters
    ----------
    weights : ndarray, shape=(OC, IC, KD, KH, KW), float32
        Kernel 3 along each axis where ``tile`` is above 1; other taps count as input channels.
    tile : (md, mh, mw)
    dst : ndarray, shape=(points, groups, ICB, inputs, lanes), float32
        Filled; `packed_shape`, or that of `rows`.
    adjoint : bool
        As in `layout.pack_weights`.
    """
    # Far larger than the weights, and read when all of it is written: always past the caches.
    order, streams = weights_order(weights.shape, adjoint=adjoint), at_lines(dst)
    inputs, lanes = dst.shape[3:]
    own = math.prod(kernel_of(tile)) * inputs * lanes + points(tile) * slot_size(inputs, lanes // LANES)
    workers, size = threads(), own + scratch_vectors(WEIGHTS, *tile) * LANES
    scratch = scratchpad("winograd", workers, size)
    flat = np.ascontiguousarray(weights).reshape(-1)
    _make_weights(*tile)(flat, order, dst.reshape(-1), dst.shape, streams, scratch)


def convolve(
    prologue: Inputs,
    src_size: Triple,
    before: Triple,
    weights: Floats,
    epilogue: Outputs,
    cut: Cut,
    tile: Triple,
) -> None:
    """Convolve blocked tensors, stride 1.

    Parameters
    ----------
    prologue, epilogue
        What is read and written; see `bricks`.
    src_size : (D, H, W)
    before : (d, h, w)
        Zeros before the first voxel.
    weights : ndarray, `packed_shape`
    cut : Cut
        Bricks of the output, in whole tiles.
    tile : (md, mh, mw)
    """
    rows, _ = gemm_tile(tile_count(cut, tile), epilogue.blocks)
    cols = weights.shape[-1] // LANES
    workers = threads()
    size = _scratch_size(cut, tile, prologue.blocks, epilogue.blocks)
    scratch = scratchpad("winograd", workers, size)
    run_workers(
        convolve_bricks,
        _make_convolve(*tile, rows, cols),
        prologue,
        src_size,
        before,
        weights.reshape(-1),
        kernel_of(tile),
        epilogue,
        cut,
        scratch,
    )


@functools.cache
def _scratch_size(cut: Cut, tile: Triple, ICB: int, OCB: int) -> int:
    """Floats of one worker's scratchpad: slab, V and M of a plane or the buffer of a strip; epilogue."""
    deep, high, wide = slab_extent(cut, tile, INPUT)
    slab = slab_planes(tile) * slot_size(max(ICB, OCB), deep * high * wide)
    slots = (sizes(INPUT, tile[2])[1] + 1) * slot_size(max(ICB, OCB), tile_count(cut, tile))
    at_a_time = max(slots, buffer_size(high, tile[0], tile[1], INPUT))
    return slab + at_a_time + finish_size(tile[0], tile[1])


@functools.cache
def _make_weights(md: int, mh: int, mw: int) -> Callable[..., None]:
    (KD, _), (KH, PH), (KW, PW) = (sizes(WEIGHTS, m) for m in (md, mh, mw))
    kind, P = WEIGHTS, points((md, mh, mw))

    @parallel_kernel
    def transform(
        weights: Floats,
        order: WeightsOrder,
        dst: Floats,
        shape: tuple[int, int, int, int, int],
        streams: bool,
        scratch: Floats,
    ) -> None:
        _, groups, ICB, inputs, lanes = shape
        block, slot = inputs * lanes, slot_size(inputs, lanes // LANES)
        width = inputs * KD * KH * KW // order.taps
        from_strides = (KH * KW * block, KW * block, block)
        to_strides = (PH * PW * slot, PW * slot, slot)
        workers = scratch.shape[0]
        to = KD * KH * KW * block
        S = to + P * slot
        for index in prange(workers):
            worker = signed(index)
            # Staged, because a point's weights are far from the next one's: all would meet in a few
            # sets of the cache.
            own = scratch[worker]
            for part in range(worker, groups * ICB, workers):
                pack_weights_part(weights, order, part // ICB, part % ICB, own, 0, width, lanes)
                for i in range(0, block, LANES):
                    transform_tile(own, i, from_strides, own, to + i, to_strides, own, S, kind, md, mh, mw)
                for point in range(P):
                    for i in range(0, block, LANES):
                        at = (point * groups * ICB + part) * block + i
                        put_vector(dst, at, load(own, to + point * slot + i), streams)
            fence()

    return transform


@functools.cache
def _make_convolve(md: int, mh: int, mw: int, rows: int, cols: int) -> Callable[..., None]:
    PW = sizes(INPUT, mw)[1]
    planes, halo = slab_planes((md, mh, mw)), sizes(INPUT, mw)[0] - mw
    finishing = finish_size(md, mh)

    @worker_kernel
    def convolve_share(
        worker: int,
        prologue: Inputs,
        src_size: Triple,
        before: Triple,
        weights: Floats,
        kernel: Triple,
        epilogue: Outputs,
        cut: Cut,
        scratch: Floats,
    ) -> None:
        # All workers of `convolve_bricks` are given the kernel's size; here the tile says it.
        ICB, OCB = prologue.blocks, epilogue.blocks
        tiles, rows_here = -(-cut.OW // mw), cut.planes // md * (cut.lines // mh)
        T, wide = rows_here * tiles, tiles * mw
        extent = (cut.planes // md, cut.lines // mh, wide + halo)
        bricks = count_bricks(cut)
        apart = slot_size(max(ICB, OCB), rows_here * extent[2])
        slot = slot_size(max(ICB, OCB), T)
        M = planes * apart
        V = M + slot
        own = scratch[worker]
        source = source_tensors(prologue)
        beside = tensors(epilogue.mask_a.x, EMPTY, epilogue.mask_b.x, EMPTY, epilogue.blocks_a, OCB)
        groups = OCB // cols
        begin, stop_unit = share(bricks * groups, worker, scratch.shape[0])
        for brick in range(begin // groups, -(-stop_unit // groups)):
            first = max(begin - brick * groups, 0) * cols
            end = min(stop_unit - brick * groups, groups) * cols
            n, start, _ = locate(cut, brick)
            origin = (start[0] - before[0], start[1] - before[1], -before[2])
            pack_brick(prologue, Window(n, origin, extent), own, Slab(0, apart, M, 0), INPUT, md, mh)
            following = next_brick(cut, brick, before, src_size, md > 1, mh > 1)
            x = Region(n, (cut.OD, cut.OH, cut.OW), start, cut.planes, cut.lines)
            for plane in range(planes):
                at = plane * apart
                near = upcoming(source, following, beside, x, plane, planes)
                transform_in(own, at, extent, ICB, own, V, slot, T, 1, INPUT, mw)
                for point in range(PW):
                    w = (plane * PW + point) * OCB * ICB * LANES * LANES
                    v, m = V + point * slot, M + point * slot
                    next_weights = address(weights, w + OCB * ICB * LANES * LANES)
                    soon = part_of(near, point, PW, next_weights)
                    multiply(own, v, m, ICB, T, first, end, weights, w, soon, rows, cols)
                for ocb in range(first, end):
                    transform_out(own, M, slot, own, at, rows_here, tiles, ocb, mw)
            staged = (extent[0], extent[1], wide)
            for ocb in range(first, end):
                at = ocb * T * mw * LANES
                finish_block(
                    epilogue, cut, brick, ocb, own, Staged(at, apart, staged, own.size - finishing), md, mh
                )
        fence()

    return convolve_share
