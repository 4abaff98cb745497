"""Weight gradient in the Winograd domain where channels are many and tiles few.

The sums of all points and pairs of blocks would stream through the caches for each brick. So source and
gradient are packed and transformed once, as `packing`. Then each pair, a block of input channels and
``cols`` of output channels, is a small weight gradient by itself: its sums are made in registers and taken
back to 27 taps while they are in cache, and only these are written, where they belong::

    points of a pair  --accumulate---------->  sums of PW points     first-level cache
                      --transform, w-------->  sums[plane][kw]       second-level cache
                      --transform, h and d-->  taps  --unpack-->  diff_weights[oc][ic]

Loop nest: pack || pairs of blocks | planes of points, points along w | register tile | tiles || transform
back. What the next point reads is fetched while registers multiply.
"""

import functools
from collections.abc import Callable

import numpy as np

from kernels.base.arguments import Doubles, Floats, Triple
from kernels.base.buffers import scratchpad
from kernels.base.jit import call_worker, parallel_kernel, prange, run_workers, signed, worker_kernel
from kernels.base.layout import WeightsOrder, unpack_weights_part, weights_order
from kernels.base.machine import threads
from kernels.base.simd import LANES, address
from kernels.conv3d.bricks import Cut, share
from kernels.conv3d.read import Inputs
from kernels.conv3d.transform import scratch_vectors, transform_columns, transform_tile
from kernels.conv3d.winograd.cutting import slab_planes
from kernels.conv3d.winograd.packing import Points, pack_points
from kernels.conv3d.winograd.stages import accumulate, slot_size
from kernels.conv3d.winograd.sums import register_tile
from kernels.ladder.cook_toom import DIFF_DST, DIFF_WEIGHTS, INPUT, sizes


def backward_weights(
    prologue: Inputs,
    src_size: Triple,
    before: Triple,
    gradient: Inputs,
    cut: Cut,
    tile: Triple,
    diff_weights: Floats,
    diff_bias: Doubles,
) -> None:
    """Gradients of weights and bias; arguments as of `weight_gradient.backward_weights`, one chunk."""
    OCB = gradient.blocks
    inputs, cols = register_tile(OCB)
    size, none = (cut.OD, cut.OH, cut.OW), (0, 0, 0)
    source = pack_points("points", prologue, src_size, before, cut, tile, INPUT, 1)
    result = pack_points("gradient points", gradient, size, none, cut, tile, DIFF_DST, cols)
    scratch = scratchpad("winograd", threads(), _scratch_size(tile, cols))
    run_workers(
        share_pairs,
        _make_pairs(*tile, inputs, cols),
        source,
        result,
        diff_weights.reshape(-1),
        weights_order(diff_weights.shape, adjoint=False),
        scratch,
    )
    sums = result.data[result.sums :].reshape(OCB, cut.bricks, LANES)
    diff_bias[0] = sums.sum(axis=1, dtype=np.float64).reshape(-1)


@functools.cache
def _scratch_size(tile: Triple, cols: int) -> int:
    """Floats of one worker's scratchpad: sums along w; sums of all planes; scratch; taps."""
    (_, KD), (_, KH), (PW, KW) = (sizes(DIFF_WEIGHTS, m) for m in tile)
    pair, scratch = LANES * cols * LANES, scratch_vectors(DIFF_WEIGHTS, *tile[:2], 1) * LANES
    sums = slab_planes(tile) * slot_size(KW * LANES, cols)
    return PW * pair + sums + scratch + KD * KH * KW * pair


@parallel_kernel
def share_pairs(
    address: int, source: Points, result: Points, diff_weights: Floats, order: WeightsOrder, scratch: Floats
) -> None:
    """Driver: each worker its pairs, with a row of ``scratch`` for itself."""
    for index in prange(scratch.shape[0]):
        worker = signed(index)
        call_worker(address, worker, source, result, diff_weights, order, scratch)


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
        source: Points,
        result: Points,
        diff_weights: Floats,
        order: WeightsOrder,
        scratch: Floats,
    ) -> None:
        X, slot_v, ICB, T, _ = source
        Y, slot_e, OCB, _, _ = result
        own = scratch[worker]
        begin, end = share(OCB // cols * ICB, worker, scratch.shape[0])
        for part in range(begin, end):
            group, icb = part // ICB, part % ICB
            v, e = icb * T * LANES, group * T * lanes
            for point in range(planes * PW):
                x, y, to = v + point * slot_v, e + point * slot_e, point % PW * pair
                soon = (address(Y, y + slot_e), address(X, x + slot_v), T * cols)
                accumulate(X, x, Y, y, T, own, to, True, soon, inputs, cols)
                if point % PW < PW - 1:
                    continue
                to = S + point // PW * apart
                transform_columns(own, 0, pair, own, to, pair, lanes, kind, mw)
            for i in range(0, row, LANES):
                strides, to_strides = (PH * apart, apart, 0), (KH * row, row, 0)
                transform_tile(own, S + i, strides, own, taps + i, to_strides, own, W, kind, md, mh, 1)
            unpack_weights_part(own, taps, 1, 0, diff_weights, order, group, icb, LANES, lanes)

    return sum_share
