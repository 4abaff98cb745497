"""Soft Dice and cross-entropy between labels and the softmax of logits, in one pass over the logits.

    p = softmax(logits), or the sigmoid if there is one class;     t[v, c] = 1 where labels[v] == c, else 0
    intersection[n, c] = sum over the voxels v of image n of p[v, c] * t[v, c]
    prediction[n, c]   = sum of p[v, c]
    target[n, c]       = sum of t[v, c]
    cross-entropy      = sum over voxels v of w[labels[v]] * loss[v] / sum of w[labels[v]]
    loss[v]            = log(sum over k of exp(x[v, k])) - x[v, labels[v]]
                         or of one class, max(x, 0) - x * labels[v] + log(1 + exp(-|x|))

With one class, ``p`` is the probability of label 1. No logarithm is taken of a probability, so nothing
underflows however wrong a voxel is. Every Dice loss is a small formula of the three sums: the kernels stop
here, and the formula stands where losses are, on arrays of ``MB * C`` numbers. Backward takes the derivatives
of the loss by intersection, prediction and cross-entropy (``target`` does not depend on the logits)::

    g[v, c]           = diff_intersection[n, c] * t[v, c] + diff_prediction[n, c]
    diff_logits[v, c] = p[v, c] * (g[v, c] - sum over k of p[v, k] * g[v, k])
                        + diff_cross_entropy * w[labels[v]] / sum of w * (p[v, c] - t[v, c])

A voxel of the ignored label counts in none of these sums, whatever its logits are, and has no gradient. If
all voxels are ignored, the cross-entropy is 0.

Traffic    Forward reads 4 bytes an item and 1 a voxel and writes nothing; backward writes 4 an item.
Saves      nothing: making ``p`` again is cheaper than writing and reading it.
Numerics   Cross-entropy of a voxel: below 3e-7 times the larger of 1 and the loss (one class: relative). Sums
           are float32 over the 8 vectors of a block, float64 from there on, in the order of the chunks: the
           result does not depend on the number of threads. float64 runs NumPy, the reference.
Source     Milletari, Navab and Ahmadi, "V-Net" (2016), section 3; Drozdzal et al. (2016).

Common parameters
-----------------
logits : float32 or float64 array, shape (MB, ..., C)
    The cross-entropy takes any shape (..., C).
labels : uint8 array, shape (MB, ...)
    Below ``C``; 0 or 1 if ``C`` is 1; or the ignored label.
class_weights : float64 array, shape (max(C, 2),), optional
    ``w``, a number for each label from 0 on; 1 if not given.
ignored : int, optional
    The ignored label, from 0 to 255: a class or not.

All functions raise TypeError or ValueError if dtypes or shapes do not fit, or a label is not a class.
"""

from typing import Any, NamedTuple

import numpy as np

from kernels.base.arguments import Array, Doubles, Floats, Labels, tensor
from kernels.base.buffers import empty
from kernels.base.exponential import exp, log, log1p
from kernels.base.jit import kernel, parallel_kernel, prange, split_index
from kernels.base.simd import (
    LANES,
    add_to_doubles,
    broadcast,
    fma,
    load,
    load_first_bytes,
    store,
    where_equal,
)
from kernels.deferred.normalizing import aligned
from kernels.ops import softmax
from kernels.ops.softmax import BLOCK, CHUNK, exponentiate, gather, normalise, probabilities, scatter

# The label of what counts nowhere: ignored voxels, and those past the last one.
NOWHERE = np.float32(-1)

_ZERO, _ONE = np.float32(0), np.float32(1)


class Weighting(NamedTuple):
    """How much voxels count, by their label."""

    weights: Array  # in the cross-entropy, (max(C, 2),)
    ignored: int  # label that counts nowhere; -1 if there is none


def weighting(classes: int, class_weights: Doubles | None = None, ignored: int | None = None) -> Weighting:
    """Weights of the labels: 1 each if none are given."""
    labels = max(classes, 2)
    if class_weights is None:
        class_weights = np.ones(labels)
    weights = tensor("class_weights", class_weights, shape=(labels,), dtype=np.float64)
    return Weighting(weights, -1 if ignored is None else ignored)


