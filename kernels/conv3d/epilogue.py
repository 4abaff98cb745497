"""What is done to a brick of a convolution's output while it is still in cache.

Forward: the bias is added, and the moments that batch norm needs are gathered. Each brick gives, for
each channel, its count, mean and sum of squared deviations, M2. Sums are taken of deviations from the
brick's first voxel, so nothing large cancels: data of mean 1000 and deviation 1 come out as accurate as
with two passes. `kernels.fused.statistics` combines the bricks, in order.

Backward: a gradient dy of y = act(scale * x + shift) becomes dz = dy * act'(scale * x + shift), and
the sums that the gradient of batch norm needs are gathered: sum of dz, and sum of dz * (x - mean).

    dst brick, one channel block    | row | row | row | ...   rows of W voxels of 16 lanes, from L2
    sums                            sum over a row in float32, over rows in float64

Source: Chan, Golub and LeVeque, "Algorithms for computing the sample variance" (1983)
"""

import numpy as np
import numpy.typing as npt

from kernels.compiler import kernel
from kernels.layout import Floats
from kernels.simd import LANES, broadcast, fma, load, store, where_positive

Brick = tuple[int, int, int]
Doubles = npt.NDArray[np.float64]


@kernel
def finish_forward(
    dst: Floats,
    first: int,
    size: Brick,
    start: Brick,
    stop: Brick,
    bias: Floats,
    at: int,
    moments: Doubles,
    row_sums: Floats,
) -> None:
    """Add the bias to one channel block of a brick, and take the moments of what comes out.

    Parameters
    ----------
    dst : flat float32 array
    first : int
        Offset of the block's first voxel.
    size : (D, H, W)
    start, stop : (d, h, w)
        The brick, whole rows: the first voxel and the one after the last.
    bias : flat float32 array
    at : int
        Index of the block's first channel.
    moments : float64, shape=(1, 3, 16)
        Filled with count, mean and M2; with shape (0, 3, 0) nothing is gathered.
    row_sums : flat float32 array
        Scratch for 48 floats.
    """
    _, H, W = size
    offset = load(bias, at)
    if moments.size == 0:
        for d in range(start[0], stop[0]):
            row = first + (d * H + start[1]) * W * LANES
            for w in range((stop[1] - start[1]) * W):
                store(dst, row + w * LANES, load(dst, row + w * LANES) + offset)
        return
    pivot = load(dst, first + (start[0] * H + start[1]) * W * LANES) + offset
    store(row_sums, 2 * LANES, pivot)
    moments[:] = 0.0
    for d in range(start[0], stop[0]):
        for h in range(start[1], stop[1]):
            row = first + (d * H + h) * W * LANES
            total = square = pivot - pivot
            for w in range(W):
                value = load(dst, row + w * LANES) + offset
                store(dst, row + w * LANES, value)
                deviation = value - pivot
                total = total + deviation
                square = fma(deviation, deviation, square)
            store(row_sums, 0, total)
            store(row_sums, LANES, square)
            for lane in range(LANES):
                moments[0, 1, lane] += row_sums[lane]
                moments[0, 2, lane] += row_sums[LANES + lane]
    count = (stop[0] - start[0]) * (stop[1] - start[1]) * W
    for lane in range(LANES):
        total_deviation = moments[0, 1, lane]
        moments[0, 0, lane] = count
        moments[0, 1, lane] = row_sums[2 * LANES + lane] + total_deviation / count
        moments[0, 2, lane] -= total_deviation * total_deviation / count


@kernel
def finish_backward(
    dst: Floats,
    first: int,
    size: Brick,
    start: Brick,
    stop: Brick,
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
    dst, first, size, start, stop, at, row_sums
        As in `finish_forward`; ``dst`` holds dy and is overwritten.
    x : flat float32 array
        The convolution output that was normalised, laid out as ``dst``.
    coefficients : flat float32 array
        ``scale``, ``shift`` and ``mean`` of that normalisation, one third each.
    slope : float32
    sums : float64, shape=(2, 16)
        Filled with the sums of dz and of dz * (x - mean).
    """
    _, H, W = size
    third = coefficients.size // 3
    scale, shift = load(coefficients, at), load(coefficients, third + at)
    mean = load(coefficients, 2 * third + at)
    slopes = broadcast(slope)
    sums[:] = 0.0
    for d in range(start[0], stop[0]):
        for h in range(start[1], stop[1]):
            row = first + (d * H + h) * W * LANES
            total = product = mean - mean
            for w in range(W):
                value = load(x, row + w * LANES)
                gradient = load(dst, row + w * LANES)
                gradient = where_positive(fma(scale, value, shift), gradient, slopes * gradient)
                store(dst, row + w * LANES, gradient)
                total = total + gradient
                product = fma(gradient, value - mean, product)
            store(row_sums, 0, total)
            store(row_sums, LANES, product)
            for lane in range(LANES):
                sums[0, lane] += row_sums[lane]
                sums[1, lane] += row_sums[LANES + lane]
