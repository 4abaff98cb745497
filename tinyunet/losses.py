# ruff: noqa: D102 - forward and backward of every operator are described once, in Function
"""Losses of a segmentation: how far class probabilities are from the labels.

Every loss returns a tensor of one number. ``from_logits=True`` takes the values before the softmax (the
sigmoid, for one class) and runs fused kernels: probabilities are never stored, sums are float64, and no
logarithm meets a rounded zero. ``from_logits=False`` takes probabilities and is composed of the arithmetic
of :class:`Tensor`: the same mathematics, to read and to compare with. Train from logits: a probability in
float32 loses how wrong a voxel is. The gradient of a cross-entropy from probabilities fades to 0 where
logits differ by more than 70 (by 14 for a sigmoid near 1).

Dice losses are made of three sums over the voxels of each image and class: intersection I = sum p * t,
prediction P = sum p, target T = sum t, with t one where the label is the class, zero elsewhere.

Common parameters
-----------------
prediction : Tensor, shape = (MB, ..., classes)
    With one class it is the probability (or the logit) of label 1, and labels are 0 and 1.
labels : array of int, shape = (MB, ...)
include_background : bool
    Whether class 0 counts. With one class there is no background channel to leave out.
smoothing : float
    Makes the Dice of an image without the class, and without a prediction of it, one; with 0 it is NaN.
from_logits : bool
    Whether ``prediction`` is logits, not probabilities.

All losses raise TypeError or ValueError if ``labels`` are not integers, have another shape, or hold what is
not a class.
"""

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray

from kernels import ops
from tinyunet.autograd import Function, Tensor
from tinyunet.common.checks import at_least_zero
from tinyunet.tape import Absent, Array, Context, Gradients

# Keeps log(p) finite where p underflows to zero, and is lost in rounding everywhere else. Its inverse times
# a gradient must not overflow.
_TINY = {"f": 1e-35, "d": 1e-300}

Labels = NDArray[np.uint8]


# ---- from logits (MB, ..., C) and labels (MB, ...): all save the logits, which exist anyway --------------


class DiceSums(Function):
    """I, P, T of softmax or sigmoid probabilities, stacked: (3, MB, C), float64."""

    @staticmethod
    def forward(ctx: Context, logits: Array, labels: Labels) -> Array:
        ctx.save(logits, labels)
        return np.stack(ops.label_losses.dice_forward(logits, labels))

    @staticmethod
    def backward(ctx: Context, gradient: Array) -> Gradients:
        logits, labels = ctx.saved
        return (ops.label_losses.dice_backward(logits, labels, gradient[0], gradient[1]),)


class CrossEntropy(Function):
    """Mean over all voxels of -log(probability of the label), float64."""

    @staticmethod
    def forward(ctx: Context, logits: Array, labels: Labels) -> Array:
        ctx.save(logits, labels)
        return np.asarray(ops.label_losses.cross_entropy_forward(logits, labels))

    @staticmethod
    def backward(ctx: Context, gradient: Array) -> Gradients:
        logits, labels = ctx.saved
        return (ops.label_losses.cross_entropy_backward(logits, labels, float(gradient)),)


class BinaryCrossEntropy(Function):
    """Mean over voxels and classes, two or more, of the binary cross-entropy, float64."""

    @staticmethod
    def forward(ctx: Context, logits: Array, labels: Labels) -> Array:
        ctx.save(logits, labels)
        return np.asarray(ops.binary_cross_entropy.forward(logits, labels))

    @staticmethod
    def backward(ctx: Context, gradient: Array) -> Gradients:
        logits, labels = ctx.saved
        return (ops.binary_cross_entropy.backward(logits, labels, float(gradient)),)


# ---- what a training calls ------------------------------------------------------------------------------


def soft_dice(
    prediction: Tensor,
    labels: npt.ArrayLike,
    include_background: bool = True,
    smoothing: float = 1.0,
    from_logits: bool = False,
) -> Tensor:
    """One minus the mean, over images and classes, of ``(2 I + smoothing) / (P + T + smoothing)``: 0 to 1.

    Source: Milletari et al. 2016 (V-Net), without the squares.
    """
    at_least_zero("smoothing", smoothing)
    intersection, total = _dice_sums(prediction, labels, include_background, from_logits)
    return 1 - ((2 * intersection + smoothing) / (total + smoothing)).mean()


def log_dice(
    prediction: Tensor,
    labels: npt.ArrayLike,
    include_background: bool = True,
    smoothing: float = 1e-4,
    from_logits: bool = False,
) -> Tensor:
    """``-ln(2 mean(I + smoothing)) + ln(mean(T + P + smoothing))``, the loss of IntelAI/unet.

    The means are over images and classes, and are taken *before* the ratio: a class counts by its size,
    unlike in :func:`soft_dice`. The result is 0 or more, but for smoothing (-ln 2 if there is nothing at
    all).

    Source: ``dice_coef_loss`` of IntelAI/unet, where its smoothing is 0.0001 as well.
    """
    at_least_zero("smoothing", smoothing)
    intersection, total = _dice_sums(prediction, labels, include_background, from_logits)
    numerator, denominator = (intersection + smoothing).mean(), (total + smoothing).mean()
    return denominator.log() - (2 * numerator).log()


