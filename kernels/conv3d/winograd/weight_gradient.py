"""Weight gradient in the Winograd domain: the same tiles and savings as `winograd`.

    diff_weights = G^T [ sum over images and tiles of (A diff_dst tile A^T) * (B^T src tile B) ] G

Idea       `direct` multiplies each voxel of diff_dst with the 27 of src around it. Transformed, a tile of
           F(2, 4, 4) takes 144 multiplications a channel pair instead of 864, and the way back, G^T, is
           taken once for all tiles
Few        Where the sums of all points fit the cache beside a brick, a worker transforms brick after
channels   brick and adds to its sums; at the end the sums of the workers are added up. Loop nest: chunks
           of bricks | slabs | planes of points | icb and ocb: transform in | points along w, groups,
           icb | register tile (ic, oc) | tiles
Many       There the sums would stream through memory for each brick: `weight_gradient_pairs`.
channels
Numerics   float32; chunks are added in order, so a run with as many threads repeats bit for bit
Source     `kernels.ladder.cook_toom`, last paragraph
"""

import functools
import math
from collections.abc import Callable
from typing import Any

from kernels.base.arguments import Doubles, Floats, Triple
from kernels.base.buffers import scratchpad
from kernels.base.jit import run_workers, specialised, worker_kernel
from kernels.base.machine import threads
from kernels.base.prefetch import part_of, upcoming
from kernels.base.simd import LANES, address
from kernels.conv3d.bricks import Cut, count_bricks, locate, next_brick, share, source_tensors
from kernels.conv3d.read import Inputs, Slab, Window, buffer_size, pack_brick
from kernels.conv3d.winograd import cutting, weight_gradient_pairs
from kernels.conv3d.winograd.cutting import points, slab_extent, slab_planes, tile_count
from kernels.conv3d.winograd.stages import accumulate, slot_size, transform_in
from kernels.conv3d.winograd.sums import brick_chunks, gather_bricks, register_tile, transform_back
from kernels.ladder.bias import add_voxels
from kernels.ladder.cook_toom import DIFF_DST, INPUT, sizes

# The sums of a pair of blocks are loaded and stored once a brick, or the values of its tiles are written and
# read once more: beyond this many sums for each value, the latter is less.
_SUMS_PER_TILE = 0.3


def cut_output(dst_size: tuple[int, int, int, int], tile: Triple, ICB: int, OCB: int) -> Cut:
    """Bricks whose source and gradient stay in cache, both transformed."""
    return cutting.cut_output(dst_size, tile, ICB, OCB, kept=ICB + OCB)


def bias_chunks(cut: Cut, tile: Triple, ICB: int, OCB: int) -> int:
    """Chunks of ``diff_bias``."""
    return 1 if by_pairs(cut, tile, ICB, OCB) else brick_chunks(cut)


def by_pairs(cut: Cut, tile: Triple, ICB: int, OCB: int) -> bool:
    """Whether to sum pair of blocks after pair, not brick after brick."""
    tiles = cut.bricks * tile_count(cut, tile)
    return ICB * OCB * LANES * LANES > _SUMS_PER_TILE * tiles * (ICB + OCB) * LANES


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
    """Gradients of weights and bias of a stride-1 convolution of blocked tensors.

    Parameters
    ----------
    prologue, gradient : Inputs
        The source, and the gradient of the output.
    src_size : (D, H, W)
    before : (d, h, w)
        Zeros before the first voxel of the source.
    cut : Cut
        Bricks of the output, in whole tiles.
    tile : (md, mh, mw)
    diff_weights : ndarray, shape=(OC, IC, KD * KH * KW), float32, C-contiguous
        Filled.
    diff_bias : ndarray, shape=(chunks, channels), float64
        Filled; the sum over the chunks is the gradient of the bias. Chunks: `bias_chunks`.
    """
    if by_pairs(cut, tile, prologue.blocks, gradient.blocks):
        weight_gradient_pairs.backward_weights(
            prologue, src_size, before, gradient, cut, tile, diff_weights, diff_bias
        )
        return
    ICB, OCB = prologue.blocks, gradient.blocks
    inputs, cols = register_tile(OCB)
    workers, size = threads(), _scratch_size(cut, tile, ICB, OCB)
    sums = scratchpad("winograd sums", diff_bias.shape[0], points(tile) * ICB * LANES * OCB * LANES)
    scratch = scratchpad("winograd", workers, size)
    run_workers(
        gather_bricks,
        _make_accumulate(*tile, inputs, cols),
        prologue,
        src_size,
        before,
        gradient,
        cut,
        sums.reshape(-1),
        diff_bias,
        scratch,
    )
    transform_back(tile, sums, diff_weights, LANES, cols * LANES)


@functools.cache
def _scratch_size(cut: Cut, tile: Triple, ICB: int, OCB: int) -> int:
    """Floats of one worker's scratchpad: what `packed_size` says; sums of blocks."""
    T, PW = tile_count(cut, tile), sizes(INPUT, tile[2])[1]
    slots = PW * (slot_size(ICB, T) + slot_size(OCB, T))
    return packed_size(cut, tile, ICB, OCB, slots) + (OCB + 1) * LANES


