"""Winograd along d and h, direct along w: a first layer, whose few channels are not blocked.

Four channels would fill a quarter of a block. Channels last, they lie side by side along a row, so that a
vector is four voxels (of four channels), and transforms along d and h do not mind. Along w nothing is
transformed: the taps and channels (kw, ic) of an output voxel are one run of memory, as in `direct`::

    line of a plane   | zeros | v0 v1 v2 v3 | v4 ...              v: channels of a voxel
    output voxel 0      ... [-- kw, ic --]
    output voxel 1            [-- kw, ic --]

F(4, 4) along d and h takes 36 * KW * IC multiplications for 16 voxels, a quarter of direct's, and packs a
quarter of what 16 channels would. Rows must be whole vectors, W * IC a multiple of 16.

Loop nest: bricks | slab | planes of points | ocb, rows, w tiles | kw and ic | register tile || ocb: epilogue.
For the weight gradient: chunks of bricks | slabs | planes of points | ocb, ic | rows, w | register tile.

Source: as `winograd` and `direct`.
"""

import functools
from collections.abc import Callable
from typing import Any

from kernels.base.arguments import Doubles, Floats, Triple
from kernels.base.buffers import scratchpad
from kernels.base.jit import run_workers, specialised, worker_kernel
from kernels.base.machine import threads
from kernels.base.prefetch import LINE, tensors, upcoming
from kernels.base.simd import LANES, fence, prefetch, tile_load, tile_rank1, tile_store, tile_zero
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
from kernels.conv3d.winograd import cutting
from kernels.conv3d.winograd.cutting import slab_planes
from kernels.conv3d.winograd.stages import slot_size
from kernels.conv3d.winograd.sums import gather_bricks, transform_back
from kernels.conv3d.write import Outputs, Staged, finish_block, finish_size
from kernels.ladder.bias import add_voxels
from kernels.ladder.cook_toom import DIFF_DST, INPUT
from kernels.ladder.direct import TileShape, tile_shape, weight_tile


def supports(size: tuple[int, int, int, int], kernel: Triple, tile: Triple, width: int) -> bool:
    """Whether rows are whole vectors, and the kernel 3 along d and h where the tile is above 1, else 1."""
    fits = kernel[:2] == cutting.kernel_of(tile)[:2]
    return fits and tile[2] == 1 and tile[1] > 1 and size[3] * width % LANES == 0


def cut_output(dst_size: tuple[int, int, int, int], tile: Triple, OCB: int) -> Cut:
    """Bricks of rows of windows whose results stay in cache."""
    return cutting.cut_output(dst_size, tile, 1, OCB)


def packed_shape(cut: Cut, tile: Triple, KW: int, OCB: int, width: int) -> tuple[int, int, int, int, int]:
    """Shape of the transformed weights: ``(planes of points, groups, 1, KW * width, cols * 16)``."""
    cols = register_tile(cut, OCB).cols
    return slab_planes(tile), OCB // cols, 1, KW * width, cols * LANES


def register_tile(cut: Cut, OCB: int) -> TileShape:
    """Register tile: voxels of a row by blocks of output channels."""
    return tile_shape(cut.OW, OCB)


def convolve(
    prologue: Inputs,
    src_size: Triple,
    before: Triple,
    weights: Floats,
    kernel: Triple,
    epilogue: Outputs,
    cut: Cut,
    tile: Triple,
) -> None:
    """Convolve a tensor of few channels, channels last, stride 1.

    Parameters
    ----------
    prologue, epilogue
        What is read and written; see `bricks`. The source is read as it is.
    src_size, before, kernel : (d, h, w)
    weights : ndarray, `packed_shape`
        From `convolution.pack_weights`, with (kw, ic) in the place of ic.
    cut : Cut
        Bricks of the output, in whole windows.
    tile : (md, mh, 1)
    """
    shape = register_tile(cut, epilogue.blocks)
    workers, size = threads(), _scratch_size(cut, tile, prologue.width, epilogue.blocks)
    scratch = scratchpad("winograd", workers, size)
    run_workers(
        convolve_bricks,
        _make_convolve(tile[0], tile[1], shape.wide, shape.cols, prologue.width),
        prologue,
        src_size,
        before,
        weights.reshape(-1),
        kernel,
        epilogue,
        cut,
        scratch,
    )


