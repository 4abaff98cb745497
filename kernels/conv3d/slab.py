"""Pack a brick of a blocked tensor with its halo: where normalisation is applied, and concatenation vanishes.

A convolution does not read its source directly. Each thread first packs the brick it works on into a
small slab that stays in the second-level cache::

    slab[block, d, h, w, lane] = act(scale * u + shift)         inside the volume, of one tensor
                               = scale * u + also * v + shift   of two
                               = 0                              around it
    act(y) = y where y > 0, else slope * y

One form serves all prologues. A stored convolution output u that is still to be normalised: scale and
shift of its batch norm, slope 0 (ReLU). A plain tensor: 1, 0, slope 1. The gradient of a convolution
followed by batch norm: a * dz + b * x + d. The blocks may come from two tensors, so that a
concatenation need never be made.

The halo must be zero after normalisation, not before: this is why it is made here and not kept in memory.

For Winograd the slab is made transformed along d and h already, a plane for each of the points. The source
is far away, and each voxel is met by several windows of planes and rows. So a strip of a few columns is
normalised and transformed along d first, into a buffer that stays in the first-level cache, and from there
along h. (The processor foresees rows, and not strips: `ahead` fetches them.) ::

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
from kernels.ladder.cook_toom import DIFF_DST, sizes

# Columns that are transformed at a time.
_STRIP = 8


def buffer_size(high: int, md: int, mh: int, kind: int) -> int:
    """Floats of the buffer that `pack_block` needs for ``high`` windows along h."""
    (_, PD), (IH, _) = sizes(kind, md), sizes(kind, mh)
    return 0 if mh == 1 else (high * mh + IH - mh) * PD * _STRIP * LANES


class Block(NamedTuple):
    """One channel block of one image, and what its voxels mean.

    Attributes
    ----------
    u, v : flat float32 arrays
        Tensors; ``v`` is empty where there is only one.
    first : int
        Offset of the block's first voxel in both.
    size : (D, H, W)
        Voxels of the volume.
    coefficients : flat float32 array
        ``scale``, ``shift`` and ``also``, one third each.
    at : int
        Index of the block's first channel in a third.
    slope : float32
    """

    u: Floats
    v: Floats
    first: int
    size: Triple
    coefficients: Floats
    at: int
    slope: np.float32


@specialised("kind", "md", "mh")
def pack_block(
    block: Block,
    slab: Floats,
    to: int,
    apart: int,
    buffer: int,
    sums: int,
    start: Triple,
    extent: Triple,
    kind: int,
    md: int,
    mh: int,
) -> Any:
    """Pack one channel block of one image.

    Parameters
    ----------
    block : Block
    slab : flat float32 array
    to, apart : int
        Offset of the block's rows in the first plane of points, and from a plane to the next.
    buffer : int
        Offset of `buffer_size` floats of scratch.
    sums : int
        Offset of 16 floats to which a gradient's voxels are added; unused otherwise.
    start : (d, h, w)
        Volume voxel that the slab's first voxel is; negative in the halo.
    extent : (deep, high, wide)
        Windows along d and h, ``md`` and ``mh`` voxels from one to the next, and voxels in a row.
        Each plane of points is filled with ``deep * high`` rows.
    kind, md, mh : int
        Transform along d and h, one of `cook_toom`'s; with 1 there is none, and a window is a row.
        Compile-time constants.
    """
    K, MD, MH = kind, md, mh
    (_, PD), (IH, PH) = sizes(K, MD), sizes(K, MH)
    strip = _STRIP

    def without(block, slab, to, apart, buffer, sums, start, extent, kind, md, mh):  # type: ignore[no-untyped-def]
        deep, high, wide = extent
        for row in range(deep * high):
            corner = (start[0] + row // high * MD, start[1] + row % high, start[2])
            y = to + row * wide * LANES
            pack_columns(block, corner, 0, wide, slab, y, apart, sums, K, MD)

    def transformed(block, slab, to, apart, buffer, sums, start, extent, kind, md, mh):  # type: ignore[no-untyped-def]
        deep, high, wide = extent
        point, line = strip * LANES, PD * strip * LANES  # of the buffer
        for group in range(deep):
            for left in range(0, wide, strip):
                right = min(left + strip, wide)
                for row in range(high * MH + IH - MH):
                    corner = (start[0] + group * MD, start[1] + row, start[2])
                    y = buffer + row * line - left * LANES
                    pack_columns(block, corner, left, right, slab, y, point, sums, K, MD)
                for row in range(high):
                    for d in range(PD):
                        x = buffer + row * MH * line + d * point
                        y = to + d * PH * apart + ((group * high + row) * wide + left) * LANES
                        transform_columns(slab, x, line, slab, y, apart, right - left, K, MH)

    return without if MH == 1 else transformed


@specialised("kind", "md")
def pack_columns(
    block: Any,
    corner: Any,
    left: int,
    right: int,
    dst: Any,
    to: int,
    apart: int,
    sums: int,
    kind: int,
    md: int,
) -> Any:
    """Normalise and transform along d some columns of a window of planes.

    Columns are voxels ``left`` to ``right`` of the row whose first, in the window's first plane, is
    ``corner``. They go to ``dst[to:]``, and their points ``apart``; a gradient's are added to ``dst[sums:]``.
    The rest is as of `pack_block`.
    """
    K, MD = kind, md
    planes, points = sizes(K, MD)

    def implementation(block, corner, left, right, dst, to, apart, sums, kind, md):  # type: ignore[no-untyped-def]
        u, v, coefficients, at = block.u, block.v, block.coefficients, block.at
        D, H, W = block.size
        d, h, w0 = corner
        plane = H * W * LANES
        third = coefficients.size // 3
        scale, shift = load(coefficients, at), load(coefficients, third + at)
        also = load(coefficients, 2 * third + at)
        slopes, two = broadcast(block.slope), v.size > 0
        begin, end = min(max(-w0, left), right), max(min(W - w0, right), left)
        if not (0 <= h < H and -planes < d < D):
            begin = end = right
        if begin > left or end < right:
            for point in range(points):
                fill_zero(dst, to + point * apart + left * LANES, begin - left)
                fill_zero(dst, to + point * apart + end * LANES, right - end)
        src = block.first + ((d * H + h) * W + w0) * LANES
        inside = 0 <= d and d + planes <= D
        if not inside:
            # A window that sticks out of the volume: its voxels are normalised to where its points go.
            for k in range(planes):
                for w in range(begin, end):
                    x, y = src + k * plane + w * LANES, to + k * apart + w * LANES
                    if 0 <= d + k < D:
                        one = load_deferred(u, v, two, x, plane, scale, also, shift, slopes, 1)
                        tile_store(one, dst, y, 0, 0, 0)
                    else:
                        fill_zero(dst, y, 1)
        total = broadcast(np.float32(0.0))
        for w in range(begin, end):
            x, y = src + w * LANES, to + w * LANES
            if inside:
                tile = load_deferred(u, v, two, x, plane, scale, also, shift, slopes, planes)
            else:
                tile = tile_load(dst, y, apart, 0, 0, planes, 1, 1)
            tile_store(transform_axis(tile, K, MD, 0), dst, y, apart, 0, 0)
            if K == DIFF_DST:
                total = total + tile_sum(tile)
        if K == DIFF_DST:
            store(dst, sums, load(dst, sums) + total)

    return implementation


@specialised("planes")
def load_deferred(
    u: Any,
    v: Any,
    two: bool,
    at: int,
    plane: int,
    scale: Any,
    also: Any,
    shift: Any,
    slopes: Any,
    planes: int,
) -> Any:
    """Tile of a voxel and those behind it in other planes, normalised."""
    N = planes

    def implementation(u, v, two, at, plane, scale, also, shift, slopes, planes):  # type: ignore[no-untyped-def]
        tile = tile_load(u, at, plane, 0, 0, N, 1, 1)
        if two:
            other = tile_fma(also, tile_load(v, at, plane, 0, 0, N, 1, 1), shift)
            tile = tile_fma(scale, tile, other)
        else:
            tile = tile_fma(scale, tile, shift)
            tile = tile_mask(tile, tile, slopes)
        return tile

    return implementation


@kernel
def fill_zero(slab: Floats, at: int, voxels: int) -> None:
    """Set some voxels to zero."""
    zero = broadcast(np.float32(0.0))
    for voxel in range(voxels):
        store(slab, at + voxel * LANES, zero)


@kernel
def pack_channels(
    u: Floats, first: int, size: Triple, width: int, slab: Floats, to: int, start: Triple, extent: Triple
) -> None:
    """Pack one image of few channels as they are; arguments as in `Block` and `pack_block`."""
    D, H, W = size
    w0, w1 = max(-start[2], 0) * width, min(W - start[2], extent[2]) * width
    for line in range(extent[0] * extent[1]):
        d, h = start[0] + line // extent[1], start[1] + line % extent[1]
        dst, end = to + line * extent[2] * width, extent[2] * width
        left, right = (w0, w1) if 0 <= d < D and 0 <= h < H else (end, end)
        src = first + ((d * H + h) * W + start[2]) * width
        vectors_end = left + (right - left) // LANES * LANES
        for i in range(left):
            slab[dst + i] = 0.0
        for i in range(left, vectors_end, LANES):
            store(slab, dst + i, load(u, src + i))
        for i in range(vectors_end, right):
            slab[dst + i] = u[src + i]
        for i in range(right, end):
            slab[dst + i] = 0.0
