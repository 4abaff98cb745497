"""Voxels of a deferred source, packed for the first or second level cache: where normalisation is applied."""

import numpy as np

from kernels.compiler import kernel
from kernels.fused.tensors import LANES, Floats, Shape
from kernels.fused.vectors import read
from kernels.simd import broadcast, load, store


@kernel
def pack_source(
    x: Floats,
    shape: Shape,
    scales: Floats,
    shifts: Floats,
    slope: float,
    image: int,
    first: int,
    count: int,
    panel: Floats,
    chunk: int,
) -> None:
    """Pack ``y`` of ``count`` voxels: ``panel[icb, voxel, lane]``, of ``chunk`` voxels each.

    Voxels past ``count`` repeat the last one. ``first`` is counted within the image.
    """
    _, CB, D, H, W, _ = shape
    slopes = broadcast(np.float32(slope))
    for block in range(CB):
        scale, shift = load(scales, block * LANES), load(shifts, block * LANES)
        src = (image * CB + block) * D * H * W + first
        for voxel in range(count):
            value = read(load(x, (src + voxel) * LANES), scale, shift, slopes)
            store(panel, (block * chunk + voxel) * LANES, value)
        for voxel in range(count, chunk):
            last = load(panel, (block * chunk + count - 1) * LANES)
            store(panel, (block * chunk + voxel) * LANES, last)
