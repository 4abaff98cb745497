"""Weight gradient in the Winograd domain: the same tiles and savings as `winograd`.

    diff_weights = G^T [ sum over images and tiles of (A diff_dst tile A^T) * (B^T src tile B) ] G

Idea       `direct` multiplies each voxel of diff_dst with the 27 of src around it. Transformed, a tile of
           F(2, 4, 4) takes 144 multiplications a channel pair instead of 864, and the way back, G^T, is
           taken once for all tiles
Few        Where the sums of all points fit the cache beside a brick, a worker transforms brick after
channels   brick and adds to its sums; at the end the sums of the workers are added up. Loop nest: chunks
           of bricks | icb and ocb: transform in | points, groups, icb | register tile (ic, oc) | tiles
Many       There the sums would stream through memory for each brick. All tiles are transformed first,
channels   and then each pair of channel blocks is summed over all tiles and transformed back while it
           is in cache. Loop nest: bricks | transform in; groups, icb | points | register tile | tiles
Numerics   float32; chunks are added in order, so a run with as many threads repeats bit for bit
Source     `kernels.conv3d.cook_toom`, last paragraph
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba.extending import overload

from kernels.compiler import (
    call_worker,
    parallel_kernel,
    prange,
    run_workers,
    split_index,
    worker_kernel,
)
from kernels.conv3d.bricks import Cut, Prologue, add_voxels, locate, pack_brick, share
from kernels.conv3d.cook_toom import DIFF_DST, DIFF_WEIGHTS, INPUT, sizes
from kernels.conv3d.epilogue import Doubles
from kernels.conv3d.shapes import Triple
from kernels.conv3d.transform import scratch_vectors, transform_tile
from kernels.conv3d.winograd_convolve import points, slab_extent, tile_count
from kernels.conv3d.winograd_stages import accumulate, literals, transform_in
from kernels.layout import Floats
from kernels.machine import threads, tile_vectors
from kernels.memory import scratchpad
from kernels.simd import LANES, load, store

# The sums of a pair of blocks are loaded and stored once a brick, the values of its tiles are written and
# read once more where pairs are summed: beyond this many sums for each value, the latter is less.
_SUMS_PER_TILE = 0.1


def register_tile(OCB: int) -> tuple[int, int]:
    """Input channels and blocks of output channels of the register tile."""
    if OCB % 2 == 0 and tile_vectors() >= 16:
        return 8, 2
    return (16, 1) if tile_vectors() >= 16 else (4, 1) if tile_vectors() >= 4 else (2, 1)


def bias_chunks(cut: Cut, tile: Triple, ICB: int, OCB: int) -> int:
    """Chunks of ``diff_bias``."""
    return split(cut, tile, ICB, OCB) or cut.bricks


def split(cut: Cut, tile: Triple, ICB: int, OCB: int) -> int:
    """Chunks of bricks, each with sums of its own; 0 where pairs of channel blocks are summed instead."""
    tiles = cut.bricks * tile_count(cut, tile)
    sums = ICB * OCB * LANES * LANES
    if sums > _SUMS_PER_TILE * tiles * (ICB + OCB) * LANES:
        return 0
    return max(1, min(cut.bricks, threads()))


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
        Filled; the sum over the chunks is the gradient of the bias. Chunks: `bias_chunks`.
    """
    ICB, OCB = prologue.blocks, gradient.blocks
    inputs, cols = register_tile(OCB)
    workers, size = threads(), _scratch_size(cut, tile, ICB, OCB)
    chunks = diff_bias.shape[0]
    pairs = split(cut, tile, ICB, OCB) == 0
    P, tiles = points(tile), tile_count(cut, tile)
    if pairs:
        tiles *= cut.bricks
        transformed = scratchpad("winograd tiles", P * tiles * (ICB + OCB) * LANES)
    else:
        transformed = scratchpad("winograd sums", chunks * P * ICB * OCB * LANES * LANES)
    scratch = scratchpad("winograd", workers * size)[: workers * size].reshape(workers, size)
    run_workers(
        gather_bricks,
        (_make_transform if pairs else _make_accumulate)(*tile, inputs, cols),
        prologue,
        src_size,
        before,
        gradient,
        cut,
        transformed,
        diff_bias,
        scratch,
    )
    if pairs:
        size = P * LANES * cols * LANES + scratch_vectors(DIFF_WEIGHTS, *tile) * LANES
        scratch = scratchpad("winograd", workers * size)[: workers * size].reshape(workers, size)
        run = _make_pairs(*tile, inputs, cols)
        run(transformed, tiles, panel.reshape(-1), ICB, OCB // cols, scratch)
    else:
        sums = transformed[: chunks * P * ICB * OCB * LANES * LANES].reshape(chunks, -1)
        _make_inverse(*tile, cols)(sums, panel.reshape(-1), ICB, OCB // cols)


def _scratch_size(cut: Cut, tile: Triple, ICB: int, OCB: int) -> int:
    """Floats of one worker's scratchpad: the larger slab, both transformed, a tile in between."""
    voxels = math.prod(slab_extent(cut, tile)) * max(ICB, OCB)
    transformed = points(tile) * tile_count(cut, tile) * (ICB + OCB)
    between = max(scratch_vectors(INPUT, *tile), scratch_vectors(DIFF_DST, *tile))
    return (voxels + transformed + between) * LANES


@parallel_kernel
def gather_bricks(
    address: int,
    prologue: Prologue,
    src_size: Triple,
    before: Triple,
    gradient: Prologue,
    cut: Cut,
    transformed: Floats,
    diff_bias: Doubles,
    scratch: Floats,
) -> None:
    """Driver of the gradient's workers: each its bricks, with a row of ``scratch`` for itself."""
    for index in prange(scratch.shape[0]):
        worker, _ = split_index(index, 1)
        call_worker(
            address,
            worker,
            prologue,
            src_size,
            before,
            gradient,
            cut,
            transformed,
            diff_bias,
            scratch,
        )


def transform_brick(
    prologue: Any,
    src_size: Any,
    before: Any,
    gradient: Any,
    cut: Any,
    brick: int,
    own: Any,
    V: int,
    S: int,
    to: Any,
    first: int,
    T: int,
    totals: Any,
    cols: int,
    md: int,
    mh: int,
    mw: int,
) -> None:
    """Transform source and gradient of a brick, and add the gradient's voxels to ``totals``.

    To ``to``: the tiles from ``first`` of ``V[point][icb][T]`` and behind it ``E[point][group][T][cols]``,
    from offset V. The slabs are at ``own[0:]``, scratch at S. Runs only inside a compiled kernel.
    """
    raise NotImplementedError("runs only inside a compiled kernel")


@overload(transform_brick, prefer_literal=True)
def _transform_brick(  # type: ignore[no-untyped-def]
    prologue,
    src_size,
    before,
    gradient,
    cut,
    brick,
    own,
    V,
    S,
    to,
    first,
    T,
    totals,
    cols,
    md,
    mh,
    mw,
):
    constants = literals(cols, md, mh, mw)
    if constants is None:
        return None
    C, MD, MH, MW = constants
    P = points((MD, MH, MW))
    halo_d, halo_h, halo_w = (2 if m > 1 else 0 for m in (MD, MH, MW))

    def implementation(  # type: ignore[no-untyped-def]
        prologue,
        src_size,
        before,
        gradient,
        cut,
        brick,
        own,
        V,
        S,
        to,
        first,
        T,
        totals,
        cols,
        md,
        mh,
        mw,
    ):
        ICB, OCB = prologue.blocks, gradient.blocks
        tiles = (cut.planes // MD, cut.lines // MH, -(-cut.OW // MW))
        inner = (cut.planes, cut.lines, tiles[2] * MW)
        extent = (inner[0] + halo_d, inner[1] + halo_h, inner[2] + halo_w)
        size = (cut.OD, cut.OH, cut.OW)
        n, start, _ = locate(cut, brick)
        origin = (start[0] - before[0], start[1] - before[1], -before[2])
        slot, at = ICB * T * LANES, V + first * LANES
        pack_brick(prologue, n, src_size, own, 0, origin, extent)
        transform_in(own, extent, ICB, tiles, to, at, slot, T, S, 1, INPUT, MD, MH, MW)
        pack_brick(gradient, n, size, own, 0, start, inner)
        add_voxels(own, inner[0] * inner[1] * inner[2], totals, own[S:])
        slot, at = OCB * T * LANES, V + P * ICB * T * LANES + first * C * LANES
        transform_in(own, inner, OCB, tiles, to, at, slot, T, S, C, DIFF_DST, MD, MH, MW)

    return implementation


@functools.cache
def _make_accumulate(md: int, mh: int, mw: int, inputs: int, cols: int) -> Callable[..., None]:
    P = points((md, mh, mw))
    halo_d, halo_h, halo_w = (2 if m > 1 else 0 for m in (md, mh, mw))

    @worker_kernel
    def accumulate_chunks(
        worker: int,
        prologue: Prologue,
        src_size: Triple,
        before: Triple,
        gradient: Prologue,
        cut: Cut,
        sums: Floats,
        diff_bias: Doubles,
        scratch: Floats,
    ) -> None:
        ICB, OCB, groups = prologue.blocks, gradient.blocks, gradient.blocks // cols
        wide = -(-cut.OW // mw)
        T = cut.planes // md * (cut.lines // mh) * wide
        slab = (cut.planes + halo_d) * (cut.lines + halo_h) * (wide * mw + halo_w)
        V = max(ICB, OCB) * slab * LANES
        E = V + P * ICB * T * LANES
        S = E + P * OCB * T * LANES
        bricks = cut.MB * -(-cut.OD // cut.planes) * -(-cut.OH // cut.lines)
        chunks, workers = diff_bias.shape[0], scratch.shape[0]
        block = LANES * cols * LANES
        own = scratch[worker]
        for chunk in range(worker, chunks, workers):
            begin, end = share(bricks, chunk, chunks)
            first = chunk * P * groups * ICB * block
            diff_bias[chunk] = 0.0
            for brick in range(begin, end):
                transform_brick(
                    prologue,
                    src_size,
                    before,
                    gradient,
                    cut,
                    brick,
                    own,
                    V,
                    S,
                    own,
                    0,
                    T,
                    diff_bias[chunk],
                    cols,
                    md,
                    mh,
                    mw,
                )
                for i in range(P * groups * ICB):
                    point, group, icb = i // (groups * ICB), i // ICB % groups, i % ICB
                    v = V + (point * ICB + icb) * T * LANES
                    e = E + (point * groups + group) * T * cols * LANES
                    fresh = brick == begin
                    accumulate(own, v, e, T, sums, first + i * block, fresh, inputs, cols)

    return accumulate_chunks


@functools.cache
def _make_transform(md: int, mh: int, mw: int, inputs: int, cols: int) -> Callable[..., None]:
    halo_d, halo_h, halo_w = (2 if m > 1 else 0 for m in (md, mh, mw))

    @worker_kernel
    def transform_chunks(
        worker: int,
        prologue: Prologue,
        src_size: Triple,
        before: Triple,
        gradient: Prologue,
        cut: Cut,
        transformed: Floats,
        diff_bias: Doubles,
        scratch: Floats,
    ) -> None:
        wide = -(-cut.OW // mw)
        T = cut.planes // md * (cut.lines // mh) * wide
        slab = (cut.planes + halo_d) * (cut.lines + halo_h) * (wide * mw + halo_w)
        S = max(prologue.blocks, gradient.blocks) * slab * LANES
        bricks = cut.MB * -(-cut.OD // cut.planes) * -(-cut.OH // cut.lines)
        own = scratch[worker]
        # A chunk is a brick.
        for brick in range(worker, bricks, scratch.shape[0]):
            diff_bias[brick] = 0.0
            transform_brick(
                prologue,
                src_size,
                before,
                gradient,
                cut,
                brick,
                own,
                0,
                S,
                transformed,
                brick * T,
                bricks * T,
                diff_bias[brick],
                cols,
                md,
                mh,
                mw,
            )

    return transform_chunks


@functools.cache
def _make_pairs(md: int, mh: int, mw: int, inputs: int, cols: int) -> Callable[..., None]:
    (PD, KD), (PH, KH), (PW, KW) = (sizes(DIFF_WEIGHTS, m) for m in (md, mh, mw))
    lanes, block = cols * LANES, LANES * cols * LANES
    kind, P = DIFF_WEIGHTS, PD * PH * PW
    point_strides = (PH * PW * block, PW * block, block)

    @parallel_kernel
    def sum_pairs(
        tiles: Floats, T: int, panel: Floats, ICB: int, groups: int, scratch: Floats
    ) -> None:
        E, S = P * ICB * T * LANES, P * block
        to_strides = (KH * KW * block, KW * block, block)
        workers = scratch.shape[0]
        for index in prange(workers):
            worker, _ = split_index(index, 1)
            own = scratch[worker]
            for pair in range(worker, groups * ICB, workers):
                for point in range(P):
                    v = (point * ICB + pair % ICB) * T * LANES
                    e = E + (point * groups + pair // ICB) * T * lanes
                    accumulate(tiles, v, e, T, own, point * block, True, inputs, cols)
                for i in range(0, block, LANES):
                    to = pair * KD * KH * KW * block + i
                    transform_tile(
                        own, i, point_strides, panel, to, to_strides, own, S, kind, md, mh, mw
                    )

    return sum_pairs


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
