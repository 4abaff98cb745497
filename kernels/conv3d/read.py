"""Read: a thread packs the part of the sources that a brick's taps meet, normalised, into its cache.

A convolution does not read its source directly. Each thread first packs a window of it into a *slab*, which
stays in the second-level cache::

    slab[block, d, h, w, lane] = act(scale * data + shift)          inside the volume, of one tensor
                               = scale * data + also * other + shift    of two
                               = 0                                  around it

This is what `kernels.deferred.tensors` calls a `Source`. Two sources may follow each other, so that a
concatenation is never made. The halo must be zero after normalisation, not before: so it is made here, and
not kept in memory.

For Winograd, the slab is transformed along d and h on the way: it has a plane for each of the points. Several
windows of planes and rows meet a voxel, so a strip of a few columns is normalised and transformed along d
first, into a buffer in the first-level cache, and from there along h::

    rows (d0..d0+5, h)  --load, normalise, transform-->  buffer[h][0..5]
    buffer[h0..h0+5][d] --load, transform------------->  planes (d, 0..5)       F(4, 4, .)
    row  (d0, h0)       --load, normalise------------->  plane (0, 0)           direct
"""

from typing import Any, NamedTuple

import numpy as np

from kernels.base.arguments import Floats, Triple
from kernels.base.jit import kernel, specialised
from kernels.base.simd import LANES, broadcast, load, store
from kernels.base.tiles import tile_fma, tile_load, tile_mask, tile_store, tile_sum
from kernels.conv3d.transform import transform_axis, transform_columns
from kernels.deferred.normalizing import flat_source
from kernels.deferred.tensors import NO_SOURCE, Source, plain
from kernels.ladder.cook_toom import DIFF_DST, sizes

# Columns that are transformed at a time.
_STRIP = 8


class Inputs(NamedTuple):
    """What a convolution reads: one or two sources, whose ``blocks`` channel blocks follow each other.

    The data of ``a`` and ``b`` are flat; the first ``blocks_a`` blocks are those of ``a``. ``size`` is
    (D, H, W). ``width`` is the channels of a block: 16, or the few of a first layer, channels last, which are
    read as they are.
    """

    a: Source
    b: Source
    blocks_a: int
    blocks: int
    size: Triple
    width: int


class Window(NamedTuple):
    """Part of image ``n`` that is packed.

    ``start`` is the volume's voxel that comes first, negative in the halo. ``extent`` is (deep, high, wide):
    windows along d and h, which start ``md`` and ``mh`` voxels after each other, and voxels in a row.
    """

    n: int
    start: Triple
    extent: Triple


class Slab(NamedTuple):
    """Offsets in a thread's scratchpad.

    ``at`` is the slab; its planes of points start ``plane`` floats after each other. A strip's buffer of
    `buffer_size` floats is at ``buffer``. At ``sums`` are the sums of a gradient's voxels, 16 for each block.
    """

    at: int
    plane: int
    buffer: int
    sums: int


class _Block(NamedTuple):
    """One channel block of an image: its tensors, its first voxel's offset, and its vectors."""

    data: Floats
    other: Floats
    has_other: bool
    first: int
    size: Triple
    scale: Any
    also: Any
    shift: Any
    slopes: Any


def inputs(a: Source, b: Source = NO_SOURCE) -> Inputs:
    """What a convolution of one or two blocked sources reads."""
    blocks_a, blocks_b = a.data.shape[1], b.data.shape[1]
    D, H, W = a.data.shape[2:5]
    return Inputs(flat_source(a), flat_source(b), blocks_a, blocks_a + blocks_b, (D, H, W), LANES)


def plain_inputs(data: Floats) -> Inputs:
    """Inputs of one tensor as it is, (MB, CB, D, H, W, 16), or (MB, D, H, W, C) with few channels."""
    if data.ndim == 6:
        return inputs(plain(data, data.shape[1] * LANES))
    MB, D, H, W, C = data.shape
    ones = np.ones((MB, LANES), np.float32)
    source = Source(data, ones, np.zeros_like(ones), 1.0)
    return Inputs(flat_source(source), flat_source(NO_SOURCE), 1, 1, (D, H, W), C)


def buffer_size(high: int, md: int, mh: int, kind: int) -> int:
    """Floats of the buffer that `pack_brick` needs for ``high`` windows along h."""
    (_, PD), (IH, _) = sizes(kind, md), sizes(kind, mh)
    return 0 if mh == 1 else (high * mh + IH - mh) * PD * _STRIP * LANES


@specialised
def pack_brick(inputs: Inputs, window: Window, own: Floats, slab: Slab, kind: int, md: int, mh: int) -> Any:
    """Pack all channel blocks of a window into ``own``, one after the other in each plane of points.

    Transforms along d and h are of ``kind``, one of `cook_toom`'s, and make ``md`` and ``mh`` outputs at a
    time; where that is 1 there is none. All three are compile-time constants.
    """
    if inputs.width < LANES:
        pack_channels(inputs, window, own, slab.at)
        return
    size = window.extent[0] * window.extent[1] * window.extent[2] * LANES
    for block in range(inputs.blocks):
        here = Slab(slab.at + block * size, slab.plane, slab.buffer, slab.sums + block * LANES)
        pack_channel_block(inputs, block, window, own, here, kind, md, mh)


