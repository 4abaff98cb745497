"""Weight gradient in the Winograd domain: the same tiles and savings as `winograd`.

    diff_weights = G^T [ sum over images and tiles of (A diff_dst tile A^T) * (B^T src tile B) ] G

Idea       `direct` multiplies each voxel of diff_dst with the 27 of src around it. Transformed, a tile of
           F(2, 4, 4) takes 144 multiplications a channel pair instead of 864, and the way back, G^T, is
           taken once for all tiles
Loop nest  parts of the output channels, chunks of bricks | icb and ocb: transform in |
           points, groups, icb | register tile of (ic, oc) | tiles
Memory     sums[point][group][icb][ic][oc] of each chunk; a register tile is loaded once a brick
Numerics   float32; chunks are added in order, so the result does not depend on the threads
Source     `kernels.conv3d.cook_toom`, last paragraph
"""

import functools
import math
from collections.abc import Callable

import numpy as np

from kernels.compiler import parallel_kernel, prange, split_index
from kernels.conv3d.bricks import Cut, Prologue, add_voxels, locate, pack_brick
from kernels.conv3d.cook_toom import DIFF_DST, DIFF_WEIGHTS, INPUT, sizes
from kernels.conv3d.epilogue import Doubles
from kernels.conv3d.shapes import Triple
from kernels.conv3d.transform import scratch_vectors, transform_tile
from kernels.conv3d.winograd_convolve import points, slab_extent, tile_count
from kernels.conv3d.winograd_stages import accumulate, transform_in
from kernels.layout import Floats
from kernels.machine import threads, tile_vectors
from kernels.memory import scratchpad
from kernels.simd import LANES, load, store


def register_tile(OCB: int) -> tuple[int, int]:
    """Input channels and blocks of output channels of the register tile."""
    if OCB % 2 == 0 and tile_vectors() >= 16:
        return 8, 2
    return (16, 1) if tile_vectors() >= 16 else (4, 1) if tile_vectors() >= 4 else (2, 1)


