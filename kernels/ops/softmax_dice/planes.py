"""Blocks of voxels, turned so that each class is a plane: what softmax and the losses work on.

Channels last, the classes of a voxel lie side by side, and there are few of them: a loop over them is
too short to vectorise. So ``BLOCK`` voxels are turned into ``planes[c, voxel]`` in the L1 cache; every
loop then runs along a plane. All functions are inlined into the kernels that call them; ``count`` is
the number of voxels in the block, which is less than ``BLOCK`` at the end of a volume.

Numerics   The maximum of each voxel is subtracted first, so that no exponential overflows and the
           largest is 1. That rounds: a probability whose logit lies ``d`` below the largest has a
           relative error of up to ``(d + 5) * 6e-8``, an absolute one below 3e-7. A sum over
           voxels is kept for each place in the block, in float32 over the 32 blocks of a chunk and
           from there on in float64: its relative error is below 32 * 6e-8, and 1e-8 in practice, as
           errors of a thousand places cancel.
"""

from typing import Any

import numpy as np

from kernels.base.arguments import Array, Floats, Labels, tensor
from kernels.base.exponential import exp, sigmoid
from kernels.base.jit import kernel

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
    if classes > 256:
        raise ValueError(f"logits must have at most 256 classes, as labels are uint8, got {classes}")
    highest = int(labels.max())
    if highest >= classes:
        raise ValueError(f"labels must be below {classes}, the number of classes, got {highest}")
    return labels


@kernel
def gather(src: Floats, start: int, count: int, planes: Floats) -> None:
    """Turn ``src[start : start + count]`` into planes."""
    block = src[start : start + count]
    if planes.shape[0] == 4:
        _gather_four(block.reshape(-1), planes[0], planes[1], planes[2], planes[3])
        return
    for c in range(planes.shape[0]):
        plane = planes[c]
        for voxel in range(block.shape[0]):
            plane[voxel] = block[voxel, c]


@kernel
def scatter(planes: Floats, start: int, count: int, dst: Floats) -> None:
    """Turn planes into ``dst[start : start + count]``."""
    block = dst[start : start + count]
    if planes.shape[0] == 4:
        _scatter_four(planes[0], planes[1], planes[2], planes[3], block.reshape(-1))
        return
    for c in range(planes.shape[0]):
        plane = planes[c]
        for voxel in range(block.shape[0]):
            block[voxel, c] = plane[voxel]


# Brain tumours come in four classes. With a stride that it knows, the compiler loads whole vectors and
# shuffles them, which takes half the time.


@kernel
def _gather_four(block: Floats, a: Floats, b: Floats, c: Floats, d: Floats) -> None:
    for voxel in range(block.size // 4):
        a[voxel] = block[4 * voxel]
        b[voxel] = block[4 * voxel + 1]
        c[voxel] = block[4 * voxel + 2]
        d[voxel] = block[4 * voxel + 3]


@kernel
def _scatter_four(a: Floats, b: Floats, c: Floats, d: Floats, block: Floats) -> None:
    for voxel in range(block.size // 4):
        block[4 * voxel] = a[voxel]
        block[4 * voxel + 1] = b[voxel]
        block[4 * voxel + 2] = c[voxel]
        block[4 * voxel + 3] = d[voxel]


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
            plane[voxel] = sigmoid(plane[voxel])
    else:
        subtract_maximum(planes, count, scratch)
        exponentiate(planes, count, scratch)
        normalise(planes, count, scratch)


@kernel
def total_of_places(sums: Floats) -> np.float64:
    """Sum of ``BLOCK`` float32 sums, in float64: place 0 of each vector, place 1, ... then these."""
    lanes = np.zeros(16)
    for start in range(0, BLOCK, 16):
        vector = sums[start : start + 16]
        for lane in range(16):
            lanes[lane] += np.float64(vector[lane])
    return lanes.sum()


@kernel
def class_of_plane(c: int, classes: int) -> np.uint8:
    """Label that plane ``c`` is the probability of: a single plane is that of label 1."""
    # Of the labels' own type, or each label would be widened to 64 bits for the comparison.
    return np.uint8(1) if classes == 1 else np.uint8(c)