def total_weight(labels: Labels, rule: Weighting) -> float:
    """Sum of the voxels' weights: what the cross-entropy's sum is divided by."""
    if rule.ignored < 0 and (rule.weights == 1).all():
        return labels.size
    counts = np.bincount(labels.reshape(-1), minlength=256)
    if rule.ignored >= 0:
        counts[rule.ignored] = 0
    return float(counts[: rule.weights.size] @ rule.weights)


def dice_forward(
    logits: Array, labels: Labels, ignored: int | None = None
) -> tuple[Doubles, Doubles, Doubles]:
    """Intersection, prediction and target, each a float64 array of shape (MB, C)."""
    logits, labels, rule = _checked(logits, labels, None, ignored, images=True)
    MB, classes = logits.shape[0], logits.shape[-1]
    if logits.dtype == np.float64:
        p, t = _reference(logits, labels, rule)
        axes = tuple(range(1, p.ndim - 1))
        return (p * t).sum(axis=axes), p.sum(axis=axes), t.sum(axis=axes)
    sums = _sums(logits.reshape(MB, -1, classes), labels, rule)[:, :-1].reshape(MB, 3, classes)
    return sums[:, 0], sums[:, 1], sums[:, 2]


def dice_backward(
    logits: Array,
    labels: Labels,
    diff_intersection: Doubles,
    diff_prediction: Doubles,
    ignored: int | None = None,
) -> Array:
    """Gradient of the logits, from the derivatives by two of the sums, float64 arrays (MB, C)."""
    logits, labels, rule = _checked(logits, labels, None, ignored, images=True)
    MB, classes = logits.shape[0], logits.shape[-1]
    given = {"diff_intersection": diff_intersection, "diff_prediction": diff_prediction}
    diffs = [tensor(name, diff, shape=(MB, classes), dtype=np.float64) for name, diff in given.items()]
    if logits.dtype == np.float64:
        p, t = _reference(logits, labels, rule)
        shape = (MB, *(1 for _ in logits.shape[1:-1]), classes)
        g = diffs[0].reshape(shape) * t + diffs[1].reshape(shape)
        mean = p * g if classes == 1 else (p * g).sum(axis=-1, keepdims=True)
        return p * (g - mean)
    return _gradient(logits, labels, rule, np.stack(diffs, axis=1).astype(np.float32), 0.0)


def cross_entropy_forward(
    logits: Array, labels: Labels, class_weights: Doubles | None = None, ignored: int | None = None
) -> float:
    """Weighted mean of the cross-entropy over all voxels of the batch."""
    logits, labels, rule = _checked(logits, labels, class_weights, ignored)
    classes, total = logits.shape[-1], total_weight(labels, rule)
    if total == 0:
        return 0.0
    if logits.dtype == np.float32:
        return float(_sums(logits.reshape(1, -1, classes), labels, rule)[0, -1]) / total
    if classes == 1:
        # How far x is on the wrong side: max(x, 0) - x would be NaN where x is infinite.
        x = np.where(labels == 1, -logits[..., 0], logits[..., 0])
        losses = np.maximum(x, 0.0) + np.log1p(np.exp(-np.abs(x)))
    else:
        shifted = logits - logits.max(axis=-1, keepdims=True)
        own = np.minimum(labels, classes - 1)[..., None].astype(np.intp)
        losses = np.log(np.exp(shifted).sum(axis=-1)) - np.take_along_axis(shifted, own, axis=-1)[..., 0]
    weighted = losses * _voxel_weights(labels, rule)
    return float(np.where(labels == rule.ignored, 0.0, weighted).sum() / total)


def cross_entropy_backward(
    logits: Array,
    labels: Labels,
    diff_loss: float = 1.0,
    class_weights: Doubles | None = None,
    ignored: int | None = None,
) -> Array:
    """Gradient of the logits, from the derivative by the cross-entropy."""
    logits, labels, rule = _checked(logits, labels, class_weights, ignored)
    share = float(diff_loss) / (total_weight(labels, rule) or 1.0)
    if logits.dtype == np.float64:
        p, t = _reference(logits, labels, rule)
        return share * _voxel_weights(labels, rule)[..., None] * (p - t)
    return _gradient(logits[None], labels, rule, np.zeros((1, 2, logits.shape[-1]), np.float32), share)


