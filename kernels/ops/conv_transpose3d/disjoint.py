"""Transposed convolution with a kernel as large as its stride, on register tiles.

    dst[n, id*KD + kd, ih*KH + kh, iw*KW + kw, oc] =
        bias[oc] + sum over ic of src[n, id, ih, iw, ic] * weights[ic, oc, kd, kh, kw]

Idea       Each output voxel has one source voxel, so there is nothing to add up but channels: for each
           of the ``KD * KH`` row taps one matrix product of all source voxels, ``M x IC``, by weights
           ``IC x N`` with ``N = KW * OC``. Its rows, ``(kw, oc)``, lie side by side in ``dst`` as they
           come: the product of a source row is an output row.
Loop nest  tile of voxels | row tap, block of N | ic        (| register tile); backward_data the same with
           ``(kd, kh, n)`` summed and blocks of ``ic``; backward_weights sums over voxels.
Traffic    Everything is read once and written once; ``2 * IC * OC * KD*KH*KW`` FLOPs a source voxel, for
           ``4 * (IC + OC * KD*KH*KW)`` bytes: 13 FLOPs a byte at 32 -> 16 channels.
Layout     Kernels want channels, and ``N``, in whole tiles; the wrappers pad others with zeros and cut
           the zeros off the results.
Numerics   Fused multiply-adds in float32, in the order of ``ic`` (backward_data: kd, kh, kw, oc).
           backward_weights sums a chunk of voxels in float32 and the chunks in float64, in their order:
           nothing depends on the number of threads.
"""

import functools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kernels.base.arguments import Array, Floats, Triple
from kernels.base.buffers import empty
from kernels.base.jit import kernel, parallel_kernel, prange
from kernels.base.machine import tile_vectors
from kernels.base.simd import LANES, load, store
from kernels.base.tiles import tile_fill, tile_load, tile_rank1, tile_store, tile_zero

_Lines = npt.NDArray[np.intp]

# A panel holds what a tile multiplies: one row for each voxel, cut into segments of 256 floats, so that
# the distance of its rows is a constant. It is 16 more, so that rows do not share one set of the cache.
_SEGMENT = 256
_STEP = _SEGMENT + 16
# Pieces the voxels are cut into for threads, if there are so many tiles.
_TASKS = 64
# Floats of src and of a row tap of diff_dst that one task of backward_weights goes through: 256 KiB.
_CHUNK = 1 << 16
# Voxels, in whole lines, that backward_weights takes at a time: they stay in the L1 cache for all tiles.
_BLOCK = 32


def forward(src: Array, weights: Array, bias: Array | None) -> Array:
    """Forward pass of `plan.forward` for float32 and stride = kernel."""
    MB, ID, IH, IW, _ = src.shape
    IC, OC, KD, KH, KW = weights.shape
    rows, cols, width = _tile(KW * OC)
    # (ic, oc, kd, kh, kw) to (kd, kh, ic, n)
    panels = weights.transpose(2, 3, 0, 4, 1).reshape(KD * KH, IC, KW * OC)
    panels = _pad(_pad(panels, 2, width), 1, LANES)
    bias = np.zeros(OC, np.float32) if bias is None else bias
    dst = empty((MB, ID * KD, IH * KH, IW, panels.shape[2]))
    _make_forward(rows, cols)(
        _pad(src, 4, LANES).reshape(-1),
        _blocked(panels, width),
        _pad(np.tile(bias, KW), 0, width),
        dst.reshape(-1),
        _dst_lines(MB * ID, IH, KD, KH),
        IW,
        panels.shape[1],
    )
    return _cropped(dst, KW * OC).reshape(MB, ID * KD, IH * KH, IW * KW, OC)


def backward_data(diff_dst: Array, weights: Array) -> Array:
    """Backward pass of `plan.backward_data` for float32 and stride = kernel."""
    IC, OC, KD, KH, KW = weights.shape
    MB, OD, OH, OW, _ = diff_dst.shape
    ID, IH, IW = OD // KD, OH // KH, OW // KW
    rows, cols, width = _tile(IC)
    # (ic, oc, kd, kh, kw) to (kd, kh, n, ic), in two steps, which the cache likes better than one.
    by_tap = np.ascontiguousarray(weights.transpose(2, 3, 4, 0, 1))
    panels = by_tap.swapaxes(3, 4).reshape(KD * KH, KW * OC, IC)
    panels = _pad(_pad(panels, 2, width), 1, LANES)
    diff_src = empty((MB, ID, IH, IW, panels.shape[2]))
    lines = _pad(diff_dst.reshape(-1, IW, KW * OC), 2, LANES)
    _make_backward_data(rows, cols)(
        lines.reshape(-1),
        _blocked(panels.reshape(1, -1, panels.shape[2]), width),
        diff_src.reshape(-1),
        _dst_lines(MB * ID, IH, KD, KH),
        IW,
        panels.shape[2],
    )
    return _cropped(diff_src, IC)


