"""The two passes of the transposed convolution that make tensors: ``forward`` and ``backward_data``."""

import functools
from collections.abc import Callable

import numpy as np

from kernels.compiler import kernel, parallel_kernel, prange, split_index
from kernels.fused.conv_transpose3d.panels import (
    Packed,
    Places,
    backward_cols,
    chunk_voxels,
    place_voxels,
)
from kernels.fused.epilogue import bands, clear, finish, flat, place_band
from kernels.fused.prologue import aligned, pack_source
from kernels.fused.tensors import LANES, Floats, Mask, Shape, Source
from kernels.fused.vectors import tile_scatter
from kernels.machine import tile_vectors
from kernels.simd import load, store, tile_fill, tile_rank1, tile_store, tile_zero

_NO_BIAS = np.empty(0, np.float32)
# Tasks there should be: where there are few bands, the blocks of channels are shared out as well.
_TASKS = 16


def forward(source: Source, weights: Packed, bias: Floats | None, dst: Floats) -> None:
    """Enlarge the source.

    Parameters
    ----------
    source : Source, data of shape (MB, ICB, ID, IH, IW, 16)
    weights : Packed
    bias : float32 array, shape=(OC,), optional
    dst : float32 array, shape=(MB, OCB, ID * KD, IH * KH, IW * KW, 16)
        Filled, a plain tensor.
    """
    KW = weights.forward.shape[4]
    _make_forward(max(1, tile_vectors() // KW), KW)(
        source.data.reshape(-1),
        source.data.shape,
        source.scale,
        source.shift,
        source.slope,
        weights.forward.reshape(-1),
        _NO_BIAS if bias is None else bias,
        dst.reshape(-1),
        dst.shape,
    )


def backward_data(
    diff_dst: Floats,
    weights: Packed,
    dst: Floats,
    accumulate: bool = False,
    mask: Mask | None = None,
) -> None:
    """Gradient of the source.

    Parameters
    ----------
    diff_dst : float32 array, shape=(MB, OCB, OD, OH, OW, 16)
    weights : Packed
    dst : float32 array, shape=(MB, ICB, ID, IH, IW, 16)
        The gradient is written, or added to what is there.
    accumulate : bool
    mask : Mask, optional
        If given, what is written is ``dz``, and the mask's sums are filled.
    """
    cols = backward_cols(dst.shape[1])
    _make_backward_data(tile_vectors() // cols, cols, weights.backward.shape[4])(
        diff_dst.reshape(-1),
        diff_dst.shape,
        weights.backward.reshape(-1),
        dst.reshape(-1),
        dst.shape,
        accumulate,
        flat(mask),
    )


@kernel
def _parts(shape: Shape, blocks: int) -> int:
    """Parts that the channel blocks are cut into, each a task of every band."""
    MB, _, D, H, W, _ = shape
    return max(1, min(blocks, _TASKS // (MB * D * bands(H, W))))


@functools.cache
def _make_forward(rows: int, KW: int) -> Callable[..., None]:
    width = KW * LANES

    @parallel_kernel
    def forward(
        x: Floats,
        shape: Shape,
        scales: Floats,
        shifts: Floats,
        slope: float,
        weights: Floats,
        bias: Floats,
        dst: Floats,
        dst_shape: Shape,
    ) -> None:
        MB, ICB, ID, IH, IW, _ = shape
        _, OCB, OD, OH, OW, _ = dst_shape
        KD, KH, IC = OD // ID, OH // IH, ICB * LANES
        biases = np.zeros(OCB * width, np.float32)
        for oc in range(bias.size):
            for kw in range(KW):
                biases[(oc // LANES * KW + kw) * LANES + oc % LANES] = bias[oc]
        parts = _parts(shape, OCB)
        for task in prange(MB * ID * bands(IH, IW) * parts):
            band, part = split_index(task, parts)
            image, begin, voxels = place_band(band, shape)
            chunk = chunk_voxels(IC, rows, voxels)
            panel = aligned(chunk * IC)
            offsets = np.empty(chunk, np.int64)
            for first in range(begin, begin + voxels, chunk):
                count = min(chunk, begin + voxels - first)
                pack_source(x, shape, scales, shifts, slope, image, first, count, panel, chunk)
                place_voxels(image, first, count, shape, dst_shape, offsets)
                for line in range(
                    part * OCB // parts * KD * KH, (part + 1) * OCB // parts * KD * KH
                ):
                    block, kd, kh = line // (KD * KH), line // KH % KD, line % KH
                    base = ((block * OD + kd) * OH + kh) * OW * LANES
                    for voxel in range(0, count, rows):
                        sums = tile_fill(biases, block * width, rows, KW)
                        at = line * IC * width
                        for icb in range(ICB):
                            k = (icb * chunk + voxel) * LANES
                            for lane in range(LANES):
                                sums = tile_rank1(
                                    sums, panel, k + lane, 0, LANES, weights, at, 1, rows, KW
                                )
                                at += width
                        tile_scatter(sums, dst, offsets, voxel, base, rows, KW)

    return forward


@kernel
def _pack_lines(
    diff_dst: Floats, diff_shape: Shape, offsets: Places, taps: tuple[int, int, int], panel: Floats
) -> None:
    """``panel[kd, kh, ocb, kw, voxel, lane]``."""
    _, OCB, OD, OH, OW, _ = diff_shape
    KD, KH, KW = taps
    chunk, to = offsets.size, 0
    for kd in range(KD):
        for kh in range(KH):
            for block in range(OCB):
                base = ((block * OD + kd) * OH + kh) * OW * LANES
                for voxel in range(chunk):
                    at = offsets[voxel] + base
                    for kw in range(KW):
                        value = load(diff_dst, at + kw * LANES)
                        store(panel, to + (kw * chunk + voxel) * LANES, value)
                to += KW * chunk * LANES


@functools.cache
def _make_backward_data(rows: int, cols: int, KW: int) -> Callable[..., None]:
    width = cols * LANES

    @parallel_kernel
    def backward_data(
        diff_dst: Floats,
        diff_shape: Shape,
        weights: Floats,
        dst: Floats,
        shape: Shape,
        accumulate: bool,
        mask: Mask,
    ) -> None:
        MB, ICB, ID, IH, IW, _ = shape
        _, OCB, OD, OH, _, _ = diff_shape
        KD, KH = OD // ID, OH // IH
        K = KD * KH * OCB * KW * LANES
        groups = ICB // cols
        parts = _parts(shape, groups)
        for task in prange(MB * ID * bands(IH, IW) * parts):
            partial, part = split_index(task, parts)
            image, begin, voxels = place_band(partial, shape)
            chunk = chunk_voxels(K, rows, voxels)
            panel = aligned(chunk * K)
            offsets = np.empty(chunk, np.int64)
            stored = aligned(rows * width)
            blocks = range(part * groups // parts * cols, (part + 1) * groups // parts * cols)
            for block in blocks:
                clear(mask, block * LANES, partial)
            for first in range(begin, begin + voxels, chunk):
                count = min(chunk, begin + voxels - first)
                place_voxels(image, first, count, shape, diff_shape, offsets)
                _pack_lines(diff_dst, diff_shape, offsets, (KD, KH, KW), panel)
                for group in range(part * groups // parts, (part + 1) * groups // parts):
                    for voxel in range(0, count, rows):
                        sums = tile_zero(rows, cols)
                        at = group * K * width
                        for line in range(K // LANES):
                            k = (line * chunk + voxel) * LANES
                            for lane in range(LANES):
                                sums = tile_rank1(
                                    sums, panel, k + lane, 0, LANES, weights, at, 1, rows, cols
                                )
                                at += width
                        tile_store(sums, stored, 0, 0, width, LANES, 1, rows, cols)
                        for col in range(cols):
                            block = image * ICB + group * cols + col
                            to = block * ID * IH * IW + first + voxel
                            for row in range(min(rows, count - voxel)):
                                value = load(stored, row * width + col * LANES)
                                if accumulate:
                                    value = value + load(dst, (to + row) * LANES)
                                store(dst, (to + row) * LANES, value)
                for block in blocks:
                    at = (image * ICB + block) * ID * IH * IW + first
                    finish(dst, at, count, mask, block * LANES, partial)

    return backward_data
