"""Activations: ReLU, leaky ReLU and sigmoid.

All three are elementwise, so the layout does not matter, and each is one pass: forward reads and
writes 4 bytes an item, backward reads 8 and writes 4. Backward needs ``dst`` only, which is kept
anyway, as it is the source of the operator that follows: ``src`` can be freed.

float32 arrays take the loops, float64 arrays the NumPy expression beside them, which is the reference.
NaN stays NaN, so that a diverged run is seen.
"""

import numpy as np

from kernels.base.arguments import Array, Floats, tensor
from kernels.base.buffers import CHUNK, chunk_count, empty
from kernels.base.exponential import sigmoid
from kernels.base.jit import parallel_kernel, prange

_ZERO = np.float32(0)
_ONE = np.float32(1)


def relu_forward(src: Array) -> Array:
    """``dst = max(src, 0)``.

    Parameters
    ----------
    src : array, any shape
        float32 or float64.

    Returns
    -------
    array, shape and dtype of ``src``

    Raises
    ------
    TypeError
        If ``src`` is not a float32 or float64 array.
    """
    src = tensor("src", src)
    if src.dtype == np.float64:
        return np.maximum(src, 0.0)
    dst = empty(src.shape)
    _relu_forward(src.reshape(-1), dst.reshape(-1))
    return dst


def relu_backward(diff_dst: Array, dst: Array) -> Array:
    """``diff_src = diff_dst where dst > 0, else 0``.

    Parameters
    ----------
    diff_dst, dst : array, same shape and dtype
        Gradient of the output, and the output itself.

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
        return np.where(dst <= 0.0, 0.0, diff_dst)
    diff_src = empty(dst.shape)
    _relu_backward(diff_dst.reshape(-1), dst.reshape(-1), diff_src.reshape(-1))
    return diff_src


def leaky_relu_forward(src: Array, slope: float) -> Array:
    """``dst = src where src > 0, else slope * src``.

    Parameters
    ----------
    src : array, any shape
        float32 or float64.
    slope : float
        Above 0, so that the sign of ``dst`` tells the sign of ``src`` to the backward pass.

    Returns
    -------
    array, shape and dtype of ``src``

    Raises
    ------
    TypeError
        If ``src`` is not a float32 or float64 array.
    ValueError
        If ``slope`` is not above 0.
    """
    src = tensor("src", src)
    slope = checked_slope(slope)
    if src.dtype == np.float64:
        return np.where(src <= 0.0, slope * src, src)
    dst = empty(src.shape)
    _leaky_relu_forward(src.reshape(-1), np.float32(slope), dst.reshape(-1))
    return dst


def leaky_relu_backward(diff_dst: Array, dst: Array, slope: float) -> Array:
    """``diff_src = diff_dst where dst > 0, else slope * diff_dst``.

    Parameters
    ----------
    diff_dst, dst : array, same shape and dtype
        Gradient of the output, and the output itself.
    slope : float
        As in the forward pass.

    Returns
    -------
    array, shape and dtype of ``dst``

    Raises
    ------
    TypeError, ValueError
        If the two differ in dtype or shape, or ``slope`` is not above 0.
    """
    dst = tensor("dst", dst)
    diff_dst = tensor("diff_dst", diff_dst, shape=dst.shape, dtype=dst.dtype)
    slope = checked_slope(slope)
    if dst.dtype == np.float64:
        return np.where(dst <= 0.0, slope * diff_dst, diff_dst)
    diff_src = empty(dst.shape)
    _leaky_relu_backward(diff_dst.reshape(-1), dst.reshape(-1), np.float32(slope), diff_src.reshape(-1))
    return diff_src


def sigmoid_forward(src: Array) -> Array:
    """``dst = 1 / (1 + exp(-src))``.

    Parameters
    ----------
    src : array, any shape
        float32 or float64.

    Returns
    -------
    array, shape and dtype of ``src``

    Raises
    ------
    TypeError
        If ``src`` is not a float32 or float64 array.
    """
    src = tensor("src", src)
    if src.dtype == np.float64:
        # Of a number that is not above 0 the exponential does not overflow.
        power = np.exp(-np.abs(src))
        return np.where(src >= 0.0, 1.0, power) / (1.0 + power)
    dst = empty(src.shape)
    _sigmoid_forward(src.reshape(-1), dst.reshape(-1))
    return dst


def sigmoid_backward(diff_dst: Array, dst: Array) -> Array:
    """``diff_src = diff_dst * dst * (1 - dst)``.

    Parameters
    ----------
    diff_dst, dst : array, same shape and dtype
        Gradient of the output, and the output itself.

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
        return diff_dst * dst * (1.0 - dst)
    diff_src = empty(dst.shape)
    _sigmoid_backward(diff_dst.reshape(-1), dst.reshape(-1), diff_src.reshape(-1))
    return diff_src


def checked_slope(slope: float) -> float:
    """``slope``, if it is above zero and finite; else ValueError."""
    if not 0.0 < slope < np.inf:
        raise ValueError(f"slope must be above 0 and finite (use relu for 0), got {slope}")
    return float(slope)


# --- float32: one chunk after the other, each vectorised --------------------------------------------
# A comparison that NaN fails must be the one that keeps the value: `x <= 0`, not `x > 0`.


@parallel_kernel
def _relu_forward(src: Floats, dst: Floats) -> None:
    for chunk in prange(chunk_count(src.size)):
        at = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
        x, y = src[at], dst[at]
        for i in range(x.size):
            y[i] = _ZERO if x[i] <= _ZERO else x[i]


@parallel_kernel
def _relu_backward(diff_dst: Floats, dst: Floats, diff_src: Floats) -> None:
    for chunk in prange(chunk_count(dst.size)):
        at = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
        dy, y, dx = diff_dst[at], dst[at], diff_src[at]
        for i in range(y.size):
            dx[i] = _ZERO if y[i] <= _ZERO else dy[i]


@parallel_kernel
def _leaky_relu_forward(src: Floats, slope: np.float32, dst: Floats) -> None:
    for chunk in prange(chunk_count(src.size)):
        at = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
        x, y = src[at], dst[at]
        for i in range(x.size):
            y[i] = slope * x[i] if x[i] <= _ZERO else x[i]


@parallel_kernel
def _leaky_relu_backward(diff_dst: Floats, dst: Floats, slope: np.float32, diff_src: Floats) -> None:
    for chunk in prange(chunk_count(dst.size)):
        at = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
        dy, y, dx = diff_dst[at], dst[at], diff_src[at]
        for i in range(y.size):
            dx[i] = slope * dy[i] if y[i] <= _ZERO else dy[i]


@parallel_kernel
def _sigmoid_forward(src: Floats, dst: Floats) -> None:
    for chunk in prange(chunk_count(src.size)):
        at = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
        x, y = src[at], dst[at]
        for i in range(x.size):
            y[i] = sigmoid(x[i])


@parallel_kernel
def _sigmoid_backward(diff_dst: Floats, dst: Floats, diff_src: Floats) -> None:
    for chunk in prange(chunk_count(dst.size)):
        at = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
        dy, y, dx = diff_dst[at], dst[at], diff_src[at]
        for i in range(y.size):
            dx[i] = dy[i] * y[i] * (_ONE - y[i])
