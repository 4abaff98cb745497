"""Rung ``im2col``: each output voxel's neighbourhood becomes a row, and each plane's convolution a GEMM.

    columns[voxel, (kd, kh, kw, ic)] = src[voxel * stride + tap - before, ic]
    dst[voxel, oc] = bias[oc] + sum over (kd, kh, kw, ic) of columns[voxel, ...] * weights[..., oc]

Idea       a library's matrix product (NumPy's BLAS) is fast, so bring the problem into its shape; this
           is how frameworks convolved before they had convolution kernels
Loop nest  n, od | GEMM of (OH * OW) x (KD * KH * KW * IC) x OC
Memory     each voxel of ``src`` is copied KD * KH * KW times. One plane of columns at a time keeps the
           copy at 27 planes rather than 27 volumes; it still leaves the caches::

               src plane  +---+      columns  | tap 0 | tap 1 | ...  | tap 26 |   one row a voxel
                          |   |  ->           | tap 0 | tap 1 | ...  | tap 26 |
                          +---+

Gradients  ``diff_weights`` is columns^T x diff_dst; ``backward_data`` makes columns of gradients and
           adds each tap's slice to the voxels that forward copies for this tap (col2im)
Traffic    27 times ``src`` written and read for a 3^3 kernel
Numerics   sums in the arrays' own type, in BLAS's order
Source     Chellapilla, Puri and Simard, "High performance convolutional neural networks for document
           processing" (2006)
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from kernels.base.arguments import Array, Triple
from kernels.base.buffers import empty
from kernels.ladder.naive import backward_bias
from kernels.ladder.shapes import Geometry, Rung


def _convolve(src: Array, weights: Array, bias: Array | None, g: Geometry, adjoint: bool) -> Array:
    matrix = _matrix(weights)
    if adjoint:
        padded, inside = _zeros(g, src.dtype)
        for n, od in np.ndindex(g.dst_shape[:2]):
            columns = src[n, od].reshape(-1, len(weights)) @ matrix.T
            taps = columns.reshape(_columns_shape(g))
            for (kd, kh, kw), voxels in _taps(padded[n], od, g):
                voxels += taps[:, :, kd, kh, kw]
        return np.ascontiguousarray(inside)
    padded, dst = _pad(src, g), empty(g.dst_shape, src.dtype)
    for n, od in np.ndindex(g.dst_shape[:2]):
        dst[n, od] = (_columns(padded[n], od, g) @ matrix).reshape(g.dst_shape[2:])
    if bias is not None:
        dst += bias
    return dst


def _gradients(src: Array, diff_dst: Array, g: Geometry) -> tuple[Array, Array]:
    padded, (IC, OC) = _pad(src, g), g.channels
    matrix = np.zeros((g.taps * IC, OC), src.dtype)
    for n, od in np.ndindex(g.dst_shape[:2]):
        matrix += _columns(padded[n], od, g).T @ diff_dst[n, od].reshape(-1, OC)
    diff_weights = matrix.reshape(*g.kernel, IC, OC).transpose(4, 3, 0, 1, 2)
    return np.ascontiguousarray(diff_weights), backward_bias(diff_dst)


_rung = Rung(_convolve, _gradients, float32=False)
forward, backward_data, backward_weights = _rung.forward, _rung.backward_data, _rung.backward_weights


def _matrix(weights: Array) -> Array:
    """Weights as a matrix, ``(kd, kh, kw, ic)`` by ``oc``."""
    return np.ascontiguousarray(weights.transpose(2, 3, 4, 1, 0).reshape(-1, weights.shape[0]))


def _zeros(g: Geometry, dtype: npt.DTypeLike) -> tuple[Array, Array]:
    """Return zeros for all images with their padding, and the view of them that is for ``src``."""
    MB, *size, IC = g.src_shape
    ends = np.add(g.before, size)
    padded = np.zeros((MB, *np.maximum(g.panel_size, ends), IC), dtype)
    return padded, padded[:, *map(slice, g.before, ends)]


def _pad(src: Array, g: Geometry) -> Array:
    padded, inside = _zeros(g, src.dtype)
    inside[:] = src
    return padded


def _columns(padded: Array, od: int, g: Geometry) -> Array:
    """Columns of one output plane, shape ``(OH * OW, KD * KH * KW * IC)``."""
    columns = np.empty(_columns_shape(g), padded.dtype)
    for (kd, kh, kw), voxels in _taps(padded, od, g):
        columns[:, :, kd, kh, kw] = voxels
    return columns.reshape(g.out[1] * g.out[2], -1)


def _columns_shape(g: Geometry) -> tuple[int, ...]:
    return (*g.out[1:], *g.kernel, g.channels[0])


def _taps(padded: Array, od: int, g: Geometry) -> Iterator[tuple[Triple, Array]]:
    """For each tap, the voxels that it meets while the kernel visits plane ``od``: ``(OH, OW, IC)``."""
    (_, OH, OW), (SD, SH, SW) = g.out, g.stride
    for kd, kh, kw in np.ndindex(g.kernel):
        rows, cols = slice(kh, kh + (OH - 1) * SH + 1, SH), slice(kw, kw + (OW - 1) * SW + 1, SW)
        yield (kd, kh, kw), padded[od * SD + kd, rows, cols]
