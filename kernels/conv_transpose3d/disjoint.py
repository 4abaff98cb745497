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
Layout     Kernels want ``IC`` and ``N`` in whole tiles; others are padded with zeros by the wrappers.
Numerics   Fused multiply-adds in float32, in the order of ``ic`` (backward_data: kd, kh, kw, oc).
           backward_weights sums a chunk of voxels in float32 and the chunks in float64, in their order:
           nothing depends on the number of threads.
"""

import functools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kernels.checks import Array, Triple
from kernels.compiler import kernel, parallel_kernel, prange
from kernels.conv3d.bias import backward_bias
from kernels.machine import tile_vectors
from kernels.memory import empty
from kernels.simd import LANES, tile_fill, tile_rank1, tile_store, tile_zero

_Floats = npt.NDArray[np.float32]

# A row of a panel is this much longer than its contents, so that rows do not share one cache set.
_SKEW = 16
# Pieces the voxels are cut into for threads, if there are so many tiles.
_TASKS = 64
# Floats of src and of a row tap of diff_dst that one task of backward_weights goes through: 256 KiB.
_CHUNK = 1 << 16


def forward(src: Array, weights: Array, bias: Array | None) -> Array:
    """Forward pass of `plan.forward` for float32 and stride = kernel."""
    MB, ID, IH, IW, IC = src.shape
    OC, KD, KH, KW = weights.shape[1:]
    rows, cols, width = _tile(KW * OC)
    # (ic, oc, kd, kh, kw) to (kd, kh, ic, n)
    panels = _pad(weights.transpose(2, 3, 0, 4, 1).reshape(KD * KH, IC, KW * OC), width)
    N = panels.shape[-1]
    bias_row = np.zeros(N, np.float32)
    if bias is not None:
        bias_row[: KW * OC] = np.tile(bias, KW)
    dst = empty((MB, ID * KD, IH * KH, IW, N))
    _make_forward(rows, cols)(
        src.reshape(-1, IC), _blocked(panels, width), bias_row, dst.reshape(-1), (IH, IW, KD, KH)
    )
    return _cropped(dst, KW * OC).reshape(MB, ID * KD, IH * KH, IW * KW, OC)


def backward_data(diff_dst: Array, weights: Array) -> Array:
    """Backward pass of `plan.backward_data` for float32 and stride = kernel."""
    IC, OC, KD, KH, KW = weights.shape
    MB, OD, OH, OW, _ = diff_dst.shape
    ID, IH, IW = OD // KD, OH // KH, OW // KW
    rows, cols, width = _tile(IC)
    # (ic, oc, kd, kh, kw) to (1, (kd, kh, n), ic)
    panels = _pad(weights.transpose(2, 3, 4, 1, 0).reshape(1, -1, IC), width)
    diff_src = empty((MB, ID, IH, IW, panels.shape[-1]))
    _make_backward_data(rows, cols)(
        diff_dst.reshape(-1, IW, KW * OC),
        _blocked(panels, width),
        diff_src.reshape(-1, panels.shape[-1]),
        (IH, KD, KH),
    )
    return _cropped(diff_src, IC)


def backward_weights(src: Array, diff_dst: Array, sizes: Triple) -> tuple[Array, Array]:
    """Backward pass of `plan.backward_weights` for float32 and stride = kernel."""
    KD, KH, KW = sizes
    IH, IW, IC = src.shape[2:]
    OC = diff_dst.shape[-1]
    rows, cols = _weights_tile(KW * OC)
    channels = _pad(src.reshape(-1, IW, IC), rows)
    lines = _pad(diff_dst.reshape(-1, IW, KW * OC), cols * LANES)
    # Rows of source voxels that a task takes.
    group = max(1, _CHUNK // (IW * (channels.shape[-1] + lines.shape[-1])))
    chunks = -(-channels.shape[0] // group)
    partial = empty((chunks, KD * KH, channels.shape[-1], lines.shape[-1]))
    _make_backward_weights(rows, cols)(channels, lines, partial, group, (IH, KD, KH))
    total = partial.sum(axis=0, dtype=np.float64)[:, :IC, : KW * OC].astype(np.float32)
    diff_weights = total.reshape(KD, KH, IC, KW, OC).transpose(2, 4, 0, 1, 3)
    return np.ascontiguousarray(diff_weights), backward_bias(diff_dst)


def _tile(columns: int) -> tuple[int, int, int]:
    """Rows and vectors of a register tile, and floats of its row, for a product with ``columns``."""
    cols = 2 if tile_vectors() >= 24 and columns > LANES else 1
    return tile_vectors() // cols, cols, cols * LANES


def _weights_tile(columns: int) -> tuple[int, int]:
    """Rows and vectors of a tile of weights; rows are channels, of which there are multiples of 8."""
    cols = 2 if tile_vectors() >= 24 and columns > LANES else 1
    return {24: 8, 6: 4, 2: 2}[tile_vectors()], cols


def _pad(array: Array, multiple: int) -> Array:
    """``array`` with zeros after its last axis, up to the next multiple."""
    missing = -array.shape[-1] % multiple
    if not missing:
        return array
    return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, missing)])


def _cropped(array: Array, size: int) -> Array:
    return array if array.shape[-1] == size else np.ascontiguousarray(array[..., :size])


def _blocked(panels: Array, width: int) -> Array:
    """``(taps, K, N)`` to ``(taps, N // width, K, width)``, flat: the order in which tiles read."""
    taps, K, N = panels.shape
    return np.ascontiguousarray(
        panels.reshape(taps, K, N // width, width).transpose(0, 2, 1, 3)
    ).reshape(-1)


@kernel
def _copy(src: _Floats, dst: _Floats) -> None:
    for i in range(src.size):
        dst[i] = src[i]


@kernel
def _dst_row(src_row: int, tap: int, IH: int, KD: int, KH: int) -> int:
    """Output row, all images and planes counted, of a source row and a row tap."""
    return (src_row // IH * KD + tap // KH) * IH * KH + src_row % IH * KH + tap % KH


@functools.cache
def _make_forward(rows: int, cols: int) -> Callable[..., None]:
    width = cols * LANES

    @parallel_kernel
    def forward(
        src: _Floats,
        weights: _Floats,
        bias: _Floats,
        dst: _Floats,
        sizes: tuple[int, int, int, int],
    ) -> None:
        IH, IW, KD, KH = sizes
        M, IC = src.shape
        N = bias.size
        blocks, step, tiles = N // width, IC + _SKEW, (M + rows - 1) // rows
        tasks = min(tiles, _TASKS)
        for task in prange(tasks):
            panel = np.zeros(rows * step, np.float32)
            stored = np.empty(rows * width, np.float32)
            for tile in range(task * tiles // tasks, (task + 1) * tiles // tasks):
                first = tile * rows
                count = min(rows, M - first)
                for r in range(count):
                    _copy(src[first + r], panel[r * step : r * step + IC])
                for tap in range(KD * KH):
                    for block in range(blocks):
                        sums = tile_fill(bias, block * width, rows, cols)
                        at = (tap * blocks + block) * IC * width
                        for ic in range(IC):
                            sums = tile_rank1(
                                sums, panel, ic, 0, step, weights, at + ic * width, 1, rows, cols
                            )
                        line, iw = first // IW, first % IW
                        if iw + rows <= IW and count == rows:
                            row = _dst_row(line, tap, IH, KD, KH) * IW + iw
                            tile_store(
                                sums, dst, row * N + block * width, 0, N, LANES, 1, rows, cols
                            )
                        else:
                            # The tile ends beyond its source row.
                            tile_store(sums, stored, 0, 0, width, LANES, 1, rows, cols)
                            for r in range(count):
                                line, iw = (first + r) // IW, (first + r) % IW
                                row = _dst_row(line, tap, IH, KD, KH) * IW + iw
                                to = row * N + block * width
                                _copy(stored[r * width : (r + 1) * width], dst[to : to + width])

    return forward


@functools.cache
def _make_backward_data(rows: int, cols: int) -> Callable[..., None]:
    width = cols * LANES

    @parallel_kernel
    def backward_data(
        diff_dst: _Floats, weights: _Floats, diff_src: _Floats, sizes: tuple[int, int, int]
    ) -> None:
        IH, KD, KH = sizes
        IW, N = diff_dst.shape[1:]
        M, IC = diff_src.shape
        K = KD * KH * N
        step, tiles = K + _SKEW, (M + rows - 1) // rows
        flat = diff_src.reshape(-1)
        tasks = min(tiles, _TASKS)
        for task in prange(tasks):
            panel = np.zeros(rows * step, np.float32)
            stored = np.empty(rows * width, np.float32)
            for tile in range(task * tiles // tasks, (task + 1) * tiles // tasks):
                first = tile * rows
                count = min(rows, M - first)
                for r in range(count):
                    line, iw = (first + r) // IW, (first + r) % IW
                    for tap in range(KD * KH):
                        at = r * step + tap * N
                        _copy(diff_dst[_dst_row(line, tap, IH, KD, KH), iw], panel[at : at + N])
                for block in range(IC // width):
                    sums = tile_zero(rows, cols)
                    for k in range(K):
                        at = (block * K + k) * width
                        sums = tile_rank1(sums, panel, k, 0, step, weights, at, 1, rows, cols)
                    if count == rows:
                        at = first * IC + block * width
                        tile_store(sums, flat, at, 0, IC, LANES, 1, rows, cols)
                    else:
                        tile_store(sums, stored, 0, 0, width, LANES, 1, rows, cols)
                        for r in range(count):
                            to = (first + r) * IC + block * width
                            _copy(stored[r * width : (r + 1) * width], flat[to : to + width])

    return backward_data


@functools.cache
def _make_backward_weights(rows: int, cols: int) -> Callable[..., None]:
    width = cols * LANES

    @parallel_kernel
    def backward_weights(
        src: _Floats,
        diff_dst: _Floats,
        partial: _Floats,
        group: int,
        sizes: tuple[int, int, int],
    ) -> None:
        IH, KD, KH = sizes
        lines, IW, IC = src.shape
        N = diff_dst.shape[2]
        taps = KD * KH
        flat_src, flat_diff, flat = src.reshape(-1), diff_dst.reshape(-1), partial.reshape(-1)
        for task in prange(partial.shape[0] * taps):
            chunk, tap = task // taps, task % taps
            for ic in range(0, IC, rows):
                for n in range(0, N, width):
                    sums = tile_zero(rows, cols)
                    for line in range(chunk * group, min((chunk + 1) * group, lines)):
                        a = line * IW * IC + ic
                        b = _dst_row(line, tap, IH, KD, KH) * IW * N + n
                        for iw in range(IW):
                            sums = tile_rank1(
                                sums,
                                flat_src,
                                a + iw * IC,
                                0,
                                1,
                                flat_diff,
                                b + iw * N,
                                1,
                                rows,
                                cols,
                            )
                    at = (task * IC + ic) * N + n
                    tile_store(sums, flat, at, 0, N, LANES, 1, rows, cols)

    return backward_weights
