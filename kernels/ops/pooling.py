"""Max pooling: the largest item of each window, and where it was.

    dst[n, od, oh, ow, c] = max over kd, kh, kw of src[n, od*KD + kd, oh*KH + kh, ow*KW + kw, c]

The stride is the window, so windows do not overlap; what does not fill a window at the end of an axis
is left out ("valid"). Of equal items the first one wins, and NaN wins over numbers. (TensorFlow's 3-D
pooling gives the gradient to each of equal items, its 2-D pooling to the first. After a ReLU only zeros
are equal, and their gradient is dropped, so networks with ReLU do not see the difference.)

Saves      ``argmax``, one byte an item of ``dst``: the number ``(kd*KH + kh)*KW + kw`` of the tap that
           won. To find it again, backward would have to read ``src`` and ``dst``, 36 bytes where 1 does.
Traffic    Forward reads ``src`` once and writes 1.25 / 8 of it (window 2^3); backward the reverse.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kernels.base.arguments import NDHWC, Array, Bytes, Floats, Triple, tensor, triple
from kernels.base.buffers import empty
from kernels.base.jit import parallel_kernel, prange


def max_pool_forward(src: Array, size: int | Sequence[int] = (2, 2, 2)) -> tuple[Array, Bytes]:
    """Largest item of each window.

    Parameters
    ----------
    src : array, shape (MB, ID, IH, IW, C)
        float32 or float64.
    size : (KD, KH, KW)
        The window, of at most 256 taps.

    Returns
    -------
    dst : array, shape (MB, ID // KD, IH // KH, IW // KW, C)
    argmax : uint8 array, shape of ``dst``
        Which tap won, for the backward pass.

    Raises
    ------
    TypeError, ValueError
        If ``src`` is no float volume, or the window has too many taps or does not fit.
    """
    src = tensor("src", src, axes=NDHWC)
    shape = pooled_shape(src.shape, size)
    size = triple("size", size)
    if src.dtype == np.float64:
        windows = _windows(src, size)
        windows = windows.reshape(-1, *windows.shape[3:])
        argmax = windows.argmax(axis=0)
        return np.take_along_axis(windows, argmax[None], axis=0)[0], argmax.astype(np.uint8)
    dst, argmax = empty(shape), empty(shape, np.uint8)
    _make_forward(*size)(src, dst, argmax)
    return dst, argmax


def max_pool_backward(
    diff_dst: Array, argmax: Bytes, src_shape: Sequence[int], size: int | Sequence[int] = (2, 2, 2)
) -> Array:
    """Gradient of each window's largest item; all others had no influence.

    Parameters
    ----------
    diff_dst : array, shape (MB, ID // KD, IH // KH, IW // KW, C)
        float32 or float64.
    argmax : uint8 array, shape of ``diff_dst``
        From the forward pass.
    src_shape : (MB, ID, IH, IW, C)
        Shape of the source.
    size : (KD, KH, KW)
        The window.

    Returns
    -------
    array, shape ``src_shape``

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes do not fit.
    """
    shape = tuple(src_shape)
    if len(shape) != 5:
        raise ValueError(f"src_shape must have the axes ({NDHWC}), got {src_shape}")
    diff_dst = tensor("diff_dst", diff_dst, shape=pooled_shape(shape, size))
    size = triple("size", size)
    argmax = tensor("argmax", argmax, shape=diff_dst.shape, dtype=np.uint8)
    whole = all(extent % window == 0 for extent, window in zip(shape[1:4], size, strict=True))
    if diff_dst.dtype == np.float64:
        diff_src = np.zeros(shape)
        taps = np.arange(math.prod(size)).reshape(*size, 1, 1, 1, 1, 1)
        _windows(diff_src, size)[...] = np.where(argmax == taps, diff_dst, 0.0)
        return diff_src
    # What no window covers is not written by the kernel.
    diff_src = empty(shape) if whole else np.zeros(shape, np.float32)
    _make_backward(*size)(diff_dst, argmax, diff_src)
    return diff_src


def pooled_shape(src_shape: Sequence[int], size: int | Sequence[int]) -> tuple[int, ...]:
    """Shape of what `max_pool_forward` returns; parameters and errors as there."""
    MB, *sizes, C = src_shape
    window = triple("size", size)
    if math.prod(window) > 256:
        raise ValueError(f"size must have at most 256 taps, got {window}")
    if any(k > i for i, k in zip(sizes, window, strict=True)):
        raise ValueError(f"size must fit into the volume {tuple(sizes)}, got {window}")
    return (MB, *[i // k for i, k in zip(sizes, window, strict=True)], C)


def _windows(src: npt.NDArray[Any], size: Triple) -> npt.NDArray[Any]:
    """View of shape (KD, KH, KW, MB, OD, OH, OW, C)."""
    KD, KH, KW = size
    MB, OD, OH, OW, C = pooled_shape(src.shape, size)
    cropped = src[:, : OD * KD, : OH * KH, : OW * KW]
    split = cropped.reshape(MB, OD, KD, OH, KH, OW, KW, C)
    return split.transpose(2, 4, 6, 0, 1, 3, 5, 7)


# --- float32 ------------------------------------------------------------------------------------------


@functools.cache
def _make_forward(KD: int, KH: int, KW: int) -> Callable[..., None]:
    """Kernel for one window; its taps are constants, so the compiler unrolls the loops over them."""

    @parallel_kernel
    def forward(src: Floats, dst: Floats, argmax: Bytes) -> None:
        MB, OD, OH, OW, C = dst.shape
        for row in prange(MB * OD * OH):
            n, od, oh = row // (OD * OH), row // OH % OD, row % OH
            for ow in range(OW):
                for c in range(C):
                    best = src[n, od * KD, oh * KH, ow * KW, c]
                    tap = 0
                    for kd in range(KD):
                        for kh in range(KH):
                            for kw in range(KW):
                                x = src[n, od * KD + kd, oh * KH + kh, ow * KW + kw, c]
                                # NaN is above every number, and the first NaN stays.
                                above = (not x <= best) & (best == best)
                                best = x if above else best
                                tap = (kd * KH + kh) * KW + kw if above else tap
                    dst[n, od, oh, ow, c] = best
                    argmax[n, od, oh, ow, c] = tap

    return forward


@functools.cache
def _make_backward(KD: int, KH: int, KW: int) -> Callable[..., None]:
    @parallel_kernel
    def backward(diff_dst: Floats, argmax: Bytes, diff_src: Floats) -> None:
        MB, OD, OH, OW, C = diff_dst.shape
        zero = np.float32(0)
        for row in prange(MB * OD * OH):
            n, od, oh = row // (OD * OH), row // OH % OD, row % OH
            for kd in range(KD):
                for kh in range(KH):
                    for ow in range(OW):
                        for kw in range(KW):
                            tap = np.uint8((kd * KH + kh) * KW + kw)
                            for c in range(C):
                                diff = diff_dst[n, od, oh, ow, c]
                                won = argmax[n, od, oh, ow, c] == tap
                                diff_src[n, od * KD + kd, oh * KH + kh, ow * KW + kw, c] = (
                                    diff if won else zero
                                )

    return backward
