"""Binary cross-entropy of each class against all others, between labels and the softmax of logits.

    p[v] = softmax(x[v])
    loss = mean over voxels v and classes c of  w[c] * -log(p[v, c])      where labels[v] == c
                                                w[c] * -log(1 - p[v, c])  elsewhere

It is computed from logits: where one class has nearly all, ``1 - p`` of it and ``p`` of the others round to
0, and a logarithm of 0 has no gradient to learn from. With ``S`` the sum of the exponentials of all classes,
``-log(1 - p[c]) = log(S) - log(sum of the others)``. The others of the largest class are summed anew, with
their own maximum; of any other class they hold the largest one, so ``-log1p(-p[c])`` loses nothing.

Gradient, with ``q[c]`` the softmax among the others of class ``c`` (0 at ``c`` itself), ``y`` the label, and
``W`` the sum of ``w``::

    diff_logits[k] = diff_loss / (voxels W) * (W p[k] - w[y] [k == y] - sum over c != y of w[c] q[c][k])

Ignored voxels count in neither. The mean is divided by ``voxels W``.

NumPy in the precision of the logits, float32 or float64: the reference, and fast enough for a loss that is
seldom used. With one class it is :func:`kernels.ops.label_losses.cross_entropy_forward`.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kernels.base.arguments import Array, Doubles, Labels, tensor
from kernels.ops.label_losses import checked_labels, weighting


class _Parts(NamedTuple):
    """What forward and backward need of a batch, each of shape (..., C) or (..., 1)."""

    is_label: npt.NDArray[np.bool_]
    is_largest: npt.NDArray[np.bool_]  # one class a voxel
    shifted: Array  # logits, the largest subtracted
    power: Array  # their exponentials
    total: Array  # and the sum of these
    second: Array  # the largest of the others of the largest class, shifted
    others: Array  # softmax among them
    others_total: Array
    counted: npt.NDArray[np.bool_]
    shares: Array  # of a voxel's classes in the mean, (C,)


def forward(
    logits: Array, labels: Labels, class_weights: Doubles | None = None, ignored: int | None = None
) -> float:
    """Mean over voxels and classes; infinite where a class has the probability 0 exactly (an infinite logit).

    Parameters
    ----------
    logits : float32 or float64 array, shape (..., C)
        Two classes at least.
    labels, class_weights, ignored
        As in `kernels.ops.label_losses`.

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes do not fit, there is one class only, or a label is not a class.
    """
    parts = _parts(logits, labels, class_weights, ignored)
    log_total = np.log(parts.total)
    with np.errstate(divide="ignore"):
        of_largest = log_total - parts.second - np.log(parts.others_total)
        of_others = -np.log1p(-np.where(parts.is_largest, 0, parts.power) / parts.total)
    wrong = np.where(parts.is_largest, of_largest, of_others)
    losses = np.where(parts.is_label, log_total - parts.shifted, wrong)
    return float((np.where(parts.counted, losses, 0) * parts.shares).sum(dtype=np.float64))


def backward(
    logits: Array,
    labels: Labels,
    diff_loss: float = 1.0,
    class_weights: Doubles | None = None,
    ignored: int | None = None,
) -> Array:
    """Gradient of the logits, from that of the loss; arguments and errors as `forward`."""
    parts = _parts(logits, labels, class_weights, ignored)
    shares, is_label, is_largest = parts.shares, parts.is_label, parts.is_largest
    # Of a class that is neither the label nor the largest the sum of the others is above 1.
    rest = np.where(is_largest, 1, parts.total - parts.power)
    weight = np.where(is_label | is_largest, 0, shares / rest)
    sums = parts.power * (weight.sum(axis=-1, keepdims=True) - weight)
    of_largest = np.where(is_largest & ~is_label, shares, 0).sum(axis=-1, keepdims=True)
    sums += of_largest * parts.others
    diff = shares.sum() * (parts.power / parts.total) - is_label * shares - sums
    return np.where(parts.counted, diff * logits.dtype.type(diff_loss), 0)


def _parts(logits: Array, labels: Labels, class_weights: Doubles | None, ignored: int | None) -> _Parts:
    logits = tensor("logits", logits)
    labels = checked_labels(logits, labels, ignored)
    classes: Any = np.arange(logits.shape[-1])
    if classes.size < 2:
        raise ValueError("logits must have two classes at least, got one; use cross_entropy")
    largest = logits.argmax(axis=-1)[..., None]
    is_largest = classes == largest
    shifted = logits - np.take_along_axis(logits, largest, axis=-1)
    power = np.exp(shifted)
    rest = np.where(is_largest, -np.inf, shifted)
    second = rest.max(axis=-1, keepdims=True)
    # Where all others are -inf there is nothing among them.
    others = np.exp(rest - np.where(second == -np.inf, 0, second))
    others_total = others.sum(axis=-1, keepdims=True)
    total = power.sum(axis=-1, keepdims=True)
    others /= np.where(others_total == 0, 1, others_total)
    is_label = classes == labels[..., None]
    counted = labels[..., None] != (-1 if ignored is None else ignored)
    weights = weighting(classes.size, class_weights).weights
    of_class = (weights / (weights.sum() * max(counted.sum(), 1))).astype(logits.dtype)
    return _Parts(
        is_label, is_largest, shifted, power, total, second, others, others_total, counted, of_class
    )