@specialised
def pack_channel_block(
    inputs: Inputs, block: int, window: Window, own: Floats, slab: Slab, kind: int, md: int, mh: int
) -> Any:
    """Normalise, transform and store one channel block; of a gradient sum voxels, to ``own[slab.sums:]``."""
    D, H, W = inputs.size
    source, local, blocks = inputs.a, block, inputs.blocks_a
    if block >= inputs.blocks_a:
        source, local, blocks = inputs.b, block - inputs.blocks_a, inputs.blocks - inputs.blocks_a
    vectors = (window.n * blocks + local) * LANES
    first = vectors * D * H * W
    scale, shift = load(source.scale, vectors), load(source.shift, vectors)
    also, slopes = shift, broadcast(np.float32(source.slope))
    has_other = source.other.size > 0
    if has_other:
        also = load(source.also, vectors)
    if kind == DIFF_DST:
        fill_zero(own, slab.sums, 1)
    what = _Block(source.data, source.other, has_other, first, inputs.size, scale, also, shift, slopes)
    (deep, high, wide), (d, h, w) = window.extent, window.start
    if mh == 1:  # row by row, else strip by strip
        for row in range(deep * high):
            corner = (d + row // high * md, h + row % high, w)
            here = Slab(slab.at + row * wide * LANES, slab.plane, 0, slab.sums)
            pack_columns(what, corner, 0, wide, own, here, kind, md)
        return
    (_, PD), (IH, PH) = sizes(kind, md), sizes(kind, mh)
    point, line = _STRIP * LANES, PD * _STRIP * LANES  # of the buffer
    for group in range(deep):
        for left in range(0, wide, _STRIP):
            right = min(left + _STRIP, wide)
            for row in range(high * mh + IH - mh):
                corner = (d + group * md, h + row, w)
                here = Slab(slab.buffer + row * line - left * LANES, point, 0, slab.sums)
                pack_columns(what, corner, left, right, own, here, kind, md)
            for row in range(high):
                for p in range(PD):
                    x = slab.buffer + row * mh * line + p * point
                    y = slab.at + p * PH * slab.plane + ((group * high + row) * wide + left) * LANES
                    transform_columns(own, x, line, own, y, slab.plane, right - left, kind, mh)


@specialised
def pack_columns(
    block: Any, corner: Any, left: int, right: int, own: Any, slab: Any, kind: int, md: int
) -> Any:
    """Normalise and transform along d some columns of a window of planes, to ``own[slab.at:]``.

    Columns are voxels ``left`` to ``right`` of the row at ``corner``, which is in the window's first plane.
    """
    planes, points = sizes(kind, md)
    D, H, W = block.size
    d, h, w0 = corner
    to, stride, plane = slab.at, slab.plane, H * W * LANES
    begin, end = min(max(-w0, left), right), max(min(W - w0, right), left)
    if not (0 <= h < H and -planes < d < D):
        begin = end = right
    if begin > left or end < right:
        for point in range(points):
            fill_zero(own, to + point * stride + left * LANES, begin - left)
            fill_zero(own, to + point * stride + end * LANES, right - end)
    src = block.first + ((d * H + h) * W + w0) * LANES
    inside = 0 <= d and d + planes <= D
    if not inside:
        # A window that sticks out of the volume: its voxels are normalised to where its points go.
        for k in range(planes):
            for w in range(begin, end):
                x, y = src + k * plane + w * LANES, to + k * stride + w * LANES
                if 0 <= d + k < D:
                    tile_store(load_normalised(block, x, plane, 1), own, y, 0, 0, 0)
                else:
                    fill_zero(own, y, 1)
    total = broadcast(np.float32(0.0))
    for w in range(begin, end):
        x, y = src + w * LANES, to + w * LANES
        if inside:
            tile = load_normalised(block, x, plane, planes)
        else:
            tile = tile_load(own, y, stride, 0, 0, planes, 1, 1)
        tile_store(transform_axis(tile, kind, md, 0), own, y, stride, 0, 0)
        if kind == DIFF_DST:
            total = total + tile_sum(tile)
    if kind == DIFF_DST:
        store(own, slab.sums, load(own, slab.sums) + total)


@specialised
def load_normalised(block: Any, at: int, plane: int, planes: int) -> Any:
    """Tile of a voxel and those behind it in other planes, normalised."""
    tile = tile_load(block.data, at, plane, 0, 0, planes, 1, 1)
    if block.has_other:
        other = tile_fma(block.also, tile_load(block.other, at, plane, 0, 0, planes, 1, 1), block.shift)
        tile = tile_fma(block.scale, tile, other)
    else:
        tile = tile_fma(block.scale, tile, block.shift)
        tile = tile_mask(tile, tile, block.slopes)
    return tile


@kernel
def fill_zero(own: Floats, at: int, voxels: int) -> None:
    """Set some voxels to zero."""
    for voxel in range(voxels):
        store(own, at + voxel * LANES, broadcast(np.float32(0.0)))


@kernel
def pack_channels(inputs: Inputs, window: Window, own: Floats, at: int) -> None:
    """Pack a window of few channels as they are."""
    (D, H, W), width, u = inputs.size, inputs.width, inputs.a.data
    _, high, wide = window.extent
    w0, w1 = max(-window.start[2], 0) * width, min(W - window.start[2], wide) * width
    for line in range(window.extent[0] * high):
        d, h = window.start[0] + line // high, window.start[1] + line % high
        dst, end = at + line * wide * width, wide * width
        left, right = (w0, w1) if 0 <= d < D and 0 <= h < H else (end, end)
        src = (((window.n * D + d) * H + h) * W + window.start[2]) * width
        vectors_end = left + (right - left) // LANES * LANES
        own[dst : dst + left] = 0.0
        for i in range(left, vectors_end, LANES):
            store(own, dst + i, load(u, src + i))
        for i in range(vectors_end, right):
            own[dst + i] = u[src + i]
        own[dst + right : dst + end] = 0.0