def cross_entropy(prediction: Tensor, labels: npt.ArrayLike, from_logits: bool = False) -> Tensor:
    """Mean over all voxels of -ln(probability of the label); with one class it is binary."""
    checked = _labels_of(prediction, labels)
    if from_logits:
        return CrossEntropy.apply(prediction, checked)
    if prediction.shape[-1] == 1:
        return _binary_cross_entropy(prediction, checked)
    right = (prediction * _one_hot(prediction, checked)).sum(axis=-1)
    return -(right + _TINY[right.dtype.char]).log().mean()


def dice_cross_entropy(
    prediction: Tensor,
    labels: npt.ArrayLike,
    include_background: bool = True,
    smoothing: float = 1.0,
    from_logits: bool = False,
) -> Tensor:
    """:func:`soft_dice` plus :func:`cross_entropy`."""
    dice = soft_dice(prediction, labels, include_background, smoothing, from_logits)
    return dice + cross_entropy(prediction, labels, from_logits)


def dice_binary_cross_entropy(
    prediction: Tensor,
    labels: npt.ArrayLike,
    include_background: bool = True,
    smoothing: float = 1.0,
    from_logits: bool = False,
) -> Tensor:
    """:func:`soft_dice` plus the mean over voxels *and* classes of the binary cross-entropy.

    Each class is a question of its own: this class, or not? With one class the binary
    cross-entropy is :func:`cross_entropy`.
    """
    dice = soft_dice(prediction, labels, include_background, smoothing, from_logits)
    if prediction.shape[-1] == 1:
        return dice + cross_entropy(prediction, labels, from_logits)
    checked = _labels_of(prediction, labels)
    if from_logits:
        return dice + BinaryCrossEntropy.apply(prediction, checked)
    return dice + _binary_cross_entropy(prediction, checked)


def _dice_sums(
    prediction: Tensor, labels: npt.ArrayLike, include_background: bool, from_logits: bool
) -> tuple[Tensor, Tensor]:
    """I and P + T, each (MB, classes that count)."""
    checked = _labels_of(prediction, labels)
    if from_logits:
        if prediction.data.ndim == 2:  # images of one voxel
            prediction, checked = prediction[:, None], checked[:, None]
        sums = DiceSums.apply(prediction, checked)
        intersection, total = sums[0], sums[1] + sums[2]
    else:
        one_hot = _one_hot(prediction, checked)
        voxels = tuple(range(1, one_hot.ndim - 1))
        intersection = (prediction * one_hot).sum(axis=voxels)
        total = (prediction + one_hot).sum(axis=voxels)
    if include_background or prediction.shape[-1] == 1:
        return intersection, total
    return intersection[:, 1:], total[:, 1:]


def _binary_cross_entropy(probabilities: Tensor, labels: Labels) -> Tensor:
    classes = probabilities.shape[-1]
    if classes == 1:
        complement = 1 - probabilities
    else:  # the sum of the others keeps the digits that 1 - p loses where p is almost 1
        others = 1 - np.eye(classes, dtype=probabilities.dtype)
        complement = (probabilities[..., np.newaxis, :] * others).sum(axis=-1)
    one_hot, tiny = _one_hot(probabilities, labels), _TINY[probabilities.dtype.char]
    right = (probabilities + tiny).log() * one_hot
    wrong = (complement + tiny).log() * (1 - one_hot)
    return -(right + wrong).mean()


def _one_hot(prediction: Tensor, labels: Labels) -> Array:
    classes = prediction.shape[-1]
    of_channel = np.arange(classes) if classes > 1 else np.ones(1)
    return np.equal(labels[..., np.newaxis], of_channel).astype(prediction.dtype)


def _labels_of(prediction: Tensor, labels: npt.ArrayLike) -> Labels:
    return checked_labels(labels, prediction.shape[:-1], max(prediction.shape[-1], 2))


def checked_labels(labels: npt.ArrayLike, shape: tuple[int, ...], classes: int) -> Labels:
    """Return integer labels as uint8.

    Raises
    ------
    TypeError, ValueError
        ``labels`` are not integers, are not of this shape, or are not all from 0 to ``classes - 1``.
    """
    highest = classes - 1
    if highest > 255:
        raise ValueError(f"prediction has {classes} classes; labels are bytes, so expected at most 256")
    # Of a loss that is traced, the labels have no numbers: a compiled step checks them at each call.
    array = labels if isinstance(labels, Absent) else np.asarray(labels)
    if array.dtype.kind not in "iub":
        raise TypeError(f"labels must be integers, not {array.dtype}")
    if array.shape != shape:
        raise ValueError(
            f"labels must have the shape {shape} of the prediction without its classes, not {array.shape}"
        )
    if not array.size:
        raise ValueError("labels are empty; expected a batch of one at least")
    if isinstance(array, Absent):
        return array  # type: ignore[return-value]
    if array.min() < 0 or array.max() > highest:
        raise ValueError(f"labels must be from 0 to {highest}, not from {array.min()} to {array.max()}")
    return array.astype(np.uint8, copy=False)
