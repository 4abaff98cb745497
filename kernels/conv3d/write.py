"""Write: what is done to a brick of a convolution's output while it is still in cache.

Forward: the bias is added, and the moments that batch norm needs are gathered. Each brick gives, for
each channel, its count, mean and sum of squared deviations, M2. Deviations are from the brick's first voxel,
so nothing large cancels: data of mean 1000 and deviation 1 come out as accurate as with two passes.
`kernels.deferred.statistics` combines the bricks, in order.

Backward: a gradient dy of y = act(scale * x + shift) becomes dz = dy * act'(scale * x + shift), and
the sums that the gradient of batch norm needs are gathered: sum of dz, and sum of dz * (x - mean).

The convolution leaves a brick of one channel block in its scratchpad, and `finish_block` writes it out. For
Winograd, the last transforms are done on the way, as `read` does the first: a strip of a few columns along h,
into a buffer that stays in the first-level cache, and from there along d. All the points of a window at once
would not fit into the registers. A large destination is streamed past the caches. ::

    planes (d, 0..5)  --load, transform-->                  buffer[0..3][d]       F(4, 4, .)
    buffer[h][0..5]   --load, transform, finish, write-->   rows (0..3, h)
    plane  (0, 0)     --load, finish, write------------->   row  (0, 0)           direct

Sums are float32 over a row of windows, float64 over rows.

Source: Chan, Golub and LeVeque, "Algorithms for computing the sample variance" (1983)
"""

from typing import Any, NamedTuple

import numpy as np

from kernels.base.arguments import Doubles, Floats, Triple
from kernels.base.buffers import past_caches
from kernels.base.jit import specialised
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
from kernels.conv3d.bricks import Cut, locate
from kernels.conv3d.transform import transform_axis, transform_columns
from kernels.deferred.statistics import close_moments
from kernels.deferred.tensors import NO_MASK, Mask
from kernels.ladder.cook_toom import OUTPUT, sizes

NO_MOMENTS = np.zeros((0, 3, 0))

# Columns that are transformed at a time.
_STRIP = 4


class Outputs(NamedTuple):
    """What a convolution writes: one or two blocked tensors, whose channel blocks follow each other.

    The first ``blocks_a`` of ``blocks`` blocks go to ``dst_a``. The ``bias`` is added, and ``moments``
    (bricks, 3, channels) are gathered unless empty. Where a mask is not empty, the values are gradients that
    are masked instead. Everything is flat but moments and sums. ``streams``: see `buffers.past_caches`.
    """

    dst_a: Floats
    dst_b: Floats
    mask_a: Mask
    mask_b: Mask
    blocks_a: int
    blocks: int
    bias: Floats
    moments: Doubles
    streams: bool


class Staged(NamedTuple):
    """A brick of one channel block, as the convolution leaves it in a thread's scratchpad.

    ``at`` is the offset of the first plane of points; planes start ``plane`` floats after each other and have
    ``extent`` windows along d and h and voxels in a row, as those of `Window`. At ``scratch`` are
    `finish_size` floats of scratch.
    """

    at: int
    plane: int
    extent: Triple
    scratch: int


class _Place(NamedTuple):
    """Where a brick comes from and goes to: whole rows, from voxel ``start`` to before ``stop``."""

    own: Floats
    staged: Staged
    first: int  # offset of the channel block's first voxel in the destination
    size: Triple
    start: Triple
    stop: Triple
    streams: bool


class _Work(NamedTuple):
    """What is done to a channel block, and where two sums go.

    With a mask, dy becomes dz where ``x`` was normalised; dz and dz * (x - mean) are summed. Without one the
    bias ``shift`` is added; deviations from ``mean`` and their squares are summed.
    """

    dst: Floats
    x: Floats
    scale: Any
    shift: Any
    mean: Any
    slopes: Any
    sums: Doubles


def outputs(
    dst: tuple[Floats, Floats],
    bias: Floats | None = None,
    moments: Doubles = NO_MOMENTS,
    masks: tuple[Mask, Mask] = (NO_MASK, NO_MASK),
) -> Outputs:
    """What a convolution writes, to one or two blocked tensors; the second may be empty."""
    (a, b), (mask_a, mask_b) = dst, (mask._replace(x=mask.x.reshape(-1)) for mask in masks)
    blocks, streams = a.shape[1] + b.shape[1], past_caches(*(each for each in (a, b) if each.size))
    lanes = np.zeros(blocks * LANES, np.float32)
    if bias is not None:
        lanes[: bias.size] = bias
    return Outputs(a.reshape(-1), b.reshape(-1), mask_a, mask_b, a.shape[1], blocks, lanes, moments, streams)


def finish_size(md: int, mh: int) -> int:
    """Floats of scratch that `finish_block` needs: sums of a row of windows, and the buffer of a strip."""
    return 2 * LANES + (0 if mh == 1 else mh * sizes(OUTPUT, md)[0] * _STRIP * LANES)


