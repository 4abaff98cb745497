"""Rung ``direct``: sums stay in registers for the whole reduction.

Idea       ``blocked`` loads and stores each sum once for every tap and input channel. Here a tile of
           24 sums (AVX-512: 24 voxels x 16 output channels, or 12 x 32) stays in registers until it
           is complete, so memory sees only loads of operands, ``rows + cols`` for ``rows * cols``
           multiply-adds.
Loop nest  groups of output channels, od, oh tile | ow tile | icb, kd, kh | kw and ic | register tile
Memory     ``src`` is packed into blocks of 16 channels with a halo of zeros; a tap's row is then one
           run of memory, in which (kw, ic) is a single index because voxels are neighbours::

               panel row   | v0: c0..c15 | v1: c0..c15 | v2: c0..c15 | ...
               voxel 0       [----- kw, ic = 0..47 ----------------]
               voxel 1                     [----- kw, ic = 0..47 ------ ...

           The first layer's 1 to 4 channels are packed as they are, without padding to 16.
           ``dst`` is written as ndhwc, straight from the registers: a layout is only strides.
Traffic    src once to pack, once from the packed panel for each group of output channels; weights of
           a group stay in the second-level cache; dst once. A panel may be larger than the caches: the
           lines that are met next are fetched while registers multiply
Gradients  ``backward_data`` is ``forward`` of ``diff_dst`` with reversed, transposed weights (with a
           stride, zeros are packed between the voxels of ``diff_dst``). ``backward_weights`` keeps a
           tile of the weight gradient in registers, (kw, ic) x oc, while it walks over the voxels of a
           few rows, whose gradients are gathered for one group of output channels first.
Numerics   float32; each sum adds kd, kh, kw, ic in order (channel blocks outermost), with one
           rounding a multiply-add. Partial weight gradients do not depend on the number of threads,
           so neither does any result.
Source     Georganas et al., "Anatomy of high-performance deep learning convolutions on SIMD
           architectures" (2018), sections II.C to II.F
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from kernels.base.arguments import Doubles, Floats, Triple
from kernels.base.buffers import empty, scratchpad
from kernels.base.conv_shapes import (
    adjoint_before,
    backward_data_geometry,
    backward_weights_geometry,
    check_float32,
    forward_geometry,
)
from kernels.base.jit import kernel, parallel_kernel, prange, signed, split_index
from kernels.base.layout import blocks, pack_src, pack_weights, unpack_weights
from kernels.base.machine import threads, tile_vectors
from kernels.base.simd import LANES, LINE, address, load, prefetch, store
from kernels.base.tiles import tile_fill, tile_load, tile_rank1, tile_store
from kernels.ladder.bias import add_voxels

#: Up to this many input channels are packed, or read, as they are; more are padded to blocks of 16.
FEW_CHANNELS = 4
# Voxels whose products are added to the weight gradient at a time, if a row is no longer: they stay in the
# first-level cache.
_VOXELS = 144
# Sums in flight that hide the latency of a fused multiply-add (4 cycles, 2 a cycle).
_LATENCY = 8


class TileShape(NamedTuple):
    """Register tile: ``high * wide`` voxels by ``cols`` blocks of 16 output channels."""

    high: int
    wide: int
    cols: int


def forward(
    src: Floats, weights: Floats, bias: Floats | None = None, stride: int | Triple = 1, padding: str = "same"
) -> Floats:
    """Convolve; arguments, result and errors as `naive.forward`, float32 only."""
    g = forward_geometry(src, weights, bias, stride, padding)
    check_float32(src)
    return _convolve(src, weights, bias, g.dst_shape, g.stride, g.before)


def backward_data(
    diff_dst: Floats,
    weights: Floats,
    src_shape: tuple[int, ...],
    stride: int | Triple = 1,
    padding: str = "same",
) -> Floats:
    """Gradient of ``src``; arguments, result and errors as `naive.backward_data`, float32 only."""
    g = backward_data_geometry(diff_dst, weights, src_shape, stride, padding)
    check_float32(diff_dst)
    return _convolve(
        diff_dst, weights, None, g.src_shape, (1, 1, 1), adjoint_before(g), g.stride, adjoint=True
    )


def backward_weights(
    src: Floats, diff_dst: Floats, kernel: Triple, stride: int | Triple = 1, padding: str = "same"
) -> tuple[Floats, Floats]:
    """Gradients of weights and bias; as `naive.backward_weights`, float32 only."""
    g = backward_weights_geometry(src, diff_dst, kernel, stride, padding)
    check_float32(src)
    width = _channel_width(g.IC)
    inputs, cols = weight_tile(g.KW, width, blocks(g.OC))
    groups, ICB = blocks(g.OC) // cols, -(-g.IC // width)
    # Enough independent chunks of rows to share among threads, whatever the number of threads.
    chunks = max(1, min(g.OD * g.OH, 16 // (groups * ICB)))
    partial = scratchpad("partial", chunks, groups, ICB, g.KD * g.KH * g.KW, width, cols * LANES)
    partial[:] = 0.0
    diff_bias = np.zeros((chunks, groups * cols * LANES))
    rows = max(1, _VOXELS // g.OW)
    scratch = scratchpad("gradient rows", threads(), (rows * g.OW * cols + 1) * LANES)
    gradient = np.ascontiguousarray(diff_dst)
    accumulate = _make_accumulate(g.KW, inputs, cols, width, g.SW)
    for n in range(g.MB):
        panel = _pack(src[n], ICB, g.panel_size, width, g.before, (1, 1, 1))
        accumulate(
            panel.reshape(-1),
            panel.shape,
            gradient[n].reshape(-1),
            partial.reshape(-1),
            diff_bias,
            (g.OD, g.OH, g.OW, g.OC, g.KD, g.KH, g.SD, g.SH),
            (chunks, groups, ICB),
            rows,
            scratch,
        )
    diff_weights = empty(g.weights_shape)
    unpack_weights(partial, diff_weights.reshape(g.OC, g.IC, -1))
    return diff_weights, diff_bias.sum(axis=0)[: g.OC].astype(np.float32)


@functools.cache
def tile_shape(OH: int, OW: int, OCB: int) -> TileShape:
    """Register tile for an output of ``OH x OW`` voxels and ``OCB`` channel blocks.

    The cheapest by count of cycles: tiles times the larger of multiply-adds, loads and latency. A
    tile at an edge is moved back inside, so a size that the tile does not divide costs the voxels
    computed twice.
    """
    best, best_cost = TileShape(1, 1, 1), float("inf")
    for cols in (1, 2, 4):
        for wide in (24, 12, 8, 6, 4, 3, 2, 1):
            for high in (1, 2, 3, 4, 6):
                if OCB % cols or wide > OW or high > OH or high * wide * cols > tile_vectors():
                    continue
                rows = high * wide
                tiles = -(-OH // high) * -(-OW // wide) * (OCB // cols)
                cost = tiles * max(rows * cols, rows + cols, _LATENCY)
                if cost < best_cost:
                    best, best_cost = TileShape(high, wide, cols), cost
    return best


def weight_tile(KW: int, width: int, OCB: int) -> tuple[int, int]:
    """Input channels and output-channel blocks of the weight-gradient tile, for all ``KW`` taps."""
    fitting = [
        (inputs, cols)
        for cols in (2, 1)
        for inputs in (16, 8, 4, 3, 2, 1)
        if OCB % cols == 0 and width % inputs == 0 and KW * inputs * cols <= tile_vectors()
    ]
    # More sums first; among equals the squarer tile, which loads less.
    return max(fitting or [(1, 1)], key=lambda tile: (tile[0] * tile[1], tile[1]))


def _convolve(
    src: Floats,
    weights: Floats,
    bias: Floats | None,
    dst_shape: tuple[int, int, int, int, int],
    stride: Triple,
    before: Triple,
    dilation: Triple = (1, 1, 1),
    *,
    adjoint: bool = False,
) -> Floats:
    """Pack weights and each image, and run the loop nest for the register tile that fits."""
    MB, OD, OH, OW, OC = dst_shape
    OCB, width = blocks(OC), _channel_width(src.shape[-1])
    ICB = -(-src.shape[-1] // width)
    KD, KH, KW = weights.shape[2:]
    tile = tile_shape(OH, OW, OCB)
    packed = scratchpad("weights", OCB // tile.cols, ICB, KD * KH * KW, width, tile.cols * LANES)
    pack_weights(weights, packed, adjoint=adjoint)
    padded_bias = np.zeros(OCB * LANES, np.float32)
    if bias is not None:
        padded_bias[:OC] = bias

    # Stores write 16 channels: a tail needs room for its padding lanes, which are then dropped.
    dst = empty((MB, OD, OH, OW, OCB * LANES))
    SD, SH, SW = stride
    size = (OD - 1) * SD + KD, (OH - 1) * SH + KH, (OW - 1) * SW + KW
    convolve = _make_convolve(*tile, width, SW)
    for n in range(MB):
        panel = _pack(src[n], ICB, size, width, before, dilation)
        convolve(
            panel.reshape(-1),
            panel.shape,
            packed.reshape(-1),
            padded_bias,
            dst[n].reshape(-1),
            dst.shape,
            (KD, KH, KW),
            stride,
        )
    return dst if OC == OCB * LANES else np.ascontiguousarray(dst[..., :OC])


@functools.cache
def _make_convolve(high: int, wide: int, cols: int, width: int, SW: int) -> Callable[..., None]:
    """Compile the loop nest for one register tile, channel width and stride along a row."""
    step = width * SW

    @parallel_kernel
    def convolve(
        panel: Floats,
        panel_shape: tuple[int, int, int, int, int],
        weights: Floats,
        bias: Floats,
        dst: Floats,
        dst_shape: tuple[int, int, int, int, int],
        kernel: Triple,
        stride: Triple,
    ) -> None:
        ICB, PD, PH, PW, _ = panel_shape
        _, OD, OH, OW, lanes = dst_shape
        KD, KH, KW = kernel
        row = PW * width
        run = KW * width
        tiles_high = -(-OH // high)
        for task in prange(lanes // (cols * LANES) * OD * tiles_high):
            group, rest = split_index(task, OD * tiles_high)
            od, oh_tile = divmod(rest, tiles_high)
            # The last tile of a column or row is moved back inside; its voxels are written twice.
            oh = min(oh_tile * high, OH - high)
            for ow_tile in range(-(-OW // wide)):
                ow = min(ow_tile * wide, OW - wide)
                sums = tile_fill(bias, group * cols * LANES, high, wide, cols)
                for icb in range(ICB):
                    # Of what the next row of tiles meets, only this row is new. Each tap fetches it
                    # again: what is there already costs nothing but the instruction.
                    below = (oh + high) * stride[1] + KH - 1
                    below += (icb * PD + od * stride[0] + KD - 1) * PH
                    soon = address(panel, below * row + ow * step)
                    for kd in range(KD):
                        for kh in range(KH):
                            d, h = od * stride[0] + kd, oh * stride[1] + kh
                            x = ((icb * PD + d) * PH + h) * row + ow * step
                            w = (((group * ICB + icb) * KD + kd) * KH + kh) * run * cols * LANES
                            for k in range(run):
                                prefetch(soon + k * LINE)
                                sums = tile_rank1(
                                    sums, panel, x + k, row * stride[1], step, weights, w + k * cols * LANES
                                )
                first = ((od * OH + oh) * OW + ow) * lanes + group * cols * LANES
                tile_store(sums, dst, first, OW * lanes, lanes, LANES)

    return convolve


@functools.cache
def _make_accumulate(KW: int, inputs: int, cols: int, width: int, SW: int) -> Callable[..., None]:
    """Compile the weight-gradient loops for one register tile, channel width and stride."""
    step, lanes = width * SW, cols * LANES

    @parallel_kernel
    def accumulate(
        panel: Floats,
        panel_shape: tuple[int, int, int, int, int],
        diff_dst: Floats,
        partial: Floats,
        diff_bias: Doubles,
        sizes: tuple[int, int, int, int, int, int, int, int],
        split: Triple,
        batch: int,
        scratch: Floats,
    ) -> None:
        _, PD, PH, PW, _ = panel_shape
        OD, OH, OW, OC, KD, KH, SD, SH = sizes
        chunks, groups, ICB = split
        row, rows, workers = PW * width, OD * OH, scratch.shape[0]
        for index in prange(workers):
            worker = signed(index)
            own = scratch[worker]
            for task in range(worker, chunks * groups * ICB, workers):
                chunk, group, icb = task // ICB // groups, task // ICB % groups, task % ICB
                totals = diff_bias[chunk, group * lanes : (group + 1) * lanes]
                end = (chunk + 1) * rows // chunks
                for start in range(chunk * rows // chunks, end, batch):
                    stop = min(start + batch, end)
                    voxels = (stop - start) * OW
                    _gather(diff_dst, start * OW, voxels, OC, group * lanes, own, cols)
                    if icb == 0:
                        add_voxels(own, 0, voxels, voxels, cols, totals, own[own.size - LANES :])
                    # The next batch, fetched meanwhile: as much of the panel as of the gradient.
                    next_d, next_h = stop // OH * SD + KD - 1, stop % OH * SH
                    next_x = address(panel, ((icb * PD + next_d) * PH + next_h) * row)
                    next_y = address(diff_dst, stop * OW * OC)
                    lines = voxels * OC // LANES
                    for part in range(KD * KH * (width // inputs)):
                        tap, ic = part // (width // inputs), part % (width // inputs) * inputs
                        kd, kh = tap // KH, tap % KH
                        at = ((task * KD * KH + tap) * KW * width + ic) * lanes
                        sums = tile_load(partial, at, width * lanes, lanes, LANES, KW, inputs, cols)
                        # Each part fetches as many lines as it meets voxels, until all are there.
                        apart = LINE if part * voxels < lines else 0
                        near = part * voxels * apart
                        first = 0
                        while first < voxels:
                            # Rows of one plane are one loop, or its end would be met every few voxels.
                            r = start + first // OW
                            d, h = r // OH, r % OH
                            x = ((icb * PD + d * SD + kd) * PH + h * SH + kh) * row + ic
                            last, ow = min(first + (OH - h) * OW, voxels), 0
                            for voxel in range(first, last):
                                prefetch(next_x + near + voxel * apart)
                                prefetch(next_y + near + voxel * apart)
                                y = voxel * lanes
                                sums = tile_rank1(sums, panel, x, width, 1, own, y)
                                ow += 1
                                x += step if ow < OW else step + SH * row - OW * step
                                ow = ow if ow < OW else 0
                            first = last
                        tile_store(sums, partial, at, width * lanes, lanes, LANES)

    return accumulate


@kernel
def _gather(diff_dst: Floats, first: int, voxels: int, OC: int, channel: int, own: Floats, cols: int) -> None:
    """Voxels of ``cols`` channel blocks from ``channel``, one after the other; zeros in padding lanes."""
    lanes = cols * LANES
    for voxel in range(voxels):
        x, y = (first + voxel) * OC + channel, voxel * lanes
        if channel + lanes <= OC:
            for c in range(0, lanes, LANES):
                store(own, y + c, load(diff_dst, x + c))
        else:
            for lane in range(lanes):
                own[y + lane] = diff_dst[x + lane] if channel + lane < OC else np.float32(0.0)


def _channel_width(IC: int) -> int:
    return IC if IC <= FEW_CHANNELS else LANES


def _pack(src: Floats, ICB: int, size: Triple, width: int, before: Triple, dilation: Triple) -> Floats:
    """One image as a panel; the image itself where it already has that form (1^3 kernels)."""
    if src.shape == (*size, width) and src.flags.c_contiguous:
        return src.reshape(1, *src.shape)
    panel = scratchpad("src", ICB, *size, width)
    pack_src(src, panel, before, dilation)
    return panel
