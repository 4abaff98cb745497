"""Gradient of the bias: the sum of ``diff_dst`` over images and voxels.

`backward_bias` makes it of a whole tensor. Voxels are cut into chunks by their number alone; each chunk is
summed in double precision, and the chunks' sums are added in order, so the result is the same for any number
of threads. The compiled graph's kernels have the gradient in cache for that of the weights, and add it up
there with `add_voxels`: runs of 1024 voxels in float32, these in float64.
"""

import numpy as np

from kernels.base.arguments import Array, Doubles, Floats
from kernels.base.jit import kernel, parallel_kernel, prange
from kernels.base.simd import LANES, load, store

_CHUNK = 8192
# Voxels that are summed in float32, before they are added to a sum in float64.
_RUN = 1024


def backward_bias(diff_dst: Array) -> Array:
    """Sum over all axes but the last.

    Parameters
    ----------
    diff_dst : ndarray, shape=(MB, OD, OH, OW, OC), float32 or float64

    Returns
    -------
    ndarray, shape=(OC,), dtype of ``diff_dst``
    """
    voxels = diff_dst.reshape(-1, diff_dst.shape[-1])
    partial = np.zeros((-(-len(voxels) // _CHUNK), voxels.shape[1]))
    _sum_chunks(voxels, partial)
    return partial.sum(axis=0).astype(diff_dst.dtype)


@parallel_kernel
def _sum_chunks(voxels: Array, partial: Doubles) -> None:
    count, channels = voxels.shape
    for chunk in prange(partial.shape[0]):
        for voxel in range(chunk * _CHUNK, min((chunk + 1) * _CHUNK, count)):
            for c in range(channels):
                partial[chunk, c] += voxels[voxel, c]


@kernel
def add_voxels(data: Floats, at: int, voxels: int, totals: Doubles, sums: Floats) -> None:
    """Add the voxels of some channel blocks to ``totals``, channel by channel.

    Parameters
    ----------
    data : flat float32 array
    at, voxels : int
        Offset of the first voxel, and how many each block has; blocks follow each other.
    totals : float64, shape=(channels,)
        Added to.
    sums : flat float32 array
        Scratch for 16 floats.
    """
    for block in range(totals.size // LANES):
        first = at + block * voxels * LANES
        for run in range(0, voxels, _RUN):
            total = load(data, first + run * LANES)
            for voxel in range(run + 1, min(run + _RUN, voxels)):
                total = total + load(data, first + voxel * LANES)
            store(sums, 0, total)
            for lane in range(LANES):
                totals[block * LANES + lane] += sums[lane]