def checked_labels(logits: Array, labels: Any, ignored: int | None = None) -> Labels:
    """``labels``, if they are uint8, of the shape of the logits' voxels, and name classes that exist."""
    labels = tensor("labels", labels, shape=logits.shape[:-1], dtype=np.uint8)
    # One channel is the probability of class 1 against class 0.
    classes = max(logits.shape[-1], 2)
    if classes > 256:
        raise ValueError(f"logits must have at most 256 classes, as labels are uint8, got {classes}")
    highest = int(labels.max() if ignored is None else labels.max(initial=0, where=labels != ignored))
    if highest >= classes:
        raise ValueError(f"labels must be below {classes}, the number of classes, got {highest}")
    return labels


def _checked(
    logits: Array, labels: Labels, weights: Doubles | None, ignored: int | None, images: bool = False
) -> tuple[Array, Labels, Weighting]:
    logits = tensor("logits", logits)
    if images and logits.ndim < 3:
        raise ValueError(f"logits must have images, voxels and classes, got shape {logits.shape}")
    labels = checked_labels(logits, labels, ignored)
    return logits, labels, weighting(logits.shape[-1], weights, ignored)


def _reference(logits: Array, labels: Labels, rule: Weighting) -> tuple[Array, Array]:
    """``p`` and ``t``, zeros in ignored voxels."""
    classes = logits.shape[-1]
    t = labels[..., None] == (np.arange(classes) if classes > 1 else 1)
    if classes > 1:
        p = softmax.reference(logits)
    else:
        power = np.exp(-np.abs(logits))
        p = np.where(logits >= 0.0, 1.0, power) / (1.0 + power)
    counted = labels[..., None] != rule.ignored
    return np.where(counted, p, 0.0), np.where(counted, t, 0.0)


def _voxel_weights(labels: Labels, rule: Weighting) -> Array:
    """Weight of each voxel; of ignored ones, any number."""
    return np.pad(rule.weights, (0, 256 - rule.weights.size))[labels]


# --- float32 ---------------------------------------------------------------------------------------------


