"""Gradient of the bias, which every rung shares: the sum of ``diff_dst`` over images and voxels.

Voxels are cut into chunks by their number alone; each chunk is summed in double precision, and the
chunks' sums are added in order, so the result is the same for any number of threads.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from kernels.compiler import parallel_kernel, prange
from kernels.conv3d.shapes import Array

_CHUNK = 8192


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
def _sum_chunks(voxels: npt.NDArray[np.floating[Any]], partial: npt.NDArray[np.float64]) -> None:
    count, channels = voxels.shape
    for chunk in prange(partial.shape[0]):
        for voxel in range(chunk * _CHUNK, min((chunk + 1) * _CHUNK, count)):
            for c in range(channels):
                partial[chunk, c] += voxels[voxel, c]
