"""Winograd convolution where channels are many and tiles few: group after group of output channels.

Transformed, the weights would be eight times as many, written to memory and read again, for a few tiles
each. So they are never made: the source is packed and transformed once, as `packing`; then a worker takes a
group of output channels and block after block of input channels, transforms the weights of that pair while
they are in cache, and adds their products with all tiles to sums that stay there::

    weights[oc][ic][27]  --block, transform, d and h-->  U[plane][kw]         second-level cache
    U of a plane         --transform, w------------->    PW points            first-level cache
    V of a block         --multiply_block----------->    M[point][tile] +=    second-level cache
    M                    --transform out, epilogue-->    destination

Loop nest: pack || groups, chunks of bricks | icb | planes of points | points along w | tiles | ic | register
tile || ocb: transform out, epilogue. The next block's weights are fetched while registers multiply.
"""

import functools
from collections.abc import Callable

from kernels.checks import Floats, Triple
from kernels.compiler import (
    call_worker,
    parallel_kernel,
    prange,
    run_workers,
    signed,
    worker_kernel,
)
from kernels.conv3d.bricks import Cut, Epilogue, Prologue, count_bricks, finish_block, share
from kernels.conv3d.cook_toom import INPUT, WEIGHTS, sizes
from kernels.conv3d.epilogue import finish_size
from kernels.conv3d.transform import scratch_vectors, transform_axis, transform_tile
from kernels.conv3d.winograd.cutting import gemm_tile, points, slab_planes, tile_count
from kernels.conv3d.winograd.packing import Points, pack_points
from kernels.conv3d.winograd.stages import multiply_block, slot_size, transform_out
from kernels.layout import WeightsOrder, pack_weights_part, part_line
from kernels.machine import threads
from kernels.memory import scratchpad
from kernels.simd import LANES, address, fence, tile_load, tile_store

# Tiles that are multiplied at a time, of several bricks, and bytes of their sums in the second-level cache,
# where weights have to stay beside them.
_TILES, _CACHED = 32, 512 * 1024


