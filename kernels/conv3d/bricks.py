"""How a blocked convolution is cut into bricks, and what is done to each before and after.

The output is cut into bricks of whole rows: a few planes by a few rows. A thread takes a brick, packs
the part of the source that its taps meet (`slab`), convolves, and finishes the brick while it is in
cache (`epilogue`). Prologue and epilogue are the same for every algorithm, which only differ in between.

Which thread takes which brick does not matter to the result: sums are kept for each brick and combined
in order afterwards.
"""

from typing import Any, NamedTuple

import numpy as np

from kernels.base.arguments import Doubles, Floats, Triple
from kernels.base.buffers import past_caches
from kernels.base.jit import call_worker, kernel, parallel_kernel, prange, signed, specialised
from kernels.base.prefetch import Region, Tensors, tensors
from kernels.base.simd import LANES
from kernels.conv3d.epilogue import Staged, finish_backward, finish_forward
from kernels.conv3d.slab import Block, fill_zero, pack_block, pack_channels
from kernels.ladder.cook_toom import DIFF_DST

EMPTY = np.zeros(0, np.float32)
NO_SUMS = np.zeros((2, 0, 0))
NO_MOMENTS = np.zeros((0, 3, 0))
_ONE = np.float32(1.0)


class Prologue(NamedTuple):
    """What a convolution reads: one or two blocked tensors, and what to make of their values.

    ``u_a, v_a`` and ``u_b, v_b`` are flat; the first ``blocks_a`` of ``blocks`` channel blocks come
    from ``a``, the others from ``b``. ``coefficients`` holds scale, shift and also, for all blocks.
    ``width`` is the channels of a block: 16, or all of them in a first layer that reads its few as they
    are, channels last and unchanged.
    """

    u_a: Floats
    blocks_a: int
    blocks: int
    coefficients: Floats
    v_a: Floats = EMPTY
    u_b: Floats = EMPTY
    v_b: Floats = EMPTY
    slope_a: np.float32 = _ONE
    slope_b: np.float32 = _ONE
    width: int = LANES


class Epilogue(NamedTuple):
    """What a convolution writes: one or two blocked tensors, and what is done on the way.

    The ``bias`` is added, and ``moments`` (bricks, 3, channels) are gathered unless empty. With ``x_a``,
    the values of ``a`` are gradients that are masked instead; ``mask_a`` holds scale, shift and mean
    and ``sums_a`` (2, bricks, channels) is filled. The same for ``b``. ``streams``: see `streaming`.
    """

    dst_a: Floats
    blocks_a: int
    blocks: int
    bias: Floats
    streams: bool
    dst_b: Floats = EMPTY
    moments: Doubles = NO_MOMENTS
    x_a: Floats = EMPTY
    x_b: Floats = EMPTY
    mask_a: Floats = EMPTY
    mask_b: Floats = EMPTY
    slope_a: np.float32 = _ONE
    slope_b: np.float32 = _ONE
    sums_a: Doubles = NO_SUMS
    sums_b: Doubles = NO_SUMS


