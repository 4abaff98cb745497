"""Direct convolution of blocked tensors, brick by brick, with prologue and epilogue.

The register tiles of `direct`, on slabs: where Winograd does not pay (first layer, 1^3 kernels, few
voxels) or its rounding is not wanted. Loop nest: bricks and parts of the output channels | groups, od,
oh and ow tiles | icb, kd, kh | kw and ic | register tile | epilogue. For the weight gradient: parts and
chunks of bricks | groups, icb, kd, kh | rows of voxels | register tile of (kw, ic) x oc.

Source: as `direct`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from kernels.base.arguments import Doubles, Floats, Triple
from kernels.base.buffers import scratchpad
from kernels.base.jit import kernel, parallel_kernel, prange, run_workers, signed, specialised, worker_kernel
from kernels.base.layout import unpack_weights
from kernels.base.machine import threads
from kernels.base.simd import LANES, fence
from kernels.base.tiles import tile_load, tile_rank1, tile_store, tile_zero
from kernels.conv3d.bricks import (
    Cut,
    Epilogue,
    Prologue,
    convolve_bricks,
    count_bricks,
    finish_block,
    locate,
    pack_brick,
    share,
)
from kernels.conv3d.epilogue import finish_size
from kernels.ladder.bias import add_voxels
from kernels.ladder.cook_toom import INPUT
from kernels.ladder.direct import TileShape, tile_shape, weight_tile

# Bytes of one thread's slab: half of a second-level cache, the rest is for weights.
_CACHED = 512 * 1024
# Voxels whose products are added to the weight gradient at a time, if a row is no longer.
_VOXELS = 96


def cut_output(dst_size: tuple[int, int, int, int], kernel: Triple, blocks: int) -> Cut:
    """Bricks of whole rows whose slabs of ``blocks`` channel blocks stay in cache."""
    MB, OD, OH, OW = dst_size
    row = (OW + kernel[2] - 1) * blocks * LANES * 4
    best, best_cost = (1, 1), float("inf")
    for planes in range(1, min(OD, 8) + 1):
        lines = int(np.clip(_CACHED // row // (planes + kernel[0] - 1) - kernel[1] + 1, 1, OH))
        lines = -(-OH // -(-OH // lines))
        # Voxels packed for each voxel computed.
        cost = (planes + kernel[0] - 1) * (lines + kernel[1] - 1) / (planes * lines)
        if cost < best_cost:
            best, best_cost = (planes, lines), cost
    return Cut(MB, OD, OH, OW, *best)


def packed_shape(cut: Cut, kernel: Triple, ICB: int, OCB: int, width: int) -> tuple[int, int, int, int, int]:
    """Shape of the packed weights: ``(groups, ICB, KD * KH * KW, width, cols * 16)``."""
    cols = register_tile(cut, OCB).cols
    return OCB // cols, ICB, math.prod(kernel), width, cols * LANES


def register_tile(cut: Cut, OCB: int) -> TileShape:
    """Register tile: one row high, because a brick may be."""
    return tile_shape(1, cut.OW, OCB)


def convolve(
    prologue: Prologue,
    src_size: Triple,
    before: Triple,
    weights: Floats,
    kernel: Triple,
    epilogue: Epilogue,
    cut: Cut,
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
    kernel : (KD, KH, KW)
    cut : Cut
        Bricks of the output.
    """
    tile = register_tile(cut, epilogue.blocks)
    workers = threads()
    extent = _extent(cut, kernel)
    slab = prologue.blocks * math.prod(extent) * prologue.width
    voxels = tile.cols * cut.planes * cut.lines * cut.OW
    size = (-(-slab // LANES) + voxels) * LANES + finish_size(1, 1)
    scratch = scratchpad("direct bricks", workers, size)
    run_workers(
        convolve_bricks,
        _make_convolve(tile.wide, tile.cols, prologue.width),
        prologue,
        src_size,
        before,
        weights.reshape(-1),
        kernel,
        epilogue,
        cut,
        scratch,
    )


def split(bricks: int, ICB: int, OCB: int) -> tuple[int, int]:
    """Parts of the output channels, and chunks of bricks: up to 16 tasks, whatever the threads."""
    chunks = max(1, min(bricks, 16 // (ICB * OCB)))
    return max(1, min(OCB, 8 // chunks)), chunks


def backward_weights(
    prologue: Prologue,
    src_size: Triple,
    before: Triple,
    gradient: Prologue,
    cut: Cut,
    kernel: Triple,
    diff_weights: Floats,
    diff_bias: Doubles,
) -> None:
    """Gradients of weights and bias of a stride-1 convolution of blocked tensors.

    Parameters
    ----------
    prologue, gradient : Prologue
        The source, and the gradient of the output.
    src_size, before, cut, kernel
        As in `convolve`.
    diff_weights : ndarray, shape=(OC, IC, KD * KH * KW), float32, C-contiguous
        Filled.
    diff_bias : ndarray, shape=(chunks, channels), float64
        Filled; the sum over the chunks, as in `split`, is the gradient of the bias.
    """
    inputs, _ = weight_tile(kernel[2], prologue.width, 1)
    workers, shape = threads(), (math.prod(kernel), prologue.width, LANES)
    slab = prologue.blocks * math.prod(_extent(cut, kernel)) * prologue.width
    size = slab + (gradient.blocks * cut.planes * cut.lines * cut.OW + 1) * LANES
    scratch = scratchpad("direct bricks", workers, size)
    parts, chunks = split(cut.bricks, prologue.blocks, gradient.blocks)
    panel = scratchpad("weight sums", chunks, gradient.blocks, prologue.blocks, *shape)
    sums = panel.reshape(chunks, -1)
    run = _make_accumulate(kernel[2], inputs, prologue.width)
    run(prologue, src_size, before, gradient, cut, kernel, parts, sums, diff_bias, scratch)
    unpack_weights(panel, diff_weights)


@kernel
def _extent(cut: Cut, kernel: Triple) -> Triple:
    """Voxels of a slab: those of a brick and what its taps meet around it."""
    return cut.planes + kernel[0] - 1, cut.lines + kernel[1] - 1, cut.OW + kernel[2] - 1


@specialised("wide", "cols", "width")
def convolve_slab(
    own: Floats,
    extent: Triple,
    ICB: int,
    weights: Floats,
    kernel: Triple,
    ocb: int,
    to: int,
    brick: Triple,
    wide: int,
    cols: int,
    width: int,
) -> Any:
    """Convolve a slab at ``own[0:]`` to ``own[to:]``: ``brick`` voxels of ``cols`` blocks from ``ocb``."""
    R, C, I = wide, cols, width  # noqa: E741

    def implementation(  # type: ignore[no-untyped-def]
        own, extent, ICB, weights, kernel, ocb, to, brick, wide, cols, width
    ):
        KD, KH, KW = kernel
        line, run = extent[2] * I, KW * I
        block = brick[0] * brick[1] * brick[2] * LANES
        for row in range(brick[0] * brick[1]):
            d, h = row // brick[1], row % brick[1]
            for w_tile in range(0, brick[2], R):
                # The last tile is moved back inside; its voxels are written twice.
                w = min(w_tile, brick[2] - R)
                sums = tile_zero(1, R, C)
                for icb in range(ICB):
                    for tap in range(KD * KH):
                        kd, kh = tap // KH, tap % KH
                        x = ((icb * extent[0] + d + kd) * extent[1] + h + kh) * line + w * I
                        y = ((ocb * ICB + icb * C) * KD * KH + tap * C) * run * LANES
                        for k in range(run):
                            at = y + k * C * LANES
                            sums = tile_rank1(sums, own, x + k, 0, I, weights, at)
                tile_store(sums, own, to + (row * brick[2] + w) * LANES, 0, LANES, block)

    return implementation


@functools.cache
def _make_convolve(wide: int, cols: int, width: int) -> Callable[..., None]:
    finishing = finish_size(1, 1)

    @worker_kernel
    def convolve_share(
        worker: int,
        prologue: Prologue,
        src_size: Triple,
        before: Triple,
        weights: Floats,
        kernel: Triple,
        epilogue: Epilogue,
        cut: Cut,
        scratch: Floats,
    ) -> None:
        ICB, groups = prologue.blocks, epilogue.blocks // cols
        extent = _extent(cut, kernel)
        bricks = count_bricks(cut)
        slab = ICB * extent[0] * extent[1] * extent[2] * width
        staged = -(-slab // LANES) * LANES
        own = scratch[worker]
        last = own[own.size - finishing :]
        begin, stop_unit = share(bricks * groups, worker, scratch.shape[0])
        for brick in range(begin // groups, -(-stop_unit // groups)):
            first = max(begin - brick * groups, 0) * cols
            end = min(stop_unit - brick * groups, groups) * cols
            n, start, stop = locate(cut, brick)
            origin = (start[0] - before[0], start[1] - before[1], -before[2])
            pack_brick(prologue, n, src_size, own, 0, 0, 0, 0, origin, extent, INPUT, 1, 1)
            rows = (stop[0] - start[0], cut.lines, cut.OW)
            for ocb in range(first, end, cols):
                convolve_slab(own, extent, ICB, weights, kernel, ocb, staged, rows, wide, cols, width)
                for c in range(cols):
                    at = staged + c * rows[0] * rows[1] * rows[2] * LANES
                    finish_block(epilogue, cut, brick, ocb + c, own, at, 0, rows, last, 1, 1)
        fence()

    return convolve_share


@specialised("KW", "inputs", "width")
def accumulate_slab(
    own: Floats,
    extent: Triple,
    ICB: int,
    G: int,
    kernel: Triple,
    cut: Cut,
    rows: tuple[int, int],
    first: int,
    end: int,
    sums: Floats,
    KW: int,
    inputs: int,
    width: int,
) -> Any:
    """Add a brick's share of the weight gradient to ``sums``."""
    W, R, I = KW, inputs, width  # noqa: E741

    def implementation(  # type: ignore[no-untyped-def]
        own, extent, ICB, G, kernel, cut, rows, first, end, sums, KW, inputs, width
    ):
        KD, KH, _ = kernel
        line, count = extent[2] * I, rows[0] * rows[1]
        # Some rows at a time: gradients and sums stay in the first-level cache.
        group = max(1, _VOXELS // cut.OW)
        for begin in range(0, count, group):
            for i in range(first * ICB * KD * KH, end * ICB * KD * KH):
                block, tap = i // (KD * KH), i % (KD * KH)
                ocb, icb, kd, kh = block // ICB, block % ICB, tap // KH, tap % KH
                for ic in range(0, I, R):
                    at = (i * W * I + ic) * LANES
                    tile = tile_load(sums, at, I * LANES, LANES, 0, W, R, 1)
                    for row in range(begin, min(begin + group, count)):
                        d, h = row // rows[1], row % rows[1]
                        x = ((icb * extent[0] + d + kd) * extent[1] + h + kh) * line + ic
                        y = G + ((ocb * cut.planes + d) * cut.lines + h) * cut.OW * LANES
                        for w in range(cut.OW):
                            tile = tile_rank1(tile, own, x + w * I, I, 1, own, y + w * LANES)
                    tile_store(tile, sums, at, I * LANES, LANES, 0)

    return implementation


@functools.cache
def _make_accumulate(KW: int, inputs: int, width: int) -> Callable[..., None]:
    @parallel_kernel
    def run(
        prologue: Prologue,
        src_size: Triple,
        before: Triple,
        gradient: Prologue,
        cut: Cut,
        kernel: Triple,
        parts: int,
        sums: Floats,
        diff_bias: Doubles,
        scratch: Floats,
    ) -> None:
        KD, KH, _ = kernel
        ICB, OCB = prologue.blocks, gradient.blocks
        inner = (cut.planes, cut.lines, cut.OW)
        extent = _extent(cut, kernel)
        G = ICB * extent[0] * extent[1] * extent[2] * width
        S = G + OCB * inner[0] * inner[1] * inner[2] * LANES
        bricks = count_bricks(cut)
        chunks, workers = sums.shape[0], scratch.shape[0]
        block = ICB * KD * KH * KW * width * LANES
        for index in prange(workers):
            worker = signed(index)
            own = scratch[worker]
            for task in range(worker, chunks * parts, workers):
                chunk, part = task // parts, task % parts
                first, end = part * OCB // parts, (part + 1) * OCB // parts
                own_sums = sums[chunk]
                for i in range(first * block, end * block):
                    own_sums[i] = 0.0
                if part == 0:
                    for c in range(OCB * LANES):
                        diff_bias[chunk, c] = 0.0
                for brick in range(chunk * bricks // chunks, (chunk + 1) * bricks // chunks):
                    n, start, stop = locate(cut, brick)
                    origin = (start[0] - before[0], start[1] - before[1], -before[2])
                    pack_brick(prologue, n, src_size, own, 0, 0, 0, 0, origin, extent, INPUT, 1, 1)
                    size = (cut.OD, cut.OH, cut.OW)
                    pack_brick(gradient, n, size, own, G, 0, 0, 0, start, inner, INPUT, 1, 1)
                    if part == 0:
                        voxels = inner[0] * inner[1] * inner[2]
                        add_voxels(own, G, voxels, voxels, 1, diff_bias[chunk], own[S:])
                    rows = (stop[0] - start[0], stop[1] - start[1])
                    accumulate_slab(
                        own, extent, ICB, G, kernel, cut, rows, first, end, own_sums, KW, inputs, width
                    )

    return run
