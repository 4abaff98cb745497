"""Memory layouts, and the kernels that change one into another.

Activations
    ``ndhwc``      offset = (((n*D + d)*H + h)*W + w)*C + c
    ``nCdhw16c``   offset = ((((n*CB + c//16)*D + d)*H + h)*W + w)*16 + c%16

    With 16 channels the two are the same. With more, ``nCdhw16c`` keeps one vector of channels for
    each voxel and its neighbour right behind it, where ``ndhwc`` is a stride of C away::

        ndhwc      | voxel 0: c0 ... c15 c16 ... c31 | voxel 1: c0 ... c15 c16 ... c31 | ...
        nCdhw16c   | voxel 0: c0 ... c15 | voxel 1: c0 ... c15 | ...  then c16 ... c31 of all voxels

Weights
    ``OIdhw``         offset = (((oc*IC + ic)*KD + kd)*KH + kh)*KW + kw
    ``OIdhw16i16o``   blocks of 16 x 16 channels; the innermost index is the output channel, so that
                      one vector load takes the weights of 16 outputs for one input

Channels that do not fill a block are zero in the blocked layouts ("padding lanes"). ``reorder_*``
changes a layout; ``pack_*`` fills a temporary panel for one kernel call.
"""

import math
from typing import NamedTuple

import numpy as np

from kernels.base.arguments import Floats
from kernels.base.buffers import past_caches
from kernels.base.jit import kernel, parallel_kernel, prange, signed, split_index
from kernels.base.machine import threads
from kernels.base.simd import LANES, fence, load, put_vector
from kernels.base.tiles import tile_add, tile_load, tile_store, tile_transpose


