"""Rung ``naive``: the definition of a 3-D convolution, as loops.

    dst[n, od, oh, ow, oc] = bias[oc] + sum over ic, kd, kh, kw of
        src[n, od*SD + kd - PD, oh*SH + kh - PH, ow*SW + kw - PW, ic] * weights[oc, ic, kd, kh, kw]

where ``src`` is zero outside its bounds. The two gradients are the same loops with the product's
three arrays in other roles: each multiply-add of the forward pass is one of each backward pass. So there is
one loop nest, which is compiled for each direction.

Idea       none: this is what every other rung must equal, and what float64 gradients run on
Loop nest  n, od, oh, ow, oc | kd, kh, kw, ic
Traffic    each multiply-add loads both its factors; nothing is reused on purpose
Numerics   sums in the arrays' own type, in the order of the loops
"""

import functools
from collections.abc import Callable

import numpy as np

from kernels.base.arguments import Array, Doubles, Triple
from kernels.base.buffers import empty
from kernels.base.jit import kernel, parallel_kernel, prange
from kernels.ladder import shapes
from kernels.ladder.shapes import Stride

_FORWARD, _DATA, _WEIGHTS = range(3)
# Voxels of a chunk of `backward_bias`.
_CHUNK = 8192


def forward(
    src: Array, weights: Array, bias: Array | None = None, stride: Stride = 1, padding: str = "same"
) -> Array:
    """Convolve.

    Parameters
    ----------
    src : ndarray, shape=(MB, ID, IH, IW, IC), float32 or float64
    weights : ndarray, shape=(OC, IC, KD, KH, KW), dtype of ``src``
        Kernel sizes 1 to 5.
    bias : ndarray, shape=(OC,), optional
    stride : int or (SD, SH, SW)
        From 1 on.
    padding : {"same", "valid"}
        TensorFlow's conventions.

    Returns
    -------
    ndarray, shape=(MB, OD, OH, OW, OC), dtype of ``src``

    Raises
    ------
    ValueError
        If shapes do not fit.
    TypeError
        If dtypes are mixed or not a float32 or float64.
    """
    g = shapes.forward_geometry(src, weights, bias, stride, padding)
    dst = empty(g.dst_shape, src.dtype)
    dst[:] = 0 if bias is None else bias
    _make(_FORWARD)(src, weights, dst, g.stride, g.before)
    return dst


def backward_data(
    diff_dst: Array, weights: Array, src_shape: tuple[int, ...], stride: Stride = 1, padding: str = "same"
) -> Array:
    """Gradient of ``src``: every product of the forward pass, sent back where its factor came from.

    Parameters
    ----------
    diff_dst : ndarray, shape=(MB, OD, OH, OW, OC), float32 or float64
    weights : ndarray, shape=(OC, IC, KD, KH, KW), dtype of ``diff_dst``
    src_shape : (MB, ID, IH, IW, IC)
    stride, padding
        As in `forward`, and so are the errors.

    Returns
    -------
    ndarray, shape=src_shape, dtype of ``diff_dst``
    """
    g = shapes.backward_data_geometry(diff_dst, weights, src_shape, stride, padding)
    diff_src = empty(g.src_shape, diff_dst.dtype)
    diff_src[:] = 0
    _make(_DATA)(diff_src, weights, diff_dst, g.stride, g.before)
    return diff_src


def backward_weights(
    src: Array, diff_dst: Array, kernel: Triple, stride: Stride = 1, padding: str = "same"
) -> tuple[Array, Array]:
    """Gradients of ``weights`` and ``bias``.

    Parameters
    ----------
    src : ndarray, shape=(MB, ID, IH, IW, IC), float32 or float64
    diff_dst : ndarray, shape=(MB, OD, OH, OW, OC), dtype of ``src``
    kernel : (KD, KH, KW)
    stride, padding
        As in `forward`, and so are the errors.

    Returns
    -------
    diff_weights : ndarray, shape=(OC, IC, KD, KH, KW), dtype of ``src``
    diff_bias : ndarray, shape=(OC,), dtype of ``src``
    """
    g = shapes.backward_weights_geometry(src, diff_dst, kernel, stride, padding)
    diff_weights = np.zeros(g.weights_shape, src.dtype)
    _make(_WEIGHTS)(src, diff_weights, diff_dst, g.stride, g.before)
    return diff_weights, backward_bias(diff_dst)


@functools.cache
def _make(direction: int) -> Callable[..., None]:
    """Compile the loop nest for one direction, a constant: only its lines are left."""

    @kernel
    def visit(src: Array, weights: Array, dst: Array, stride: Triple, before: Triple) -> None:
        _, ID, IH, IW, IC = src.shape
        _, _, KD, KH, KW = weights.shape
        for n, od, oh, ow, oc in np.ndindex(dst.shape):
            value = dst[n, od, oh, ow, oc]  # the sum so far, or a gradient
            for kd in range(KD):
                d = od * stride[0] + kd - before[0]
                for kh in range(KH):
                    h = oh * stride[1] + kh - before[1]
                    for kw in range(KW):
                        w = ow * stride[2] + kw - before[2]
                        if 0 <= d < ID and 0 <= h < IH and 0 <= w < IW:
                            for ic in range(IC):
                                if direction == _FORWARD:
                                    value += src[n, d, h, w, ic] * weights[oc, ic, kd, kh, kw]
                                elif direction == _DATA:
                                    src[n, d, h, w, ic] += value * weights[oc, ic, kd, kh, kw]
                                else:
                                    weights[oc, ic, kd, kh, kw] += src[n, d, h, w, ic] * value
            if direction == _FORWARD:
                dst[n, od, oh, ow, oc] = value

    return visit


def backward_bias(diff_dst: Array) -> Array:
    """Gradient of the bias, which all rungs share: the sum over all axes but the last.

    Voxels are cut into chunks by their number alone. Each chunk is summed in float64, and the chunks' sums
    are added in order, so the result is the same for any number of threads.

    Parameters
    ----------
    diff_dst : ndarray, shape=(MB, OD, OH, OW, OC), float32 or float64

    Returns
    -------
    ndarray, shape=(OC,), dtype of ``diff_dst``
    """
    voxels = diff_dst.reshape(-1, diff_dst.shape[-1])
    partial = np.zeros((-(-len(voxels) // _CHUNK), voxels.shape[1]))
    _sum_chunks(voxels, partial)
    return partial.sum(axis=0).astype(diff_dst.dtype)


@parallel_kernel
def _sum_chunks(voxels: Array, partial: Doubles) -> None:
    count, channels = voxels.shape
    for chunk in prange(partial.shape[0]):
        for voxel in range(chunk * _CHUNK, min((chunk + 1) * _CHUNK, count)):
            for c in range(channels):
                partial[chunk, c] += voxels[voxel, c]
