"""Softmax over the last axis, and the blocks of voxels that softmax and the losses work on.

    dst[v, c] = exp(src[v, c] - m[v]) / sum over k of exp(src[v, k] - m[v]),    m[v] = max of src[v]

Idea       Channels last, the few classes of a voxel lie side by side: a loop over them is too short to
           vectorise. So 128 voxels are turned into planes in the L1 cache, and loops run along a plane::

               memory   v0: c0 c1 c2 | v1: c0 c1 c2 | ...
               planes   c0: v0 ... v127 | c1: v0 ... v127 | ...          planes[c * BLOCK + v]

           Functions on planes work on whole vectors, up to voxel ``end``. In the last block of a volume that
           may be past its last voxel, where the numbers mean nothing.
Traffic    Forward reads and writes 4 bytes an item; backward reads 8 and writes 4.
Saves      ``dst``
Numerics   float32, with :func:`kernels.base.exponential.exp`. The maximum of each voxel is subtracted first,
           so no exponential overflows and the largest is 1. That rounds: a probability whose logit lies ``d``
           below the largest has a relative error of up to ``(d + 5) * 6e-8``, an absolute one below 3e-7. A
           voxel sums to 1 within ``C * 6e-8``. float64 runs the NumPy expression, which is the reference.
"""

import numpy as np

from kernels.base.arguments import Array, Floats, tensor
from kernels.base.buffers import empty
from kernels.base.exponential import exp, sigmoid
from kernels.base.jit import kernel, parallel_kernel, prange, signed
from kernels.base.simd import LANES, broadcast, fma, load, store, where_above
from kernels.deferred.normalizing import aligned

# Voxels of a block; the planes of 4 classes take 2 KiB.
BLOCK = 128
# Voxels that one thread takes at a time: a whole number of blocks.
CHUNK = 32 * BLOCK

_ONE = np.float32(1)


def forward(logits: Array) -> Array:
    """Probabilities of the classes, the last axis of a float32 or float64 array of any shape.

    Raises
    ------
    TypeError, ValueError
        If ``logits`` is another array, or empty.
    """
    logits = tensor("logits", logits)
    if logits.dtype == np.float64:
        return reference(logits)
    dst, classes = empty(logits.shape), logits.shape[-1]
    _forward(logits.reshape(-1, classes), dst.reshape(-1, classes))
    return dst


def backward(diff_dst: Array, dst: Array) -> Array:
    """``diff_logits = dst * (diff_dst - sum over classes of diff_dst * dst)``.

    Raises
    ------
    TypeError, ValueError
        If the two differ in dtype or shape.
    """
    dst = tensor("dst", dst)
    diff_dst = tensor("diff_dst", diff_dst, shape=dst.shape, dtype=dst.dtype)
    if dst.dtype == np.float64:
        return dst * (diff_dst - (diff_dst * dst).sum(axis=-1, keepdims=True))
    diff_logits, classes = empty(dst.shape), dst.shape[-1]
    _backward(diff_dst.reshape(-1, classes), dst.reshape(-1, classes), diff_logits.reshape(-1, classes))
    return diff_logits


def reference(logits: Array) -> Array:
    """Softmax over the last axis, in NumPy; of a single class it is 1."""
    power = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return power / power.sum(axis=-1, keepdims=True)


# --- Blocks of voxels ------------------------------------------------------------------------------------


# Brain tumours come in four classes. With a stride that it knows, the compiler loads whole vectors and
# shuffles them, which takes half the time.