@specialised
def finish_block(
    outputs: Outputs, cut: Cut, brick: int, block: int, own: Floats, staged: Staged, md: int, mh: int
) -> Any:
    """Transform, finish and write one channel block of a brick, staged in ``own``.

    A window of points makes ``md`` by ``mh`` rows; both are compile-time constants.
    """
    n, start, stop = locate(cut, brick)
    dst, mask, local, blocks = outputs.dst_a, outputs.mask_a, block, outputs.blocks_a
    if block >= outputs.blocks_a:
        dst, mask, local = outputs.dst_b, outputs.mask_b, block - outputs.blocks_a
        blocks = outputs.blocks - outputs.blocks_a
    size, vectors = (cut.OD, cut.OH, cut.OW), (n * blocks + local) * LANES
    first = vectors * size[0] * size[1] * size[2]
    place = _Place(own, staged, first, size, start, stop, outputs.streams)
    if mask.x.size > 0:
        scale, shift = load(mask.scale, vectors), load(mask.shift, vectors)
        mean, slopes = load(mask.mean, vectors), broadcast(np.float32(mask.slope))
        sums = mask.sums[:, brick, local * LANES : (local + 1) * LANES]
        sums[:] = 0.0
        finish(place, _Work(dst, mask.x, scale, shift, mean, slopes, sums), md, mh, 1)
    else:
        offset = load(outputs.bias, block * LANES)
        pivot = first_voxel(own, staged, md, mh) + offset
        moments = outputs.moments[brick, :, block * LANES : (block + 1) * LANES]
        moments[:] = 0.0
        finish(place, _Work(dst, mask.x, offset, offset, pivot, offset, moments[1:]), md, mh, 0)
        count = (stop[0] - start[0]) * (stop[1] - start[1]) * size[2]
        store(own, staged.scratch, pivot)
        close_moments(outputs.moments, brick, block * LANES, own, staged.scratch, count)


@specialised
def finish(place: Any, what: Any, md: int, mh: int, masks: int) -> Any:
    """Transform, finish and write a brick, row of windows by row; ``masks`` is 1 or 0."""
    PD, PH, strip = sizes(OUTPUT, md)[0], sizes(OUTPUT, mh)[0], _STRIP * LANES
    own, staged, (_, H, W), kind = place.own, place.staged, place.size, OUTPUT
    sums, zero, (deep, high, long) = staged.scratch, broadcast(np.float32(0.0)), staged.extent
    buffer, columns = sums + 2 * LANES, _STRIP if mh > 1 else W
    for row in range(deep * high):
        d, h = place.start[0] + row // high * md, place.start[1] + row % high * mh
        first, to = staged.at + row * long * LANES, place.first + (d * H + h) * W * LANES
        planes = min(md, place.stop[0] - d)
        lines = min(mh, place.stop[1] - h) if planes > 0 else 0
        store(own, sums, zero)
        store(own, sums + LANES, zero)
        for left in range(0, W, columns):
            wide, y = min(columns, W - left), to + left * LANES
            x, stride, line = first + left * LANES, staged.plane, 0
            if mh > 1:
                # A strip along h: to buffer[h][point of d][column].
                for point in range(PD):
                    at, there = x + point * PH * stride, buffer + point * strip
                    transform_columns(own, at, stride, own, there, PD * strip, wide, kind, mh)
                x, stride, line = buffer, strip, PD * strip
            for _ in range(lines):
                if planes == md:
                    finish_row(place, x, stride, what, y, wide, md, masks)
                else:
                    # In the place of the points, for one voxel of a column to be read alone.
                    transform_columns(own, x, stride, own, x, stride, wide, kind, md)
                    for k in range(planes):
                        there = y + k * H * W * LANES
                        finish_row(place, x + k * stride, stride, what, there, wide, 1, masks)
                x, y = x + line, y + W * LANES
        if what.sums.size > 0:
            for lane in range(LANES):
                what.sums[0, lane] += own[sums + lane]
                what.sums[1, lane] += own[sums + LANES + lane]


@specialised
def first_voxel(own: Any, staged: Any, md: int, mh: int) -> Any:
    """The first voxel of a staged brick."""
    PD, PH, kind = sizes(OUTPUT, md)[0], sizes(OUTPUT, mh)[0], OUTPUT
    tile = tile_load(own, staged.at, PH * staged.plane, staged.plane, 0, PD, PH, 1)
    return tile_first(transform_axis(transform_axis(tile, kind, mh, 1), kind, md, 0))


@specialised
def finish_row(
    place: Any, at: int, stride: int, what: Any, to: int, columns: int, md: int, masks: int
) -> Any:
    """Transform a row of columns along d, finish and write it: ``md`` voxels of each."""
    PD, kind = sizes(OUTPUT, md)[0], OUTPUT
    own, sums, plane = place.own, place.staged.scratch, place.size[1] * place.size[2] * LANES
    total, product = load(own, sums), load(own, sums + LANES)
    negative_mean = broadcast(np.float32(0.0)) - what.mean
    for w in range(columns):
        y = to + w * LANES
        tile = transform_axis(tile_load(own, at + w * LANES, stride, 0, 0, PD, 1, 1), kind, md, 0)
        if masks:
            x = tile_load(what.x, y, plane, 0, 0, md, 1, 1)
            tile = tile_mask(tile, tile_fma(what.scale, x, what.shift), what.slopes)
            one, other = tile, tile_add(x, negative_mean)
        else:
            tile = tile_add(tile, what.shift)
            one = other = tile_add(tile, negative_mean)
        put_tile(what.dst, y, plane, 0, tile, place.streams)
        total, product = total + tile_sum(one), product + tile_dot(one, other)
    store(own, sums, total)
    store(own, sums + LANES, product)
