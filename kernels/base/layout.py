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
returns a tensor in another layout; ``pack_*`` fills a temporary panel for one kernel call.
"""

import math
from typing import NamedTuple

import numpy as np

from kernels.base.arguments import Floats, Triple, tensor
from kernels.base.buffers import empty, past_caches
from kernels.base.jit import kernel, parallel_kernel, prange, signed, split_index
from kernels.base.machine import threads
from kernels.base.simd import LANES, broadcast, fence, load, put_vector, store, where_above
from kernels.base.tiles import tile_add, tile_load, tile_store, tile_transpose

# Voxels that a thread unblocks at a time.
_RUN = 1024
_PLACES, _ZERO = np.arange(LANES, dtype=np.float32), np.float32(0)


def blocks(channels: int) -> int:
    """Blocks of 16 that hold this many channels."""
    return -(-channels // LANES)


def reorder_ndhwc_to_nCdhw16c(src: Floats) -> Floats:  # noqa: N802
    """(MB, D, H, W, C) -> (MB, CB, D, H, W, 16)."""
    src = tensor("src", src, axes="MB, D, H, W, C", dtype=np.float32)
    MB, D, H, W, C = src.shape
    dst = empty((MB, blocks(C), D, H, W, LANES))
    fill_blocked(src, dst)
    return dst


def fill_blocked(src: Floats, dst: Floats) -> None:
    """Fill ``dst``, (MB, CB, D, H, W, 16), with ``src``, (MB, D, H, W, C), and zeros past channel ``C``."""
    for image, panel in zip(src, dst, strict=True):
        pack_src(image, panel, (0, 0, 0), (1, 1, 1))


def reorder_nCdhw16c_to_ndhwc(src: Floats, channels: int) -> Floats:  # noqa: N802
    """(MB, CB, D, H, W, 16) -> (MB, D, H, W, channels)."""
    src = tensor("src", src, axes="MB, CB, D, H, W, 16", dtype=np.float32)
    MB, CB, D, H, W, _ = src.shape
    if blocks(channels) != CB:
        raise ValueError(f"src has {CB} channel blocks; {channels} channels need {blocks(channels)}")
    dst = empty((MB, D, H, W, channels))
    _unblock(src.reshape(-1), dst.reshape(-1), D * H * W, channels)
    return dst


@parallel_kernel
def _unblock(src: Floats, dst: Floats, voxels: int, channels: int) -> None:
    CB, parts = (channels + LANES - 1) // LANES, (voxels + _RUN - 1) // _RUN
    for task in prange(dst.size // (voxels * channels) * parts):
        n, part = split_index(task, parts)
        first, last = part * _RUN, min((part + 1) * _RUN, voxels)
        end = (n * voxels + last) * channels
        for voxel in range(first, last):
            x, to = (n * CB * voxels + voxel) * LANES, (n * voxels + voxel) * channels
            for _ in range(CB):
                # The padding lanes go to where the next voxel's channels come next, but not past the end.
                if to + LANES <= end:
                    store(dst, to, load(src, x))
                else:
                    for lane in range(end - to):
                        dst[to + lane] = src[x + lane]
                x, to = x + voxels * LANES, to + LANES


def pack_src(src: Floats, panel: Floats, before: Triple, dilation: Triple) -> None:
    """Block one image's channels and surround it with zeros, so that no loop needs bounds.

    Parameters
    ----------
    src : ndarray, shape=(D, H, W, C), float32
    panel : ndarray, shape=(CB, PD, PH, PW, width), float32, C-contiguous
        Filled: ``width`` channels in each of ``CB`` blocks (16, or ``C`` itself when there are few).
    before : (d, h, w)
        Zeros before the first voxel.
    dilation : (d, h, w)
        Distance of neighbours in the panel; zeros lie between.
    """
    sizes, src = (src.shape, panel.shape), np.ascontiguousarray(src).reshape(-1)
    _pack_src(src, panel.reshape(-1), sizes, before, dilation, past_caches(panel), threads())


@parallel_kernel
def _pack_src(
    src: Floats,
    panel: Floats,
    sizes: tuple[tuple[int, ...], tuple[int, ...]],
    before: Triple,
    dilation: Triple,
    streams: bool,
    workers: int,
) -> None:
    (D, H, W, C), (CB, PD, PH, PW, width) = sizes
    rows = PD * PH
    for index in prange(workers):
        worker, used = signed(index), broadcast(np.float32(C % LANES))
        for row in range(worker * rows // workers, (worker + 1) * rows // workers):
            plane, line = row // PH, row % PH
            d, d_between = divmod(plane - before[0], dilation[0])
            h, h_between = divmod(line - before[1], dilation[1])
            inside = d_between == 0 and h_between == 0 and 0 <= d < D and 0 <= h < H
            voxels = min(W, (PW - before[2] - 1) // dilation[2] + 1) if inside else 0
            read, written = (d * H + h) * W * C, (plane * PH + line) * PW * width
            to, block_stride, step = before[2] * width, PD * PH * PW * width, dilation[2] * width
            for block in range(CB):
                # Clear only what no voxel fills below: the stores take the time.
                start = written + block * block_stride
                dense = voxels * width if dilation[2] == 1 else 0
                panel[start : start + to] = 0.0
                panel[start + to + dense : start + PW * width] = 0.0
            if width == LANES:
                # All blocks of a voxel: memory is read from front to back.
                for w in range(voxels):
                    x, at = read + w * C, written + to + w * step
                    for _ in range(C // LANES):
                        put_vector(panel, at, load(src, x), streams)
                        x, at = x + LANES, at + block_stride
                    if C % LANES > 0:
                        if x + LANES <= src.size:
                            # Past the last channel are those of the next voxel, which may be NaN.
                            value = where_above(used, load(_PLACES, 0), load(src, x), broadcast(_ZERO))
                            store(panel, at, value)
                        else:
                            for lane in range(LANES):
                                panel[at + lane] = src[x + lane] if lane < C % LANES else _ZERO
            elif dilation[2] == 1:  # few channels, whose row is one run of memory
                whole = voxels * width // LANES * LANES
                for i in range(0, whole, LANES):
                    store(panel, written + to + i, load(src, read + i))
                for i in range(whole, voxels * width):
                    panel[written + to + i] = src[read + i]
            else:
                for w in range(voxels):
                    for lane in range(width):
                        panel[written + to + w * step + lane] = src[read + w * width + lane]
        fence()


class WeightsOrder(NamedTuple):
    """How ``OIdhw`` weights are read: of the convolution or of its adjoint."""

    outputs: int
    inputs: int
    taps: int
    output_stride: int  # from a channel to the next, in floats
    input_stride: int
    first: int  # place of the first tap in a panel
    step: int  # from the place of a tap to that of the next


class Part(NamedTuple):
    """Weights that lie together in a panel: a group of ``lanes`` outputs by a block of ``width`` inputs."""

    group: int
    block: int
    width: int
    lanes: int


def weights_order(shape: tuple[int, ...], *, adjoint: bool) -> WeightsOrder:
    """Order of weights ``(OC, IC, KD, KH, KW)``; the adjoint exchanges channels and reverses taps."""
    OC, IC, *kernel = shape
    taps = math.prod(kernel)
    if adjoint:
        return WeightsOrder(IC, OC, taps, taps, IC * taps, taps - 1, -1)
    return WeightsOrder(OC, IC, taps, IC * taps, taps, 0, 1)


@kernel
def _corner(order: WeightsOrder, part: Part) -> tuple[int, int, int, int]:
    """Outputs and inputs that a part has, how many outputs go in squares, and its first weight's offset."""
    outputs = min(part.lanes, order.outputs - part.group * part.lanes)
    inputs = min(part.width, order.inputs - part.block * part.width)
    # Squares of 16 taps by 16 output channels are transposed in registers; the rest goes one by one.
    squares = outputs // LANES * LANES if order.taps >= LANES else 0
    first = part.group * part.lanes * order.output_stride + part.block * part.width * order.input_stride
    return outputs, inputs, squares, first


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
    _pack_weights(np.ascontiguousarray(weights).reshape(-1), order, panel.reshape(-1), panel.shape)


