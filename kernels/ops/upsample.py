"""Nearest-neighbour upsampling: each voxel becomes a block of equal voxels.

    dst[n, d, h, w, c] = src[n, d // FD, h // FH, w // FW, c]

Traffic    Forward reads ``src`` and writes ``FD*FH*FW`` times as much, backward the reverse.
Saves      nothing
Numerics   Backward adds the items of a block in the order d, h, w, in the type of the arrays.

``src`` is a float32 or float64 array (MB, D, H, W, C), ``dst`` is (MB, D * FD, H * FH, W * FW, C), and
``factor`` is (FD, FH, FW). Both functions raise TypeError or ValueError if the array is no float volume, or
``factor`` is not three whole numbers from 1 on.
"""

from collections.abc import Sequence

import numpy as np

from kernels.base.arguments import NDHWC, Array, Floats, tensor, triple
from kernels.base.buffers import empty
from kernels.base.jit import parallel_kernel, prange


def forward(src: Array, factor: int | Sequence[int] = (2, 2, 2)) -> Array:
    """``dst``: each voxel ``FD x FH x FW`` times."""
    src = tensor("src", src, axes=NDHWC)
    FD, FH, FW = triple("factor", factor)
    if src.dtype == np.float64:
        return src.repeat(FD, axis=1).repeat(FH, axis=2).repeat(FW, axis=3)
    MB, D, H, W, C = src.shape
    dst = empty((MB, D * FD, H * FH, W * FW, C))
    _forward(src.reshape(MB * D, H, W, C), dst.reshape(MB * D, FD, H, FH, W, FW, C))
    return dst


def backward(diff_dst: Array, factor: int | Sequence[int] = (2, 2, 2)) -> Array:
    """Gradient of ``src``: the sum over each block, of which ``diff_dst`` must have whole ones."""
    diff_dst = tensor("diff_dst", diff_dst, axes=NDHWC)
    FD, FH, FW = triple("factor", factor)
    MB, OD, OH, OW, C = diff_dst.shape
    if OD % FD or OH % FH or OW % FW:
        raise ValueError(f"diff_dst must be a multiple of the factor {(FD, FH, FW)}, got {diff_dst.shape}")
    D, H, W = OD // FD, OH // FH, OW // FW
    blocks = diff_dst.reshape(MB * D, FD, H, FH, W, FW, C)
    if diff_dst.dtype == np.float64:
        return blocks.sum(axis=(1, 3, 5)).reshape(MB, D, H, W, C)
    diff_src = empty((MB, D, H, W, C))
    _backward(blocks, diff_src.reshape(MB * D, H, W, C))
    return diff_src


# --- float32: arrays of blocks, (MB * D, FD, H, FH, W, FW, C) -----------------------------------------


@parallel_kernel
def _forward(src: Floats, dst: Floats) -> None:
    planes, FD, H, FH, W, FW, C = dst.shape
    for row in prange(planes * H):
        d, h = row // H, row % H
        for fd in range(FD):
            for fh in range(FH):
                for w in range(W):
                    for fw in range(FW):
                        for c in range(C):
                            dst[d, fd, h, fh, w, fw, c] = src[d, h, w, c]


@parallel_kernel
def _backward(diff_dst: Floats, diff_src: Floats) -> None:
    planes, FD, H, FH, W, FW, C = diff_dst.shape
    for row in prange(planes * H):
        d, h = row // H, row % H
        diff_src[d, h] = 0.0
        for fd in range(FD):
            for fh in range(FH):
                for w in range(W):
                    for fw in range(FW):
                        for c in range(C):
                            diff_src[d, h, w, c] += diff_dst[d, fd, h, fh, w, fw, c]
