"""Concatenation along the channels, and the split that is its backward pass.

Traffic: everything is read once and written once.
"""

import numpy as np

from kernels.base.arguments import NDHWC, Array, Floats, tensor
from kernels.base.buffers import empty
from kernels.base.jit import kernel, parallel_kernel, prange

# Voxels one thread takes at a time.
_VOXELS = 1024


def forward(a: Array, b: Array) -> Array:
    """``dst[..., c] = a[..., c]``, then ``b``.

    Parameters
    ----------
    a, b : array, shape (MB, D, H, W, AC) and (MB, D, H, W, BC)
        float32 or float64, both the same.

    Returns
    -------
    array, shape (MB, D, H, W, AC + BC)

    Raises
    ------
    TypeError, ValueError
        If dtypes, ranks or the axes before the channels differ.
    """
    a = tensor("a", a, axes=NDHWC)
    b = tensor("b", b, axes=NDHWC, dtype=a.dtype)
    if a.shape[:-1] != b.shape[:-1]:
        raise ValueError(f"b must have shape {a.shape[:-1]} before its channels, got {b.shape}")
    if a.dtype == np.float64:
        return np.concatenate([a, b], axis=-1)
    channels = (a.shape[-1], b.shape[-1])
    dst = empty((*a.shape[:-1], sum(channels)))
    _forward(a.reshape(-1, channels[0]), b.reshape(-1, channels[1]), dst.reshape(-1, sum(channels)))
    return dst


def backward(diff_dst: Array, split: int) -> tuple[Array, Array]:
    """``diff_a = diff_dst[..., :split], diff_b = diff_dst[..., split:]``, each contiguous.

    Parameters
    ----------
    diff_dst : array, shape (MB, D, H, W, AC + BC)
        float32 or float64.
    split : int
        ``AC``, the channels of the first source.

    Returns
    -------
    diff_a : array, shape (MB, D, H, W, AC)
    diff_b : array, shape (MB, D, H, W, BC)

    Raises
    ------
    TypeError, ValueError
        If ``diff_dst`` is no float volume, or ``split`` leaves one side without channels.
    """
    diff_dst = tensor("diff_dst", diff_dst, axes=NDHWC)
    channels = diff_dst.shape[-1]
    if not 0 < split < channels:
        raise ValueError(f"split must be from 1 to {channels - 1}, got {split}")
    if diff_dst.dtype == np.float64:
        return diff_dst[..., :split].copy(), diff_dst[..., split:].copy()
    diff_a = empty((*diff_dst.shape[:-1], split))
    diff_b = empty((*diff_dst.shape[:-1], channels - split))
    _backward(diff_dst.reshape(-1, channels), diff_a.reshape(-1, split), diff_b.reshape(-1, channels - split))
    return diff_a, diff_b


# --- float32 ------------------------------------------------------------------------------------------


@kernel
def _join(a: Floats, b: Floats, dst: Floats) -> None:
    for voxel in range(dst.shape[0]):
        for c in range(a.shape[1]):
            dst[voxel, c] = a[voxel, c]
        for c in range(b.shape[1]):
            dst[voxel, a.shape[1] + c] = b[voxel, c]


@parallel_kernel
def _forward(a: Floats, b: Floats, dst: Floats) -> None:
    for block in prange((dst.shape[0] + _VOXELS - 1) // _VOXELS):
        at = slice(block * _VOXELS, (block + 1) * _VOXELS)
        _join(a[at], b[at], dst[at])


@kernel
def _part(diff_dst: Floats, diff_a: Floats, diff_b: Floats) -> None:
    for voxel in range(diff_dst.shape[0]):
        for c in range(diff_a.shape[1]):
            diff_a[voxel, c] = diff_dst[voxel, c]
        for c in range(diff_b.shape[1]):
            diff_b[voxel, c] = diff_dst[voxel, diff_a.shape[1] + c]


@parallel_kernel
def _backward(diff_dst: Floats, diff_a: Floats, diff_b: Floats) -> None:
    for block in prange((diff_dst.shape[0] + _VOXELS - 1) // _VOXELS):
        at = slice(block * _VOXELS, (block + 1) * _VOXELS)
        _part(diff_dst[at], diff_a[at], diff_b[at])
