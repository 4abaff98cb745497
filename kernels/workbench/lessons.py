"""What each rung of the ladder teaches: what it does new, what limits it, and the bytes it moves.

The bytes are counted, not measured: those of every array that a rung reads or writes as a whole. Numbers that
stay in a cache between two uses count once.
"""

import math
from types import ModuleType
from typing import NamedTuple

import numpy as np

from kernels.base.layout import blocks
from kernels.conv3d import winograd
from kernels.ladder import blocked, direct, im2col, minimal_filtering, naive
from kernels.ladder.direct import FEW_CHANNELS
from kernels.ladder.shapes import Geometry, geometry


class Lesson(NamedTuple):
    """What a rung teaches."""

    new: str  # what it does that the rung before it does not
    limit: str  # what keeps it from its roof


LESSONS = {
    "naive": Lesson(
        "runs the definition: a loop over every output, tap and channel.",
        "one multiply-add at a time, and each waits for the sum of the one before",
    ),
    "im2col": Lesson(
        "copies each voxel's neighbourhood into a row, so that one matrix product of NumPy's BLAS does all "
        "multiply-adds, with registers and caches used well.",
        "writing and reading the columns, beside a matrix with few columns",
    ),
    "blocked": Lesson(
        "copies src once instead of 27 times, in blocks of 16 channels: one vector multiply-add updates 16 "
        "output channels.",
        "loads and stores: each multiply-add loads a sum and stores it again",
    ),
    "direct": Lesson(
        "keeps a tile of sums in registers until they are complete, where blocked loads and stores each sum "
        "for every tap and input channel.",
        "packing src and reordering dst, which cost as much as a few taps where channels are few",
    ),
    "minimal_filtering": Lesson(
        "transforms tiles of 4^3 voxels, so that 64 multiplications do the work of 216.",
        "the transformed tensors, which go through memory",
    ),
    "winograd": Lesson(
        "transforms a brick of tiles that stays in cache, and larger tiles: up to 8 times fewer "
        "multiplications.",
        "transforms, and reordering src and dst",
    ),
    "fused": Lesson(
        "is the kernel of the compiled net: tensors are blocked and weights packed before, and the kernel "
        "normalises what it reads and sums what it writes.",
        "transforms of small tensors",
    ),
}
#: The modules that have the three passes, in the order of the ladder: `fused` has none.
RUNGS: dict[str, ModuleType] = {
    module.__name__.rpartition(".")[-1]: module
    for module in (naive, im2col, blocked, direct, minimal_filtering, winograd)
}
#: The definition runs at about a GFLOP/s, and on one core whatever it is given: it is timed on as few planes
#: as make this many operations, and its time is scaled up.
SLOW = "naive"
SLOW_FLOPS = 2e8
#: Rungs of minimal filtering, which have no kernel but 3^3.
ONLY_3 = ("minimal_filtering", "winograd")
_NAMES = tuple(LESSONS)
_WAYS = {
    "forward": ("src, read", "weights, read", "dst, written"),
    "backward_data": ("diff_dst, read", "weights, read", "diff_src, written"),
    "backward_weights": ("src, read", "diff_weights, written", "diff_dst, read"),
}


def previous(rung: str) -> str | None:
    """Return the rung before one, or None for the first."""
    return _NAMES[_NAMES.index(rung) - 1] if rung != _NAMES[0] else None


def planes(g: Geometry, flops: float) -> int:
    """Return how many planes of a volume make about this many operations: 1 at least, all at most."""
    return int(np.clip(flops / g.flops * g.out[0], 1, g.out[0]))


def bytes_moved(rung: str, g: Geometry, direction: str) -> dict[str, int]:
    """Return the bytes of each array that a rung reads or writes as a whole.

    ``g`` is the forward convolution, of stride 1 and padding "same". Channels of a blocked array are rounded
    up to 16; few channels of a first layer are not blocked.
    """
    if direction == "backward_data":
        OC, IC, *kernel = g.weights_shape
        g = geometry(g.dst_shape, (IC, OC, *kernel))
    sizes = (4 * math.prod(shape) for shape in (g.src_shape, g.weights_shape, g.dst_shape))
    source, weights, result = _WAYS[direction]
    ends = dict(zip((source, weights, result), sizes, strict=True))
    voxels = 4 * math.prod(g.dst_shape[:4])
    ic, oc = (16 * blocks(c) for c in g.channels)
    ic = g.channels[0] if g.channels[0] <= FEW_CHANNELS else ic
    packed, name, other = voxels * ic, source.split(",")[0], result.split(",")[0]

    def twice(what: str, nbytes: int) -> dict[str, int]:
        return {f"{what}, written and read": 2 * nbytes}

    panel = twice(f"panel of {name}", 4 * g.src_shape[0] * math.prod(g.panel_size) * ic)
    blocked = twice(f"{other} in blocks", voxels * oc)
    eight = twice(f"V, 8 times {name}", 8 * packed) | twice(f"M, 8 times {other}", 8 * voxels * oc)
    return {
        "naive": ends,
        "im2col": ends | twice(f"columns, {g.taps} times {name}", g.taps * voxels * g.channels[0]),
        "blocked": ends | panel | blocked,
        "direct": ends | panel | blocked,
        "minimal_filtering": ends | panel | eight | blocked,
        "winograd": ends | twice(f"{name} in blocks", packed) | blocked,
        "fused": ends | {source: packed, result: voxels * oc},
    }[rung]
