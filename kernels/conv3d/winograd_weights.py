"""Weights into the Winograd domain, and the sums of their gradient back.

packed = G weights G^T              diff_weights = G^T [ sums ] G         along d, h and w alike
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from kernels.base.arguments import Floats, Triple
from kernels.base.buffers import at_lines, scratchpad
from kernels.base.jit import parallel_kernel, prange, signed
from kernels.base.layout import WeightsOrder, pack_weights_part, unpack_weights_part, weights_order
from kernels.base.machine import threads
from kernels.base.simd import LANES, fence, load, put_vector, store
from kernels.conv3d.transform import Grid, scratch_vectors, transform_tile
from kernels.conv3d.winograd_stages import odd_lines, points
from kernels.ladder.cook_toom import DIFF_WEIGHTS, WEIGHTS, sizes


class _Layout(NamedTuple):
    """Offsets in a thread's scratchpad, in floats: taps of a block, its points, scratch of transforms."""

    block: int  # of one tap, or one point
    taps: int
    points: int
    point: int  # from one point to the next
    scratch: int
    size: int


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
    at = taps * inputs * lanes
    scratch = at + points(tile) * point
    size = scratch + scratch_vectors(WEIGHTS, *tile) * LANES
    layout = _Layout(inputs * lanes, 0, at, point, scratch, size)
    # Far larger than the weights, and read only after all of it is written: always past the caches.
    flat, streams = np.ascontiguousarray(weights).reshape(-1), at_lines(dst)
    own = scratchpad("winograd", threads(), size)
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
    taps = math.prod(sizes(DIFF_WEIGHTS, m)[1] for m in tile)
    block = order.taps // taps * width * lanes
    scratch = points(tile) * LANES
    at = scratch + scratch_vectors(DIFF_WEIGHTS, *tile) * LANES
    layout = _Layout(block, at, 0, LANES, scratch, at + taps * block)
    own = scratchpad("winograd", threads(), layout.size)
    _make_inverse(*tile)(sums, diff_weights.reshape(-1), order, (width, lanes), layout, own)


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
        layout: _Layout,
        scratch: Floats,
    ) -> None:
        block, point = layout.block, layout.point
        _, groups, ICB, inputs, lanes = shape
        # Along an axis that is not transformed, each tap counts as an input.
        width = inputs * taps // order.taps
        from_strides = (KH * KW * block, KW * block, block)
        to_strides = (PH * PW * point, PW * point, point)
        workers = scratch.shape[0]
        for index in prange(workers):
            worker = signed(index)
            own = scratch[worker]
            for part in range(worker, groups * ICB, workers):
                pack_weights_part(weights, order, part // ICB, part % ICB, own, 0, width, lanes)
                # Staged, because a point's weights are far from the next one's: all would meet in a few sets
                # of the cache.
                for i in range(0, block, LANES):
                    src, to = Grid(own, i, from_strides), Grid(own, layout.points + i, to_strides)
                    transform_tile(src, to, own, layout.scratch, kind, md, mh, mw)
                for p in range(P):
                    for i in range(0, block, LANES):
                        at = (p * groups * ICB + part) * block + i
                        put_vector(dst, at, load(own, layout.points + p * point + i), streams)
            fence()

    return pack


@functools.cache
def _make_inverse(md: int, mh: int, mw: int) -> Callable[..., None]:
    (PD, _), (PH, KH), (PW, KW) = (sizes(DIFF_WEIGHTS, m) for m in (md, mh, mw))
    P, kind = PD * PH * PW, DIFF_WEIGHTS
    tile_strides = (PH * PW * LANES, PW * LANES, LANES)

    @parallel_kernel
    def inverse(
        sums: Floats,
        diff_weights: Floats,
        order: WeightsOrder,
        size: tuple[int, int],
        layout: _Layout,
        scratch: Floats,
    ) -> None:
        (width, lanes), block, taps = size, layout.block, layout.taps
        ICB = -(-order.inputs // width)
        parts = -(-order.outputs // lanes) * ICB
        strides = (KH * KW * block, KW * block, block)
        workers = scratch.shape[0]
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
                    transform_tile(src, to, own, layout.scratch, kind, md, mh, mw)
                group, icb = part // ICB, part % ICB
                unpack_weights_part(own, taps, 1, 0, diff_weights, order, group, icb, width, lanes)

    return inverse
