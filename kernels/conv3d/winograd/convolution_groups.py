"""Winograd convolution where channels are many and tiles few: group after group of output channels.

Transformed, the weights would be eight times as many, written to memory and read again, for a few tiles
each. So they are never made: the source is packed and transformed once, as `packing`; then a worker takes a
group of output channels and block after block of input channels, transforms the weights of that pair while
they are in cache, and adds their products with all tiles to sums that stay there::

    weights[oc][ic][27]  --transform_weights, d and h-->  U[plane][kw][ic]      second-level cache
    U of a plane         --transform_columns, w-------->  points                first-level cache
    V of a block         --multiply_block-------------->  M[point][tile] +=     second-level cache
    M                    --transform_out, epilogue----->  destination

Loop nest: pack || groups, chunks of bricks | icb | planes of points | points along w | tiles | ic | register
tile || ocb: transform out, epilogue. The next block's weights are fetched while registers multiply.
"""

import functools
from collections.abc import Callable
from typing import Any

from kernels.base.arguments import Floats, Triple
from kernels.base.buffers import scratchpad
from kernels.base.jit import (
    call_worker,
    parallel_kernel,
    prange,
    run_workers,
    signed,
    specialised,
    worker_kernel,
)
from kernels.base.layout import WeightsOrder, pack_weights_part, part_line
from kernels.base.machine import threads
from kernels.base.simd import LANES, address, fence
from kernels.conv3d.bricks import Cut, count_bricks, share
from kernels.conv3d.read import Inputs
from kernels.conv3d.transform import scratch_vectors, transform_columns, transform_tile
from kernels.conv3d.winograd.cutting import gemm_tile, points, slab_planes, tile_count
from kernels.conv3d.winograd.packing import Points, pack_points
from kernels.conv3d.winograd.stages import multiply_block, slot_size, transform_out
from kernels.conv3d.write import Outputs, Staged, finish_block, finish_size
from kernels.ladder.cook_toom import INPUT, WEIGHTS, sizes

# Tiles that are multiplied at a time, of several bricks, and bytes of their sums in the second-level cache,
# where weights have to stay beside them.
_TILES, _CACHED = 32, 512 * 1024


def convolve(
    prologue: Inputs,
    src_size: Triple,
    before: Triple,
    weights: Floats,
    order: WeightsOrder,
    epilogue: Outputs,
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
        share_groups, _make_groups(*tile, rows, cols), source, weights, order, epilogue, cut, at_once, scratch
    )


