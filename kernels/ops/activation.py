"""Activations: functions of one number whose derivative follows from their result.

                value                            derivative, from the result y
    ReLU        max(x, 0)                        1 where y > 0, else 0
    leaky ReLU  x where x > 0, else slope * x    1 where y > 0, else slope
    sigmoid     1 / (1 + exp(-x))                y * (1 - y)

Backward reads ``dst`` alone, which is kept anyway: it is the source of the operator that follows. So ``src``
can be freed. The layout does not matter. Forward reads and writes 4 bytes an item, backward reads 8 and
writes 4. float32 runs the compiled loops, float64 the NumPy expressions, which are the reference.

A new activation is an `Activation` and a case in `_value` and `_gradient`. NaN stays NaN, so that a diverged
run is seen: a comparison that NaN fails must be the one that keeps the value, ``x <= 0`` and not ``x > 0``.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from kernels.base.arguments import Array, Floats, tensor
from kernels.base.buffers import CHUNK, chunk_count, empty
from kernels.base.exponential import sigmoid
from kernels.base.jit import kernel, parallel_kernel, prange

_RELU, _LEAKY, _SIGMOID = range(3)
_ZERO, _ONE = np.float32(0), np.float32(1)


class Activation(NamedTuple):
    """The reference of one activation, and the case of the compiled loops that computes it."""

    value: Callable[[Array], Array]  # of src
    gradient: Callable[[Array, Array], Array]  # of diff_dst and dst
    case: int
    slope: float = 0.0


def _sigmoid(src: Array) -> Array:
    # The exponential of a number that is not above 0 does not overflow.
    power = np.exp(-np.abs(src))
    return np.where(src >= 0.0, 1.0, power) / (1.0 + power)


RELU = Activation(lambda x: np.maximum(x, 0.0), lambda dy, y: np.where(y <= 0.0, 0.0, dy), _RELU)
SIGMOID = Activation(_sigmoid, lambda dy, y: dy * y * (1.0 - y), _SIGMOID)


def leaky_relu(slope: float) -> Activation:
    """Leaky ReLU. Its slope must be finite and above 0, so that ``dst`` has the sign of ``src``."""
    if not 0.0 < slope < np.inf:
        raise ValueError(f"slope must be above 0 and finite (use relu for 0), got {slope}")
    slope = float(slope)
    return Activation(
        lambda x: np.where(x <= 0.0, slope * x, x),
        lambda dy, y: np.where(y <= 0.0, slope * dy, dy),
        _LEAKY,
        slope,
    )


def forward(src: Array, activation: Activation) -> Array:
    """Apply an activation to each item of ``src``, a float32 or float64 array of any shape.

    Raises
    ------
    TypeError, ValueError
        If ``src`` is another array, or empty.
    """
    src = tensor("src", src)
    if src.dtype == np.float64:
        return activation.value(src)
    dst = empty(src.shape)
    _make_forward(activation.case)(src.reshape(-1), np.float32(activation.slope), dst.reshape(-1))
    return dst


def backward(diff_dst: Array, dst: Array, activation: Activation) -> Array:
    """Gradient of the source: ``diff_dst`` times the derivative, which follows from ``dst``.

    Raises
    ------
    TypeError, ValueError
        If the two arrays differ in dtype or shape.
    """
    dst = tensor("dst", dst)
    diff_dst = tensor("diff_dst", diff_dst, shape=dst.shape, dtype=dst.dtype)
    if dst.dtype == np.float64:
        return activation.gradient(diff_dst, dst)
    diff_src = empty(dst.shape)
    arrays = diff_dst.reshape(-1), dst.reshape(-1), diff_src.reshape(-1)
    _make_backward(activation.case)(*arrays, np.float32(activation.slope))
    return diff_src


# --- float32: the case is a constant, so the compiler keeps one branch and vectorises it -----------------


@kernel
def _value(x: np.float32, slope: np.float32, case: int) -> np.float32:
    if case == _SIGMOID:
        return sigmoid(x)
    below = slope * x if case == _LEAKY else _ZERO
    return below if x <= _ZERO else x


@kernel
def _gradient(dy: np.float32, y: np.float32, slope: np.float32, case: int) -> np.float32:
    if case == _SIGMOID:
        return dy * y * (_ONE - y)
    below = slope * dy if case == _LEAKY else _ZERO
    return below if y <= _ZERO else dy


@functools.cache
def _make_forward(case: int) -> Callable[..., None]:
    @parallel_kernel
    def forward(src: Floats, slope: np.float32, dst: Floats) -> None:
        for chunk in prange(chunk_count(src.size)):
            at = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
            x, y = src[at], dst[at]
            for i in range(x.size):
                y[i] = _value(x[i], slope, case)

    return forward


@functools.cache
def _make_backward(case: int) -> Callable[..., None]:
    @parallel_kernel
    def backward(diff_dst: Floats, dst: Floats, diff_src: Floats, slope: np.float32) -> None:
        for chunk in prange(chunk_count(dst.size)):
            at = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
            dy, y, dx = diff_dst[at], dst[at], diff_src[at]
            for i in range(y.size):
                dx[i] = _gradient(dy[i], y[i], slope, case)

    return backward
