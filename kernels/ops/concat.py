"""Concatenation along the channels, and the split that is its backward pass.

Traffic: everything is read once and written once. NumPy alone takes twice as long, on one thread.
"""

import itertools

import numpy as np

from kernels.base.arguments import NDHWC, Array, Floats, tensor
from kernels.base.buffers import empty
from kernels.base.jit import parallel_kernel, prange

# Voxels one thread takes at a time.
_VOXELS = 1024


def forward(a: Array, b: Array, *more: Array) -> Array:
    """Channels of ``a``, then those of ``b``, then those of ``more``: (MB, D, H, W, sum of all channels).

    Parameters
    ----------
    a, b, *more : array, shape (MB, D, H, W, channels)
        All float32, or all float64; each has its own number of channels.

    Raises
    ------
    TypeError, ValueError
        If dtypes, ranks or the axes before the channels differ.
    """
    a = tensor("a", a, axes=NDHWC)
    named = {"b": b} | {f"more[{i}]": part for i, part in enumerate(more)}
    parts = [a, *(tensor(name, part, axes=NDHWC, dtype=a.dtype) for name, part in named.items())]
    for name, part in zip(named, parts[1:], strict=True):
        if part.shape[:-1] != a.shape[:-1]:
            raise ValueError(f"{name} must have shape {a.shape[:-1]} before its channels, got {part.shape}")
    if a.dtype == np.float64:
        return np.concatenate(parts, axis=-1)
    dst, first = empty((*a.shape[:-1], sum(part.shape[-1] for part in parts))), 0
    for part in parts:
        _copy_channels(_lines(part), 0, _lines(dst), first, part.shape[-1])
        first += part.shape[-1]
    return dst


def backward(diff_dst: Array, *splits: int) -> tuple[Array, ...]:
    """``diff_dst[..., : splits[0]]``, ``diff_dst[..., splits[0] : splits[1]]`` and so on, each contiguous.

    Raises
    ------
    TypeError, ValueError
        If ``diff_dst`` is no float volume, or ``splits`` leave a part without channels.
    """
    diff_dst = tensor("diff_dst", diff_dst, axes=NDHWC)
    channels, parts = diff_dst.shape[-1], list[Array]()
    for first, split in itertools.pairwise((0, *splits)):
        if not first < split < channels:
            raise ValueError(f"split must be from {first + 1} to {channels - 1}, got {split}")
    for first, end in itertools.pairwise((0, *splits, channels)):
        if diff_dst.dtype == np.float64:
            parts.append(diff_dst[..., first:end].copy())
        else:
            parts.append(empty((*diff_dst.shape[:-1], end - first)))
            _copy_channels(_lines(diff_dst), first, _lines(parts[-1]), 0, end - first)
    return tuple(parts)


def _lines(volume: Array) -> Array:
    """The channels of each voxel as one row."""
    return volume.reshape(-1, volume.shape[-1])


@parallel_kernel
def _copy_channels(src: Floats, src_channel: int, dst: Floats, dst_channel: int, count: int) -> None:
    voxels = src.shape[0]
    for block in prange((voxels + _VOXELS - 1) // _VOXELS):
        for voxel in range(block * _VOXELS, min((block + 1) * _VOXELS, voxels)):
            x = src[voxel, src_channel : src_channel + count]
            y = dst[voxel, dst_channel : dst_channel + count]
            for c in range(x.size):
                y[c] = x[c]
