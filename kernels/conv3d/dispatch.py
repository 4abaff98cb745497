"""Which rung computes a convolution: ``direct`` in float32, ``naive`` (the reference) in float64."""

from types import ModuleType

import numpy as np

from kernels.base.arguments import Array, Triple, array
from kernels.ladder import direct, naive


def _rung(**arrays: Array) -> ModuleType:
    for name, value in arrays.items():
        array(name, value)
    return direct if all(value.dtype == np.float32 for value in arrays.values()) else naive


def forward(
    src: Array, weights: Array, bias: Array | None = None, stride: int | Triple = 1, padding: str = "same"
) -> Array:
    """Convolve; arguments, result and errors as `naive.forward`."""
    given = {"src": src, "weights": weights} | ({} if bias is None else {"bias": bias})
    return _rung(**given).forward(src, weights, bias, stride, padding)


def backward_data(
    diff_dst: Array,
    weights: Array,
    src_shape: tuple[int, ...],
    stride: int | Triple = 1,
    padding: str = "same",
) -> Array:
    """Gradient of ``src``; arguments, result and errors as `naive.backward_data`."""
    return _rung(diff_dst=diff_dst, weights=weights).backward_data(
        diff_dst, weights, src_shape, stride, padding
    )


def backward_weights(
    src: Array, diff_dst: Array, kernel: Triple, stride: int | Triple = 1, padding: str = "same"
) -> tuple[Array, Array]:
    """Gradients of weights and bias; arguments, result and errors as `naive.backward_weights`."""
    return _rung(src=src, diff_dst=diff_dst).backward_weights(src, diff_dst, kernel, stride, padding)
