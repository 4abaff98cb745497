"""Reorders between channels last and blocks of 16 channels, where the compiled graph begins and ends.

    to_blocked   NDHWC to nCdhw16c
    to_ndhwc     nCdhw16c, which may still have to be normalised, to NDHWC

An operator that the graph does not fuse runs on NDHWC, between one of each.

Idea       One vector a voxel, even if fewer channels are left. What is stored past them is written over by
           the next voxel, which comes later in the same task. Only where a vector would reach beyond the
           task, the kernel moves single floats.
Traffic    Everything is read once and written once.
"""

import numpy as np

from kernels.base.arguments import Floats
from kernels.base.jit import parallel_kernel, prange, signed
from kernels.base.layout import fill_blocked as to_blocked
from kernels.base.simd import LANES, broadcast, load, read, store
from kernels.deferred.masking import bands, place_band
from kernels.deferred.normalizing import aligned, flat_source
from kernels.deferred.tensors import Shape, Source

__all__ = ["to_blocked", "to_ndhwc"]


def to_ndhwc(source: Source, dst: Floats) -> None:
    """Fill ``dst``, (MB, D, H, W, C), with what a source, data (MB, CB, D, H, W, 16), means."""
    _to_ndhwc(flat_source(source), source.data.shape, dst.reshape(-1), dst.shape[-1])


@parallel_kernel
def _to_ndhwc(source: Source, shape: Shape, dst: Floats, C: int) -> None:
    MB, CB, D, H, W, _ = shape
    x, scales, shifts, slope = source[:4]
    volume = D * H * W
    for band in prange(MB * D * bands(H, W)):
        index = signed(band)
        image, first, count = place_band(index, shape)
        slopes, single = broadcast(np.float32(slope)), aligned(LANES)
        end = (image * volume + first + count) * C
        for voxel in range(first, first + count):
            for block in range(CB):
                channel, vectors = block * LANES, (image * CB + block) * LANES
                scale, shift = load(scales, vectors), load(shifts, vectors)
                data = load(x, vectors * volume + voxel * LANES)
                at = (image * volume + voxel) * C + channel
                value = read(data, scale, shift, slopes)
                if at + LANES <= end:
                    store(dst, at, value)
                else:
                    store(single, 0, value)
                    for lane in range(min(LANES, C - channel)):
                        dst[at + lane] = single[lane]