def backward_weights(
    prologue: Inputs,
    src_size: Triple,
    before: Triple,
    gradient: Inputs,
    cut: Cut,
    kernel: Triple,
    tile: Triple,
    diff_weights: Floats,
    diff_bias: Doubles,
) -> None:
    """Gradients of weights and bias.

    Parameters
    ----------
    prologue, src_size, before, cut, kernel, tile
        As in `convolve`.
    gradient : Inputs
        Of the output, in blocks.
    diff_weights : ndarray, shape=(OC, IC, KD * KH * KW), float32, C-contiguous
        Filled.
    diff_bias : ndarray, shape=(chunks, channels), float64
        Filled; the sum over the chunks is the gradient of the bias. Chunks: `brick_chunks`.
    """
    OCB, chunks, workers = gradient.blocks, diff_bias.shape[0], threads()
    inputs, _ = weight_tile(kernel[2], prologue.width, 1)
    block = kernel[2] * prologue.width * LANES
    sums = scratchpad("winograd sums", chunks, slab_planes(tile) * OCB * block)
    size = _scratch_size(cut, tile, prologue.width, OCB)
    scratch = scratchpad("winograd", workers, size)
    run_workers(
        gather_bricks,
        _make_accumulate(tile[0], tile[1], kernel[2], inputs, prologue.width),
        prologue,
        src_size,
        before,
        gradient,
        cut,
        sums.reshape(-1),
        diff_bias,
        scratch,
    )
    transform_back(tile, sums, diff_weights, prologue.width, LANES)


@functools.cache
def _scratch_size(cut: Cut, tile: Triple, width: int, OCB: int) -> int:
    """Floats of one worker's scratchpad: slab; results or gradients, or a strip; sums."""
    deep, high = cut.planes // tile[0], cut.lines // tile[1]
    lines = cut.OW * width // LANES + 2
    inside = slab_planes(tile) * slot_size(1, deep * high * lines)
    outside = slab_planes(tile) * slot_size(OCB, deep * high * cut.OW)
    # The gradient's slab is packed beside its buffer.
    buffers = buffer_size(high, tile[0], tile[1], INPUT) + finish_size(tile[0], tile[1])
    return inside + outside + buffers + (OCB + 1) * LANES


