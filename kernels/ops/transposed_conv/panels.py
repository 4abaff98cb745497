"""Weights as the transposed convolution reads them, and where its register tiles lie."""

from typing import NamedTuple

from kernels.base.arguments import Floats
from kernels.base.buffers import empty
from kernels.base.jit import kernel, parallel_kernel, prange, split_index
from kernels.base.layout import blocks
from kernels.base.machine import tile_vectors
from kernels.base.simd import LANES
from kernels.deferred.tensors import Shape


class Packed(NamedTuple):
    """The weights (IC, OC, KD, KH, KW), twice; lanes past the last channel are zero."""

    forward: Floats  # (OCB, KD, KH, ICB * 16, KW, 16 oc)
    backward: Floats  # (ICB / cols, KD, KH, OCB, KW, 16 oc, cols * 16 ic)


def panels(weights_shape: tuple[int, int, int, int, int]) -> Packed:
    """Panels of zeros for packed weights (IC, OC, KD, KH, KW), which `pack` fills."""
    IC, OC, KD, KH, KW = weights_shape
    ICB, OCB = blocks(IC), blocks(OC)
    cols = backward_cols(ICB)
    packed = Packed(
        empty((OCB, KD, KH, ICB * LANES, KW, LANES)),
        empty((ICB // cols, KD, KH, OCB, KW, LANES, cols * LANES)),
    )
    for panel in packed:
        panel[:] = 0.0
    return packed


def pack(weights: Floats, packed: Packed) -> None:
    """Refresh packed weights, from `panels`."""
    _pack(weights, *packed)


def backward_cols(ICB: int) -> int:
    """Blocks of input channels in a register tile of backward_data."""
    return 2 if tile_vectors() >= 24 and ICB % 2 == 0 else 1


@parallel_kernel
def _pack(weights: Floats, forward: Floats, backward: Floats) -> None:
    IC, OC, KD, KH, KW = weights.shape
    groups, _, _, OCB, _, _, width = backward.shape
    # A group of input channels by a block of output channels fits the first-level cache, twice.
    for task in prange(groups * OCB):
        group, block = split_index(task, OCB)
        for ic in range(group * width, min((group + 1) * width, IC)):
            for oc in range(block * LANES, min((block + 1) * LANES, OC)):
                for kd in range(KD):
                    for kh in range(KH):
                        for kw in range(KW):
                            value = weights[ic, oc, kd, kh, kw]
                            forward[block, kd, kh, ic, kw, oc % LANES] = value
                            backward[group, kd, kh, block, kw, oc % LANES, ic % width] = value


def tile_rows(cols: int, width: int) -> int:
    """Voxels of a register tile with ``cols`` columns: no more than a row has."""
    fitting = (rows for rows in (24, 12, 6, 3) if rows * cols <= tile_vectors() and rows <= width)
    return next(fitting, 1)


@kernel
def tile_place(tile: int, rows: int, width: int) -> tuple[int, int]:
    """Row, and voxel in it, where a tile begins; the last of a row is moved back inside."""
    tiles = -(-width // rows)
    return tile // tiles, min(tile % tiles * rows, width - rows)


@kernel
def output_line(image: int, row: int, shape: Shape, dst_shape: Shape) -> int:
    """Voxels of the output before the first tap of a row of the source, in the first block.

    Rows are counted through an image of the source.
    """
    _, _, D, H, _, _ = shape
    _, OCB, OD, OH, OW, _ = dst_shape
    return ((image * OCB * OD + row // H * (OD // D)) * OH + row % H * (OH // H)) * OW