def split(bricks: int, ICB: int, OCB: int) -> tuple[int, int]:
    """Parts of the output channels, and chunks of bricks: about eight tasks, whatever the threads.

    Each chunk has sums of its own, which is much memory where channels are many; each part transforms
    the source anew, which is much work where they are few.
    """
    groups = OCB // register_tile(OCB)[1]
    parts = min(groups, 4) if ICB * OCB >= 16 else 1
    return parts, max(1, min(bricks, 8 // parts))


def backward_weights(
    prologue: Prologue,
    src_size: Triple,
    before: Triple,
    gradient: Prologue,
    cut: Cut,
    tile: Triple,
    panel: Floats,
    diff_bias: Doubles,
) -> None:
    """Gradients of weights and bias of a stride-1 convolution of blocked tensors.

    Parameters
    ----------
    prologue, gradient : Prologue
        The source, and the gradient of the output.
    src_size : (D, H, W)
    before : (d, h, w)
        Zeros before the first voxel of the source.
    cut : Cut
        Bricks of the output, in whole tiles.
    tile : (md, mh, mw)
    panel : ndarray, shape=(1, groups, ICB, KD * KH * KW, 16, lanes), float32
        Filled, as `layout.unpack_weights` takes it; ``lanes`` as in `register_tile`.
    diff_bias : ndarray, shape=(chunks, channels), float64
        Filled; the sum over the chunks is the gradient of the bias.
    """
    ICB, OCB = prologue.blocks, gradient.blocks
    inputs, cols = register_tile(OCB)
    parts, chunks = split(cut.bricks, ICB, OCB)
    workers, size = threads(), _scratch_size(cut, tile, ICB, OCB)
    scratch = scratchpad("winograd", workers * size)[: workers * size].reshape(workers, size)
    per_chunk = points(tile) * ICB * OCB * LANES * LANES
    sums = scratchpad("winograd sums", chunks * per_chunk)[: chunks * per_chunk]
    sums = sums.reshape(chunks, per_chunk)
    run = _make_accumulate(*tile, inputs, cols)
    run(prologue, src_size, before, gradient, cut, parts, sums, diff_bias, scratch)
    _make_inverse(*tile, cols)(sums, panel.reshape(-1), ICB, OCB // cols)


def _scratch_size(cut: Cut, tile: Triple, ICB: int, OCB: int) -> int:
    """Floats of one worker's scratchpad: the larger slab, both transformed, a tile in between."""
    voxels = math.prod(slab_extent(cut, tile)) * max(ICB, OCB)
    transformed = points(tile) * tile_count(cut, tile) * (ICB + OCB)
    between = max(scratch_vectors(INPUT, *tile), scratch_vectors(DIFF_DST, *tile))
    return (voxels + transformed + between) * LANES


@functools.cache
def _make_accumulate(md: int, mh: int, mw: int, inputs: int, cols: int) -> Callable[..., None]:
    P = points((md, mh, mw))
    halo_d, halo_h, halo_w = (2 if m > 1 else 0 for m in (md, mh, mw))

    @parallel_kernel
    def run(
        prologue: Prologue,
        src_size: Triple,
        before: Triple,
        gradient: Prologue,
        cut: Cut,
        parts: int,
        sums: Floats,
        diff_bias: Doubles,
        scratch: Floats,
    ) -> None:
        ICB, OCB = prologue.blocks, gradient.blocks
        tiles = (cut.planes // md, cut.lines // mh, -(-cut.OW // mw))
        T = tiles[0] * tiles[1] * tiles[2]
        inner = (cut.planes, cut.lines, tiles[2] * mw)
        extent = (inner[0] + halo_d, inner[1] + halo_h, inner[2] + halo_w)
        V = max(ICB, OCB) * extent[0] * extent[1] * extent[2] * LANES
        E = V + P * ICB * T * LANES
        S = E + P * OCB * T * LANES
        bricks = cut.MB * -(-cut.OD // cut.planes) * -(-cut.OH // cut.lines)
        chunks, workers = sums.shape[0], scratch.shape[0]
        size = (cut.OD, cut.OH, cut.OW)
        for index in prange(workers):
            worker, _ = split_index(index, 1)
            own = scratch[worker]
            for task in range(worker, chunks * parts, workers):
                chunk, part = task // parts, task % parts
                first = part * (OCB // cols) // parts * cols
                end = (part + 1) * (OCB // cols) // parts * cols
                block_sums = sums[chunk]
                for point in range(P):
                    at = (point * OCB + first) * ICB * LANES * LANES
                    for i in range(at, at + (end - first) * ICB * LANES * LANES):
                        block_sums[i] = 0.0
                if part == 0:
                    for c in range(OCB * LANES):
                        diff_bias[chunk, c] = 0.0
                for brick in range(chunk * bricks // chunks, (chunk + 1) * bricks // chunks):
                    n, start, _ = locate(cut, brick)
                    origin = (start[0] - before[0], start[1] - before[1], -before[2])
                    pack_brick(prologue, n, src_size, own, 0, origin, extent)
                    transform_in(own, extent, ICB, tiles, V, S, 1, INPUT, md, mh, mw)
                    pack_brick(gradient, n, size, own, 0, start, inner)
                    if part == 0:
                        add_voxels(own, inner[0] * inner[1] * inner[2], diff_bias[chunk], own[S:])
                    transform_in(own, inner, OCB, tiles, E, S, cols, DIFF_DST, md, mh, mw)
                    accumulate(own, V, E, ICB, OCB, T, first, end, block_sums, P, inputs, cols)

    return run


@functools.cache
def _make_inverse(md: int, mh: int, mw: int, cols: int) -> Callable[..., None]:
    (PD, KD), (PH, KH), (PW, KW) = (sizes(DIFF_WEIGHTS, m) for m in (md, mh, mw))
    lanes, block = cols * LANES, LANES * cols * LANES
    kind = DIFF_WEIGHTS
    vectors = PD * PH * PW + scratch_vectors(kind, md, mh, mw)
    tile_strides = (PH * PW * LANES, PW * LANES, LANES)

    @parallel_kernel
    def inverse(sums: Floats, panel: Floats, ICB: int, groups: int) -> None:
        chunks = sums.shape[0]
        for task in prange(groups * ICB):
            part, _ = split_index(task, 1)
            own = np.empty(vectors * LANES, np.float32)
            for i in range(0, LANES * lanes, LANES):
                for point in range(PD * PH * PW):
                    at = (point * groups * ICB + part) * block + i
                    total = load(sums[0], at)
                    for chunk in range(1, chunks):
                        total = total + load(sums[chunk], at)
                    store(own, point * LANES, total)
                to = part * KD * KH * KW * block + i
                to_strides = (KH * KW * block, KW * block, block)
                scratch = PD * PH * PW * LANES
                transform_tile(
                    own, 0, tile_strides, panel, to, to_strides, own, scratch, kind, md, mh, mw
                )

    return inverse
