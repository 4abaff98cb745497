# ruff: noqa: D102 - forward and backward of every operator are described once, in Function
"""Losses of a segmentation compare class probabilities with labels.

Every loss returns a tensor of one number. ``from_logits=True`` takes the values before the softmax (the
sigmoid, for one class) and runs fused kernels: probabilities are never stored, sums are float64, and no
logarithm gets a rounded zero. ``from_logits=False`` takes probabilities and is composed of the arithmetic
of :class:`Tensor`: the same mathematics, for reading and comparing. Train from logits: a float32 probability
near 0 or 1 is rounded, and loses how wrong a voxel is. The gradient of a cross-entropy from probabilities
fades to 0 where logits differ by more than 70 (by 14 for a sigmoid near 1).

Dice losses use three sums over the voxels of each image and class: intersection I = sum p * t,
prediction P = sum p, target T = sum t, where p is the probability, and t is 1 for the label's class, else 0.

Common parameters
-----------------
prediction : Tensor, float32 or float64, shape = (MB, ..., classes)
    One class means the probability (or the logit) of label 1; labels are then 0 and 1.
labels : array of int, shape = (MB, ...)
    From 0 to classes - 1, or ``ignore_label``.
include_background : bool
    Whether class 0 counts. With one class there is no background channel to leave out.
smoothing : float
    Above 0, the Dice of an image in which a class is neither present nor predicted is 1. With 0 it is NaN.
from_logits : bool
    Whether ``prediction`` is logits, not probabilities.
class_weights : sequence of float, optional
    A weight of 0 or more for each label: ``classes`` numbers, or two if there is one class. Each mean becomes
    a weighted mean, divided by the sum of the weights. A cross-entropy weights voxels by their label, as
    PyTorch does. Dice, and the binary cross-entropy of several classes, weight classes; the Dice of one
    class alone has no weight.
ignore_label : int, optional
    Voxels with this label, 0 to 255, count in no sum and no mean; the label need not be a class. An image
    whose voxels are all ignored has a Dice of 1 (with smoothing), and still counts in the mean over images.
    If all voxels of a batch are ignored, the cross-entropy and its gradient are 0.

Every loss raises TypeError if ``labels`` are not integers, and ValueError if ``labels`` are empty, have
another shape or hold a number that is neither a class nor ignored, if ``class_weights`` have another length,
one is negative or all are 0, if ``ignore_label`` is not from 0 to 255, or if ``smoothing`` is negative.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray

from kernels import ops
from kernels.base.arguments import Doubles
from tinyunet.autograd import Function, Tensor
from tinyunet.common.checks import at_least_zero
from tinyunet.tape import Absent, Array, Context, Gradients
from tinyunet.unet import UNet

# Added to p, it keeps log(p) finite where p underflows to 0, and changes no other p. Its inverse times a
# gradient must not overflow.
_TINY = {"f": 1e-35, "d": 1e-300}

Labels = NDArray[np.uint8]


# ---- from logits (MB, ..., C) and labels (MB, ...): all save the logits, which exist anyway --------------


class DiceSums(Function):
    """I, P and T of softmax or sigmoid probabilities, stacked: (3, MB, C), float64."""

    @staticmethod
    def forward(ctx: Context, logits: Array, labels: Labels, ignore_label: int | None = None) -> Array:
        ctx.save(logits, labels)
        ctx.ignore_label = ignore_label
        return np.stack(ops.label_losses.dice_forward(logits, labels, ignore_label))

    @staticmethod
    def backward(ctx: Context, gradient: Array) -> Gradients:
        logits, labels = ctx.saved
        parts = gradient[0], gradient[1]
        return (ops.label_losses.dice_backward(logits, labels, *parts, ctx.ignore_label),)


class CrossEntropy(Function):
    """Weighted mean over all voxels of -log(probability of the label), float64."""

    @staticmethod
    def passes() -> tuple[Callable[..., float], Callable[..., Array]]:
        """Return the kernels of forward and backward."""
        return ops.label_losses.cross_entropy_forward, ops.label_losses.cross_entropy_backward

    @staticmethod
    def forward(
        ctx: Context,
        logits: Array,
        labels: Labels,
        class_weights: Doubles | None = None,
        ignore_label: int | None = None,
    ) -> Array:
        ctx.save(logits, labels)
        ctx.rule = class_weights, ignore_label
        return np.asarray(ctx.function.passes()[0](logits, labels, *ctx.rule))

    @staticmethod
    def backward(ctx: Context, gradient: Array) -> Gradients:
        return (ctx.function.passes()[1](*ctx.saved, float(gradient), *ctx.rule),)


class BinaryCrossEntropy(CrossEntropy):
    """Weighted mean over voxels and classes, two or more, of the binary cross-entropy, float64."""

    passes = staticmethod(lambda: (ops.binary_cross_entropy.forward, ops.binary_cross_entropy.backward))


class CoarseLabels(Function):
    """The label in the middle of each block of voxels: nearest-neighbour downsampling. It has no gradient."""

    @staticmethod
    def forward(ctx: Context | None, labels: Labels, block: Sequence[int], size: Sequence[int]) -> Any:
        """(MB, D, H, W) or (MB, H, W) -> (MB, *size)."""
        picked = [slice(b // 2, b * n, b) for b, n in zip(block, size, strict=True)]
        return labels[:, *picked]


# ---- what a training calls ------------------------------------------------------------------------------


def soft_dice(
    prediction: Tensor,
    labels: npt.ArrayLike,
    include_background: bool = True,
    smoothing: float = 1.0,
    from_logits: bool = False,
    class_weights: npt.ArrayLike | None = None,
    ignore_label: int | None = None,
) -> Tensor:
    """One minus the mean, over images and classes, of ``(2 I + smoothing) / (P + T + smoothing)``: 0 to 1.

    Source: Milletari et al. 2016 (V-Net), without the squares.
    """
    at_least_zero("smoothing", smoothing)
    truth = _truth(prediction, labels, class_weights, ignore_label)
    intersection, total, weights = _dice_sums(prediction, truth, include_background, from_logits)
    return 1 - _mean((2 * intersection + smoothing) / (total + smoothing), weights)


def log_dice(
    prediction: Tensor,
    labels: npt.ArrayLike,
    include_background: bool = True,
    smoothing: float = 1e-4,
    from_logits: bool = False,
    class_weights: npt.ArrayLike | None = None,
    ignore_label: int | None = None,
) -> Tensor:
    """``-ln(2 mean(I + smoothing)) + ln(mean(T + P + smoothing))``, the loss of IntelAI/unet.

    The means over images and classes are taken *before* the ratio. So a class counts by its size, unlike in
    :func:`soft_dice`. Without smoothing the result is 0 or more; with smoothing it can be as low as -ln 2,
    if no class is present or predicted.

    Source: ``dice_coef_loss`` of IntelAI/unet, where its smoothing is 0.0001 as well.
    """
    at_least_zero("smoothing", smoothing)
    truth = _truth(prediction, labels, class_weights, ignore_label)
    intersection, total, weights = _dice_sums(prediction, truth, include_background, from_logits)
    return _mean(total + smoothing, weights).log() - (2 * _mean(intersection + smoothing, weights)).log()


def cross_entropy(
    prediction: Tensor,
    labels: npt.ArrayLike,
    from_logits: bool = False,
    class_weights: npt.ArrayLike | None = None,
    ignore_label: int | None = None,
) -> Tensor:
    """Mean over all voxels of -ln(probability of the label); the binary cross-entropy for one class."""
    truth = _truth(prediction, labels, class_weights, ignore_label)
    if from_logits:
        return CrossEntropy.apply(prediction, *truth)
    weights = _voxel_weights(truth)
    if prediction.shape[-1] == 1:
        weights = None if weights is None else weights[..., np.newaxis]
        return _binary_cross_entropy(prediction, truth, weights)
    right = (prediction * _one_hot(prediction, truth)).sum(axis=-1)
    return -_mean((right + _TINY[right.dtype.char]).log(), weights)


def dice_cross_entropy(
    prediction: Tensor,
    labels: npt.ArrayLike,
    include_background: bool = True,
    smoothing: float = 1.0,
    from_logits: bool = False,
    class_weights: npt.ArrayLike | None = None,
    ignore_label: int | None = None,
) -> Tensor:
    """:func:`soft_dice` plus :func:`cross_entropy`."""
    rules = from_logits, class_weights, ignore_label
    dice = soft_dice(prediction, labels, include_background, smoothing, *rules)
    return dice + cross_entropy(prediction, labels, *rules)


def dice_binary_cross_entropy(
    prediction: Tensor,
    labels: npt.ArrayLike,
    include_background: bool = True,
    smoothing: float = 1.0,
    from_logits: bool = False,
    class_weights: npt.ArrayLike | None = None,
    ignore_label: int | None = None,
) -> Tensor:
    """:func:`soft_dice` plus the mean over voxels *and* classes of the binary cross-entropy.

    The binary cross-entropy asks of each class by itself: this class, or not? With one class it is
    :func:`cross_entropy`.
    """
    rules = from_logits, class_weights, ignore_label
    dice = soft_dice(prediction, labels, include_background, smoothing, *rules)
    if prediction.shape[-1] == 1:
        return dice + cross_entropy(prediction, labels, *rules)
    truth = _truth(prediction, labels, class_weights, ignore_label)
    if from_logits:
        return dice + BinaryCrossEntropy.apply(prediction, *truth)
    weights = truth.class_weights
    if truth.ignore_label is not None:
        counted = truth.labels != truth.ignore_label
        weights = counted[..., np.newaxis] * (1.0 if weights is None else weights)
    return dice + _binary_cross_entropy(prediction, truth, weights)


def of_levels(loss: Callable[..., Tensor], model: UNet) -> Callable[..., Tensor]:
    """Return the loss of a net with deep supervision of "levels"; of another net ``loss`` itself.

    It is the mean of ``loss`` over the levels of the decoder with weights 1, 1/2, 1/4, ..., each on labels
    downsampled to the level. Source: Lee et al., "Deeply-Supervised Nets" (2015); weights as in
    Isensee et al., "nnU-Net" (2021), which gives the lowest level none.
    """
    is_so = model.config.get("deep_supervision") == "levels"
    return functools.partial(_of_levels, loss, model) if is_so else loss


def _of_levels(
    loss: Callable[..., Tensor], model: UNet, prediction: Tensor, labels: Labels, from_logits: bool = True
) -> Tensor:
    lower, model.lower_logits = model.lower_logits, ()
    weights = [0.5**level for level in range(1 + len(lower))]
    total = loss(prediction, labels, from_logits=True) * (weights[0] / sum(weights))
    for level, (weight, logits) in enumerate(zip(weights[1:], lower, strict=True), start=1):
        size = logits.shape[1:-1]
        how = [2**level] * len(size), size
        traced = isinstance(labels, Absent)  # while compile writes down the step
        coarse = CoarseLabels.apply(labels, *how).data if traced else CoarseLabels.forward(None, labels, *how)
        total = total + loss(logits, coarse, from_logits=True) * (weight / sum(weights))
    return total


# ---- what losses are made of -----------------------------------------------------------------------------


class _Truth(NamedTuple):
    """Checked labels and weights, which a loss compares a prediction with."""

    labels: Labels
    class_weights: Doubles | None
    ignore_label: int | None


def _truth(
    prediction: Tensor, labels: npt.ArrayLike, class_weights: npt.ArrayLike | None, ignore_label: int | None
) -> _Truth:
    classes, weights = max(prediction.shape[-1], 2), None
    if ignore_label is not None and not 0 <= operator.index(ignore_label) <= 255:
        raise ValueError(f"ignore_label must be from 0 to 255, as labels are bytes, not {ignore_label}")
    if class_weights is not None:
        weights = np.array(class_weights, np.float64)
        fits = weights.shape == (classes,) and (np.isfinite(weights) & (weights >= 0)).all()
        if not (fits and weights.any()):
            raise ValueError(
                f"class_weights must be {classes} numbers, one a label, none below 0 and one above, "
                f"not {class_weights}"
            )
    return _Truth(checked_labels(labels, prediction.shape[:-1], classes, ignore_label), weights, ignore_label)


def _dice_sums(
    prediction: Tensor, truth: _Truth, include_background: bool, from_logits: bool
) -> tuple[Tensor, Tensor, Array | None]:
    """I and P + T, each (MB, classes that count), and the weights of these classes."""
    labels, weights, ignored = truth
    if from_logits:
        if prediction.data.ndim == 2:  # images of one voxel
            prediction, labels = prediction[:, None], labels[:, None]
        sums = DiceSums.apply(prediction, labels, ignored)
        intersection, total = sums[0], sums[1] + sums[2]
    else:
        one_hot = _one_hot(prediction, truth)
        voxels = tuple(range(1, one_hot.ndim - 1))
        intersection = (prediction * one_hot).sum(axis=voxels)
        if ignored is not None:
            prediction = prediction * (labels != ignored)[..., np.newaxis].astype(prediction.dtype)
        total = (prediction + one_hot).sum(axis=voxels)
    if prediction.shape[-1] == 1:
        return intersection, total, None
    if include_background:
        return intersection, total, weights
    if weights is not None and not weights[1:].any():
        raise ValueError(f"class_weights must have one above 0 behind the background's, not {weights}")
    return intersection[:, 1:], total[:, 1:], None if weights is None else weights[1:]


def _binary_cross_entropy(probabilities: Tensor, truth: _Truth, weights: Array | None) -> Tensor:
    classes = probabilities.shape[-1]
    if classes == 1:
        complement = 1 - probabilities
    else:  # where p is almost 1, 1 - p loses digits that the sum of the other probabilities keeps
        others = 1 - np.eye(classes, dtype=probabilities.dtype)
        complement = (probabilities[..., np.newaxis, :] * others).sum(axis=-1)
    one_hot, tiny = _one_hot(probabilities, truth), _TINY[probabilities.dtype.char]
    right = (probabilities + tiny).log() * one_hot
    wrong = (complement + tiny).log() * (1 - one_hot)
    return -_mean(right + wrong, weights)


def _mean(losses: Tensor, weights: Array | None) -> Tensor:
    """Mean of losses with weights, which are broadcast; 0 if all weights are 0."""
    if weights is None:
        return losses.mean()
    whole = np.broadcast_to(weights, losses.shape)
    return (losses * (whole / (whole.sum() or 1.0)).astype(losses.dtype)).sum()


def _voxel_weights(truth: _Truth) -> Array | None:
    """Weight of each voxel; None if all weights are 1."""
    labels, weights, ignored = truth
    if weights is None and ignored is None:
        return None
    of_label = np.ones(256)
    if weights is not None:
        of_label[: weights.size] = weights
    return np.where(labels == ignored, 0.0, of_label[labels])  # of None, no voxel is ignored


def _one_hot(prediction: Tensor, truth: _Truth) -> Array:
    """1 where a voxel's label is the class, else 0; 0 in ignored voxels."""
    classes = prediction.shape[-1]
    of_channel = np.arange(classes) if classes > 1 else np.ones(1)
    one_hot = np.equal(truth.labels[..., np.newaxis], of_channel).astype(prediction.dtype)
    if truth.ignore_label is not None:
        one_hot[truth.labels == truth.ignore_label] = 0
    return one_hot


def checked_labels(
    labels: npt.ArrayLike, shape: tuple[int, ...], classes: int, ignore_label: int | None = None
) -> Labels:
    """Return integer labels as uint8.

    Raises
    ------
    TypeError, ValueError
        ``labels`` are not integers, are empty, have another shape, or hold a number that is neither from 0
        to ``classes - 1`` nor ignored; or there are more than 256 classes.
    """
    highest = classes - 1
    if highest > 255:
        raise ValueError(f"prediction has {classes} classes; labels are bytes, so expected at most 256")
    # While a loss is traced, its labels have no numbers: a compiled step checks labels at each call.
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
    others = array if ignore_label is None else array[array != ignore_label]
    if others.size and (others.min() < 0 or others.max() > highest):
        raise ValueError(f"labels must be from 0 to {highest}, not from {others.min()} to {others.max()}")
    return array.astype(np.uint8, copy=False)
