"""Logits of a block of voxels, a plane for each class; and ``infer``, which writes probabilities."""

import numpy as np

from kernels.base.arguments import Floats
from kernels.base.jit import kernel, parallel_kernel, prange, signed
from kernels.base.simd import LANES, LINE, address, broadcast, prefetch
from kernels.base.tiles import tile_fma, tile_load, tile_rank1, tile_store, tile_transpose, tile_zero
from kernels.deferred.masking import bands, place_band
from kernels.deferred.normalizing import aligned, flat_source, pack_source
from kernels.deferred.tensors import Shape, Source
from kernels.ops.head.planes import probabilities
from kernels.ops.softmax_dice.planes import BLOCK, scatter

# Classes of a register tile; the planes of a block are filled up to whole tiles.
TILE = 4


def infer(source: Source, weights: Floats, bias: Floats, dst: Floats) -> None:
    """Probabilities of the classes, channels last.

    Parameters
    ----------
    source : Source, data of shape (MB, ICB, D, H, W, 16)
    weights : float32 array, shape=(classes, IC, 1, 1, 1)
    bias : float32 array, shape=(classes,)
    dst : float32 array, shape=(MB, D, H, W, classes)
        Filled.
    """
    _infer(
        flat_source(source),
        source.data.shape,
        by_channel(weights, source.data.shape[1]),
        starts(bias),
        dst.reshape(-1, bias.size),
    )


def by_channel(weights: Floats, ICB: int) -> Floats:
    """``weights[ic, class]``, with zeros past the last channel and past the last class of a tile."""
    classes, IC = weights.shape[:2]
    padded = np.zeros((ICB * LANES, -(-classes // TILE) * TILE), np.float32)
    padded[:IC, :classes] = weights.reshape(classes, IC).T
    return padded.reshape(-1)


def by_class(weights: Floats, ICB: int) -> Floats:
    """``weights[class, ic]``, with zeros past the last channel."""
    classes, IC = weights.shape[:2]
    padded = np.zeros((classes, ICB * LANES), np.float32)
    padded[:, :IC] = weights.reshape(classes, IC)
    return padded.reshape(-1)


def starts(bias: Floats) -> Floats:
    """Each bias 16 times: what the sums of a class start from."""
    padded = np.zeros((-(-bias.size // TILE) * TILE, LANES), np.float32)
    padded[: bias.size] = bias[:, np.newaxis]
    return padded.reshape(-1)


@kernel
def logits_of_block(
    y: Floats,
    end: int,
    weights: Floats,
    bias: Floats,
    planes: Floats,
    x: Floats,
    ahead: int,
    step: int,
    turned: Floats,
) -> None:
    """Logits of a block's voxels.

    Parameters
    ----------
    y : flat float32 array
        ``y[icb, voxel, lane]`` of 128 voxels.
    end : int
        Voxels, rounded up to whole vectors.
    weights, bias
        From `by_channel` and `starts`.
    planes : flat float32 array
        Filled: ``planes[class, voxel]``, classes up to whole tiles.
    x : flat float32 array
        The source. While one block of voxels is worked on, the next is fetched from memory.
    ahead, step : int
        The next block's first voxel, and the voxels from one channel block to the next.
    turned : flat float32 array
        Scratch for 16 vectors.
    """
    classes = planes.size // BLOCK
    one = broadcast(np.float32(1))
    for voxel in range(0, end, LANES):
        for block in range(y.size // (BLOCK * LANES)):
            square = tile_load(y, (block * BLOCK + voxel) * LANES, 0, LANES, 0, 1, LANES, 1)
            tile_store(tile_transpose(square), turned, 0, 0, LANES, 0)
            soon = address(x, (ahead + block * step + voxel) * LANES)
            for c in range(0, classes, TILE):
                at = c * BLOCK + voxel
                if block == 0:
                    sums = tile_load(bias, c * LANES, 0, LANES, 0, 1, TILE, 1)
                else:
                    sums = tile_load(planes, at, 0, BLOCK, 0, 1, TILE, 1)
                # Even and odd channels apart: one sum waits for itself.
                odd = tile_zero(1, TILE, 1)
                for lane in range(0, LANES, 2):
                    prefetch(soon + lane * LINE)
                    prefetch(soon + (lane + 1) * LINE)
                    column, v = (block * LANES + lane) * classes + c, lane * LANES
                    sums = tile_rank1(sums, weights, column, 0, 1, turned, v)
                    column, v = column + classes, v + LANES
                    odd = tile_rank1(odd, weights, column, 0, 1, turned, v)
                tile_store(tile_fma(one, sums, odd), planes, at, 0, BLOCK, 0)


@parallel_kernel
def _infer(source: Source, shape: Shape, weights: Floats, bias: Floats, dst: Floats) -> None:
    MB, _, D, H, W, _ = shape
    for band in prange(MB * D * bands(H, W)):
        _infer_band(signed(band), source, shape, weights, bias, dst)


@kernel
def _infer_band(band: int, source: Source, shape: Shape, weights: Floats, bias: Floats, dst: Floats) -> None:
    _, ICB, D, H, W, _ = shape
    image, begin, voxels = place_band(band, shape)
    classes, lanes, volume = dst.shape[1], ICB * LANES, D * H * W
    y, planes, scratch = (aligned(lanes * BLOCK), aligned(weights.size // lanes * BLOCK), aligned(BLOCK))
    turned = aligned(LANES * LANES)
    for first in range(begin, begin + voxels, BLOCK):
        count = min(BLOCK, begin + voxels - first)
        end = (count + LANES - 1) // LANES * LANES
        pack_source(source, shape, image, first, count, y, BLOCK)
        ahead = image * ICB * volume + first + BLOCK
        logits_of_block(y, end, weights, bias, planes, source.data, ahead, volume, turned)
        probabilities(planes, end, classes, scratch)
        scatter(planes.reshape(-1, BLOCK)[:classes], image * volume + first, count, dst)