@parallel_kernel
def _pack_weights(
    weights: Floats, order: WeightsOrder, panel: Floats, shape: tuple[int, int, int, int, int]
) -> None:
    groups, ICB, taps, width, lanes = shape
    for task in prange(groups * ICB):
        group, block = split_index(task, ICB)
        at = (group * ICB + block) * taps * width * lanes
        pack_weights_part(weights, order, Part(group, block, width, lanes), panel, at)


@kernel
def pack_weights_part(weights: Floats, order: WeightsOrder, part: Part, panel: Floats, at: int) -> None:
    """`pack_weights` of one part, to ``panel[at:]``."""
    (_, _, width, lanes), taps, out_stride = part, order.taps, order.output_stride
    outputs, inputs, squares, first = _corner(order, part)
    tap_stride = order.step * width * lanes
    if outputs < lanes or inputs < width:
        panel[at : at + taps * width * lanes] = 0.0
    for i in range(inputs):
        src = first + i * order.input_stride
        # Tap t goes to place first + step * t.
        dst = at + order.first * width * lanes + i * lanes
        for o in range(0, squares, LANES):
            for t in range(0, taps, LANES):
                # The last square is moved back inside.
                tap = min(t, taps - LANES)
                x, y = src + o * out_stride + tap, dst + tap * tap_stride + o
                tile = tile_load(weights, x, out_stride, 0, 0, LANES, 1, 1)
                tile_store(tile_transpose(tile), panel, y, tap_stride, 0, 0)
        for tap in range(taps):
            for o in range(squares, outputs):
                panel[dst + tap * tap_stride + o] = weights[src + o * out_stride + tap]


