"""Cross-entropy between labels and the softmax of logits, in one pass.

    loss = mean over voxels v of log(sum over k of exp(x[v, k])) - x[v, labels[v]]

and with one class, whose sigmoid is the probability of label 1,

    loss = mean over voxels v of max(x, 0) - x * labels[v] + log(1 + exp(-|x|))

Neither takes the logarithm of a probability, so nothing underflows however wrong a voxel is.

Traffic    Forward reads 4 bytes an item and 1 a voxel and writes nothing; backward writes 4 an item.
Saves      nothing: backward makes the probabilities again.
Numerics   float32 per voxel with an error below 3e-7 times the larger of 1 and the voxel's loss (one
           class: relative); the mean is summed as ``planes`` says, chunks in their order.
"""

import numpy as np

from kernels.base.arguments import Array, Doubles, Floats, Labels, tensor
from kernels.base.buffers import empty
from kernels.base.exponential import exp, log, log1p
from kernels.base.jit import kernel, parallel_kernel, prange
from kernels.ops.activation import sigmoid_forward
from kernels.ops.softmax_dice.planes import (
    BLOCK,
    CHUNK,
    checked_labels,
    class_of_plane,
    exponentiate,
    gather,
    probabilities,
    scatter,
    subtract_maximum,
    total_of_places,
)
from kernels.ops.softmax_dice.softmax import softmax_reference

_ZERO = np.float32(0)
_ONE = np.float32(1)


def cross_entropy_forward(logits: Array, labels: Labels) -> float:
    """Mean cross-entropy over all voxels of the batch.

    Parameters
    ----------
    logits : array, shape (..., C)
        float32 or float64.
    labels : uint8 array, shape (...)
        Below ``C``; 0 or 1 if ``C`` is 1.

    Returns
    -------
    float

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes do not fit, or a label is not a class.
    """
    logits = tensor("logits", logits)
    labels = checked_labels(logits, labels)
    if logits.dtype == np.float64:
        return float(_reference(logits, labels).mean())
    classes = logits.shape[-1]
    partial = np.empty(-(-labels.size // CHUNK))
    _forward(logits.reshape(-1, classes), labels.reshape(-1), partial)
    return float(partial.sum()) / labels.size


def cross_entropy_backward(logits: Array, labels: Labels, diff_loss: float = 1.0) -> Array:
    """``diff_logits = diff_loss * (p - t) / voxels``, with ``t`` 1 in the class of the label, else 0.

    Parameters
    ----------
    logits : array, shape (..., C)
        float32 or float64.
    labels : uint8 array, shape (...)
        As in the forward pass.
    diff_loss : float
        Gradient of the loss.

    Returns
    -------
    array, shape and dtype of ``logits``

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes do not fit, or a label is not a class.
    """
    logits = tensor("logits", logits)
    labels = checked_labels(logits, labels)
    classes = logits.shape[-1]
    share = float(diff_loss) / labels.size
    if logits.dtype == np.float64:
        if classes == 1:
            return share * (sigmoid_forward(logits) - labels[..., None])
        return share * (softmax_reference(logits) - (labels[..., None] == np.arange(classes)))
    diff_logits = empty(logits.shape)
    _backward(
        logits.reshape(-1, classes), labels.reshape(-1), np.float32(share), diff_logits.reshape(-1, classes)
    )
    return diff_logits


def _reference(logits: Array, labels: Labels) -> Array:
    """Cross-entropy of each voxel, in NumPy."""
    if logits.shape[-1] == 1:
        x = np.where(labels == 1, -logits[..., 0], logits[..., 0])
        return np.maximum(x, 0.0) + np.log1p(np.exp(-np.abs(x)))
    shifted = logits - logits.max(axis=-1, keepdims=True)
    picked = np.take_along_axis(shifted, labels[..., None].astype(np.intp), axis=-1)[..., 0]
    return np.log(np.exp(shifted).sum(axis=-1)) - picked


# --- float32, shape (voxels, C) -----------------------------------------------------------------------


@kernel
def _binary(plane: Floats, label: Labels, loss: Floats) -> None:
    for voxel in range(label.size):
        # How far x is on the wrong side: max(x, 0) - x would be NaN where x is infinite.
        x = -plane[voxel] if label[voxel] == 1 else plane[voxel]
        loss[voxel] = max(x, _ZERO) + log1p(exp(-abs(x)))


@kernel
def _categorical(planes: Floats, label: Labels, scratch: Floats, loss: Floats) -> None:
    subtract_maximum(planes, label.size, scratch)
    for c in range(planes.shape[0]):
        plane, mine = planes[c], np.uint8(c)
        for voxel in range(label.size):
            loss[voxel] = -plane[voxel] if label[voxel] == mine else loss[voxel]
    exponentiate(planes, label.size, scratch)
    for voxel in range(label.size):
        loss[voxel] += log(scratch[voxel])


@parallel_kernel
def _forward(logits: Floats, labels: Labels, partial: Doubles) -> None:
    voxels, classes = logits.shape
    for chunk in prange(partial.size):
        planes = np.empty((classes, BLOCK), np.float32)
        scratch = np.empty(BLOCK, np.float32)
        loss = np.zeros(BLOCK, np.float32)
        sums = np.zeros(BLOCK, np.float32)
        for start in range(chunk * CHUNK, min((chunk + 1) * CHUNK, voxels), BLOCK):
            label = labels[start : min(start + BLOCK, voxels)]
            gather(logits, start, label.size, planes)
            if classes == 1:
                _binary(planes[0], label, loss)
            else:
                _categorical(planes, label, scratch, loss)
            for voxel in range(label.size):
                sums[voxel] += loss[voxel]
        partial[chunk] = total_of_places(sums)


@parallel_kernel
def _backward(logits: Floats, labels: Labels, share: np.float32, diff_logits: Floats) -> None:
    voxels, classes = logits.shape
    for chunk in prange((voxels + CHUNK - 1) // CHUNK):
        planes = np.empty((classes, BLOCK), np.float32)
        scratch = np.empty(BLOCK, np.float32)
        for start in range(chunk * CHUNK, min((chunk + 1) * CHUNK, voxels), BLOCK):
            label = labels[start : min(start + BLOCK, voxels)]
            gather(logits, start, label.size, planes)
            probabilities(planes, label.size, scratch)
            for c in range(classes):
                plane, mine = planes[c], class_of_plane(c, classes)
                for voxel in range(label.size):
                    t = _ONE if label[voxel] == mine else _ZERO
                    plane[voxel] = (plane[voxel] - t) * share
            scatter(planes, start, label.size, diff_logits)