def convolve(
    prologue: Prologue,
    src_size: Triple,
    before: Triple,
    weights: Floats,
    order: WeightsOrder,
    epilogue: Epilogue,
    cut: Cut,
    tile: Triple,
) -> None:
    """Convolve blocked tensors, stride 1; arguments as of `convolution.convolve`, but for the weights.

    Parameters
    ----------
    weights : flat float32 array
        As a layer has them, (OC, IC, KD, KH, KW).
    order : WeightsOrder
        Theirs, or that of the adjoint convolution.
    """
    source = pack_points("points", prologue, src_size, before, cut, tile, INPUT, 1)
    at_once = max(1, min(cut.bricks, _TILES // tile_count(cut, tile)))
    T = at_once * tile_count(cut, tile)
    rows, cols = gemm_tile(T, epilogue.blocks)
    units = epilogue.blocks // cols * -(-cut.bricks // at_once)
    if units < threads() or points(tile) * T * cols * LANES * 4 > _CACHED:
        rows, cols = gemm_tile(T, 1)
    scratch = scratchpad("winograd", threads(), _scratch_size(cut, tile, at_once, rows, cols))
    run_workers(
        share_groups,
        _make_groups(*tile, rows, cols),
        source,
        weights,
        order,
        epilogue,
        cut,
        at_once,
        scratch,
    )


@functools.cache
def _scratch_size(cut: Cut, tile: Triple, at_once: int, rows: int, cols: int) -> int:
    """Floats of one worker's scratchpad: M; weights, at each stage; or results along w; epilogue."""
    (KD, _), (KH, _), (KW, PW) = (sizes(WEIGHTS, m) for m in tile)
    T, block = -(-at_once * tile_count(cut, tile) // rows) * rows, LANES * cols * LANES
    blocked, scratch = KD * KH * KW * LANES, scratch_vectors(WEIGHTS, *tile[:2], 1) * LANES
    stages = blocked + scratch + slab_planes(tile) * slot_size(KW * LANES, cols) + PW * block
    results = slab_planes(tile) * slot_size(1, at_once * tile_count(cut, tile) * tile[2])
    return points(tile) * slot_size(cols, T) + max(stages, results) + finish_size(*tile[:2])


@parallel_kernel
def share_groups(
    address: int,
    source: Points,
    weights: Floats,
    order: WeightsOrder,
    epilogue: Epilogue,
    cut: Cut,
    at_once: int,
    scratch: Floats,
) -> None:
    """Driver: each worker its groups, with a row of ``scratch`` for itself."""
    for index in prange(scratch.shape[0]):
        worker = signed(index)
        call_worker(address, worker, source, weights, order, epilogue, cut, at_once, scratch)


@functools.cache
def _make_groups(md: int, mh: int, mw: int, rows: int, cols: int) -> Callable[..., None]:
    (KD, PD), (KH, PH), (KW, PW) = (sizes(WEIGHTS, m) for m in (md, mh, mw))
    planes, lanes, block = PD * PH, cols * LANES, LANES * cols * LANES
    # Weights of 16 outputs and one input; those of a pair of blocks transformed along d and h; and along w.
    apart, finishing = slot_size(KW * LANES, cols), finish_size(md, mh)
    S = KD * KH * KW * LANES
    U = S + scratch_vectors(WEIGHTS, md, mh, 1) * LANES
    UW = U + planes * apart

    @worker_kernel
    def convolve_groups(
        worker: int,
        source: Points,
        weights: Floats,
        order: WeightsOrder,
        epilogue: Epilogue,
        cut: Cut,
        at_once: int,
        scratch: Floats,
    ) -> None:
        data, slot, ICB, T, _ = source
        bricks, groups = count_bricks(cut), epilogue.blocks // cols
        here, wide = T // bricks, -(-cut.OW // mw) * mw
        chunks = -(-bricks // at_once)
        padded = -(-at_once * here // rows) * rows
        m_slot = slot_size(cols, padded)
        own = scratch[worker]
        last = own[own.size - finishing :]
        first_weights = PW * planes * m_slot
        pair = own[first_weights:]
        begin, end = share(groups * chunks, worker, scratch.shape[0])
        for unit in range(begin, end):
            group, first = unit // chunks, unit % chunks * at_once
            count = min(at_once, bricks - first)
            for icb in range(ICB):
                strides, to_strides = (KH * KW * LANES, KW * LANES, 0), (PH * apart, apart, 0)
                for i in range(LANES * cols):
                    ic, ocb = icb * LANES + i // cols, group * cols + i % cols
                    pack_weights_part(weights, order, ocb, ic, pair, 0, 1, LANES)
                    for kw in range(KW):
                        to = U + kw * block + i * LANES
                        transform_tile(
                            pair,
                            kw * LANES,
                            strides,
                            pair,
                            to,
                            to_strides,
                            pair,
                            S,
                            WEIGHTS,
                            md,
                            mh,
                            1,
                        )
                v = (icb * T + first * here) * LANES
                # Next the weights of the next block, or of the next unit's first.
                ahead = unit * ICB + icb + 1
                next_group, next_icb = min(ahead // ICB // chunks, groups - 1), ahead % ICB
                for plane in range(planes):
                    for i in range(0, block, LANES):
                        at = U + plane * apart + i
                        line = tile_load(pair, at, 0, block, 0, 1, KW, 1)
                        line = transform_axis(line, WEIGHTS, mw, 1, 1)
                        tile_store(line, pair, UW + i, 0, block, 0, 1, PW, 1)
                    for k in range(PW):
                        point = plane * PW + k
                        x, y = v + point * slot, UW + k * block
                        line = point * lanes * order.taps // (planes * PW)
                        w = part_line(order, next_group, next_icb, LANES, lanes, line)
                        soon = (address(weights, w), address(data, x + slot), count * here)
                        multiply_block(
                            data,
                            x,
                            count * here,
                            pair,
                            y,
                            own,
                            point * m_slot,
                            padded * LANES,
                            icb == 0,
                            soon,
                            rows,
                            cols,
                        )
            # The results along w take the place of the weights.
            results = slot_size(1, at_once * here * mw)
            extent = (cut.planes // md, cut.lines // mh, wide)
            for c in range(cols):
                for plane in range(planes):
                    m = plane * PW * m_slot + c * padded * LANES
                    transform_out(own, m, m_slot, pair, plane * results, count * here, 1, 0, mw)
                for k in range(count):
                    at = first_weights + k * here * mw * LANES
                    ocb = group * cols + c
                    finish_block(
                        epilogue, cut, first + k, ocb, own, at, results, extent, last, md, mh
                    )
        fence()

    return convolve_groups