@kernel
def part_line(order: WeightsOrder, part: Part, line: int) -> int:
    """Offset of one of the ``width * lanes * taps / 16`` cache lines that `pack_weights_part` reads."""
    # The lines are runs: the input channels of an output channel, or the other way round.
    by_output = order.input_stride == order.taps
    run = (part.width if by_output else part.lanes) * order.taps
    run_stride = order.output_stride if by_output else order.input_stride
    return _corner(order, part)[3] + line * LANES // run * run_stride + line * LANES % run


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
    size = taps * width * lanes
    for task in prange(groups * ICB):
        group, block = split_index(task, ICB)
        at = (group * ICB + block) * size
        part = Part(group, block, width, lanes)
        unpack_weights_part(partial, at, (chunks, groups * ICB * size), dst, order, part)


@kernel
def unpack_weights_part(
    partial: Floats, at: int, chunks: tuple[int, int], dst: Floats, order: WeightsOrder, part: Part
) -> None:
    """`unpack_weights` of one part at ``partial[at:]``; ``chunks`` is their number and stride in floats."""
    (_, _, width, lanes), taps, out_stride = part, order.taps, order.output_stride
    outputs, inputs, squares, first = _corner(order, part)
    tap_stride = order.step * width * lanes
    for i in range(inputs):
        src = at + order.first * width * lanes + i * lanes
        to = first + i * order.input_stride
        for o in range(0, squares, LANES):
            for t in range(0, taps, LANES):
                tap = min(t, taps - LANES)
                x, y = src + tap * tap_stride + o, to + o * out_stride + tap
                tile = tile_load(partial, x, tap_stride, 0, 0, LANES, 1, 1)
                for chunk in range(1, chunks[0]):
                    z = x + chunk * chunks[1]
                    tile = tile_add(tile, tile_load(partial, z, tap_stride, 0, 0, LANES, 1, 1))
                tile_store(tile_transpose(tile), dst, y, out_stride, 0, 0)
        for o in range(squares, outputs):
            for tap in range(taps):
                x = src + tap * tap_stride + o
                total = partial[x]
                for chunk in range(1, chunks[0]):
                    total += partial[x + chunk * chunks[1]]
                dst[to + o * out_stride + tap] = total
