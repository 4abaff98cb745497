"""How a blocked convolution is cut into bricks, and what is done to each before and after.

The output is cut into bricks of whole rows: a few planes by a few rows. A thread takes a brick, packs
the part of the source that its taps meet (`read`), convolves, and finishes the brick while it is in
cache (`write`). Reading and writing are the same for every algorithm, which only differ in between.

Which thread takes which brick does not matter to the result: sums are kept for each brick and combined
in order afterwards.
"""

from typing import NamedTuple

import numpy as np

from kernels.base.arguments import Triple
from kernels.base.jit import kernel
from kernels.base.prefetch import Region, Tensors, tensors
from kernels.conv3d.read import Inputs

EMPTY = np.zeros(0, np.float32)


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
