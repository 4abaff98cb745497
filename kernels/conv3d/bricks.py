"""How a blocked convolution is cut into bricks, and what is done to each before and after.

The output is cut into bricks of whole rows: a few planes by a few rows. A thread takes a brick, packs
the part of the source that its taps meet (`read`), convolves, and finishes the brick while it is in
cache (`write`). Reading and writing are the same for every algorithm, which only differ in between.

The forward pass and the masks keep sums for each brick, a weight gradient for each chunk of bricks. All are
added in order. `winograd_bricks` has a chunk for each thread: its weight gradients depend on the threads.

An algorithm (`direct_bricks`, `winograd_bricks`, `many_channels`) is a module with functions of a `Plan`::

    packed_shape(p)                                         of the weights that `convolve` takes
    pack(p, weights, packed, adjoint)                       fills them
    convolve(p, source, packed, to, adjoint)                from `Inputs` to `Outputs`
    backward_weights(p, source, gradient, diff_weights)     fills (OC, IC, KD * KH * KW), and returns sums of
                                                            the gradient, (chunks, channels), for the bias
"""

from types import ModuleType
from typing import NamedTuple

import numpy as np

from kernels.base.arguments import Doubles, Floats, Triple
from kernels.base.jit import kernel
from kernels.base.layout import blocks
from kernels.base.simd import LANES, load, store
from kernels.conv3d.prefetch import Region, Tensors, tensors
from kernels.conv3d.read import Inputs

EMPTY = np.zeros(0, np.float32)
# Voxels that `add_voxels` sums in float32, before they are added to a sum in float64.
_RUN = 1024


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


class Plan(NamedTuple):
    """One direction of a convolution of stride 1: sizes, algorithm, bricks."""

    channels_in: tuple[int, int]  # of the two sources
    channels_out: tuple[int, int]  # of the two destinations
    size: tuple[int, int, int, int]  # MB, D, H, W
    kernel: Triple
    tile: Triple | None  # Winograd F(tile); None: direct
    width: int  # channels in a block of the source: 16, or the few of a first layer
    before: Triple  # zeros before the first voxel
    cut: Cut
    algorithm: ModuleType
    packs: bool  # weights beforehand; else they are transformed where they are used

    @property
    def form(self) -> Triple:
        """The tile of Winograd, or the kernel of direct convolution."""
        return self.tile or self.kernel

    @property
    def blocks_in(self) -> int:
        """Channel blocks of both sources."""
        return 1 if self.width < LANES else sum(map(blocks, self.channels_in))

    @property
    def blocks_out(self) -> int:
        """Channel blocks of both destinations."""
        return sum(map(blocks, self.channels_out))


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
def source_tensors(inputs: Inputs) -> Tensors:
    """Where the tensors are that are read."""
    a, b = inputs.a, inputs.b
    return tensors(a.data, a.other, b.data, b.other, inputs.blocks_a, inputs.blocks)


@kernel
def next_brick(
    what: Tensors, cut: Cut, brick: int, before: Triple, size: Triple, halo_d: int, halo_h: int
) -> Region:
    """What the brick after this one reads of tensors of ``size`` voxels, but for rows that both read.

    The kernel adds 2 ``halo_d`` planes and 2 ``halo_h`` rows to a brick.
    """
    n, start, _ = locate(cut, min(brick + 1, count_bricks(cut) - 1))
    first = (start[0] - before[0], start[1] - before[1] + 2 * halo_h, 0)
    return Region(what, n, size, first, cut.planes + 2 * halo_d, cut.lines)


@kernel
def add_voxels(data: Floats, at: int, voxels: int, totals: Doubles, sums: Floats) -> None:
    """Add the voxels of some channel blocks to ``totals``, channel by channel: the gradient of the bias.

    Parameters
    ----------
    data : flat float32 array
    at, voxels : int
        Offset of the first voxel, and how many each block has; blocks follow each other.
    totals : float64, shape=(channels,)
        Added to.
    sums : flat float32 array
        Scratch for 16 floats.
    """
    for block in range(totals.size // LANES):
        first = at + block * voxels * LANES
        for run in range(0, voxels, _RUN):
            total = load(data, first + run * LANES)
            for voxel in range(run + 1, min(run + _RUN, voxels)):
                total = total + load(data, first + voxel * LANES)
            store(sums, 0, total)
            for lane in range(LANES):
                totals[block * LANES + lane] += sums[lane]
