"""Weights as the transposed convolution reads them, and chunks of voxels as panels."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kernels.compiler import kernel, parallel_kernel, prange, split_index
from kernels.fused.tensors import LANES, Floats, Shape
from kernels.layout import blocks
from kernels.machine import tile_vectors
from kernels.memory import empty

Places = npt.NDArray[np.int64]

# Floats of a panel: 64 KiB, a part of the second-level cache.
_PANEL = 1 << 14


class Packed(NamedTuple):
    """The weights (IC, OC, KD, KH, KW), twice; lanes past the last channel are zero."""

    forward: Floats  # (OCB, KD, KH, ICB * 16, KW, 16 oc)
    backward: Floats  # (ICB / cols, KD, KH, OCB, KW, 16 oc, cols * 16 ic)


def panels(weights_shape: tuple[int, int, int, int, int]) -> Packed:
    """Room for packed weights, to be filled by `pack`; zeros.

    Parameters
    ----------
    weights_shape : (IC, OC, KD, KH, KW)
    """
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
    """Refresh packed weights.

    Parameters
    ----------
    weights : float32 array, shape=(IC, OC, KD, KH, KW)
    packed : Packed
        From `panels`; filled.
    """
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


@kernel
def chunk_voxels(floats: int, rows: int, count: int) -> int:
    """Voxels of a chunk that need ``floats`` each: whole tiles, and no more than ``count`` needs."""
    most = max(rows, _PANEL // floats // rows * rows)
    return min(most, (count + rows - 1) // rows * rows)


@kernel
def place_voxels(
    image: int, first: int, count: int, shape: Shape, dst_shape: Shape, offsets: Places
) -> None:
    """Offset in ``dst`` of the first tap of each of ``count`` voxels, in the first block.

    Places past ``count`` repeat the last one. ``first`` is counted within the image.
    """
    _, _, D, H, W, _ = shape
    _, OCB, OD, OH, OW, _ = dst_shape
    KD, KH, KW = OD // D, OH // H, OW // W
    for i in range(offsets.size):
        voxel = first + min(i, count - 1)
        d, h, w = voxel // (H * W), voxel // W % H, voxel % W
        offsets[i] = (((image * OCB * OD + d * KD) * OH + h * KH) * OW + w * KW) * LANES
