"""Weights into the Winograd domain, and the sums of their gradient back.

packed = G weights G^T              diff_weights = G^T [ sums ] G         along d, h and w alike
"""

import functools
import math
from collections.abc import Callable

import numpy as np

from kernels.base.arguments import Floats, Triple
from kernels.base.buffers import at_lines, scratchpad
from kernels.base.jit import parallel_kernel, prange, signed
from kernels.base.layout import Part, WeightsOrder, pack_weights_part, unpack_weights_part, weights_order
from kernels.base.machine import threads
from kernels.base.simd import LANES, fence, load, put_vector, store
from kernels.conv3d.transform import Grid, scratch_vectors, transform_tile
from kernels.conv3d.winograd_stages import odd_lines, points
from kernels.ladder.cook_toom import DIFF_WEIGHTS, WEIGHTS, sizes


def pack_weights(weights: Floats, tile: Triple, dst: Floats, *, adjoint: bool = False) -> None:
    """Block weights and transform them into the Winograd domain.

    Parameters
    ----------
    weights : ndarray, shape=(OC, IC, KD, KH, KW), float32
        Kernel 3 along each axis where ``tile``, (md, mh, mw), is above 1; other taps count as inputs.
    dst : ndarray, shape=(points, groups, ICB, inputs, lanes), float32
        Filled.
    adjoint : bool
        As in `layout.pack_weights`.
    """
    order = weights_order(weights.shape, adjoint=adjoint)
    inputs, lanes = dst.shape[3:]
    taps, point = math.prod(sizes(WEIGHTS, m)[0] for m in tile), odd_lines(inputs, lanes // LANES)
    # A thread's scratchpad has the taps of a part, their points, and scratch of the transforms.
    at = taps * inputs * lanes
    layout = at, point, at + points(tile) * point
    own = scratchpad("winograd", threads(), layout[2] + scratch_vectors(WEIGHTS, *tile) * LANES)
    # Far larger than the weights, and read only after all of it is written: always past the caches.
    flat, streams = np.ascontiguousarray(weights).reshape(-1), at_lines(dst)
    _make_pack(*tile)(flat, order, dst.reshape(-1), dst.shape, streams, layout, own)


def transform_back(
    tile: Triple, sums: Floats, diff_weights: Floats, width: int, lanes: int, *, adjoint: bool = False
) -> None:
    """Add up the chunks of sums, transform them to gradients, and undo the blocks.

    Parameters
    ----------
    tile : (md, mh, mw)
        Along an axis where it is 1 the taps are part of a block of sums.
    sums : ndarray, shape=(chunks, points * groups * ICB * block), float32
    diff_weights : ndarray, shape=(OC, IC, KD * KH * KW), float32, C-contiguous
        Filled.
    width, lanes : int
        Input channels in a block, and output channels in a group.
    adjoint : bool
        The sums are those of the adjoint convolution.
    """
    order = weights_order(diff_weights.shape, adjoint=adjoint)
    # A thread's scratchpad has the points of a vector, scratch of the transform, and the taps of a part.
    scratch = points(tile) * LANES
    taps = scratch + scratch_vectors(DIFF_WEIGHTS, *tile) * LANES
    own = scratchpad("winograd", threads(), taps + order.taps * width * lanes)
    _make_inverse(*tile)(sums, diff_weights.reshape(-1), order, (width, lanes), (scratch, taps), own)


@functools.cache
def _make_pack(md: int, mh: int, mw: int) -> Callable[..., None]:
    (KD, PD), (KH, PH), (KW, PW) = (sizes(WEIGHTS, m) for m in (md, mh, mw))
    P, taps, kind = PD * PH * PW, KD * KH * KW, WEIGHTS

    @parallel_kernel
    def pack(
        weights: Floats,
        order: WeightsOrder,
        dst: Floats,
        shape: tuple[int, int, int, int, int],
        streams: bool,
        layout: Triple,
        scratch: Floats,
    ) -> None:
        (_, groups, ICB, inputs, lanes), (to, point, free) = shape, layout
        block, workers = inputs * lanes, scratch.shape[0]
        # Along an axis that is not transformed, each tap counts as an input.
        width = inputs * taps // order.taps
        from_strides = (KH * KW * block, KW * block, block)
        to_strides = (PH * PW * point, PW * point, point)
        for index in prange(workers):
            worker = signed(index)
            own = scratch[worker]
            for part in range(worker, groups * ICB, workers):
                pack_weights_part(weights, order, Part(part // ICB, part % ICB, width, lanes), own, 0)
                # Staged, because a point's weights are far from the next one's: all would meet in a few sets
                # of the cache.
                for i in range(0, block, LANES):
                    src, points = Grid(own, i, from_strides), Grid(own, to + i, to_strides)
                    transform_tile(src, points, own, free, kind, md, mh, mw)
                for p in range(P):
                    for i in range(0, block, LANES):
                        at = (p * groups * ICB + part) * block + i
                        put_vector(dst, at, load(own, to + p * point + i), streams)
            fence()

    return pack


@functools.cache
def _make_inverse(md: int, mh: int, mw: int) -> Callable[..., None]:
    (PD, KD), (PH, KH), (PW, KW) = (sizes(DIFF_WEIGHTS, m) for m in (md, mh, mw))
    P, kind = PD * PH * PW, DIFF_WEIGHTS
    tile_strides = (PH * PW * LANES, PW * LANES, LANES)

    @parallel_kernel
    def inverse(
        sums: Floats,
        diff_weights: Floats,
        order: WeightsOrder,
        size: tuple[int, int],
        layout: tuple[int, int],
        scratch: Floats,
    ) -> None:
        (width, lanes), (free, taps), workers = size, layout, scratch.shape[0]
        block = order.taps // (KD * KH * KW) * width * lanes
        ICB = -(-order.inputs // width)
        parts = -(-order.outputs // lanes) * ICB
        strides = (KH * KW * block, KW * block, block)
        for index in prange(workers):
            worker = signed(index)
            own = scratch[worker]
            for part in range(worker, parts, workers):
                for i in range(0, block, LANES):
                    for p in range(P):
                        at = (p * parts + part) * block + i
                        total = load(sums[0], at)
                        for chunk in range(1, sums.shape[0]):
                            total = total + load(sums[chunk], at)
                        store(own, p * LANES, total)
                    src, to = Grid(own, 0, tile_strides), Grid(own, taps + i, strides)
                    transform_tile(src, to, own, free, kind, md, mh, mw)
                here = Part(part // ICB, part % ICB, width, lanes)
                unpack_weights_part(own, taps, (1, 0), diff_weights, order, here)

    return inverse
