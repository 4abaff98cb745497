"""What is done to a brick of a convolution's output while it is still in cache.

Forward: the bias is added, and the moments that batch norm needs are gathered. Each brick gives, for
each channel, its count, mean and sum of squared deviations, M2. Sums are taken of deviations from the
brick's first voxel, so nothing large cancels: data of mean 1000 and deviation 1 come out as accurate as
with two passes. `kernels.fused.statistics` combines the bricks, in order.

Backward: a gradient dy of y = act(scale * x + shift) becomes dz = dy * act'(scale * x + shift), and
the sums that the gradient of batch norm needs are gathered: sum of dz, and sum of dz * (x - mean).

The convolution leaves a brick of one channel block in its scratchpad, and this is the pass that writes
it out. A large destination is streamed past the caches.

    staged brick, one channel block | row | row | row | ...   rows of voxels of 16 lanes, in cache
    sums                            sum over a row in float32, over rows in float64

Source: Chan, Golub and LeVeque, "Algorithms for computing the sample variance" (1983)
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kernels.compiler import kernel
from kernels.layout import Floats
from kernels.simd import LANES, broadcast, fma, load, store, stream, where_positive

Brick = tuple[int, int, int]
Doubles = npt.NDArray[np.float64]


class Staged(NamedTuple):
    """A brick of one channel block between convolution and destination.

    Attributes
    ----------
    at : int
        Offset of its first voxel in the scratchpad.
    lines, wide : int
        Rows in a plane, and voxels in a row, of the scratchpad; the destination may hold less.
    first : int
        Offset of the channel block's first voxel in the destination.
    size : (D, H, W)
        Of the destination.
    start, stop : (d, h, w)
        The brick, whole rows: the first voxel and the one after the last.
    streams : bool
        Whether to write past the caches.
    """

    at: int
    lines: int
    wide: int
    first: int
    size: Brick
    start: Brick
    stop: Brick
    streams: bool


@kernel
def finish_forward(
    own: Floats,
    brick: Staged,
    dst: Floats,
    bias: Floats,
    at: int,
    moments: Doubles,
    row_sums: Floats,
) -> None:
    """Add the bias to one channel block of a brick, and take the moments of what comes out.

    Parameters
    ----------
    own : flat float32 array
        The scratchpad.
    brick : Staged
    dst : flat float32 array
    bias : flat float32 array
    at : int
        Index of the block's first channel.
    moments : float64, shape=(1, 3, 16)
        Filled with count, mean and M2; with shape (0, 3, 0) nothing is gathered.
    row_sums : flat float32 array
        Scratch for 48 floats.
    """
    _, H, W = brick.size
    start, stop = brick.start, brick.stop
    offset = load(bias, at)
    pivot = load(own, brick.at) + offset
    store(row_sums, 2 * LANES, pivot)
    moments[:] = 0.0
    for d in range(start[0], stop[0]):
        for h in range(start[1], stop[1]):
            row = brick.first + (d * H + h) * W * LANES
            src = brick.at + ((d - start[0]) * brick.lines + h - start[1]) * brick.wide * LANES
            total = square = pivot - pivot
            for w in range(W):
                value = load(own, src + w * LANES) + offset
                put(dst, row + w * LANES, value, brick.streams)
                deviation = value - pivot
                total = total + deviation
                square = fma(deviation, deviation, square)
            store(row_sums, 0, total)
            store(row_sums, LANES, square)
            if moments.size > 0:
                for lane in range(LANES):
                    moments[0, 1, lane] += row_sums[lane]
                    moments[0, 2, lane] += row_sums[LANES + lane]
    if moments.size > 0:
        count = (stop[0] - start[0]) * (stop[1] - start[1]) * W
        for lane in range(LANES):
            total_deviation = moments[0, 1, lane]
            moments[0, 0, lane] = count
            moments[0, 1, lane] = row_sums[2 * LANES + lane] + total_deviation / count
            moments[0, 2, lane] -= total_deviation * total_deviation / count


@kernel
def finish_backward(
    own: Floats,
    brick: Staged,
    dst: Floats,
    x: Floats,
    coefficients: Floats,
    at: int,
    slope: np.float32,
    sums: Doubles,
    row_sums: Floats,
) -> None:
    """Turn dy into dz in one channel block of a brick, and gather its two sums.

    Parameters
    ----------
    own, brick, dst, at, row_sums
        As in `finish_forward`; the scratchpad holds dy.
    x : flat float32 array
        The convolution output that was normalised, laid out as ``dst``.
    coefficients : flat float32 array
        ``scale``, ``shift`` and ``mean`` of that normalisation, one third each.
    slope : float32
    sums : float64, shape=(2, 16)
        Filled with the sums of dz and of dz * (x - mean).
    """
    _, H, W = brick.size
    start, stop = brick.start, brick.stop
    third = coefficients.size // 3
    scale, shift = load(coefficients, at), load(coefficients, third + at)
    mean = load(coefficients, 2 * third + at)
    slopes = broadcast(slope)
    sums[:] = 0.0
    for d in range(start[0], stop[0]):
        for h in range(start[1], stop[1]):
            row = brick.first + (d * H + h) * W * LANES
            src = brick.at + ((d - start[0]) * brick.lines + h - start[1]) * brick.wide * LANES
            total = product = mean - mean
            for w in range(W):
                value = load(x, row + w * LANES)
                gradient = load(own, src + w * LANES)
                gradient = where_positive(fma(scale, value, shift), gradient, slopes * gradient)
                put(dst, row + w * LANES, gradient, brick.streams)
                total = total + gradient
                product = fma(gradient, value - mean, product)
            store(row_sums, 0, total)
            store(row_sums, LANES, product)
            for lane in range(LANES):
                sums[0, lane] += row_sums[lane]
                sums[1, lane] += row_sums[LANES + lane]


@kernel
def put(dst: Floats, at: int, vector: Any, streams: bool) -> None:
    """Store a vector, past the caches or not."""
    if streams:
        stream(dst, at, vector)
    else:
        store(dst, at, vector)
