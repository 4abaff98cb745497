"""Which rung computes a convolution: ``direct`` in float32, ``naive`` (the reference) in float64."""

from types import ModuleType

import numpy as np

from kernels.conv3d import direct, naive
from kernels.conv3d.shapes import Array, Triple


def _rung(array: Array) -> ModuleType:
    return direct if array.dtype == np.float32 else naive


def forward(
    src: Array,
    weights: Array,
    bias: Array | None = None,
    stride: int | Triple = 1,
    padding: str = "same",
) -> Array:
    """Convolve; arguments, result and errors as `naive.forward`."""
    return _rung(src).forward(src, weights, bias, stride, padding)


def backward_data(
    diff_dst: Array,
    weights: Array,
    src_shape: tuple[int, ...],
    stride: int | Triple = 1,
    padding: str = "same",
) -> Array:
    """Gradient of ``src``; arguments, result and errors as `naive.backward_data`."""
    return _rung(diff_dst).backward_data(diff_dst, weights, src_shape, stride, padding)


def backward_weights(
    src: Array,
    diff_dst: Array,
    kernel: Triple,
    stride: int | Triple = 1,
    padding: str = "same",
) -> tuple[Array, Array]:
    """Gradients of weights and bias; arguments, result and errors as `naive.backward_weights`."""
    return _rung(src).backward_weights(src, diff_dst, kernel, stride, padding)
