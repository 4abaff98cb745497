"""The two passes of the transposed convolution that make tensors: ``forward`` and ``backward_data``."""

import functools
from collections.abc import Callable

import numpy as np

from kernels.base.arguments import Floats
from kernels.base.buffers import past_caches
from kernels.base.jit import kernel, parallel_kernel, prange, split_index
from kernels.base.simd import LANES, LINE, address, fence, load, prefetch, store
from kernels.base.tiles import tile_fill, tile_rank1, tile_store, tile_stream, tile_zero
from kernels.deferred.masking import bands, clear, finish, flat, place_band
from kernels.deferred.normalizing import aligned, flat_source, pack_source
from kernels.deferred.tensors import Mask, Shape, Source
from kernels.ops.transposed_conv.panels import Packed, backward_cols, output_line, tile_place, tile_rows

_NO_BIAS = np.empty(0, np.float32)
# Tasks wanted: where there are few bands, tasks share the blocks of channels as well.
_TASKS = 16
# Floats of a chunk of rows that stay in the second-level cache for all channel blocks: 64 KiB.
_CHUNK = 1 << 14


def forward_blocked(source: Source, weights: Packed, bias: Floats | None, dst: Floats) -> None:
    """Enlarge the source; ``bias`` is (OC,)."""
    KW = weights.forward.shape[4]
    _make_forward(tile_rows(KW, source.data.shape[4]), KW)(
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
    cols = backward_cols(dst.shape[1])
    _make_backward_data(tile_rows(cols, dst.shape[4]), cols, weights.backward.shape[4])(
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
                        row, w = tile_place(i, rows, IW)
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
                        row, w = tile_place(i, rows, IW)
                        next_row, next_w = tile_place(i + 1, rows, IW)
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
