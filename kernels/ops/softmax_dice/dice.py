"""The three sums of which soft Dice is made, from logits in one pass.

    p = softmax(logits), or the sigmoid if there is one class;     t[v, c] = 1 where labels[v] == c, else 0
    intersection[n, c] = sum over the voxels v of image n of p[v, c] * t[v, c]
    prediction[n, c]   = sum of p[v, c]
    target[n, c]       = sum of t[v, c]

Every Dice loss is a small formula of these: ``2 * intersection / (prediction + target)`` by class, by
image or over the batch, smoothed or not. So the kernels stop here, and the formula and its derivatives
are written out where losses are, on arrays of ``MB * C`` numbers. The backward pass takes those
derivatives, by ``intersection`` and by ``prediction`` (``target`` depends on nothing)::

    g[v, c]           = diff_intersection[n, c] * t[v, c] + diff_prediction[n, c]
    diff_logits[v, c] = p[v, c] * (g[v, c] - sum over k of p[v, k] * g[v, k])              softmax
    diff_logits[v, 0] = p[v, 0] * (1 - p[v, 0]) * g[v, 0]                                  sigmoid

With one class, ``p`` is the probability of label 1.

Traffic    Forward reads 4 bytes an item and 1 a voxel and writes nothing; backward writes 4 an item.
Saves      nothing: ``p`` is made again, which is cheaper than to write and read it.
Numerics   ``p`` is float32, sums as ``planes`` says: float64 but for short ones. Chunks are added in
           their order, so the result does not depend on the number of threads.
Source: Milletari, Navab and Ahmadi, "V-Net" (2016), section 3; Drozdzal et al. (2016).
"""

import numpy as np

from kernels.base.arguments import Array, Doubles, Floats, Labels, tensor
from kernels.base.buffers import empty
from kernels.base.jit import kernel, parallel_kernel, prange
from kernels.ops.activation import sigmoid_forward
from kernels.ops.softmax_dice.planes import (
    BLOCK,
    CHUNK,
    checked_labels,
    class_of_plane,
    gather,
    probabilities,
    scatter,
    total_of_places,
)
from kernels.ops.softmax_dice.softmax import softmax_reference

_ZERO = np.float32(0)
_ONE = np.float32(1)