@kernel
def gather(src: Floats, start: int, count: int, planes: Floats) -> None:
    """Turn ``src[start : start + count]``, shape (count, classes), into planes."""
    block, classes = src[start : start + count].reshape(-1), src.shape[1]
    if classes == 4:
        for voxel in range(block.size // 4):
            for c in range(4):
                planes[c * BLOCK + voxel] = block[voxel * 4 + c]
    else:
        for c in range(classes):
            for voxel in range(block.size // classes):
                planes[c * BLOCK + voxel] = block[voxel * classes + c]


@kernel
def scatter(planes: Floats, start: int, count: int, dst: Floats) -> None:
    """Turn planes into ``dst[start : start + count]``, shape (count, classes)."""
    block, classes = dst[start : start + count].reshape(-1), dst.shape[1]
    if classes == 4:
        for voxel in range(block.size // 4):
            for c in range(4):
                block[voxel * 4 + c] = planes[c * BLOCK + voxel]
    else:
        for c in range(classes):
            for voxel in range(block.size // classes):
                block[voxel * classes + c] = planes[c * BLOCK + voxel]


@kernel
def probabilities(planes: Floats, end: int, classes: int, scratch: Floats) -> None:
    """Softmax of the planes, in place; the sigmoid of a single plane. ``scratch`` is a plane."""
    if classes == 1:
        sigmoid_plane(planes)
    else:
        normalise_classes(planes, end, classes, scratch)


@kernel
def normalise_classes(planes: Floats, end: int, classes: int, scratch: Floats) -> None:
    """Softmax of the planes, in place; of a single plane it is 1."""
    subtract_maximum(planes, end, classes)
    exponentiate(planes, end, classes, scratch)
    normalise(planes, end, classes, scratch)


@kernel
def sigmoid_plane(plane: Floats) -> None:
    """Sigmoid of one plane, in place."""
    for voxel in range(BLOCK):
        plane[voxel] = sigmoid(plane[voxel])


@kernel
def subtract_maximum(planes: Floats, end: int, classes: int) -> None:
    """Subtract from each voxel its largest logit."""
    for voxel in range(0, end, LANES):
        largest = load(planes, voxel)
        for c in range(1, classes):
            logit = load(planes, c * BLOCK + voxel)
            largest = where_above(logit, largest, logit, largest)
        for c in range(classes):
            store(planes, c * BLOCK + voxel, load(planes, c * BLOCK + voxel) - largest)


@kernel
def exponentiate(planes: Floats, end: int, classes: int, totals: Floats) -> None:
    """Replace the planes by their exponentials, and sum these for each voxel."""
    _exponentials(planes[: classes * BLOCK])
    for voxel in range(0, end, LANES):
        total = load(planes, voxel)
        for c in range(1, classes):
            total = total + load(planes, c * BLOCK + voxel)
        store(totals, voxel, total)


@kernel
def normalise(planes: Floats, end: int, classes: int, totals: Floats) -> None:
    """Divide each voxel by its total."""
    _reciprocals(totals)
    for voxel in range(0, end, LANES):
        factor = load(totals, voxel)
        for c in range(classes):
            store(planes, c * BLOCK + voxel, load(planes, c * BLOCK + voxel) * factor)


@kernel
def _exponentials(planes: Floats) -> None:
    for i in range(planes.size):
        planes[i] = exp(planes[i])


@kernel
def _reciprocals(plane: Floats) -> None:
    for voxel in range(BLOCK):
        plane[voxel] = _ONE / plane[voxel]


# --- float32, shape (voxels, C) --------------------------------------------------------------------------


@parallel_kernel
def _forward(logits: Floats, dst: Floats) -> None:
    voxels, classes = logits.shape
    for index in prange((voxels + CHUNK - 1) // CHUNK):
        chunk = signed(index)
        planes, scratch = aligned(classes * BLOCK), aligned(BLOCK)
        for start in range(chunk * CHUNK, min((chunk + 1) * CHUNK, voxels), BLOCK):
            count = min(BLOCK, voxels - start)
            gather(logits, start, count, planes)
            normalise_classes(planes, BLOCK, classes, scratch)
            scatter(planes, start, count, dst)


@parallel_kernel
def _backward(diff_dst: Floats, dst: Floats, diff_logits: Floats) -> None:
    voxels, classes = dst.shape
    for index in prange((voxels + CHUNK - 1) // CHUNK):
        chunk = signed(index)
        planes, diffs = aligned(classes * BLOCK), aligned(classes * BLOCK)
        for start in range(chunk * CHUNK, min((chunk + 1) * CHUNK, voxels), BLOCK):
            count = min(BLOCK, voxels - start)
            gather(dst, start, count, planes)
            gather(diff_dst, start, count, diffs)
            for voxel in range(0, BLOCK, LANES):
                product = broadcast(np.float32(0))
                for at in range(voxel, planes.size, BLOCK):
                    product = fma(load(planes, at), load(diffs, at), product)
                for at in range(voxel, planes.size, BLOCK):
                    store(planes, at, load(planes, at) * (load(diffs, at) - product))
            scatter(planes, start, count, diff_logits)
