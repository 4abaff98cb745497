"""What is done to a brick of a convolution's output while it is still in cache.

Forward: the bias is added, and the moments that batch norm needs are gathered. Each brick gives, for
each channel, its count, mean and sum of squared deviations, M2. Sums are taken of deviations from the
brick's first voxel, so nothing large cancels: data of mean 1000 and deviation 1 come out as accurate as
with two passes. `kernels.deferred.statistics` combines the bricks, in order.

Backward: a gradient dy of y = act(scale * x + shift) becomes dz = dy * act'(scale * x + shift), and
the sums that the gradient of batch norm needs are gathered: sum of dz, and sum of dz * (x - mean).

The convolution leaves a brick of one channel block in its scratchpad, and this is the pass that writes
it out. For Winograd, the last transforms are done on the way, as `slab` does the first: a strip of a few
columns along h, into a buffer that stays in the first-level cache, and from there along d. All the points
of a window at once would not fit into the registers. A large destination is streamed past the caches. ::

    planes (d, 0..5)  --load, transform-->                  buffer[0..3][d]       F(4, 4, .)
    buffer[h][0..5]   --load, transform, finish, write-->   rows (0..3, h)
    plane  (0, 0)     --load, finish, write------------->   row  (0, 0)           direct

Sums are taken over a row of windows in float32, over rows in float64.

Source: Chan, Golub and LeVeque, "Algorithms for computing the sample variance" (1983)
"""

from typing import Any, NamedTuple

import numpy as np

from kernels.base.arguments import Doubles, Floats, Triple
from kernels.base.jit import kernel, specialised
from kernels.base.simd import LANES, broadcast, load, store
from kernels.base.tiles import (
    put_tile,
    tile_add,
    tile_dot,
    tile_first,
    tile_fma,
    tile_load,
    tile_mask,
    tile_sum,
)
from kernels.conv3d.transform import transform_axis, transform_columns
from kernels.ladder.cook_toom import OUTPUT, sizes

# Columns that are transformed at a time.
_STRIP = 4


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
    extent: Triple
    first: int
    size: Triple
    start: Triple
    stop: Triple
    streams: bool


class Forward(NamedTuple):
    """What is done to a convolution's output: ``offset`` is added, and moments are gathered.

    ``pivot`` is subtracted before; ``moments`` is of shape (1, 3, 16), or (0, 3, 0) to gather nothing.
    """

    dst: Floats
    offset: Any
    pivot: Any
    moments: Doubles


class Backward(NamedTuple):
    """What is done to a gradient: dy becomes dz where ``x`` was normalised, and its sums are gathered.

    ``sums`` is of shape (2, 16).
    """

    dst: Floats
    x: Floats
    scale: Any
    shift: Any
    mean: Any
    slopes: Any
    sums: Doubles


def finish_size(md: int, mh: int) -> int:
    """Floats of scratch that `finish` needs: sums of a row of windows, and the buffer of a strip."""
    return 2 * LANES + (0 if mh == 1 else mh * sizes(OUTPUT, md)[0] * _STRIP * LANES)


