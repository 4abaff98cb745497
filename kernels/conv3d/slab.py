"""Pack a brick of a blocked tensor with its halo: where normalisation is applied, and concatenation vanishes.

A convolution does not read its source directly. Each thread first packs the brick it works on into a
small slab that stays in the second-level cache::

    slab[block, d, h, w, lane] = act(scale * u + also * v + shift)     inside the volume
                               = 0                                     around it
    act(y) = y where y > 0, else slope * y

One form serves all prologues. A stored convolution output u that is still to be normalised: scale and
shift of its batch norm, slope 0 (ReLU). A plain tensor: 1, 0, slope 1. The gradient of a convolution
followed by batch norm: a * dz + b * x + d, slope 1. The blocks may come from two tensors, so that a
concatenation need never be made.

The halo must be zero after normalisation, not before: this is why it is made here and not kept in memory.
"""

import numpy as np

from kernels.compiler import kernel
from kernels.layout import Floats
from kernels.simd import LANES, broadcast, fma, load, store, where_positive

Brick = tuple[int, int, int]


@kernel
def pack_block(
    u: Floats,
    v: Floats,
    first: int,
    size: Brick,
    coefficients: Floats,
    at: int,
    slope: np.float32,
    slab: Floats,
    to: int,
    start: Brick,
    extent: Brick,
) -> None:
    """Pack one channel block of one image.

    Parameters
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
    slab : flat float32 array
    to : int
        Offset of the block's slab, filled with ``extent`` voxels of 16 lanes.
    start : (d, h, w)
        Volume voxel that the slab's first voxel is; negative in the halo.
    extent : (d, h, w)
    """
    D, H, W = size
    third = coefficients.size // 3
    scale, shift = load(coefficients, at), load(coefficients, third + at)
    also = load(coefficients, 2 * third + at)
    slopes = broadcast(slope)
    zero = broadcast(slope) * broadcast(slope - slope)
    w0, w1 = max(-start[2], 0), min(W - start[2], extent[2])
    for line in range(extent[0] * extent[1]):
        d, h = start[0] + line // extent[1], start[1] + line % extent[1]
        dst = to + line * extent[2] * LANES
        inside = 0 <= d < D and 0 <= h < H
        left, right = (w0, w1) if inside else (extent[2], extent[2])
        for w in range(left):
            store(slab, dst + w * LANES, zero)
        src = first + ((d * H + h) * W + start[2]) * LANES
        if v.size > 0:
            for w in range(left, right):
                value = fma(also, load(v, src + w * LANES), shift)
                value = fma(scale, load(u, src + w * LANES), value)
                store(slab, dst + w * LANES, where_positive(value, value, slopes * value))
        else:
            for w in range(left, right):
                value = fma(scale, load(u, src + w * LANES), shift)
                store(slab, dst + w * LANES, where_positive(value, value, slopes * value))
        for w in range(right, extent[2]):
            store(slab, dst + w * LANES, zero)


@kernel
def pack_channels(
    u: Floats,
    first: int,
    size: Brick,
    width: int,
    slab: Floats,
    to: int,
    start: Brick,
    extent: Brick,
) -> None:
    """Pack one image of few channels as they are; arguments as in `pack_block`."""
    D, H, W = size
    w0, w1 = max(-start[2], 0), min(W - start[2], extent[2])
    for line in range(extent[0] * extent[1]):
        d, h = start[0] + line // extent[1], start[1] + line % extent[1]
        dst = to + line * extent[2] * width
        for i in range(extent[2] * width):
            slab[dst + i] = 0.0
        if 0 <= d < D and 0 <= h < H:
            src = first + ((d * H + h) * W + start[2]) * width
            for i in range(w0 * width, w1 * width):
                slab[dst + i] = u[src + i]