@functools.cache
def _scratch_size(cut: Cut, tile: Triple, at_once: int, rows: int, cols: int) -> int:
    """Floats of one worker's scratchpad: M; weights of a pair, or results along w; epilogue."""
    tiles = at_once * tile_count(cut, tile)
    sums = points(tile) * slot_size(cols, -(-tiles // rows) * rows)
    weights = _layout(tile, cols)[2] + sizes(WEIGHTS, tile[2])[1] * LANES * cols * LANES
    results = slab_planes(tile) * slot_size(1, tiles * tile[2])
    return sums + max(weights, results) + finish_size(*tile[:2])


@parallel_kernel
def share_groups(
    address: int,
    source: Points,
    weights: Floats,
    order: WeightsOrder,
    epilogue: Outputs,
    cut: Cut,
    at_once: int,
    scratch: Floats,
) -> None:
    """Driver: each worker its groups, with a row of ``scratch`` for itself."""
    for index in prange(scratch.shape[0]):
        worker = signed(index)
        call_worker(address, worker, source, weights, order, epilogue, cut, at_once, scratch)


@functools.cache
def _layout(tile: Triple, cols: int) -> tuple[int, int, int, int]:
    """Where a pair's weights are, in a scratchpad for them, of which the first are those of one input.

    Offsets of the transform's scratch, of planes transformed along d and h, and of a plane transformed along
    w; and floats from plane to plane.
    """
    (KD, _), (KH, _), (KW, _) = (sizes(WEIGHTS, m) for m in tile)
    scratch = KD * KH * KW * LANES
    first, apart = (scratch + scratch_vectors(WEIGHTS, *tile[:2], 1) * LANES, slot_size(KW * LANES, cols))
    return scratch, first, first + slab_planes(tile) * apart, apart


@specialised("md", "mh", "mw", "cols")
def transform_weights(
    weights: Any, order: Any, group: int, icb: int, own: Any, md: int, mh: int, mw: int, cols: int
) -> Any:
    """Transform the weights of ``cols`` blocks by one along d and h: ``own[plane][kw][ic][cols]``."""
    MD, MH, C = md, mh, cols
    KH, KW, PH = sizes(WEIGHTS, MH)[0], sizes(WEIGHTS, mw)[0], sizes(WEIGHTS, MH)[1]
    scratch, first, _, apart = _layout((md, mh, mw), cols)
    K, block = WEIGHTS, LANES * cols * LANES

    def implementation(weights, order, group, icb, own, md, mh, mw, cols):  # type: ignore[no-untyped-def]
        strides, to_strides = (KH * KW * LANES, KW * LANES, 0), (PH * apart, apart, 0)
        for i in range(LANES * C):
            ic, ocb = icb * LANES + i // C, group * C + i % C
            pack_weights_part(weights, order, ocb, ic, own, 0, 1, LANES)
            for kw in range(KW):
                x, to = kw * LANES, first + kw * block + i * LANES
                transform_tile(own, x, strides, own, to, to_strides, own, scratch, K, MD, MH, 1)

    return implementation


@functools.cache
def _make_groups(md: int, mh: int, mw: int, rows: int, cols: int) -> Callable[..., None]:
    planes, PW = slab_planes((md, mh, mw)), sizes(WEIGHTS, mw)[1]
    lanes, block, finishing = cols * LANES, LANES * cols * LANES, finish_size(md, mh)
    _, U, W, apart = _layout((md, mh, mw), cols)

    @worker_kernel
    def convolve_groups(
        worker: int,
        source: Points,
        weights: Floats,
        order: WeightsOrder,
        epilogue: Outputs,
        cut: Cut,
        at_once: int,
        scratch: Floats,
    ) -> None:
        data, slot, ICB, T, _ = source
        bricks, groups = count_bricks(cut), epilogue.blocks // cols
        here, wide, chunks = T // bricks, -(-cut.OW // mw) * mw, -(-bricks // at_once)
        padded = -(-at_once * here // rows) * rows
        m_slot, results = slot_size(cols, padded), slot_size(1, at_once * here * mw)
        extent = (cut.planes // md, cut.lines // mh, wide)
        own = scratch[worker]
        # A pair's weights lie behind M, and at the end the results along w in their place.
        behind = PW * planes * m_slot
        pair = own[behind:]
        begin, end = share(groups * chunks, worker, scratch.shape[0])
        for unit in range(begin, end):
            group, first = unit // chunks, unit % chunks * at_once
            count = min(at_once, bricks - first)
            tiles = count * here
            for icb in range(ICB):
                transform_weights(weights, order, group, icb, pair, md, mh, mw, cols)
                # Next are the weights of the next block, or of the next unit's first.
                ahead = unit * ICB + icb + 1
                next_group, next_icb = min(ahead // ICB // chunks, groups - 1), ahead % ICB
                for point in range(planes * PW):
                    if point % PW == 0:
                        at = U + point // PW * apart
                        transform_columns(pair, at, block, pair, W, block, lanes, WEIGHTS, mw)
                    x = point * slot + (icb * T + first * here) * LANES
                    y, m = W + point % PW * block, point * m_slot
                    line = point * lanes * order.taps // (planes * PW)
                    near = part_line(order, next_group, next_icb, LANES, lanes, line)
                    soon = (address(weights, near), address(data, x + slot), tiles)
                    far = padded * LANES
                    multiply_block(data, x, tiles, pair, y, own, m, far, icb == 0, soon, rows, cols)
            for c in range(cols):
                for plane in range(planes):
                    m = plane * PW * m_slot + c * padded * LANES
                    transform_out(own, m, m_slot, pair, plane * results, tiles, 1, 0, mw)
                for k in range(count):
                    ocb, at = group * cols + c, behind + k * here * mw * LANES
                    staged = Staged(at, results, extent, own.size - finishing)
                    finish_block(epilogue, cut, first + k, ocb, own, staged, md, mh)
        fence()

    return convolve_groups