@specialised("md", "mh")
def finish_forward(
    own: Floats,
    brick: Staged,
    dst: Floats,
    bias: Floats,
    at: int,
    moments: Doubles,
    scratch: Floats,
    md: int,
    mh: int,
) -> Any:
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
    scratch : flat float32 array
        Of `finish_size`.
    md, mh : int
        Voxels that a window makes along d and h, compile-time constants.
    """
    MD, MH = md, mh

    def implementation(own, brick, dst, bias, at, moments, scratch, md, mh):  # type: ignore[no-untyped-def]
        offset = load(bias, at)
        pivot = first_voxel(own, brick, MD, MH) + offset
        moments[:] = 0.0
        finish(own, brick, Forward(dst, offset, pivot, moments), scratch, MD, MH)
        if moments.size > 0:
            start, stop = brick.start, brick.stop
            count = (stop[0] - start[0]) * (stop[1] - start[1]) * brick.size[2]
            store(scratch, 0, pivot)
            for lane in range(LANES):
                total_deviation = moments[0, 1, lane]
                moments[0, 0, lane] = count
                moments[0, 1, lane] = scratch[lane] + total_deviation / count
                moments[0, 2, lane] -= total_deviation * total_deviation / count

    return implementation


@specialised("md", "mh")
def finish_backward(
    own: Floats,
    brick: Staged,
    dst: Floats,
    x: Floats,
    coefficients: Floats,
    at: int,
    slope: np.float32,
    sums: Doubles,
    scratch: Floats,
    md: int,
    mh: int,
) -> Any:
    """Turn dy into dz in one channel block of a brick, and gather its two sums.

    Parameters
    ----------
    own, brick, dst, at, scratch, md, mh
        As in `finish_forward`; what is staged makes dy.
    x : flat float32 array
        The convolution output that was normalised, laid out as ``dst``.
    coefficients : flat float32 array
        ``scale``, ``shift`` and ``mean`` of that normalisation, one third each.
    slope : float32
    sums : float64, shape=(2, 16)
        Filled with the sums of dz and of dz * (x - mean).
    """
    MD, MH = md, mh

    def implementation(  # type: ignore[no-untyped-def]
        own, brick, dst, x, coefficients, at, slope, sums, scratch, md, mh
    ):
        third = coefficients.size // 3
        scale, shift = load(coefficients, at), load(coefficients, third + at)
        mean, slopes = load(coefficients, 2 * third + at), broadcast(slope)
        sums[:] = 0.0
        what = Backward(dst, x, scale, shift, mean, slopes, sums)
        finish(own, brick, what, scratch, MD, MH)

    return implementation


@specialised("md", "mh")
def finish(own: Any, brick: Any, what: Any, scratch: Any, md: int, mh: int) -> Any:
    """Transform, finish and write a brick, row of windows by row; ``what`` is `Forward` or `Backward`."""
    MD, MH = md, mh
    PD, in_strips = sizes(OUTPUT, MD)[0], MH > 1
    strip = _STRIP * LANES

    def implementation(own, brick, what, scratch, md, mh):  # type: ignore[no-untyped-def]
        H, W = brick.size[1:]
        buffer, zero = scratch[2 * LANES :], broadcast(np.float32(0.0))
        columns = strip // LANES if in_strips else W
        for row in range(brick.extent[0] * brick.extent[1]):
            first, to, planes, lines = place(brick, row, MD, MH)
            store(scratch, 0, zero)
            store(scratch, LANES, zero)
            for left in range(0, W, columns):
                wide, y = min(columns, W - left), to + left * LANES
                x, src, apart, line = first + left * LANES, own, brick.apart, 0
                if in_strips:
                    transform_along_h(own, x, apart, buffer, wide, MD, MH)
                    x, src, apart, line = 0, buffer, strip, PD * strip
                for _ in range(lines):
                    if planes == MD:
                        finish_row(src, x, apart, brick, what, y, wide, scratch, MD)
                    else:
                        # In the place of the points, for one voxel of a column to be read alone.
                        transform_columns(src, x, apart, src, x, apart, wide, OUTPUT, MD)
                        for d in range(planes):
                            p, q = x + d * apart, y + d * H * W * LANES
                            finish_row(src, p, apart, brick, what, q, wide, scratch, 1)
                    x, y = x + line, y + W * LANES
            add_sums(what, scratch)

    return implementation


@kernel
def place(brick: Staged, row: int, md: int, mh: int) -> tuple[int, int, int, int]:
    """Where a row of windows is staged, where it goes, and how many planes and rows of it are wanted."""
    _, H, W = brick.size
    d = brick.start[0] + row // brick.extent[1] * md
    h = brick.start[1] + row % brick.extent[1] * mh
    src = brick.at + row * brick.extent[2] * LANES
    planes, lines = min(md, brick.stop[0] - d), min(mh, brick.stop[1] - h)
    return src, brick.first + (d * H + h) * W * LANES, planes, lines if planes > 0 else 0


@specialised("md", "mh")
def first_voxel(own: Any, brick: Any, md: int, mh: int) -> Any:
    """The first voxel of a staged brick."""
    MD, MH = md, mh
    PD, PH, K = sizes(OUTPUT, MD)[0], sizes(OUTPUT, MH)[0], OUTPUT

    def implementation(own, brick, md, mh):  # type: ignore[no-untyped-def]
        tile = tile_load(own, brick.at, PH * brick.apart, brick.apart, 0, PD, PH, 1)
        return tile_first(transform_axis(transform_axis(tile, K, MH, 1), K, MD, 0))

    return implementation


@specialised("md", "mh")
def transform_along_h(own: Any, at: int, apart: int, buffer: Any, columns: int, md: int, mh: int) -> Any:
    """Transform a strip of columns of a row of windows along h: to ``buffer[h][point of d][column]``."""
    MD, MH = md, mh
    PD, PH = sizes(OUTPUT, MD)[0], sizes(OUTPUT, MH)[0]
    strip = _STRIP * LANES

    def implementation(own, at, apart, buffer, columns, md, mh):  # type: ignore[no-untyped-def]
        for point in range(PD):
            x, y = at + point * PH * apart, point * strip
            transform_columns(own, x, apart, buffer, y, PD * strip, columns, OUTPUT, MH)

    return implementation


@specialised("md")
def finish_row(
    src: Any, at: int, apart: int, brick: Any, what: Any, to: int, columns: int, row_sums: Any, md: int
) -> Any:
    """Transform a row of columns along d, finish and write it: ``md`` voxels of each."""
    MD = md
    PD, K = sizes(OUTPUT, MD)[0], OUTPUT

    def implementation(src, at, apart, brick, what, to, columns, row_sums, md):  # type: ignore[no-untyped-def]
        plane = brick.size[1] * brick.size[2] * LANES
        total, product = load(row_sums, 0), load(row_sums, LANES)
        for w in range(columns):
            x, y = at + w * LANES, to + w * LANES
            tile = transform_axis(tile_load(src, x, apart, 0, 0, PD, 1, 1), K, MD, 0)
            tile, one, other = finish_tile(what, tile, y, plane, MD)
            put_tile(what.dst, y, plane, 0, tile, brick.streams)
            total = total + tile_sum(one)
            product = product + tile_dot(one, other)
        store(row_sums, 0, total)
        store(row_sums, LANES, product)

    return implementation


@specialised("md")
def finish_tile(what: Any, tile: Any, at: int, plane: int, md: int) -> Any:
    """Finish ``md`` voxels that go to ``dst[at:]``.

    Returns them and two tiles to sum: the first one's items, and the products of both.
    """
    MD, is_forward = md, what.instance_class is Forward

    def forward(what, tile, at, plane, md):  # type: ignore[no-untyped-def]
        tile = tile_add(tile, what.offset)
        deviation = tile_add(tile, broadcast(np.float32(0.0)) - what.pivot)
        return tile, deviation, deviation

    def backward(what, tile, at, plane, md):  # type: ignore[no-untyped-def]
        x = tile_load(what.x, at, plane, 0, 0, MD, 1, 1)
        tile = tile_mask(tile, tile_fma(what.scale, x, what.shift), what.slopes)
        return tile, tile, tile_add(x, broadcast(np.float32(0.0)) - what.mean)

    return forward if is_forward else backward


@specialised()
def add_sums(what: Any, row_sums: Any) -> Any:
    """Add the sums of a row of windows to those of the brick."""
    is_forward = what.instance_class is Forward

    def forward(what, row_sums):  # type: ignore[no-untyped-def]
        if what.moments.size > 0:
            for lane in range(LANES):
                what.moments[0, 1, lane] += row_sums[lane]
                what.moments[0, 2, lane] += row_sums[LANES + lane]

    def backward(what, row_sums):  # type: ignore[no-untyped-def]
        for lane in range(LANES):
            what.sums[0, lane] += row_sums[lane]
            what.sums[1, lane] += row_sums[LANES + lane]

    return forward if is_forward else backward