def dice_forward(logits: Array, labels: Labels) -> tuple[Doubles, Doubles, Doubles]:
    """Sums of ``p * t``, ``p`` and ``t`` over the voxels of each image, for each class.

    Parameters
    ----------
    logits : array, shape (MB, ..., C)
        float32 or float64.
    labels : uint8 array, shape (MB, ...)
        Below ``C``; 0 or 1 if ``C`` is 1.

    Returns
    -------
    intersection, prediction, target : float64 array, shape (MB, C)

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes do not fit, or a label is not a class.
    """
    logits, labels = _checked(logits, labels)
    MB, classes = logits.shape[0], logits.shape[-1]
    if logits.dtype == np.float64:
        p, t = _reference(logits, labels)
        axes = tuple(range(1, p.ndim - 1))
        return (p * t).sum(axis=axes), p.sum(axis=axes), t.sum(axis=axes)
    voxels = labels.size // MB
    partial = np.empty((MB, -(-voxels // CHUNK), 3, classes))
    _forward(logits.reshape(MB, voxels, classes), labels.reshape(MB, voxels), partial)
    sums = partial.sum(axis=1)
    return sums[:, 0], sums[:, 1], sums[:, 2]


def dice_backward(
    logits: Array, labels: Labels, diff_intersection: Doubles, diff_prediction: Doubles
) -> Array:
    """Gradient of the logits, from those of two of the sums.

    Parameters
    ----------
    logits : array, shape (MB, ..., C)
        float32 or float64.
    labels : uint8 array, shape (MB, ...)
        As in the forward pass.
    diff_intersection, diff_prediction : float64 array, shape (MB, C)

    Returns
    -------
    array, shape and dtype of ``logits``

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes do not fit, or a label is not a class.
    """
    logits, labels = _checked(logits, labels)
    MB, classes = logits.shape[0], logits.shape[-1]
    diffs = [
        tensor(name, diff, shape=(MB, classes), dtype=np.float64)
        for name, diff in (("diff_intersection", diff_intersection), ("diff_prediction", diff_prediction))
    ]
    if logits.dtype == np.float64:
        p, t = _reference(logits, labels)
        shape = (MB, *(1 for _ in logits.shape[1:-1]), classes)
        g = diffs[0].reshape(shape) * t + diffs[1].reshape(shape)
        if classes == 1:
            return p * (1.0 - p) * g
        return p * (g - (p * g).sum(axis=-1, keepdims=True))
    voxels = labels.size // MB
    diff_logits = empty(logits.shape)
    _backward(
        logits.reshape(MB, voxels, classes),
        labels.reshape(MB, voxels),
        np.stack(diffs, axis=1).astype(np.float32),
        diff_logits.reshape(MB, voxels, classes),
    )
    return diff_logits


def _checked(logits: Array, labels: Labels) -> tuple[Array, Labels]:
    logits = tensor("logits", logits)
    if logits.ndim < 3:
        raise ValueError(f"logits must have images, voxels and classes, got shape {logits.shape}")
    return logits, checked_labels(logits, labels)


def _reference(logits: Array, labels: Labels) -> tuple[Array, Array]:
    classes = logits.shape[-1]
    if classes == 1:
        return sigmoid_forward(logits), (labels[..., None] == 1).astype(np.float64)
    return softmax_reference(logits), (labels[..., None] == np.arange(classes)).astype(np.float64)


# --- float32, shape (MB, voxels, C) -------------------------------------------------------------------


@kernel
def _add(
    plane: Floats, label: Labels, mine: np.uint8, intersection: Floats, prediction: Floats, target: Floats
) -> None:
    for voxel in range(label.size):
        p = plane[voxel]
        t = _ONE if label[voxel] == mine else _ZERO
        intersection[voxel] += p * t
        prediction[voxel] += p
        target[voxel] += t


@parallel_kernel
def _forward(logits: Floats, labels: Labels, partial: Doubles) -> None:
    MB, voxels, classes = logits.shape
    chunks = partial.shape[1]
    for task in prange(MB * chunks):
        n, chunk = task // chunks, task % chunks
        planes = np.empty((classes, BLOCK), np.float32)
        scratch = np.empty(BLOCK, np.float32)
        sums = np.zeros((3, classes, BLOCK), np.float32)
        for start in range(chunk * CHUNK, min((chunk + 1) * CHUNK, voxels), BLOCK):
            count = min(BLOCK, voxels - start)
            gather(logits[n], start, count, planes)
            probabilities(planes, count, scratch)
            label = labels[n, start : start + count]
            for c in range(classes):
                mine = class_of_plane(c, classes)
                _add(planes[c], label, mine, sums[0, c], sums[1, c], sums[2, c])
        for which in range(3):
            for c in range(classes):
                partial[n, chunk, which, c] = total_of_places(sums[which, c])


@parallel_kernel
def _backward(logits: Floats, labels: Labels, diffs: Floats, diff_logits: Floats) -> None:
    MB, voxels, classes = logits.shape
    chunks = (voxels + CHUNK - 1) // CHUNK
    for task in prange(MB * chunks):
        n, chunk = task // chunks, task % chunks
        planes = np.empty((classes, BLOCK), np.float32)
        g = np.empty((classes, BLOCK), np.float32)
        mean = np.empty(BLOCK, np.float32)
        for start in range(chunk * CHUNK, min((chunk + 1) * CHUNK, voxels), BLOCK):
            count = min(BLOCK, voxels - start)
            gather(logits[n], start, count, planes)
            probabilities(planes, count, mean)
            label = labels[n, start : start + count]
            mean[:] = 0.0
            for c in range(classes):
                mine = class_of_plane(c, classes)
                plane, diff = planes[c], g[c]
                diff_intersection, diff_prediction = diffs[n, 0, c], diffs[n, 1, c]
                for voxel in range(label.size):
                    here = diff_intersection if label[voxel] == mine else _ZERO
                    diff[voxel] = here + diff_prediction
                    mean[voxel] += plane[voxel] * diff[voxel]
            for c in range(classes):
                plane, diff = planes[c], g[c]
                for voxel in range(label.size):
                    # The sigmoid is a softmax whose other class has the gradient 0.
                    plane[voxel] *= diff[voxel] - mean[voxel]
            scatter(planes, start, count, diff_logits[n])
