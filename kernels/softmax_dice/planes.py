"""Blocks of voxels, turned so that each class is a plane: what softmax and the losses work on.

Channels last, the classes of a voxel lie side by side, and there are few of them: a loop over them is
too short to vectorise. So ``BLOCK`` voxels are turned into ``planes[c, voxel]`` in the L1 cache; every
loop then runs along a plane. All functions are inlined into the kernels that call them; ``count`` is
the number of voxels in the block, which is less than ``BLOCK`` at the end of a volume.

Numerics   The maximum of each voxel is subtracted first, so that no exponential overflows and the
           largest is 1. Sums over voxels are float64, one for each place in the block.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from kernels.checks import Array, tensor
from kernels.compiler import kernel
from kernels.exponential import exp

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.uint8]
Sums = npt.NDArray[np.float64]

# Voxels of a block; the planes of 4 classes and their sums take 16 KiB.
BLOCK = 128
# Voxels of a chunk, what one thread takes at a time: a whole number of blocks.
CHUNK = 32 * BLOCK

_ZERO = np.float32(0)
_ONE = np.float32(1)


def checked_labels(logits: Array, labels: Any) -> Labels:
    """``labels``, if they are uint8, of the shape of the logits' voxels, and name classes that exist.

    Raises
    ------
    TypeError, ValueError
        If not.
    """
    labels = tensor("labels", labels, shape=logits.shape[:-1], dtype=np.uint8)
    # One channel is the probability of class 1 against class 0.
    classes = max(logits.shape[-1], 2)
    highest = int(labels.max())
    if highest >= classes:
        raise ValueError(f"labels must be below {classes}, the number of classes, got {highest}")
    return labels


@kernel
def gather(src: Floats, start: int, count: int, planes: Floats) -> None:
    """Turn ``src[start : start + count]`` into planes."""
    block = src[start : start + count]
    for c in range(planes.shape[0]):
        plane = planes[c]
        for voxel in range(block.shape[0]):
            plane[voxel] = block[voxel, c]


@kernel
def scatter(planes: Floats, start: int, count: int, dst: Floats) -> None:
    """Turn planes into ``dst[start : start + count]``."""
    block = dst[start : start + count]
    for c in range(planes.shape[0]):
        plane = planes[c]
        for voxel in range(block.shape[0]):
            block[voxel, c] = plane[voxel]


@kernel
def subtract_maximum(planes: Floats, count: int, maximum: Floats) -> None:
    """Subtract from each voxel its largest logit."""
    for voxel in range(count):
        maximum[voxel] = planes[0, voxel]
    for c in range(1, planes.shape[0]):
        plane = planes[c]
        for voxel in range(count):
            maximum[voxel] = max(maximum[voxel], plane[voxel])
    for c in range(planes.shape[0]):
        plane = planes[c]
        for voxel in range(count):
            plane[voxel] -= maximum[voxel]


@kernel
def exponentiate(planes: Floats, count: int, total: Floats) -> None:
    """Replace the planes by their exponentials, and sum these for each voxel."""
    for voxel in range(count):
        total[voxel] = _ZERO
    for c in range(planes.shape[0]):
        plane = planes[c]
        for voxel in range(count):
            power = exp(plane[voxel])
            plane[voxel] = power
            total[voxel] += power


@kernel
def normalise(planes: Floats, count: int, total: Floats) -> None:
    """Divide each voxel by its total."""
    for voxel in range(count):
        total[voxel] = _ONE / total[voxel]
    for c in range(planes.shape[0]):
        plane = planes[c]
        for voxel in range(count):
            plane[voxel] *= total[voxel]


@kernel
def probabilities(planes: Floats, count: int, scratch: Floats) -> None:
    """Softmax of the planes, in place; of a single plane the sigmoid."""
    if planes.shape[0] == 1:
        plane = planes[0]
        for voxel in range(count):
            plane[voxel] = _ONE / (_ONE + exp(-plane[voxel]))
    else:
        subtract_maximum(planes, count, scratch)
        exponentiate(planes, count, scratch)
        normalise(planes, count, scratch)


@kernel
def class_of_plane(c: int, classes: int) -> int:
    """Label that plane ``c`` is the probability of: a single plane is that of label 1."""
    return 1 if classes == 1 else c