def _sums(logits: Floats, labels: Labels, rule: Weighting) -> Doubles:
    """Sums of each image, shape (MB, 3 * C + 1): intersection, prediction, target, cross-entropy."""
    MB, voxels, classes = logits.shape
    partial = np.empty((MB, -(-voxels // CHUNK), 3 * classes + 1))
    _forward(logits, labels.reshape(MB, voxels), in_float32(rule), partial)
    return partial.sum(axis=1)


def _gradient(logits: Floats, labels: Labels, rule: Weighting, diffs: Floats, share: float) -> Floats:
    MB, classes = logits.shape[0], logits.shape[-1]
    diff_logits = empty((*labels.shape, classes))
    src, dst = logits.reshape(MB, -1, classes), diff_logits.reshape(MB, -1, classes)
    _backward(src, labels.reshape(MB, -1), in_float32(rule), diffs, np.float32(share), dst)
    return diff_logits


def in_float32(rule: Weighting) -> Weighting:
    """The same, as kernels take it."""
    return Weighting(rule.weights.astype(np.float32), rule.ignored)


@parallel_kernel
def _forward(logits: Floats, labels: Labels, rule: Weighting, partial: Doubles) -> None:
    MB, voxels, classes = logits.shape
    chunks = partial.shape[1]
    for task in prange(MB * chunks):
        n, chunk = split_index(task, chunks)
        planes, block = aligned(classes * BLOCK), loss_block()
        sums = np.zeros((3 * classes + 1) * LANES)
        for start in range(chunk * CHUNK, min((chunk + 1) * CHUNK, voxels), BLOCK):
            count = min(BLOCK, voxels - start)
            gather(logits[n], start, count, planes)
            mark(labels[n], start, count, rule.ignored, block.marks)
            add_losses(planes, whole_vectors(count), classes, block, rule.weights, sums)
        total_of_lanes(sums, partial[n, chunk])


@parallel_kernel
def _backward(
    logits: Floats, labels: Labels, rule: Weighting, diffs: Floats, share: np.float32, diff_logits: Floats
) -> None:
    MB, voxels, classes = logits.shape
    chunks = (voxels + CHUNK - 1) // CHUNK
    for task in prange(MB * chunks):
        n, chunk = split_index(task, chunks)
        planes, block = aligned(classes * BLOCK), loss_block()
        for start in range(chunk * CHUNK, min((chunk + 1) * CHUNK, voxels), BLOCK):
            count = min(BLOCK, voxels - start)
            gather(logits[n], start, count, planes)
            mark(labels[n], start, count, rule.ignored, block.marks)
            gradient_of_logits(planes, whole_vectors(count), classes, block, rule.weights, diffs[n], share)
            scatter(planes, start, count, diff_logits[n])


# --- Blocks of 128 voxels, as in `softmax`; the fused last layer uses them, too -----------------


class LossBlock(NamedTuple):
    """What a thread needs for the voxels of a block beside their planes."""

    marks: Floats  # labels as floats, or `NOWHERE`
    loss: Floats  # cross-entropies
    scratch: Floats  # two planes


@kernel
def loss_block() -> LossBlock:
    """Room for the voxels of a block."""
    planes = aligned(4 * BLOCK)
    return LossBlock(planes[:BLOCK], planes[BLOCK : 2 * BLOCK], planes[2 * BLOCK :])


@kernel
def whole_vectors(count: int) -> int:
    """Voxels, rounded up to whole vectors."""
    return (count + LANES - 1) // LANES * LANES


@kernel
def mark(labels: Labels, first: int, count: int, ignored: int, marks: Floats) -> None:
    """Labels of ``count`` voxels as floats; `NOWHERE` for ignored ones, and up to the end of a vector."""
    nobody, nowhere = broadcast(np.float32(ignored)), broadcast(NOWHERE)
    for voxel in range(0, count, LANES):
        label = load_first_bytes(labels, first + voxel, count - voxel)
        store(marks, voxel, where_equal(label, nobody, nowhere, label))


@kernel
def _weights_of(label: Any, weights: Floats) -> Any:
    """Weights of a vector of labels."""
    found = broadcast(_ZERO)
    for c in range(weights.size):
        found = where_equal(label, broadcast(np.float32(c)), broadcast(weights[c]), found)
    return found


@kernel
def add_losses(
    planes: Floats, end: int, classes: int, block: LossBlock, weights: Floats, sums: Doubles
) -> None:
    """Add the logits' Dice sums and cross-entropy, 16 sums each, and replace logits by probabilities."""
    if classes == 1:
        _binary_losses(planes, end, block)
    else:
        _categorical_losses(planes, end, classes, block)
    _add_dice(planes, end, classes, block.marks, sums)
    total = zero = broadcast(_ZERO)
    for voxel in range(0, end, LANES):
        label = load(block.marks, voxel)
        loss = load(block.loss, voxel) * _weights_of(label, weights)
        total = total + where_equal(label, broadcast(NOWHERE), zero, loss)
    add_to_doubles(sums, 3 * classes * LANES, total)


@kernel
def total_of_lanes(sums: Doubles, totals: Doubles) -> None:
    """Sum of each 16."""
    for i in range(totals.size):
        totals[i] = 0.0
        for lane in range(LANES):
            totals[i] += sums[i * LANES + lane]


@kernel
def _softplus(plane: Floats) -> None:
    for voxel in range(BLOCK):
        x = plane[voxel]
        plane[voxel] = max(x, _ZERO) + log1p(exp(-abs(x)))


@kernel
def _logarithms(plane: Floats) -> None:
    for voxel in range(BLOCK):
        plane[voxel] = log(plane[voxel])


@kernel
def _binary_losses(plane: Floats, end: int, block: LossBlock) -> None:
    """``max(x, 0) + log(1 + exp(-|x|))``, of -x where the label is 1."""
    marks, loss, zero = block.marks, block.loss, broadcast(_ZERO)
    for voxel in range(0, end, LANES):
        x = load(plane, voxel)
        store(loss, voxel, where_equal(load(marks, voxel), broadcast(_ONE), zero - x, x))
    _softplus(loss)
    softmax.sigmoid_plane(plane)


@kernel
def _categorical_losses(planes: Floats, end: int, classes: int, block: LossBlock) -> None:
    """``log(sum of exp) - x[label]``, each with the maximum subtracted."""
    marks, loss, scratch, zero = block.marks, block.loss, block.scratch, broadcast(_ZERO)
    softmax.subtract_maximum(planes, end, classes)
    for voxel in range(0, end, LANES):
        picked = zero
        for c in range(classes):
            x, mine = load(planes, c * BLOCK + voxel), broadcast(np.float32(c))
            picked = where_equal(load(marks, voxel), mine, x, picked)
        store(scratch, BLOCK + voxel, picked)
    exponentiate(planes, end, classes, scratch)
    for voxel in range(0, end, LANES):
        store(loss, voxel, load(scratch, voxel))
    _logarithms(loss)
    for voxel in range(0, end, LANES):
        store(loss, voxel, load(loss, voxel) - load(scratch, BLOCK + voxel))
    normalise(planes, end, classes, scratch)


@kernel
def _add_dice(planes: Floats, end: int, classes: int, marks: Floats, sums: Doubles) -> None:
    """Add ``p * t``, ``p`` and ``t`` of each class to 16 sums each."""
    zero, one = broadcast(_ZERO), broadcast(_ONE)
    for c in range(classes):
        mine = broadcast(np.float32(_label_of_plane(c, classes)))
        intersection = prediction = target = zero
        for voxel in range(0, end, LANES):
            p, label = load(planes, c * BLOCK + voxel), load(marks, voxel)
            intersection = intersection + where_equal(label, mine, p, zero)
            prediction = prediction + where_equal(label, broadcast(NOWHERE), zero, p)
            target = target + where_equal(label, mine, one, zero)
        add_to_doubles(sums, c * LANES, intersection)
        add_to_doubles(sums, (classes + c) * LANES, prediction)
        add_to_doubles(sums, (2 * classes + c) * LANES, target)


@kernel
def add_plane(planes: Floats, c: int, end: int, sums: Doubles, at: int) -> None:
    """Add plane ``c`` to 16 sums."""
    total = broadcast(_ZERO)
    for voxel in range(0, end, LANES):
        total = total + load(planes, c * BLOCK + voxel)
    add_to_doubles(sums, at, total)


@kernel
def gradient_of_logits(
    planes: Floats,
    end: int,
    classes: int,
    block: LossBlock,
    weights: Floats,
    diffs: Floats,
    share: np.float32,
) -> None:
    """Replace logits by their gradient.

    Parameters
    ----------
    diffs : float32 array, shape=(2, classes)
        Derivatives by intersection and prediction, of this image.
    share : float32
        Derivative by the cross-entropy of a voxel of weight 1.
    """
    probabilities(planes, end, classes, block.scratch)
    zero, one = broadcast(_ZERO), broadcast(_ONE)
    nowhere = broadcast(NOWHERE)
    for voxel in range(0, end, LANES):
        label, mean = load(block.marks, voxel), zero
        shares = broadcast(share) * _weights_of(label, weights)
        for c in range(classes):
            mine = broadcast(np.float32(_label_of_plane(c, classes)))
            g = where_equal(label, mine, broadcast(diffs[0, c]), zero) + broadcast(diffs[1, c])
            mean = fma(load(planes, c * BLOCK + voxel), g, mean)
        for c in range(classes):
            p, mine = load(planes, c * BLOCK + voxel), broadcast(np.float32(_label_of_plane(c, classes)))
            g = where_equal(label, mine, broadcast(diffs[0, c]), zero) + broadcast(diffs[1, c])
            t = where_equal(label, mine, one, zero)
            diff = fma(shares, p - t, p * (g - mean))
            store(planes, c * BLOCK + voxel, where_equal(label, nowhere, zero, diff))


@kernel
def _label_of_plane(c: int, classes: int) -> int:
    """Label that plane ``c`` is the probability of: a single plane is that of label 1."""
    return 1 if classes == 1 else c
