"""Upsampling, nearest or trilinear, along depth, height and width.

    dst[n, od, oh, ow, c] = sum over d, h, w of A[od, d] * A[oh, h] * A[ow, w] * src[n, d, h, w, c]
    nearest     A[o, i] = 1 where o // F == i, else 0
    trilinear   A[o, i] = max(0, 1 - |x - i|),    x = (o + 0.5) / F - 0.5, clipped to 0 ... I - 1

``x`` is where the centre of item ``o`` lies among the centres of the source, as PyTorch defines it
(``align_corners=False``), and TensorFlow. Backward multiplies by the transposed matrices.

Idea       A row of ``A`` has a few neighbouring items that are not 0, its *taps*. One kernel adds taps up;
           forward and backward, nearest and trilinear differ in the tables of taps alone. The kernel sums
           rows of the source first, which are long and contiguous, and then voxels of that sum, which is in
           the L1 cache.
Traffic    Forward reads ``src`` and writes ``FD*FH*FW`` times as much, backward the reverse.
Saves      nothing
Numerics   In the type of the arrays: taps along d and h, then along w. Errors in float32: trilinear, 5e-7 of
           the largest ``|src|``; backward, 3e-7 * FD*FH*FW * (FD*FH + FW) of the largest ``|diff_dst|``.

``src`` is a float32 or float64 array (MB, D, H, W, C), ``dst`` is (MB, D * FD, H * FH, W * FW, C), and
``factor`` is (FD, FH, FW). Both functions raise TypeError or ValueError if the array is no float volume,
``factor`` is not three whole numbers from 1 on, or ``mode`` is not "nearest" or "trilinear".
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kernels.base.arguments import NDHWC, Array, Floats, Triple, tensor, triple
from kernels.base.buffers import empty
from kernels.base.jit import parallel_kernel, prange, split_index
from kernels.base.simd import LANES, broadcast, fma, load, store
from kernels.deferred.normalizing import aligned

# Rows of the result that one thread makes at a time.
_ROWS = 8

_Indices = npt.NDArray[np.int64]


class _Taps(NamedTuple):
    """Along each axis item ``i`` of the result is the sum of ``weights[i, k] * src[first[i] + k]``."""

    first_d: _Indices
    weights_d: Array
    first_h: _Indices
    weights_h: Array
    first_w: _Indices
    weights_w: Array


def forward(src: Array, factor: int | Sequence[int] = (2, 2, 2), mode: str = "nearest") -> Array:
    """``dst``, as large as ``src`` times ``factor``."""
    src, factors = tensor("src", src, axes=NDHWC), triple("factor", factor)
    return _resized(src, _taps(src.shape[1:4], factors, mode, False, src.dtype.char))


def backward(diff_dst: Array, factor: int | Sequence[int] = (2, 2, 2), mode: str = "nearest") -> Array:
    """Gradient of ``src``; the sizes of ``diff_dst`` must be multiples of ``factor``."""
    diff_dst, factors = tensor("diff_dst", diff_dst, axes=NDHWC), triple("factor", factor)
    sizes = tuple(n // f for n, f in zip(diff_dst.shape[1:4], factors, strict=True))
    if diff_dst.shape[1:4] != tuple(np.multiply(sizes, factors)):
        raise ValueError(f"diff_dst must be a multiple of the factor {factors}, got {diff_dst.shape}")
    return _resized(diff_dst, _taps(sizes, factors, mode, True, diff_dst.dtype.char))


def checked_mode(mode: str) -> str:
    """``mode`` itself, if it is one."""
    if mode not in ("nearest", "trilinear"):
        raise ValueError(f'mode must be "nearest" or "trilinear", got {mode!r}')
    return mode


@functools.lru_cache(maxsize=64)
def _taps(sizes: Triple, factors: Triple, mode: str, transposed: bool, dtype: str) -> _Taps:
    """What is not 0 in the rows of ``A``, or of its transpose; shorter rows are filled up with zeros."""
    found: list[Any] = []
    for size, factor in zip(sizes, factors, strict=True):
        src, dst = np.arange(size), np.arange(size * factor)[:, np.newaxis]
        x = np.clip((dst + 0.5) / factor - 0.5, 0, size - 1)
        nearest = checked_mode(mode) == "nearest"
        matrix: Any = np.float64(dst // factor == src) if nearest else np.maximum(0, 1 - np.abs(x - src))
        matrix = matrix.T if transposed else matrix
        taps = int(np.count_nonzero(matrix, axis=1).max())
        first = np.minimum((matrix != 0).argmax(axis=1), matrix.shape[1] - taps)
        weights = np.take_along_axis(matrix, first[:, np.newaxis] + np.arange(taps), axis=1)
        found += [first, weights.astype(dtype)]
    return _Taps(*found)


def _resized(src: Array, taps: _Taps) -> Array:
    if src.dtype == np.float64:  # the reference
        for axis, first, weights in zip((1, 2, 3), taps[::2], taps[1::2], strict=True):
            factors = weights.T.reshape(weights.shape[1], -1, *(1,) * (4 - axis))
            terms = [factor * src.take(first + k, axis=axis) for k, factor in enumerate(factors)]
            src = np.sum(terms, axis=0)
        return src
    MB, D, H, W, C = src.shape
    OD, OH, OW = taps.first_d.size, taps.first_h.size, taps.first_w.size
    dst = empty((MB, OD, OH, OW, C))
    add_taps = _make_add_taps(taps.weights_w.shape[1])
    add_taps(src.reshape(MB, D, H, W * C), dst.reshape(MB, OD, OH, OW * C), C, taps)
    return dst


@functools.cache
def _make_add_taps(KW: int) -> Callable[..., None]:
    @parallel_kernel
    def add_taps(src: Floats, dst: Floats, C: int, taps: _Taps) -> None:
        first_d, weights_d, first_h, weights_h, first_w, weights_w = taps
        MB, OD, OH, size = dst.shape
        strips = (OH + _ROWS - 1) // _ROWS
        for task in prange(MB * OD * strips):
            plane, strip = split_index(task, strips)
            n, od = plane // OD, plane % OD
            # Vectors of the last channels reach past the row.
            line, single = aligned(src.shape[3] + LANES), aligned(LANES)
            total = line[: src.shape[3]]
            for oh in range(strip * _ROWS, min((strip + 1) * _ROWS, OH)):
                for kd in range(weights_d.shape[1]):
                    for kh in range(weights_h.shape[1]):
                        x = src[n, first_d[od] + kd, first_h[oh] + kh]
                        weight = weights_d[od, kd] * weights_h[oh, kh]
                        for i in range(total.size):
                            total[i] = total[i] + weight * x[i] if kd + kh > 0 else weight * x[i]
                y = dst[n, od, oh]
                # Downwards: what is stored past the last channel is written over later.
                for c in range((C - 1) // LANES * LANES, -1, -LANES):
                    for ow in range(first_w.size):
                        at, item = ow * C + c, first_w[ow] * C + c
                        value = broadcast(weights_w[ow, 0]) * load(line, item)
                        for k in range(1, KW):
                            value = fma(broadcast(weights_w[ow, k]), load(line, item + k * C), value)
                        if at + LANES <= size:
                            store(y, at, value)
                        else:
                            store(single, 0, value)
                            for lane in range(min(LANES, C - c)):
                                y[at + lane] = single[lane]

    return add_taps
