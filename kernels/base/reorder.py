"""Reorders between the layouts of `kernels.base.layout`, for kernels, tests and benchmarks that compare them.

Each takes and returns float32. Lanes past the channels of an array come as zeros in a blocked layout, and are
dropped on the way back. Wrong shapes raise ValueError.
"""

import numpy as np

from kernels.base.arguments import Floats, tensor
from kernels.base.buffers import empty
from kernels.base.jit import parallel_kernel, prange, split_index
from kernels.base.layout import blocks, pack_src, pack_weights, unpack_weights
from kernels.base.simd import LANES


def reorder_ndhwc_to_nCdhw16c(src: Floats) -> Floats:  # noqa: N802
    """(MB, D, H, W, C) -> (MB, CB, D, H, W, 16)."""
    src = tensor("src", src, axes="MB, D, H, W, C", dtype=np.float32)
    MB, D, H, W, C = src.shape
    dst = empty((MB, blocks(C), D, H, W, LANES))
    for n in range(MB):
        pack_src(src[n], dst[n], (0, 0, 0), (1, 1, 1))
    return dst


def reorder_nCdhw16c_to_ndhwc(src: Floats, channels: int) -> Floats:  # noqa: N802
    """(MB, CB, D, H, W, 16) -> (MB, D, H, W, channels)."""
    src = tensor("src", src, axes="MB, CB, D, H, W, 16", dtype=np.float32)
    MB, CB, D, H, W, _ = src.shape
    if blocks(channels) != CB:
        raise ValueError(f"src has {CB} channel blocks; {channels} channels need {blocks(channels)}")
    dst = empty((MB, D, H, W, channels))
    _unblock(src.reshape(MB, CB, D * H * W, LANES), dst.reshape(MB, D * H * W, channels))
    return dst


@parallel_kernel
def _unblock(src: Floats, dst: Floats) -> None:
    MB, voxels, channels = dst.shape
    for task in prange(MB * voxels):
        n, voxel = split_index(task, voxels)
        for c in range(channels):
            dst[n, voxel, c] = src[n, c // LANES, voxel, c % LANES]


def reorder_OIdhw_to_OIdhw16i16o(weights: Floats) -> Floats:  # noqa: N802
    """(OC, IC, KD, KH, KW) -> (OCB, ICB, KD, KH, KW, 16, 16)."""
    weights = tensor("weights", weights, axes="OC, IC, KD, KH, KW", dtype=np.float32)
    OC, IC, KD, KH, KW = weights.shape
    dst = empty((blocks(OC), blocks(IC), KD, KH, KW, LANES, LANES))
    pack_weights(weights, dst.reshape(blocks(OC), blocks(IC), KD * KH * KW, LANES, LANES))
    return dst


def reorder_OIdhw16i16o_to_OIdhw(weights: Floats, OC: int, IC: int) -> Floats:  # noqa: N802
    """(OCB, ICB, KD, KH, KW, 16, 16) -> (OC, IC, KD, KH, KW)."""
    axes = "OCB, ICB, KD, KH, KW, 16, 16"
    weights = tensor("weights", weights, axes=axes, dtype=np.float32)
    OCB, ICB, KD, KH, KW, _, _ = weights.shape
    if (blocks(OC), blocks(IC)) != (OCB, ICB):
        raise ValueError(
            f"weights have {OCB} x {ICB} blocks; {OC} x {IC} channels need {blocks(OC)} x {blocks(IC)}"
        )
    dst = empty((OC, IC, KD, KH, KW))
    taps = KD * KH * KW
    unpack_weights(weights.reshape(1, OCB, ICB, taps, LANES, LANES), dst.reshape(OC, IC, taps))
    return dst