def blocks(channels: int) -> int:
    """Blocks of 16 that hold this many channels."""
    return -(-channels // LANES)


def pack_src(
    src: Floats, panel: Floats, before: tuple[int, int, int], dilation: tuple[int, int, int]
) -> None:
    """Block one image's channels and surround it with zeros, so that no loop needs bounds.

    Parameters
    ----------
    src : ndarray, shape=(D, H, W, C), float32
    panel : ndarray, shape=(CB, PD, PH, PW, width), float32
        Filled: ``width`` channels in each of ``CB`` blocks (16, or ``C`` itself when there are few).
    before : (d, h, w)
        Zeros before the first voxel.
    dilation : (d, h, w)
        Distance of neighbours in the panel; zeros lie between.
    """
    src, streams = np.ascontiguousarray(src), past_caches(panel)
    flat = src.reshape(-1), src.shape, panel.reshape(-1), panel.shape
    _pack_src(*flat, before, dilation, streams, threads())


@parallel_kernel
def _pack_src(
    src: Floats,
    shape: tuple[int, int, int, int],
    panel: Floats,
    panel_shape: tuple[int, int, int, int, int],
    before: tuple[int, int, int],
    dilation: tuple[int, int, int],
    streams: bool,
    workers: int,
) -> None:
    D, H, W, C = shape
    CB, PD, PH, PW, width = panel_shape
    rows = PD * PH
    for index in prange(workers):
        worker = signed(index)
        for row in range(worker * rows // workers, (worker + 1) * rows // workers):
            plane, line = row // PH, row % PH
            d, d_between = divmod(plane - before[0], dilation[0])
            h, h_between = divmod(line - before[1], dilation[1])
            inside = d_between == 0 and h_between == 0 and 0 <= d < D and 0 <= h < H
            voxels = min(W, (PW - before[2] - 1) // dilation[2] + 1) if inside else 0
            read, written = (d * H + h) * W * C, (plane * PH + line) * PW * width
            to, block_stride, step = before[2] * width, PD * PH * PW * width, dilation[2] * width
            vectors = C // LANES if width == LANES else 0
            for block in range(CB):
                # Clear only what no vector fills below: the stores take the time.
                start = written + block * block_stride
                dense = voxels * width if block < vectors and dilation[2] == 1 else 0
                panel[start : start + to] = 0.0
                panel[start + to + dense : start + PW * width] = 0.0
            # All blocks of a voxel: memory is read from front to back.
            for w in range(voxels):
                x, at = read + w * C, written + to + w * step
                for block in range(vectors):
                    put_vector(panel, at + block * block_stride, load(src, x + block * LANES), streams)
            rest = C - vectors * LANES
            for w in range(voxels if rest > 0 else 0):
                x, at = read + w * C + vectors * LANES, written + to + w * step + vectors * block_stride
                for lane in range(rest):
                    panel[at + lane] = src[x + lane]
        fence()


def pack_weights(weights: Floats, panel: Floats, *, adjoint: bool = False) -> None:
    """Block weights by groups of output channels, for one vector load per group and input.

    Parameters
    ----------
    weights : ndarray, shape=(OC, IC, KD, KH, KW), float32
    panel : ndarray, shape=(groups, ICB, KD * KH * KW, width, lanes), float32, C-contiguous
        Filled: ``lanes`` output channels in a group, ``width`` input channels in a block.
    adjoint : bool
        Fill it with the weights of the adjoint convolution instead: input and output channels
        exchanged, taps in reverse. ``backward_data`` is a forward convolution with these.
    """
    order = weights_order(weights.shape, adjoint=adjoint)
    flat = np.ascontiguousarray(weights).reshape(-1)
    _pack_weights(flat, order, panel.reshape(-1), panel.shape)


class WeightsOrder(NamedTuple):
    """How ``OIdhw`` weights are read: of the convolution or of its adjoint.

    Attributes
    ----------
    outputs, inputs, taps : int
    output_stride, input_stride : int
        From a channel to the next, in floats.
    first, step : int
        Place of the first tap in a panel, and from one to the next.
    """

    outputs: int
    inputs: int
    taps: int
    output_stride: int
    input_stride: int
    first: int
    step: int


def weights_order(shape: tuple[int, ...], *, adjoint: bool) -> WeightsOrder:
    """Order of weights ``(OC, IC, KD, KH, KW)``; the adjoint exchanges channels and reverses taps."""
    OC, IC, *kernel = shape
    taps = math.prod(kernel)
    if adjoint:
        return WeightsOrder(IC, OC, taps, taps, IC * taps, taps - 1, -1)
    return WeightsOrder(OC, IC, taps, IC * taps, taps, 0, 1)


@parallel_kernel
def _pack_weights(
    weights: Floats, order: WeightsOrder, panel: Floats, shape: tuple[int, int, int, int, int]
) -> None:
    groups, ICB, taps, width, lanes = shape
    for task in prange(groups * ICB):
        group, block = split_index(task, ICB)
        at = (group * ICB + block) * taps * width * lanes
        pack_weights_part(weights, order, group, block, panel, at, width, lanes)


@kernel
def pack_weights_part(
    weights: Floats,
    order: WeightsOrder,
    group: int,
    block: int,
    panel: Floats,
    at: int,
    width: int,
    lanes: int,
) -> None:
    """`pack_weights` of one group of output channels and block of input channels, to ``panel[at:]``."""
    taps, tap_stride, out_stride = order.taps, width * lanes, order.output_stride
    outputs = min(lanes, order.outputs - group * lanes)
    inputs = min(width, order.inputs - block * width)
    if outputs < lanes or inputs < width:
        panel[at : at + taps * tap_stride] = 0.0
    # Squares of 16 taps by 16 output channels are transposed in registers; the rest goes one by one.
    squares = outputs // LANES * LANES if taps >= LANES else 0
    for i in range(inputs):
        src = group * lanes * out_stride + (block * width + i) * order.input_stride
        # Tap t goes to place first + step * t.
        dst = at + order.first * tap_stride + i * lanes
        for o in range(0, squares, LANES):
            for t in range(0, taps, LANES):
                # The last square is moved back inside.
                tap = min(t, taps - LANES)
                x, y = src + o * out_stride + tap, dst + order.step * tap * tap_stride + o
                tile = tile_load(weights, x, out_stride, 0, 0, LANES, 1, 1)
                tile_store(tile_transpose(tile), panel, y, order.step * tap_stride, 0, 0)
        for tap in range(taps):
            for o in range(squares, outputs):
                panel[dst + order.step * tap * tap_stride + o] = weights[src + o * out_stride + tap]


@kernel
def part_line(order: WeightsOrder, group: int, block: int, width: int, lanes: int, line: int) -> int:
    """Offset of one of the ``width * lanes * taps / 16`` cache lines that `pack_weights_part` reads."""
    # The lines are runs: the input channels of an output channel, or the other way round.
    by_output = order.input_stride == order.taps
    run = (width if by_output else lanes) * order.taps
    run_stride = order.output_stride if by_output else order.input_stride
    first = group * lanes * order.output_stride + block * width * order.input_stride
    return first + line * LANES // run * run_stride + line * LANES % run


def unpack_weights(partial: Floats, dst: Floats) -> None:
    """Add up partial weight gradients in a fixed order, and undo `pack_weights`.

    Parameters
    ----------
    partial : ndarray, shape=(chunks, groups, ICB, KD * KH * KW, width, lanes), float32
    dst : ndarray, shape=(OC, IC, KD * KH * KW), float32, C-contiguous
        Filled.
    """
    order = weights_order(dst.shape, adjoint=False)
    _unpack_weights(partial.reshape(-1), partial.shape, dst.reshape(-1), order)


@parallel_kernel
def _unpack_weights(
    partial: Floats, shape: tuple[int, int, int, int, int, int], dst: Floats, order: WeightsOrder
) -> None:
    chunks, groups, ICB, taps, width, lanes = shape
    part = taps * width * lanes
    whole = groups * ICB * part
    for task in prange(groups * ICB):
        group, block = split_index(task, ICB)
        at = (group * ICB + block) * part
        unpack_weights_part(partial, at, chunks, whole, dst, order, group, block, width, lanes)


@kernel
def unpack_weights_part(
    partial: Floats,
    at: int,
    chunks: int,
    whole: int,
    dst: Floats,
    order: WeightsOrder,
    group: int,
    block: int,
    width: int,
    lanes: int,
) -> None:
    """`unpack_weights` of one group of output channels and block of input channels.

    The part is at ``partial[at:]``; chunks have a stride of ``whole`` floats.
    """
    taps, tap_stride, out_stride = order.taps, width * lanes, order.output_stride
    outputs = min(lanes, order.outputs - group * lanes)
    inputs = min(width, order.inputs - block * width)
    squares = outputs // LANES * LANES if taps >= LANES else 0
    for i in range(inputs):
        src = at + order.first * tap_stride + i * lanes
        to = group * lanes * out_stride + (block * width + i) * order.input_stride
        for o in range(0, squares, LANES):
            for t in range(0, taps, LANES):
                tap = min(t, taps - LANES)
                x, y = src + order.step * tap * tap_stride + o, to + o * out_stride + tap
                tile = tile_load(partial, x, order.step * tap_stride, 0, 0, LANES, 1, 1)
                for chunk in range(1, chunks):
                    z = x + chunk * whole
                    other = tile_load(partial, z, order.step * tap_stride, 0, 0, LANES, 1, 1)
                    tile = tile_add(tile, other)
                tile_store(tile_transpose(tile), dst, y, out_stride, 0, 0)
        for o in range(squares, outputs):
            for tap in range(taps):
                x = src + order.step * tap * tap_stride + o
                total = partial[x]
                for chunk in range(1, chunks):
                    total += partial[x + chunk * whole]
                dst[to + o * out_stride + tap] = total
