"""What is done to a brick of a convolution's output while it is still in cache.

Forward: the bias is added, and the moments that batch norm needs are gathered. Each brick gives, for
each channel, its count, mean and sum of squared deviations, M2. Sums are taken of deviations from the
brick's first voxel, so nothing large cancels: data of mean 1000 and deviation 1 come out as accurate as
with two passes. `kernels.fused.statistics` combines the bricks, in order.

Backward: a gradient dy of y = act(scale * x + shift) becomes dz = dy * act'(scale * x + shift), and
the sums that the gradient of batch norm needs are gathered: sum of dz, and sum of dz * (x - mean).

The convolution leaves a brick of one channel block in its scratchpad, and this is the pass that writes
it out; for Winograd, the last transforms, along d and h, are done on the way. A large destination is
streamed past the caches.

    staged brick    planes of points, in cache    a voxel of each plane --transform--> md x mh voxels
    sums            over a row of windows in float32, over rows in float64

Source: Chan, Golub and LeVeque, "Algorithms for computing the sample variance" (1983)
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba.extending import overload

from kernels.compiler import kernel
from kernels.conv3d.cook_toom import OUTPUT, sizes
from kernels.conv3d.transform import transform_axis
from kernels.layout import Floats
from kernels.simd import (
    LANES,
    broadcast,
    literals,
    load,
    store,
    tile_add,
    tile_dot,
    tile_first,
    tile_fma,
    tile_load,
    tile_mask,
    tile_store,
    tile_sum,
)
from kernels.streaming import put_tile

Brick = tuple[int, int, int]
Doubles = npt.NDArray[np.float64]


class Staged(NamedTuple):
    """A brick of one channel block between convolution and destination.

    Attributes
    ----------
    at, apart : int
        Offset of the first plane of points in the scratchpad, and from a plane to the next.
    extent : (deep, high, wide)
        Windows along d and h, and voxels in a row; the destination may hold less.
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
    apart: int
    extent: Brick
    first: int
    size: Brick
    start: Brick
    stop: Brick
    streams: bool


@kernel
def place(brick: Staged, row: int, md: int, mh: int) -> tuple[int, int, int, int]:
    """Where a row of windows is staged, where it goes, and how many planes and rows of it are wanted."""
    _, H, W = brick.size
    d = brick.start[0] + row // brick.extent[1] * md
    h = brick.start[1] + row % brick.extent[1] * mh
    src = brick.at + row * brick.extent[2] * LANES
    planes, lines = min(md, brick.stop[0] - d), min(mh, brick.stop[1] - h)
    return src, brick.first + (d * H + h) * W * LANES, planes, lines if planes > 0 else 0


def staged_tile(own: Any, at: int, apart: int, md: int, mh: int) -> Any:
    """Voxels ``md x mh`` that the points of a window make; runs only inside a compiled kernel."""
    raise NotImplementedError("runs only inside a compiled kernel")


@overload(staged_tile, prefer_literal=True)
def _staged_tile(own, at, apart, md, mh):  # type: ignore[no-untyped-def]
    constants = literals(md, mh)
    if constants is None:
        return None
    MD, MH = constants
    PD, PH, K = sizes(OUTPUT, MD)[0], sizes(OUTPUT, MH)[0], OUTPUT

    def implementation(own, at, apart, md, mh):  # type: ignore[no-untyped-def]
        tile = tile_load(own, at, PH * apart, apart, 0, PD, PH, 1)
        return transform_axis(transform_axis(tile, K, MH, PD, 1), K, MD, 1, MH)

    return implementation


