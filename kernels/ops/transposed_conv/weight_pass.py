"""The pass of the transposed convolution that makes gradients of parameters: ``backward_weights``."""

import functools
from collections.abc import Callable

import numpy as np

from kernels.base.arguments import Doubles, Floats
from kernels.base.buffers import scratchpad
from kernels.base.jit import kernel, parallel_kernel, prange, split_index
from kernels.base.machine import tile_vectors
from kernels.base.simd import LANES, LINE, add_to_doubles, address, broadcast, load, prefetch
from kernels.base.tiles import tile_add, tile_fma, tile_load, tile_rank1, tile_store, tile_sum, tile_zero
from kernels.deferred.normalizing import aligned, flat_source, pack_source
from kernels.deferred.tensors import Shape, Source
from kernels.ops.transposed_conv.data_passes import output_line

# Voxels whose products are summed in registers.
_CHUNK = 128
# Sums of the bias side by side, because one waits for itself.
_ABREAST = 8
# Tasks wanted: where there are few blocks of output channels, rows are cut into ranges with sums of their
# own. A range has this many voxels at least, or its sums would cost more than they save.
_TASKS = 16
_RANGE = 256


def backward_weights_blocked(
    source: Source, diff_dst: Floats, diff_weights: Floats, diff_bias: Floats
) -> None:
    """Gradients of weights and bias."""
    MB, ICB, ID, IH, IW, _ = source.data.shape
    OCB = diff_dst.shape[1]
    KD, KH, KW = diff_weights.shape[2:]
    size = ICB * LANES * OCB * LANES * KD * KH * KW
    ranges = max(1, min(_TASKS // OCB, MB * ID * IH, MB * ID * IH * IW // _RANGE))
    partial = scratchpad("fused transposed weights", ranges * size)
    # The bias has float64 partials; two floats make room for one.
    partial_bias = scratchpad("fused transposed bias", 2 * ranges * OCB * LANES).view(np.float64)
    _make_backward_weights(max(1, tile_vectors() // 3), KW)(
        flat_source(source), source.data.shape, diff_dst.reshape(-1), diff_dst.shape, partial, partial_bias
    )
    _combine(partial, partial_bias.reshape(ranges, OCB * LANES), diff_weights, diff_bias)


@kernel
def _add_bias(diff_dst: Floats, first: int, voxels: int, sums: Doubles, at: int) -> None:
    """Sum over a row of an output, which begins at ``first``."""
    total, one = tile_zero(1, _ABREAST, 1), broadcast(np.float32(1))
    whole = voxels // _ABREAST * _ABREAST
    for voxel in range(0, whole, _ABREAST):
        tile = tile_load(diff_dst, first + voxel * LANES, 0, LANES, 0, 1, _ABREAST, 1)
        total = tile_fma(one, tile, total)
    rest = tile_sum(total)
    for voxel in range(whole, voxels):
        rest = rest + load(diff_dst, first + voxel * LANES)
    add_to_doubles(sums, at, rest)


@functools.cache
def _make_backward_weights(inputs: int, KW: int) -> Callable[..., None]:
    width = KW * LANES

    @parallel_kernel
    def backward_weights(
        source: Source,
        shape: Shape,
        diff_dst: Floats,
        diff_shape: Shape,
        partial: Floats,
        partial_bias: Doubles,
    ) -> None:
        MB, ICB, ID, IH, IW, _ = shape
        _, OCB, OD, OH, OW, _ = diff_shape
        KD, KH, IC = OD // ID, OH // IH, ICB * LANES
        ranges = partial_bias.size // (OCB * LANES)
        rows = MB * ID * IH
        for task in prange(ranges * OCB):
            part, block = split_index(task, OCB)
            for i in range(task * LANES, (task + 1) * LANES):
                partial_bias[i] = 0.0
            height = max(1, _CHUNK // IW)
            panel, origins = aligned(height * IW * IC), np.empty(2 * height, np.int64)
            start, end = part * rows // ranges, (part + 1) * rows // ranges
            row = start
            while row < end:
                # Rows of one image, as its blocks lie behind each other.
                image, h = row // (ID * IH), row % (ID * IH)
                high = min(height, end - row, ID * IH - h)
                pack_source(source, shape, image, h * IW, high * IW, panel, high * IW)
                for r in range(2 * high):
                    origins[r] = output_line(image, h + r, shape, diff_shape)
                for tap in range(KD * KH):
                    this = (block * OD + tap // KH) * OH + tap % KH
                    # Prefetched meanwhile: the next tap of these rows, or the first tap of the next rows.
                    then, further = (tap + 1) % (KD * KH), (tap + 1) // (KD * KH) * high
                    after = (block * OD + then // KH) * OH + then % KH
                    for r in range(high):
                        at = (origins[r] + this * OW) * LANES
                        _add_bias(diff_dst, at, OW, partial_bias, task * LANES)
                    for ic in range(0, IC, inputs):
                        sums = tile_zero(1, inputs, KW)
                        k = ic // LANES * high * IW * LANES + ic % LANES
                        fetched = min(ic // inputs, KW - 1) * IW
                        for r in range(high):
                            at = (origins[r] + this * OW) * LANES
                            line = origins[r + further] + after * OW + fetched
                            soon = address(diff_dst, line * LANES)
                            for iw in range(IW):
                                prefetch(soon + iw * LINE)
                                sums = tile_rank1(sums, panel, k, 0, 1, diff_dst, at)
                                k += LANES
                                at += width
                        to = ((task * KD * KH + tap) * IC + ic) * width
                        if row > start:
                            sums = tile_add(sums, tile_load(partial, to, 0, width, LANES, 1, inputs, KW))
                        tile_store(sums, partial, to, 0, width, LANES)
                row += high

    return backward_weights


@parallel_kernel
def _combine(partial: Floats, partial_bias: Doubles, diff_weights: Floats, diff_bias: Floats) -> None:
    """Add up the ranges, in their order, and bring the weights to (IC, OC, KD, KH, KW)."""
    IC, OC, KD, KH, KW = diff_weights.shape
    ranges, OCB = partial_bias.shape[0], partial_bias.shape[1] // LANES
    taps, lanes = KD * KH, partial.size // (ranges * OCB * KD * KH * KW * LANES)
    for ic in prange(IC):
        totals = np.empty(taps * KW * LANES)
        for block in range(OCB):
            totals[:] = 0.0
            for r in range(ranges):
                for tap in range(taps):
                    at = (((r * OCB + block) * taps + tap) * lanes + ic) * KW * LANES
                    for kw in range(KW):
                        value = load(partial, at + kw * LANES)
                        add_to_doubles(totals, (tap * KW + kw) * LANES, value)
            for lane in range(min(LANES, OC - block * LANES)):
                for tap in range(taps):
                    for kw in range(KW):
                        total = totals[(tap * KW + kw) * LANES + lane]
                        diff_weights[ic, block * LANES + lane, tap // KH, tap % KH, kw] = total
    for oc in range(OC):
        diff_bias[oc] = partial_bias[:, oc].sum()