def packed_size(cut: Cut, tile: Triple, blocks: int, gradient_blocks: int, slots: int) -> int:
    """Floats that `pack_both` fills: two slabs, and a strip where ``slots`` floats of a plane come later."""
    voxels = (math.prod(slab_extent(cut, tile, kind)) for kind in (INPUT, DIFF_DST))
    both = zip(voxels, (blocks, gradient_blocks), strict=True)
    slabs = slab_planes(tile) * sum(slot_size(count, of) for count, of in both)
    return slabs + max(slots, buffer_size(cut.lines // tile[1], tile[0], tile[1], INPUT))


@specialised("md", "mh", "mw")
def pack_both(
    prologue: Any,
    src_size: Any,
    before: Any,
    gradient: Any,
    cut: Any,
    brick: int,
    own: Any,
    sums: int,
    md: int,
    mh: int,
    mw: int,
) -> Any:
    """Pack a brick of source and gradient.

    The sums of the gradient's blocks are left at ``own[sums:]``.

    Returns
    -------
    extent, inner : (deep, high, wide)
        Windows along d and h and voxels in a row, of the source's slab and of the gradient's.
    apart, gradient_apart : int
        From a plane of points to the next; the gradient's slab comes behind the source's.
    """
    MD, MH, MW = md, mh, mw
    planes, halo = slab_planes((MD, MH, MW)), sizes(INPUT, MW)[0] - MW

    def implementation(prologue, src_size, before, gradient, cut, brick, own, sums, md, mh, mw):  # type: ignore[no-untyped-def]
        inner = (cut.planes // MD, cut.lines // MH, -(-cut.OW // MW) * MW)
        extent = (inner[0], inner[1], inner[2] + halo)
        apart = slot_size(prologue.blocks, extent[0] * extent[1] * extent[2])
        gradient_apart = slot_size(gradient.blocks, inner[0] * inner[1] * inner[2])
        size = (cut.OD, cut.OH, cut.OW)
        n, start, _ = locate(cut, brick)
        origin = (start[0] - before[0], start[1] - before[1], -before[2])
        G, buffer = planes * apart, planes * (apart + gradient_apart)
        slab = Slab(0, apart, buffer, 0)
        pack_brick(prologue, Window(n, origin, extent), own, slab, INPUT, MD, MH)
        slab = Slab(G, gradient_apart, buffer, sums)
        pack_brick(gradient, Window(n, start, inner), own, slab, DIFF_DST, MD, MH)
        return extent, inner, apart, gradient_apart

    return implementation


@functools.cache
def _make_accumulate(md: int, mh: int, mw: int, inputs: int, cols: int) -> Callable[..., None]:
    planes, PW = slab_planes((md, mh, mw)), sizes(INPUT, mw)[1]

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
        ICB, OCB, groups = prologue.blocks, gradient.blocks, gradient.blocks // cols
        source, result = source_tensors(prologue), source_tensors(gradient)
        size = (cut.OD, cut.OH, cut.OW)
        T = cut.planes // md * (cut.lines // mh) * -(-cut.OW // mw)
        slot_v, slot_e = slot_size(ICB, T), slot_size(OCB, T)
        own = scratch[worker]
        S = own.size - (OCB + 1) * LANES
        E = S - PW * slot_e
        V = E - PW * slot_v  # where the buffer of a strip was, too
        bricks = count_bricks(cut)
        chunks, workers = diff_bias.shape[0], scratch.shape[0]
        block = LANES * cols * LANES
        for chunk in range(worker, chunks, workers):
            begin, end = share(bricks, chunk, chunks)
            first = chunk * planes * PW * groups * ICB * block
            diff_bias[chunk] = 0.0
            for brick in range(begin, end):
                extent, inner, apart, gradient_apart = pack_both(
                    prologue, src_size, before, gradient, cut, brick, own, S, md, mh, mw
                )
                add_voxels(own, S, 1, 1, 1, diff_bias[chunk], own[S + OCB * LANES :])
                following = next_brick(cut, brick, before, src_size, md > 1, mh > 1)
                inside = next_brick(cut, brick, (0, 0, 0), size, 0, 0)
                for plane in range(planes):
                    near = upcoming(source, following, result, inside, plane, planes)
                    g = planes * apart + plane * gradient_apart
                    transform_in(own, plane * apart, extent, ICB, own, V, slot_v, T, 1, INPUT, mw)
                    transform_in(own, g, inner, OCB, own, E, slot_e, T, cols, DIFF_DST, mw)
                    for i in range(PW * groups * ICB):
                        point, group, icb = i // (groups * ICB), i // ICB % groups, i % ICB
                        v = V + point * slot_v + icb * T * LANES
                        e = E + point * slot_e + group * T * cols * LANES
                        at = first + (plane * PW * groups * ICB + i) * block
                        next_sums = address(sums, at + block)
                        soon = part_of(near, i, PW * groups * ICB, next_sums)
                        accumulate(own, v, own, e, T, sums, at, brick == begin, soon, inputs, cols)

    return accumulate_chunks