@specialised("md", "mh")
def pack_lines(
    prologue: Any, src_size: Any, before: Any, n: int, start: Any, own: Any, extent: Any, md: int, mh: int
) -> Any:
    """Pack a brick of the source at ``own[0:]``, with a line of zeros around each row; scratch behind it."""
    MD, MH = md, mh
    planes = slab_planes((MD, MH, 1))

    def implementation(prologue, src_size, before, n, start, own, extent, md, mh):  # type: ignore[no-untyped-def]
        D, H, W = src_size
        lines = Inputs(prologue.a, prologue.b, 1, 1, (D, H, W * prologue.width // LANES), LANES)
        origin = (start[0] - before[0], start[1] - before[1], -1)
        apart = slot_size(1, extent[0] * extent[1] * extent[2])
        slab = Slab(0, apart, planes * apart, 0)
        pack_brick(lines, Window(n, origin, extent), own, slab, INPUT, MD, MH)

    return implementation


@functools.cache
def _make_convolve(md: int, mh: int, wide: int, cols: int, width: int) -> Callable[..., None]:
    planes, finishing = slab_planes((md, mh, 1)), finish_size(md, mh)

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
        OCB, OW, run = epilogue.blocks, cut.OW, kernel[2] * width
        groups = OCB // cols
        deep, high = cut.planes // md, cut.lines // mh
        extent, staged = (deep, high, OW * width // LANES + 2), (deep, high, OW)
        own = scratch[worker]
        plane_size = slot_size(1, deep * high * extent[2])
        apart, block = slot_size(OCB, deep * high * OW), deep * high * OW * LANES
        bricks = count_bricks(cut)
        begin, end = share(bricks, worker, scratch.shape[0])
        for brick in range(begin, end):
            n, start, _ = locate(cut, brick)
            pack_lines(prologue, src_size, before, n, start, own, extent, md, mh)
            for plane in range(planes):
                first = plane * plane_size + LANES - before[2] * width
                to = planes * plane_size + plane * apart
                for i in range(groups * deep * high):
                    group, row = i // (deep * high), i % (deep * high)
                    at = (plane * groups + group) * run * cols * LANES
                    for w_tile in range(0, OW, wide):
                        # The last tile is moved back inside; its voxels are computed twice.
                        w = min(w_tile, OW - wide)
                        x = first + row * extent[2] * LANES + w * width
                        sums = tile_zero(wide, cols)
                        for k in range(run):
                            y = at + k * cols * LANES
                            sums = tile_rank1(sums, own, x + k, 0, width, weights, y, 1, wide, cols)
                        z = to + group * cols * block + (row * OW + w) * LANES
                        tile_store(sums, own, z, 0, LANES, block, 1, wide, cols)
            for ocb in range(OCB):
                at = planes * plane_size + ocb * block
                finish_block(
                    epilogue, cut, brick, ocb, own, Staged(at, apart, staged, own.size - finishing), md, mh
                )
        fence()

    return convolve_share


@functools.cache
def _make_accumulate(md: int, mh: int, KW: int, inputs: int, width: int) -> Callable[..., None]:
    planes, run = slab_planes((md, mh, 1)), KW * width

    @worker_kernel
    def accumulate_chunks(
        worker: int,
        prologue: Inputs,
        src_size: Triple,
        before: Triple,
        gradient: Inputs,
        cut: Cut,
        sums: Floats,
        diff_bias: Doubles,
        scratch: Floats,
    ) -> None:
        OCB, OW = gradient.blocks, cut.OW
        deep, high = cut.planes // md, cut.lines // mh
        rows, extent, inner = deep * high, (deep, high, OW * width // LANES + 2), (deep, high, OW)
        own = scratch[worker]
        plane_size = slot_size(1, rows * extent[2])
        apart, G = slot_size(OCB, rows * OW), planes * plane_size
        size, buffer = (cut.OD, cut.OH, OW), G + planes * apart
        S = own.size - (OCB + 1) * LANES
        result, nothing = source_tensors(gradient), tensors(EMPTY, EMPTY, EMPTY, EMPTY, 0, 0)
        bricks = count_bricks(cut)
        chunks, workers = diff_bias.shape[0], scratch.shape[0]
        for chunk in range(worker, chunks, workers):
            begin, end = share(bricks, chunk, chunks)
            first = chunk * planes * OCB * run * LANES
            for i in range(first, first + planes * OCB * run * LANES):
                sums[i] = 0.0
            diff_bias[chunk] = 0.0
            for brick in range(begin, end):
                n, start, _ = locate(cut, brick)
                pack_lines(prologue, src_size, before, n, start, own, extent, md, mh)
                slab = Slab(G, apart, buffer, S)
                pack_brick(gradient, Window(n, start, inner), own, slab, DIFF_DST, md, mh)
                add_voxels(own, S, 1, 1, 1, diff_bias[chunk], own[S + OCB * LANES :])
                following = next_brick(cut, brick, (0, 0, 0), size, 0, 0)
                for i in range(planes * OCB):
                    plane, ocb = i // OCB, i % OCB
                    soon = upcoming(result, following, nothing, following, i, planes * OCB)
                    for ic in range(0, width, inputs):
                        to = first + (i * run + ic) * LANES
                        tile = tile_load(sums, to, width * LANES, LANES, 0, KW, inputs, 1)
                        near, beside, count = soon
                        step = 0
                        for row in range(rows):
                            x = plane * plane_size + row * extent[2] * LANES
                            x += LANES - before[2] * width + ic
                            y = G + plane * apart + (ocb * rows + row) * OW * LANES
                            # Two voxels for each line that is fetched: few channels make rows even.
                            for _ in range(0, OW, 2):
                                line = LINE if step < count else 0
                                step += 1
                                prefetch(near)
                                prefetch(beside)
                                near += line
                                beside += line
                                tile = tile_rank1(tile, own, x, width, 1, own, y, KW, inputs, 1)
                                tile = tile_rank1(
                                    tile, own, x + width, width, 1, own, y + LANES, KW, inputs, 1
                                )
                                x += 2 * width
                                y += 2 * LANES
                        tile_store(tile, sums, to, width * LANES, LANES, 0, KW, inputs, 1)

    return accumulate_chunks
