"""A gradient is masked and summed while it is in the first-level cache.

    dz = dy * act'(scale * x + shift)      S1 = sum dz      S2 = sum dz * (x - mean)

A kernel computes ``dy`` for a run of voxels of one channel block, adds what other consumers have left
there, and calls `finish` before it goes on, so that neither ``dy`` nor the sums cost another pass
over memory. The tensor is cut into *bands*, some rows of a plane each; a task works on one band of one
channel block and owns one partial sum, so the result does not depend on the number of threads.

    plane      | row | row | row | row | row | row | ...
    band       |----- partial 0 -----|----- partial 1 -----
    run        |---|---|---|---|---|---|    sums in registers, float32; added to the partial in float64
"""

import numpy as np

from kernels.base.arguments import Floats
from kernels.base.jit import kernel, parallel_kernel, prange, split_index
from kernels.base.simd import LANES, add_to_doubles, broadcast, fma, load, put_vector, where_positive
from kernels.deferred.tensors import NO_MASK, Mask, Shape

# Voxels of a channel block in a band, at most, unless a row is longer: 128 KiB.
_BAND = 2048
# Voxels of a run.
RUN = 64


def partials(shape: tuple[int, ...]) -> int:
    """Partial sums that kernels make of a tensor of this shape, (MB, CB, D, H, W, 16).

    One for each band of each plane of each image, image by image; ``Mask.sums`` has the shape
    ``(2, partials(shape), CB * 16)``, and moments have ``(partials(shape), 3, CB * 16)``.
    """
    MB, _, D, H, W, _ = shape
    return MB * D * int(bands(H, W))


def flat(mask: Mask | None) -> Mask:
    """The mask as kernels take it: its tensor flat, everything empty where there is none."""
    mask = NO_MASK if mask is None else mask
    return mask._replace(x=mask.x.reshape(-1))


@kernel
def bands(H: int, W: int) -> int:
    """Bands of a plane; band ``i`` ends before row ``(i + 1) * H // bands``."""
    return min(H, (H * W + _BAND - 1) // _BAND)


@kernel
def band_of_task(task: int, shape: Shape) -> tuple[int, int, int, int]:
    """First voxel, voxels, channel block and partial of a task; there are ``CB * partials`` tasks.

    Voxels and blocks are counted through the whole blocked tensor: voxels as
    ``(((n * CB + cb) * D + d) * H + h) * W + w``, blocks as ``n * CB + cb``.
    """
    _, CB, D, H, W, _ = shape
    count = bands(H, W)
    plane, band = split_index(task, count)
    block, d = plane // D, plane % D
    start, stop = band * H // count, (band + 1) * H // count
    return (plane * H + start) * W, (stop - start) * W, block, (block // CB * D + d) * count + band


@kernel
def place_band(partial: int, shape: Shape) -> tuple[int, int, int]:
    """Image, first voxel in it, and voxels, of the band of a partial sum."""
    _, _, D, H, W, _ = shape
    count = bands(H, W)
    plane, band = split_index(partial, count)
    start, stop = band * H // count, (band + 1) * H // count
    return plane // D, (plane % D * H + start) * W, (stop - start) * W


@kernel
def clear(mask: Mask, block: int, partial: int) -> None:
    """Set a partial sum of a channel block to zero; nothing happens where the mask is empty."""
    if mask.x.size > 0:
        channel = block * LANES % mask.sums.shape[2]
        mask.sums[:, partial, channel : channel + LANES] = 0.0


@kernel
def finish(diff: Floats, first: int, count: int, mask: Mask, block: int, partial: int) -> None:
    """Turn ``dy`` into ``dz`` in ``count`` voxels of a channel block, and add to its partial sums.

    Voxels and blocks are counted through the tensor, as in `band_of_task`; ``diff`` is overwritten. Where the
    mask, from `flat`, is empty, nothing happens.
    """
    if mask.x.size > 0:
        write_gradient(diff, first, diff, first, count, mask, block, partial, False)


@kernel
def write_gradient(
    dy: Floats,
    at: int,
    diff: Floats,
    first: int,
    count: int,
    mask: Mask,
    block: int,
    partial: int,
    streams: bool,
) -> None:
    """Write what `finish` makes of the voxels from ``at`` on in ``dy``; copy them where the mask is empty."""
    if mask.x.size == 0:
        for voxel in range(count):
            put_vector(diff, (first + voxel) * LANES, load(dy, (at + voxel) * LANES), streams)
        return
    vectors, lanes = block * LANES, mask.sums.shape[2]
    scale, shift = load(mask.scale, vectors), load(mask.shift, vectors)
    mean, slope = load(mask.mean, vectors), broadcast(np.float32(mask.slope))
    to = partial * lanes + vectors % lanes
    for run in range(0, count, RUN):
        total = product = broadcast(np.float32(0))
        for voxel in range(run, min(run + RUN, count)):
            x, value = load(mask.x, (first + voxel) * LANES), load(dy, (at + voxel) * LANES)
            dz = where_positive(fma(scale, x, shift), value, slope)
            put_vector(diff, (first + voxel) * LANES, dz, streams)
            total = total + dz
            product = fma(dz, x - mean, product)
        add_to_doubles(mask.sums, to, total)
        add_to_doubles(mask.sums, mask.sums.size // 2 + to, product)


def apply_mask(diff: Floats, mask: Mask) -> None:
    """Turn ``dy`` into ``dz`` in a whole tensor, in place, for kernels that cannot mask; fill the sums."""
    _apply_mask(diff.reshape(-1), diff.shape, flat(mask))


@parallel_kernel
def _apply_mask(diff: Floats, shape: Shape, mask: Mask) -> None:
    MB, CB, D, H, W, _ = shape
    for task in prange(MB * CB * D * bands(H, W)):
        first, count, block, partial = band_of_task(task, shape)
        clear(mask, block, partial)
        finish(diff, first, count, mask, block, partial)
