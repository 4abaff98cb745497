"""Softmax over the last axis.

    dst[v, c] = exp(src[v, c] - m[v]) / sum over k of exp(src[v, k] - m[v]),    m[v] = max of src[v]

Traffic    Forward reads and writes 4 bytes an item; backward reads 8 and writes 4.
Saves      ``dst``
Numerics   float32; the exponential is :func:`kernels.base.exponential.exp`; a voxel sums to 1 within
           ``C * 6e-8``.
"""

import numpy as np

from kernels.base.arguments import Array, Floats, tensor
from kernels.base.buffers import empty
from kernels.base.jit import parallel_kernel, prange
from kernels.ops.softmax_dice.planes import (
    BLOCK,
    CHUNK,
    exponentiate,
    gather,
    normalise,
    scatter,
    subtract_maximum,
)


def softmax_forward(logits: Array) -> Array:
    """Probabilities of the classes, the last axis.

    Parameters
    ----------
    logits : array, shape (..., C)
        float32 or float64.

    Returns
    -------
    array, shape and dtype of ``logits``

    Raises
    ------
    TypeError, ValueError
        If ``logits`` is no float array, or has no axis.
    """
    logits = tensor("logits", logits)
    if logits.dtype == np.float64:
        return softmax_reference(logits)
    dst = empty(logits.shape)
    classes = logits.shape[-1]
    _forward(logits.reshape(-1, classes), dst.reshape(-1, classes))
    return dst


def softmax_backward(diff_dst: Array, dst: Array) -> Array:
    """``diff_logits = dst * (diff_dst - sum over classes of diff_dst * dst)``.

    Parameters
    ----------
    diff_dst, dst : array, shape (..., C)
        Gradient of the probabilities, and the probabilities; same shape and dtype.

    Returns
    -------
    array, shape and dtype of ``dst``

    Raises
    ------
    TypeError, ValueError
        If the two differ in dtype or shape.
    """
    dst = tensor("dst", dst)
    diff_dst = tensor("diff_dst", diff_dst, shape=dst.shape, dtype=dst.dtype)
    if dst.dtype == np.float64:
        return dst * (diff_dst - (diff_dst * dst).sum(axis=-1, keepdims=True))
    diff_logits = empty(dst.shape)
    classes = dst.shape[-1]
    _backward(diff_dst.reshape(-1, classes), dst.reshape(-1, classes), diff_logits.reshape(-1, classes))
    return diff_logits


def softmax_reference(logits: Array) -> Array:
    """Softmax over the last axis, in NumPy; of a single class it is 1."""
    power = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return power / power.sum(axis=-1, keepdims=True)


# --- float32, shape (voxels, C) -----------------------------------------------------------------------


@parallel_kernel
def _forward(logits: Floats, dst: Floats) -> None:
    voxels, classes = logits.shape
    for chunk in prange((voxels + CHUNK - 1) // CHUNK):
        planes = np.empty((classes, BLOCK), np.float32)
        scratch = np.empty(BLOCK, np.float32)
        for start in range(chunk * CHUNK, min((chunk + 1) * CHUNK, voxels), BLOCK):
            count = min(BLOCK, voxels - start)
            gather(logits, start, count, planes)
            subtract_maximum(planes, count, scratch)
            exponentiate(planes, count, scratch)
            normalise(planes, count, scratch)
            scatter(planes, start, count, dst)


@parallel_kernel
def _backward(diff_dst: Floats, dst: Floats, diff_logits: Floats) -> None:
    voxels, classes = dst.shape
    for chunk in prange((voxels + CHUNK - 1) // CHUNK):
        planes = np.empty((classes, BLOCK), np.float32)
        diff_planes = np.empty((classes, BLOCK), np.float32)
        product = np.empty(BLOCK, np.float32)
        for start in range(chunk * CHUNK, min((chunk + 1) * CHUNK, voxels), BLOCK):
            count = min(BLOCK, voxels - start)
            gather(dst, start, count, planes)
            gather(diff_dst, start, count, diff_planes)
            product[:] = 0.0
            for c in range(classes):
                plane, diff_plane = planes[c], diff_planes[c]
                for voxel in range(count):
                    product[voxel] += plane[voxel] * diff_plane[voxel]
            for c in range(classes):
                plane, diff_plane = planes[c], diff_planes[c]
                for voxel in range(count):
                    plane[voxel] *= diff_plane[voxel] - product[voxel]
            scatter(planes, start, count, diff_logits)
