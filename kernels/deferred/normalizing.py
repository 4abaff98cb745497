"""Voxels of a deferred source, packed for the first or second level cache: where normalisation is applied."""

import numpy as np

from kernels.base.arguments import Floats
from kernels.base.jit import kernel
from kernels.base.simd import LANES, broadcast, load, read, store
from kernels.deferred.tensors import Shape, Source


def flat_source(source: Source) -> Source:
    """The source as kernels take it: its data flat."""
    return source._replace(data=source.data.reshape(-1))


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
    """Pack ``y`` of ``count`` voxels: ``panel[icb, voxel, lane]``, of ``chunk`` voxels each.

    Voxels past ``count`` repeat the last one. ``first`` is counted within the image.
    """
    _, CB, D, H, W, _ = shape
    x, scales, shifts, slope = source
    slopes = broadcast(np.float32(slope))
    for block in range(CB):
        scale, shift = load(scales, block * LANES), load(shifts, block * LANES)
        src = (image * CB + block) * D * H * W + first
        for voxel in range(chunk):
            value = load(x, (src + min(voxel, count - 1)) * LANES)
            store(panel, (block * chunk + voxel) * LANES, read(value, scale, shift, slopes))