def finish_forward(
    own: Floats,
    brick: Staged,
    dst: Floats,
    bias: Floats,
    at: int,
    moments: Doubles,
    row_sums: Floats,
    md: int,
    mh: int,
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
    md, mh : int
        Voxels that a window makes along d and h, compile-time constants.
    """
    raise NotImplementedError("runs only inside a compiled kernel")


@overload(finish_forward, prefer_literal=True)
def _finish_forward(own, brick, dst, bias, at, moments, row_sums, md, mh):  # type: ignore[no-untyped-def]
    constants = literals(md, mh)
    if constants is None:
        return None
    MD, MH = constants
    PH = sizes(OUTPUT, MH)[0]

    def implementation(own, brick, dst, bias, at, moments, row_sums, md, mh):  # type: ignore[no-untyped-def]
        _, H, W = brick.size
        apart = brick.apart
        offset = load(bias, at)
        pivot = tile_first(staged_tile(own, brick.at, apart, MD, MH)) + offset
        store(row_sums, 2 * LANES, pivot)
        moments[:] = 0.0
        for row in range(brick.extent[0] * brick.extent[1]):
            src, to, planes, lines = place(brick, row, MD, MH)
            if planes == MD and lines == MH:
                forward_row(
                    own, src, apart, dst, to, brick, offset, pivot, moments, row_sums, MD, MH
                )
                continue
            invert_row(own, src, apart, W, MD, MH)
            for k in range(planes * lines):
                kd, kh = k // lines, k % lines
                x, y = src + (kd * PH + kh) * apart, to + (kd * H + kh) * W * LANES
                forward_row(own, x, apart, dst, y, brick, offset, pivot, moments, row_sums, 1, 1)
        if moments.size > 0:
            start, stop = brick.start, brick.stop
            count = (stop[0] - start[0]) * (stop[1] - start[1]) * W
            for lane in range(LANES):
                total_deviation = moments[0, 1, lane]
                moments[0, 0, lane] = count
                moments[0, 1, lane] = row_sums[2 * LANES + lane] + total_deviation / count
                moments[0, 2, lane] -= total_deviation * total_deviation / count

    return implementation


def forward_row(
    own: Any,
    src: int,
    apart: int,
    dst: Any,
    to: int,
    brick: Any,
    offset: Any,
    pivot: Any,
    moments: Any,
    row_sums: Any,
    md: int,
    mh: int,
) -> None:
    """Finish a row of windows; runs only inside a compiled kernel."""
    raise NotImplementedError("runs only inside a compiled kernel")


@overload(forward_row, prefer_literal=True)
def _forward_row(  # type: ignore[no-untyped-def]
    own, src, apart, dst, to, brick, offset, pivot, moments, row_sums, md, mh
):
    constants = literals(md, mh)
    if constants is None:
        return None
    MD, MH = constants

    def implementation(  # type: ignore[no-untyped-def]
        own, src, apart, dst, to, brick, offset, pivot, moments, row_sums, md, mh
    ):
        _, H, W = brick.size
        total = square = zero = broadcast(np.float32(0.0))
        for w in range(W):
            tile = tile_add(staged_tile(own, src + w * LANES, apart, MD, MH), offset)
            put_tile(dst, to + w * LANES, H * W * LANES, W * LANES, tile, brick.streams, MD, MH)
            tile = tile_add(tile, zero - pivot)
            total = total + tile_sum(tile)
            square = square + tile_dot(tile, tile)
        store(row_sums, 0, total)
        store(row_sums, LANES, square)
        if moments.size > 0:
            for lane in range(LANES):
                moments[0, 1, lane] += row_sums[lane]
                moments[0, 2, lane] += row_sums[LANES + lane]

    return implementation


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
    md: int,
    mh: int,
) -> None:
    """Turn dy into dz in one channel block of a brick, and gather its two sums.

    Parameters
    ----------
    own, brick, dst, at, row_sums, md, mh
        As in `finish_forward`; what is staged makes dy.
    x : flat float32 array
        The convolution output that was normalised, laid out as ``dst``.
    coefficients : flat float32 array
        ``scale``, ``shift`` and ``mean`` of that normalisation, one third each.
    slope : float32
    sums : float64, shape=(2, 16)
        Filled with the sums of dz and of dz * (x - mean).
    """
    raise NotImplementedError("runs only inside a compiled kernel")


@overload(finish_backward, prefer_literal=True)
def _finish_backward(  # type: ignore[no-untyped-def]
    own, brick, dst, x, coefficients, at, slope, sums, row_sums, md, mh
):
    constants = literals(md, mh)
    if constants is None:
        return None
    MD, MH = constants
    PH = sizes(OUTPUT, MH)[0]

    def implementation(  # type: ignore[no-untyped-def]
        own, brick, dst, x, coefficients, at, slope, sums, row_sums, md, mh
    ):
        _, H, W = brick.size
        apart, third = brick.apart, coefficients.size // 3
        scale, shift = load(coefficients, at), load(coefficients, third + at)
        mean, slopes = load(coefficients, 2 * third + at), broadcast(slope)
        sums[:] = 0.0
        for row in range(brick.extent[0] * brick.extent[1]):
            src, to, planes, lines = place(brick, row, MD, MH)
            if planes == MD and lines == MH:
                backward_row(
                    own,
                    src,
                    apart,
                    dst,
                    to,
                    x,
                    brick,
                    scale,
                    shift,
                    mean,
                    slopes,
                    sums,
                    row_sums,
                    MD,
                    MH,
                )
                continue
            invert_row(own, src, apart, W, MD, MH)
            for k in range(planes * lines):
                kd, kh = k // lines, k % lines
                y, z = src + (kd * PH + kh) * apart, to + (kd * H + kh) * W * LANES
                backward_row(
                    own,
                    y,
                    apart,
                    dst,
                    z,
                    x,
                    brick,
                    scale,
                    shift,
                    mean,
                    slopes,
                    sums,
                    row_sums,
                    1,
                    1,
                )

    return implementation


def backward_row(
    own: Any,
    src: int,
    apart: int,
    dst: Any,
    to: int,
    x: Any,
    brick: Any,
    scale: Any,
    shift: Any,
    mean: Any,
    slopes: Any,
    sums: Any,
    row_sums: Any,
    md: int,
    mh: int,
) -> None:
    """Finish a row of windows; runs only inside a compiled kernel."""
    raise NotImplementedError("runs only inside a compiled kernel")


@overload(backward_row, prefer_literal=True)
def _backward_row(  # type: ignore[no-untyped-def]
    own, src, apart, dst, to, x, brick, scale, shift, mean, slopes, sums, row_sums, md, mh
):
    constants = literals(md, mh)
    if constants is None:
        return None
    MD, MH = constants

    def implementation(  # type: ignore[no-untyped-def]
        own, src, apart, dst, to, x, brick, scale, shift, mean, slopes, sums, row_sums, md, mh
    ):
        _, H, W = brick.size
        plane, line = H * W * LANES, W * LANES
        total = product = zero = broadcast(np.float32(0.0))
        for w in range(W):
            tile = staged_tile(own, src + w * LANES, apart, MD, MH)
            value = tile_load(x, to + w * LANES, plane, line, 0, MD, MH, 1)
            tile = tile_mask(tile, tile_fma(scale, value, shift), slopes)
            put_tile(dst, to + w * LANES, plane, line, tile, brick.streams, MD, MH)
            total = total + tile_sum(tile)
            product = product + tile_dot(tile, tile_add(value, zero - mean))
        store(row_sums, 0, total)
        store(row_sums, LANES, product)
        for lane in range(LANES):
            sums[0, lane] += row_sums[lane]
            sums[1, lane] += row_sums[LANES + lane]

    return implementation


def invert_row(own: Any, src: int, apart: int, voxels: int, md: int, mh: int) -> None:
    """Put the voxels that a row of windows makes in the place of its points, for one to be read alone."""
    raise NotImplementedError("runs only inside a compiled kernel")


@overload(invert_row, prefer_literal=True)
def _invert_row(own, src, apart, voxels, md, mh):  # type: ignore[no-untyped-def]
    constants = literals(md, mh)
    if constants is None:
        return None
    MD, MH = constants
    PH = sizes(OUTPUT, MH)[0]

    def implementation(own, src, apart, voxels, md, mh):  # type: ignore[no-untyped-def]
        for w in range(voxels):
            at = src + w * LANES
            tile = staged_tile(own, at, apart, MD, MH)
            tile_store(tile, own, at, PH * apart, apart, 0, MD, MH, 1)

    return implementation