class Cut(NamedTuple):
    """Bricks of an output of ``OD x OH x OW``: ``planes`` by ``lines`` rows each."""

    MB: int
    OD: int
    OH: int
    OW: int
    planes: int
    lines: int

    @property
    def bricks(self) -> int:
        """Number of bricks."""
        return self.MB * -(-self.OD // self.planes) * -(-self.OH // self.lines)


def plain_prologue(data: Floats) -> Prologue:
    """Prologue that takes one blocked tensor ``(MB, CB, D, H, W, 16)`` as it is."""
    coefficients = np.zeros((3, data.shape[1] * LANES), np.float32)
    coefficients[0] = 1.0
    blocks = data.shape[1]
    return Prologue(data.reshape(-1), blocks, blocks, coefficients.reshape(-1))


def plain_epilogue(dst: Floats, bias: Floats) -> Epilogue:
    """Epilogue that writes one blocked tensor, and adds the bias, which may be empty."""
    blocks = dst.shape[1]
    padded = np.zeros(blocks * LANES, np.float32)
    padded[: bias.size] = bias
    return Epilogue(dst.reshape(-1), blocks, blocks, padded, past_caches(dst))


@parallel_kernel
def convolve_bricks(
    address: int,
    prologue: Prologue,
    src_size: Triple,
    before: Triple,
    weights: Floats,
    kernel: Triple,
    epilogue: Epilogue,
    cut: Cut,
    scratch: Floats,
) -> None:
    """Driver of all convolutions: each worker its share, with a row of ``scratch`` for itself."""
    for index in prange(scratch.shape[0]):
        worker = signed(index)
        call_worker(address, worker, prologue, src_size, before, weights, kernel, epilogue, cut, scratch)


@kernel
def share(units: int, worker: int, workers: int) -> tuple[int, int]:
    """First and last + 1 of a worker's units: neighbours, because they share halos."""
    return units * worker // workers, units * (worker + 1) // workers


@kernel
def count_bricks(cut: Cut) -> int:
    """`Cut.bricks`, for kernels."""
    return cut.MB * -(-cut.OD // cut.planes) * -(-cut.OH // cut.lines)


@kernel
def locate(cut: Cut, brick: int) -> tuple[int, Triple, Triple]:
    """Image, first voxel and end of a brick."""
    high = -(-cut.OH // cut.lines)
    deep = -(-cut.OD // cut.planes)
    n, rest = brick // (deep * high), brick % (deep * high)
    d, h = rest // high * cut.planes, rest % high * cut.lines
    stop = (min(d + cut.planes, cut.OD), min(h + cut.lines, cut.OH), cut.OW)
    return n, (d, h, 0), stop


@kernel
def source_tensors(prologue: Prologue) -> Tensors:
    """Where a prologue's tensors are."""
    p = prologue
    return tensors(p.u_a, p.v_a, p.u_b, p.v_b, p.blocks_a, p.blocks)


@kernel
def next_brick(cut: Cut, brick: int, before: Triple, size: Triple, halo_d: int, halo_h: int) -> Region:
    """What the brick after this one reads of a volume of ``size``, but for rows that both read.

    The kernel adds 2 ``halo_d`` planes and 2 ``halo_h`` rows to a brick.
    """
    n, start, _ = locate(cut, min(brick + 1, count_bricks(cut) - 1))
    first = (start[0] - before[0], start[1] - before[1] + 2 * halo_h, 0)
    return Region(n, size, first, cut.planes + 2 * halo_d, cut.lines)


@specialised("kind", "md", "mh")
def pack_channel_block(
    prologue: Prologue,
    block: int,
    n: int,
    size: Triple,
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
    """Pack one channel block of image ``n`` into ``slab[to:]``; the other arguments as in `pack_block`.

    A gradient's ``slab[sums:]`` becomes the sums of its voxels.
    """
    K, MD, MH = kind, md, mh

    def implementation(  # type: ignore[no-untyped-def]
        prologue, block, n, size, slab, to, apart, buffer, sums, start, extent, kind, md, mh
    ):
        voxels = size[0] * size[1] * size[2] * LANES
        if K == DIFF_DST:
            fill_zero(slab, sums, 1)
        if block < prologue.blocks_a:
            u, v, slope = prologue.u_a, prologue.v_a, prologue.slope_a
            first = (n * prologue.blocks_a + block) * voxels
        else:
            u, v, slope = prologue.u_b, prologue.v_b, prologue.slope_b
            blocks_b = prologue.blocks - prologue.blocks_a
            first = (n * blocks_b + block - prologue.blocks_a) * voxels
        source = Block(u, v, first, size, prologue.coefficients, block * LANES, slope)
        pack_block(source, slab, to, apart, buffer, sums, start, extent, K, MD, MH)

    return implementation


@specialised("kind", "md", "mh")
def pack_brick(
    prologue: Prologue,
    n: int,
    size: Triple,
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
    """Pack all channel blocks of image ``n`` into ``slab[to:]``; the other arguments as in `pack_block`."""
    K, MD, MH = kind, md, mh

    def implementation(  # type: ignore[no-untyped-def]
        prologue, n, size, slab, to, apart, buffer, sums, start, extent, kind, md, mh
    ):
        if prologue.width < LANES:
            voxels = size[0] * size[1] * size[2] * prologue.width
            pack_channels(prologue.u_a, n * voxels, size, prologue.width, slab, to, start, extent)
            return
        for block in range(prologue.blocks):
            at = to + block * extent[0] * extent[1] * extent[2] * LANES
            own_sums = sums + block * LANES
            pack_channel_block(
                prologue, block, n, size, slab, at, apart, buffer, own_sums, start, extent, K, MD, MH
            )

    return implementation


@specialised("md", "mh")
def finish_block(
    epilogue: Epilogue,
    cut: Cut,
    brick: int,
    block: int,
    own: Floats,
    at: int,
    apart: int,
    extent: Triple,
    scratch: Floats,
    md: int,
    mh: int,
) -> Any:
    """Apply the epilogue to one channel block of a brick that is staged at ``own[at:]``.

    It lies there as `pack_block` leaves a slab: ``extent`` windows and voxels in each plane of points,
    planes ``apart``, still to be transformed to ``md x mh`` rows a window.
    ``scratch`` has `finish_size` floats.
    """
    MD, MH = md, mh

    def implementation(  # type: ignore[no-untyped-def]
        epilogue, cut, brick, block, own, at, apart, extent, scratch, md, mh
    ):
        n, start, stop = locate(cut, brick)
        size = (cut.OD, cut.OH, cut.OW)
        voxels = cut.OD * cut.OH * cut.OW * LANES
        if block < epilogue.blocks_a:
            local, dst, x, mask = block, epilogue.dst_a, epilogue.x_a, epilogue.mask_a
            slope, sums, blocks_here = epilogue.slope_a, epilogue.sums_a, epilogue.blocks_a
        else:
            local = block - epilogue.blocks_a
            dst, x, mask = epilogue.dst_b, epilogue.x_b, epilogue.mask_b
            slope, sums, blocks_here = epilogue.slope_b, epilogue.sums_b, epilogue.blocks
            blocks_here -= epilogue.blocks_a
        first = (n * blocks_here + local) * voxels
        staged = Staged(at, apart, extent, first, size, start, stop, epilogue.streams)
        if x.size > 0:
            gathered = sums[:, brick, local * LANES : (local + 1) * LANES]
            finish_backward(own, staged, dst, x, mask, local * LANES, slope, gathered, scratch, MD, MH)
        else:
            moments = epilogue.moments[brick : brick + 1, :, block * LANES : (block + 1) * LANES]
            finish_forward(own, staged, dst, epilogue.bias, block * LANES, moments, scratch, MD, MH)

    return implementation
