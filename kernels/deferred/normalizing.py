"""Voxels of a source, normalised: packed for a cache, or written out for readers that cannot normalise."""

import numpy as np

from kernels.base.arguments import Floats
from kernels.base.jit import kernel, parallel_kernel, prange, signed
from kernels.base.simd import LANES, broadcast, fma, load, read, store
from kernels.deferred.tensors import Shape, Source


def flat_source(source: Source) -> Source:
    """The source as kernels take it: its tensors flat."""
    return source._replace(data=source.data.reshape(-1), other=source.other.reshape(-1))


@kernel
def aligned(size: int) -> Floats:
    """Flat temporary array at the start of a cache line: a vector across two lines costs double."""
    raw = np.empty(size + LANES, np.float32)
    start = -(raw.ctypes.data // 4) % LANES
    return raw[start : start + size]


@kernel
def pack_source(
    source: Source, shape: Shape, image: int, first: int, count: int, panel: Floats, chunk: int
) -> None:
    """Pack ``count`` voxels of a source of one tensor: ``panel[icb, voxel, lane]``, of ``chunk`` voxels each.

    Voxels past ``count`` repeat the last one. ``first`` is counted within the image.
    """
    _, CB, D, H, W, _ = shape
    slopes = broadcast(np.float32(source.slope))
    for block in range(CB):
        vectors = (image * CB + block) * LANES
        scale, shift = load(source.scale, vectors), load(source.shift, vectors)
        src = (image * CB + block) * D * H * W + first
        for voxel in range(chunk):
            value = load(source.data, (src + min(voxel, count - 1)) * LANES)
            store(panel, (block * chunk + voxel) * LANES, read(value, scale, shift, slopes))


def normalize(source: Source, dst: Floats) -> None:
    """Write what a source means: everything is read once and written once, which a fused reader saves.

    Parameters
    ----------
    source : Source, data of shape (MB, CB, D, H, W, 16)
    dst : float32 array, the same shape
        Filled, a plain tensor; may be the data themselves.
    """
    _normalize(flat_source(source), dst.shape, dst.reshape(-1))


@parallel_kernel
def _normalize(source: Source, shape: Shape, dst: Floats) -> None:
    MB, CB, D, H, W, _ = shape
    row = H * W * LANES
    for plane in prange(MB * CB * D):
        vectors = signed(plane) // D * LANES
        scale, shift = load(source.scale, vectors), load(source.shift, vectors)
        if source.other.size > 0:
            also = load(source.also, vectors)
            for i in range(plane * row, (plane + 1) * row, LANES):
                store(dst, i, fma(scale, load(source.data, i), fma(also, load(source.other, i), shift)))
        else:
            slopes = broadcast(np.float32(source.slope))
            for i in range(plane * row, (plane + 1) * row, LANES):
                store(dst, i, read(load(source.data, i), scale, shift, slopes))