def backward_weights(src: Array, diff_dst: Array, sizes: Triple) -> tuple[Array, Array]:
    """Backward pass of `plan.backward_weights` for float32 and stride = kernel."""
    KD, KH, KW = sizes
    IH, IW, IC = src.shape[2:]
    OC = diff_dst.shape[-1]
    rows, cols = _weights_tile(KW * OC)
    channels = _pad(src.reshape(-1, IW, IC), 2, rows)
    columns = _pad(diff_dst.reshape(-1, IW, KW * OC), 2, cols * LANES)
    lines, padded_IC, N = len(channels), channels.shape[2], columns.shape[2]
    # Lines, which are rows of source voxels, that a task takes.
    group = max(1, _CHUNK // (IW * (padded_IC + N)))
    partial = empty((-(-lines // group), KD * KH, padded_IC + 1, N))
    _make_backward_weights(rows, cols)(
        channels.reshape(-1),
        columns.reshape(-1),
        partial.reshape(-1),
        _dst_lines(lines // IH, IH, KD, KH),
        IW,
        group,
    )
    total = partial.sum(axis=0, dtype=np.float64)[..., : KW * OC].reshape(KD, KH, -1, KW, OC)
    diff_weights = total[:, :, :IC].transpose(2, 4, 0, 1, 3).astype(np.float32, order="C")
    return diff_weights, total[:, :, padded_IC].sum(axis=(0, 1, 2)).astype(np.float32)


def _dst_lines(planes: int, IH: int, KD: int, KH: int) -> _Lines:
    """Line of the output that each line of the source goes to, shape (row taps, source lines).

    A line is a row of voxels along the width; lines of all planes and images are counted through.
    """
    lines = np.arange(planes * KD * IH * KH).reshape(planes, KD, IH, KH)
    return np.ascontiguousarray(lines.transpose(1, 3, 0, 2)).reshape(KD * KH, planes * IH)


def _tile(columns: int) -> tuple[int, int, int]:
    """Rows and vectors of a register tile, and floats of its row, for a product with ``columns``."""
    cols = 2 if tile_vectors() >= 24 and columns > LANES else 1
    return tile_vectors() // cols, cols, cols * LANES


def _weights_tile(columns: int) -> tuple[int, int]:
    """Rows and vectors of a tile of weights; rows, source channels, are 8 or a smaller power of two."""
    cols = 2 if tile_vectors() >= 24 and columns > LANES else 1
    return 1 << (min(tile_vectors() // cols, 8).bit_length() - 1), cols


def _pad(array: Array, axis: int, multiple: int) -> Array:
    """``array`` with zeros at the end of one axis, up to the next multiple."""
    missing = -array.shape[axis] % multiple
    if not missing:
        return array
    return np.pad(array, [(0, missing if a == axis else 0) for a in range(array.ndim)])


def _cropped(array: Array, size: int) -> Array:
    return array if array.shape[-1] == size else np.ascontiguousarray(array[..., :size])


def _blocked(panels: Array, width: int) -> Array:
    """``(taps, K, N)`` to ``(taps, N // width, K, width)``, flat: the order in which tiles read."""
    taps, K, N = panels.shape
    return np.ascontiguousarray(panels.reshape(taps, K, N // width, width).transpose(0, 2, 1, 3)).reshape(-1)


@kernel
def _copy(src: Floats, at: int, dst: Floats, to: int, count: int) -> None:
    """Copy ``count`` floats, a multiple of 16."""
    for i in range(0, count, LANES):
        store(dst, to + i, load(src, at + i))


@kernel
def _pack(src: Floats, at: int, panel: Floats, rows: int, row: int, k: int, count: int) -> None:
    """Copy ``count`` floats, a multiple of 16, to place ``k`` of a row of the panel."""
    for i in range(0, count, LANES):
        to = ((k + i) // _SEGMENT * rows + row) * _STEP + (k + i) % _SEGMENT
        store(panel, to, load(src, at + i))


@functools.cache
def _make_forward(rows: int, cols: int) -> Callable[..., None]:
    width = cols * LANES

    @parallel_kernel
    def forward(
        src: Floats, weights: Floats, bias: Floats, dst: Floats, dst_lines: _Lines, IW: int, IC: int
    ) -> None:
        taps, lines = dst_lines.shape
        M, N = lines * IW, bias.size
        tiles, segments = (M + rows - 1) // rows, (IC + _SEGMENT - 1) // _SEGMENT
        tasks = min(tiles, _TASKS)
        for task in prange(tasks):
            panel = np.zeros(segments * rows * _STEP, np.float32)
            stored = np.empty(rows * width, np.float32)
            for tile in range(task * tiles // tasks, (task + 1) * tiles // tasks):
                first = tile * rows
                count = min(rows, M - first)
                line, iw = first // IW, first % IW
                for r in range(count):
                    _pack(src, (first + r) * IC, panel, rows, r, 0, IC)
                at = 0
                for tap in range(taps):
                    for n in range(0, N, width):
                        sums = tile_fill(bias, n, 1, rows, cols)
                        for segment in range(segments):
                            k = segment * rows * _STEP
                            for _ in range(min(IC - segment * _SEGMENT, _SEGMENT)):
                                sums = tile_rank1(sums, panel, k, 0, _STEP, weights, at)
                                k += 1
                                at += width
                        if count == rows and iw + rows <= IW:
                            to = (dst_lines[tap, line] * IW + iw) * N + n
                            tile_store(sums, dst, to, 0, N, LANES)
                        else:
                            # The tile ends beyond its line: one voxel after the other.
                            tile_store(sums, stored, 0, 0, width, LANES)
                            for r in range(count):
                                voxel = first + r
                                to = (dst_lines[tap, voxel // IW] * IW + voxel % IW) * N + n
                                _copy(stored, r * width, dst, to, width)

    return forward


@functools.cache
def _make_backward_data(rows: int, cols: int) -> Callable[..., None]:
    width = cols * LANES

    @parallel_kernel
    def backward_data(
        diff_dst: Floats, weights: Floats, diff_src: Floats, dst_lines: _Lines, IW: int, IC: int
    ) -> None:
        taps, lines = dst_lines.shape
        M, K = lines * IW, weights.size // IC
        N = K // taps
        tiles, segments = (M + rows - 1) // rows, (K + _SEGMENT - 1) // _SEGMENT
        tasks = min(tiles, _TASKS)
        for task in prange(tasks):
            panel = np.zeros(segments * rows * _STEP, np.float32)
            stored = np.empty(rows * width, np.float32)
            for tile in range(task * tiles // tasks, (task + 1) * tiles // tasks):
                first = tile * rows
                count = min(rows, M - first)
                line, iw = first // IW, first % IW
                for r in range(count):
                    for tap in range(taps):
                        voxel = dst_lines[tap, line] * IW + iw
                        _pack(diff_dst, voxel * N, panel, rows, r, tap * N, N)
                    iw += 1
                    if iw == IW:
                        line, iw = line + 1, 0
                at = 0
                for ic in range(0, IC, width):
                    sums = tile_zero(1, rows, cols)
                    for segment in range(segments):
                        k = segment * rows * _STEP
                        for _ in range(min(K - segment * _SEGMENT, _SEGMENT)):
                            sums = tile_rank1(sums, panel, k, 0, _STEP, weights, at)
                            k += 1
                            at += width
                    to = first * IC + ic
                    if count == rows:
                        tile_store(sums, diff_src, to, 0, IC, LANES)
                    else:
                        tile_store(sums, stored, 0, 0, width, LANES)
                        for r in range(count):
                            _copy(stored, r * width, diff_src, to + r * IC, width)

    return backward_data


@functools.cache
def _make_backward_weights(rows: int, cols: int) -> Callable[..., None]:
    width = cols * LANES

    @parallel_kernel
    def backward_weights(
        src: Floats, diff_dst: Floats, partial: Floats, dst_lines: _Lines, IW: int, group: int
    ) -> None:
        taps, lines = dst_lines.shape
        IC = src.size // (lines * IW)
        tasks = (lines + group - 1) // group * taps
        # Each task sums IC rows of weights and one of bias.
        N = partial.size // (tasks * (IC + 1))
        ones = np.ones(1, np.float32)
        block = max(1, _BLOCK // IW)
        for task in prange(tasks):
            chunk, tap = task // taps, task % taps
            into = task * (IC + 1) * N
            partial[into : into + (IC + 1) * N] = 0.0
            end = min((chunk + 1) * group, lines)
            for first in range(chunk * group, end, block):
                last = min(first + block, end)
                for n in range(0, N, width):
                    for ic in range(0, IC, rows):
                        to = into + ic * N + n
                        sums = tile_load(partial, to, 0, N, LANES, 1, rows, cols)
                        for line in range(first, last):
                            a = line * IW * IC + ic
                            b = dst_lines[tap, line] * IW * N + n
                            for iw in range(IW):
                                sums = tile_rank1(sums, src, a + iw * IC, 0, 1, diff_dst, b + iw * N)
                        tile_store(sums, partial, to, 0, N, LANES)
                    to = into + IC * N + n
                    total = tile_load(partial, to, 0, 0, LANES, 1, 1, cols)
                    for line in range(first, last):
                        b = dst_lines[tap, line] * IW * N + n
                        for iw in range(IW):
                            total = tile_rank1(total, ones, 0, 0, 0, diff_dst, b + iw * N)
                    tile_store(total, partial, to, 0, 0, LANES)

    return backward_weights
