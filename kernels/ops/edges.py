"""Reorders between channels last and blocks of 16 channels, where the compiled graph begins and ends.

    to_blocked   NDHWC to nCdhw16c
    to_ndhwc     nCdhw16c, which may still have to be normalised, to NDHWC

An operator that the graph does not fuse runs on NDHWC, between one of each. An eager operator whose fast
kernel is on blocks calls `blocked` and `channels_last`.

Idea       One vector a voxel, even if fewer channels are left. What is loaded past them belongs to the next
           voxel and is set to zero. What is stored past them is written over by the next voxel, which comes
           later in the same task. Only where a vector would reach beyond the array, or the task, the kernels
           move single floats.
Traffic    Everything is read once and written once.
"""

import numpy as np

from kernels.base.arguments import Floats
from kernels.base.buffers import empty
from kernels.base.jit import parallel_kernel, prange, signed
from kernels.base.layout import blocks
from kernels.base.simd import LANES, broadcast, load, read, store, where_above
from kernels.deferred.masking import band_of_task, bands, place_band
from kernels.deferred.normalizing import aligned, flat_source
from kernels.deferred.tensors import Shape, Source, plain


def blocked(src: Floats) -> Floats:
    """``src``, shape=(MB, D, H, W, C), as (MB, CB, D, H, W, 16); a view if C is 16."""
    MB, *sizes, C = src.shape
    if C == LANES:
        return src.reshape(MB, 1, *sizes, LANES)
    dst = empty_blocked(src.shape)
    to_blocked(src, dst)
    return dst


def empty_blocked(shape: tuple[int, ...]) -> Floats:
    """Array to fill for a volume of shape (MB, D, H, W, C), as (MB, CB, D, H, W, 16)."""
    MB, *sizes, C = shape
    return empty((MB, blocks(C), *sizes, LANES))


def channels_last(data: Floats, channels: int) -> Floats:
    """``data``, shape=(MB, CB, D, H, W, 16), as (MB, D, H, W, channels); a view if there are 16."""
    MB, _, *sizes, _ = data.shape
    if channels == LANES:
        return data.reshape(MB, *sizes, LANES)
    dst = empty((MB, *sizes, channels))
    to_ndhwc(plain(data, channels), dst)
    return dst


def to_blocked(src: Floats, dst: Floats) -> None:
    """Fill ``dst``, (MB, CB, D, H, W, 16), with ``src``, (MB, D, H, W, C), and zeros past channel ``C``."""
    places = np.arange(LANES, dtype=np.float32)
    _to_blocked(src.reshape(-1), src.shape[-1], places, dst.reshape(-1), dst.shape)


def to_ndhwc(source: Source, dst: Floats) -> None:
    """Fill ``dst``, (MB, D, H, W, C), with what a source, data (MB, CB, D, H, W, 16), means."""
    _to_ndhwc(flat_source(source), source.data.shape, dst.reshape(-1), dst.shape[-1])


@parallel_kernel
def _to_blocked(src: Floats, C: int, places: Floats, dst: Floats, shape: Shape) -> None:
    MB, CB, D, H, W, _ = shape
    volume = D * H * W
    for task in prange(MB * CB * D * bands(H, W)):
        first, count, block, _ = band_of_task(task, shape)
        channel = block % CB * LANES
        lanes = min(LANES, C - channel)
        used, zero = broadcast(np.float32(lanes)), broadcast(np.float32(0))
        place, single = load(places, 0), aligned(LANES)
        # The same voxel in src, where an image has one block.
        shift = (first // (volume * CB) - first // volume) * volume
        for voxel in range(first, first + count):
            at = (voxel + shift) * C + channel
            if at + LANES <= src.size:
                value = load(src, at)
            else:
                for lane in range(lanes):
                    single[lane] = src[at + lane]
                value = load(single, 0)
            store(dst, voxel * LANES, where_above(used, place, value, zero))


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
