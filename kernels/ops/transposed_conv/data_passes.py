"""The two passes of the transposed convolution that make tensors: ``forward`` and ``backward_data``.

And what they read: the weights, packed, with a panel for each direction.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from kernels.base.arguments import Floats
from kernels.base.buffers import empty, past_caches
from kernels.base.jit import kernel, parallel_kernel, prange, split_index
from kernels.base.layout import blocks
from kernels.base.machine import tile_vectors
from kernels.base.simd import LANES, LINE, address, fence, load, prefetch, store
from kernels.base.tiles import tile_fill, tile_rank1, tile_store, tile_stream, tile_zero
from kernels.deferred.masking import bands, clear, finish, flat, place_band
from kernels.deferred.normalizing import aligned, flat_source, pack_source
from kernels.deferred.tensors import Mask, Shape, Source

_NO_BIAS = np.empty(0, np.float32)
# Tasks wanted: where there are few bands, tasks share the blocks of channels as well.
_TASKS = 16
# Floats of a chunk of rows that stay in the second-level cache for all channel blocks: 64 KiB.
_CHUNK = 1 << 14


class Packed(NamedTuple):
    """The weights (IC, OC, KD, KH, KW), twice; lanes past the last channel are zero."""

    forward: Floats  # (OCB, KD, KH, ICB * 16, KW, 16 oc)
    backward: Floats  # (ICB / cols, KD, KH, OCB, KW, 16 oc, cols * 16 ic)


def panels(weights_shape: tuple[int, int, int, int, int]) -> Packed:
    """Panels of zeros for packed weights (IC, OC, KD, KH, KW), which `pack` fills."""
    IC, OC, KD, KH, KW = weights_shape
    ICB, OCB = blocks(IC), blocks(OC)
    cols = _backward_cols(ICB)
    packed = Packed(
        empty((OCB, KD, KH, ICB * LANES, KW, LANES)),
        empty((ICB // cols, KD, KH, OCB, KW, LANES, cols * LANES)),
    )
    for panel in packed:
        panel[:] = 0.0
    return packed


def pack(weights: Floats, packed: Packed) -> None:
    """Refresh packed weights, from `panels`."""
    _pack(weights, *packed)


def _backward_cols(ICB: int) -> int:
    """Blocks of input channels in a register tile of backward_data."""
    return 2 if tile_vectors() >= 24 and ICB % 2 == 0 else 1


@parallel_kernel
def _pack(weights: Floats, forward: Floats, backward: Floats) -> None:
    IC, OC, KD, KH, KW = weights.shape
    groups, _, _, OCB, _, _, width = backward.shape
    # A group of input channels by a block of output channels fits the first-level cache, twice.
    for task in prange(groups * OCB):
        group, block = split_index(task, OCB)
        for ic in range(group * width, min((group + 1) * width, IC)):
            for oc in range(block * LANES, min((block + 1) * LANES, OC)):
                for kd in range(KD):
                    for kh in range(KH):
                        for kw in range(KW):
                            value = weights[ic, oc, kd, kh, kw]
                            forward[block, kd, kh, ic, kw, oc % LANES] = value
                            backward[group, kd, kh, block, kw, oc % LANES, ic % width] = value


def forward_blocked(source: Source, weights: Packed, bias: Floats | None, dst: Floats) -> None:
    """Enlarge the source; ``bias`` is (OC,)."""
    KW = weights.forward.shape[4]
    _make_forward(_tile_rows(KW, source.data.shape[4]), KW)(
        flat_source(source),
        source.data.shape,
        weights.forward.reshape(-1),
        _NO_BIAS if bias is None else bias,
        dst.reshape(-1),
        dst.shape,
        past_caches(dst),
    )


def backward_data_blocked(
    diff_dst: Floats, weights: Packed, dst: Floats, accumulate: bool = False, mask: Mask | None = None
) -> None:
    """Write the source's gradient to ``dst``, or add it; with a mask, ``dz``, and fill the mask's sums."""
    cols = _backward_cols(dst.shape[1])
    _make_backward_data(_tile_rows(cols, dst.shape[4]), cols, weights.backward.shape[4])(
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


def _tile_rows(cols: int, width: int) -> int:
    """Voxels of a register tile with ``cols`` columns: no more than a row has."""
    fitting = (rows for rows in (24, 12, 6, 3) if rows * cols <= tile_vectors() and rows <= width)
    return next(fitting, 1)


@kernel
def _tile_place(tile: int, rows: int, width: int) -> tuple[int, int]:
    """Row, and voxel in it, where a tile begins; the last of a row is moved back inside."""
    tiles = -(-width // rows)
    return tile // tiles, min(tile % tiles * rows, width - rows)


@kernel
def output_line(image: int, row: int, shape: Shape, dst_shape: Shape) -> int:
    """Voxels of the output before the first tap of a row of the source, in the first block.

    Rows are counted through an image of the source.
    """
    _, _, D, H, _, _ = shape
    _, OCB, OD, OH, OW, _ = dst_shape
    return ((image * OCB * OD + row // H * (OD // D)) * OH + row % H * (OH // H)) * OW


@functools.cache
def _make_forward(rows: int, KW: int) -> Callable[..., None]:
    width = KW * LANES

    @parallel_kernel
    def forward(
        source: Source,
        shape: Shape,
        weights: Floats,
        bias: Floats,
        dst: Floats,
        dst_shape: Shape,
        streams: bool,
    ) -> None:
        MB, ICB, ID, IH, IW, _ = shape
        _, OCB, OD, OH, OW, _ = dst_shape
        KD, KH, IC = OD // ID, OH // IH, ICB * LANES
        biases = np.zeros(OCB * width, np.float32)
        for oc in range(bias.size):
            for kw in range(KW):
                biases[(oc // LANES * KW + kw) * LANES + oc % LANES] = bias[oc]
        parts, tiles = _parts(shape, OCB), -(-IW // rows)
        for task in prange(MB * ID * bands(IH, IW) * parts):
            band, part = split_index(task, parts)
            image, begin, voxels = place_band(band, shape)
            begin, end = begin // IW, (begin + voxels) // IW
            high = max(1, min(_CHUNK // (IC * IW), end - begin))
            panel = aligned(high * IW * IC)
            for first in range(begin, end, high):
                count = min(high, end - first) * IW
                pack_source(source, shape, image, first * IW, count, panel, count)
                for line in range(part * OCB // parts * KD * KH, (part + 1) * OCB // parts * KD * KH):
                    block, kd, kh = line // (KD * KH), line // KH % KD, line % KH
                    for i in range(count // IW * tiles):
                        row, w = _tile_place(i, rows, IW)
                        sums = tile_fill(biases, block * width, 1, rows, KW)
                        at = line * IC * width
                        for icb in range(ICB):
                            k = (icb * count + row * IW + w) * LANES
                            for lane in range(LANES):
                                sums = tile_rank1(sums, panel, k + lane, 0, LANES, weights, at)
                                at += width
                        to = output_line(image, first + row, shape, dst_shape)
                        to += ((block * OD + kd) * OH + kh) * OW + w * KW
                        if streams:
                            tile_stream(sums, dst, to * LANES, 0, width, LANES)
                        else:
                            tile_store(sums, dst, to * LANES, 0, width, LANES)
            fence()

    return forward


@functools.cache
def _make_backward_data(rows: int, cols: int, KW: int) -> Callable[..., None]:
    width, step = cols * LANES, KW * LANES

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
        _, OCB, OD, OH, OW, _ = diff_shape
        KD, KH = OD // ID, OH // IH
        groups, tiles = ICB // cols, -(-IW // rows)
        parts = _parts(shape, groups)
        for task in prange(MB * ID * bands(IH, IW) * parts):
            partial, part = split_index(task, parts)
            image, begin, voxels = place_band(partial, shape)
            begin, end = begin // IW, (begin + voxels) // IW
            high = max(1, _CHUNK // (KD * KH * OCB * OW * LANES))
            stored = aligned(rows * width)
            blocks = range(part * groups // parts * cols, (part + 1) * groups // parts * cols)
            for block in blocks:
                clear(mask, image * ICB + block, partial)
            for first in range(begin, end, high):
                count = min(high, end - first)
                for group in range(part * groups // parts, (part + 1) * groups // parts):
                    for i in range(count * tiles):
                        row, w = _tile_place(i, rows, IW)
                        next_row, next_w = _tile_place(i + 1, rows, IW)
                        this = output_line(image, first + row, shape, diff_shape) + w * KW
                        upcoming = output_line(image, first + next_row, shape, diff_shape) + next_w * KW
                        sums = tile_zero(1, rows, cols)
                        at = group * KD * KH * OCB * step * width
                        for line in range(KD * KH * OCB):
                            kd, kh, block = line // (KH * OCB), line // OCB % KH, line % OCB
                            tap = ((block * OD + kd) * OH + kh) * OW
                            src, near = (this + tap) * LANES, address(diff_dst, (upcoming + tap) * LANES)
                            for k in range(src, src + step):
                                prefetch(near + (k - src) * LINE)
                                sums = tile_rank1(sums, diff_dst, k, 0, step, weights, at)
                                at += width
                        tile_store(sums, stored, 0, 0, width, LANES)
                        for col in range(cols):
                            block = image * ICB + group * cols + col
                            to = ((block * ID * IH + first + row) * IW + w) * LANES
                            # Voxels that the tile before has made, too, are not added again.
                            for r in range(i % tiles * rows - w, rows):
                                value = load(stored, r * width + col * LANES)
                                if accumulate:
                                    value = value + load(dst, to + r * LANES)
                                store(dst, to + r * LANES, value)
                for block in blocks:
                    at = ((image * ICB + block) * ID * IH + first) * IW
                    finish(dst, at, count * IW, mask, image * ICB + block, partial)

    return backward_data
