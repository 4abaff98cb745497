"""Softmax and losses of a block of 128 voxels, in planes: ``planes[class * 128 + voxel]``.

The functions work on whole vectors, up to voxel ``end``. In the last block of a band that may be past its
last voxel; there the label is `NOWHERE`, and losses and gradients are zero. Softmax itself is as in
`kernels.ops.softmax_dice.planes`; ``planes`` may have more rows than classes.
"""

import numpy as np

from kernels.base.arguments import Doubles, Floats, Labels
from kernels.base.exponential import exp, log, log1p, sigmoid
from kernels.base.jit import kernel
from kernels.base.simd import (
    LANES,
    add_to_doubles,
    broadcast,
    fma,
    load,
    load_first_bytes,
    store,
    where_above,
    where_equal,
)
from kernels.ops.softmax_dice.planes import BLOCK, class_of_plane

# The label past the last voxel: no class.
NOWHERE = np.float32(-1)

_ZERO = np.float32(0)
_ONE = np.float32(1)


@kernel
def mark(labels: Labels, first: int, count: int, marks: Floats) -> None:
    """Labels of ``count`` voxels as floats, and then `NOWHERE` up to the end of a vector."""
    for voxel in range(0, count, LANES):
        store(marks, voxel, load_first_bytes(labels, first + voxel, count - voxel))


@kernel
def _copy_plane(src: Floats, end: int, dst: Floats) -> None:
    """Copy one plane."""
    for voxel in range(0, end, LANES):
        store(dst, voxel, load(src, voxel))


@kernel
def _exponentials(planes: Floats) -> None:
    for i in range(planes.size):
        planes[i] = exp(planes[i])


@kernel
def _sigmoid(plane: Floats) -> None:
    for voxel in range(BLOCK):
        plane[voxel] = sigmoid(plane[voxel])


@kernel
def _binary_losses(plane: Floats) -> None:
    for voxel in range(BLOCK):
        x = plane[voxel]
        plane[voxel] = max(x, _ZERO) + log1p(exp(-abs(x)))


@kernel
def _logarithms(plane: Floats) -> None:
    for voxel in range(BLOCK):
        plane[voxel] = log(plane[voxel])


@kernel
def _reciprocals(plane: Floats) -> None:
    for voxel in range(BLOCK):
        plane[voxel] = _ONE / plane[voxel]


@kernel
def _subtract_maximum(planes: Floats, end: int, classes: int) -> None:
    """Subtract from each voxel its largest logit."""
    for voxel in range(0, end, LANES):
        largest = load(planes, voxel)
        for c in range(1, classes):
            logit = load(planes, c * BLOCK + voxel)
            largest = where_above(logit, largest, logit, largest)
        for c in range(classes):
            store(planes, c * BLOCK + voxel, load(planes, c * BLOCK + voxel) - largest)


@kernel
def _exponentiate(planes: Floats, end: int, classes: int, totals: Floats) -> None:
    """Replace the planes by their exponentials, and sum these for each voxel."""
    _exponentials(planes[: classes * BLOCK])
    for voxel in range(0, end, LANES):
        total = load(planes, voxel)
        for c in range(1, classes):
            total = total + load(planes, c * BLOCK + voxel)
        store(totals, voxel, total)


@kernel
def _normalise(planes: Floats, end: int, classes: int, totals: Floats) -> None:
    """Divide each voxel by its total."""
    _reciprocals(totals)
    for voxel in range(0, end, LANES):
        factor = load(totals, voxel)
        for c in range(classes):
            store(planes, c * BLOCK + voxel, load(planes, c * BLOCK + voxel) * factor)


@kernel
def probabilities(planes: Floats, end: int, classes: int, scratch: Floats) -> None:
    """Softmax of the planes, in place; of a single class the sigmoid."""
    if classes == 1:
        _sigmoid(planes)
    else:
        _subtract_maximum(planes, end, classes)
        _exponentiate(planes, end, classes, scratch)
        _normalise(planes, end, classes, scratch)


@kernel
def losses(planes: Floats, end: int, classes: int, marks: Floats, scratch: Floats, loss: Floats) -> None:
    """Replace logits by probabilities, and fill in the cross-entropy of each voxel.

    ``scratch`` has room for two planes, ``loss`` is one.
    """
    zero = broadcast(_ZERO)
    if classes == 1:
        # max(x, 0) + log(1 + exp(-|x|)), of -x where the label is 1
        for voxel in range(0, end, LANES):
            x = load(planes, voxel)
            store(loss, voxel, where_equal(load(marks, voxel), broadcast(_ONE), zero - x, x))
        _binary_losses(loss)
        for voxel in range(0, end, LANES):
            label = load(marks, voxel)
            store(loss, voxel, where_equal(label, broadcast(NOWHERE), zero, load(loss, voxel)))
        _sigmoid(planes)
        return
    # log(sum of exp) - x[label], each with the maximum subtracted
    _subtract_maximum(planes, end, classes)
    for voxel in range(0, end, LANES):
        picked = zero
        for c in range(classes):
            x, mine = load(planes, c * BLOCK + voxel), broadcast(np.float32(c))
            picked = where_equal(load(marks, voxel), mine, x, picked)
        store(scratch, BLOCK + voxel, picked)
    _exponentiate(planes, end, classes, scratch)
    _copy_plane(scratch, end, loss)
    _logarithms(loss)
    for voxel in range(0, end, LANES):
        wrong = load(loss, voxel) - load(scratch, BLOCK + voxel)
        store(loss, voxel, where_equal(load(marks, voxel), broadcast(NOWHERE), zero, wrong))
    _normalise(planes, end, classes, scratch)


@kernel
def diff_logits(
    planes: Floats, end: int, classes: int, marks: Floats, diffs: Floats, share: np.float32
) -> None:
    """Replace probabilities by the gradient of the logits.

    ::

        g[c] = diff_intersection[c] * t[c] + diff_prediction[c]
        p[c] * (g[c] - sum over k of p[k] * g[k]) + share * (p[c] - t[c])

    Parameters
    ----------
    diffs : float32 array, shape=(2, classes)
        Of intersection and prediction, of this image.
    share : float32
        Gradient of a voxel's cross-entropy.
    """
    zero, one = broadcast(_ZERO), broadcast(_ONE)
    shares, nowhere = broadcast(share), broadcast(NOWHERE)
    for voxel in range(0, end, LANES):
        label, mean = load(marks, voxel), zero
        for c in range(classes):
            mine = broadcast(np.float32(class_of_plane(c, classes)))
            g = where_equal(label, mine, broadcast(diffs[0, c]), zero) + broadcast(diffs[1, c])
            mean = fma(load(planes, c * BLOCK + voxel), g, mean)
        for c in range(classes):
            p, mine = (load(planes, c * BLOCK + voxel), broadcast(np.float32(class_of_plane(c, classes))))
            g = where_equal(label, mine, broadcast(diffs[0, c]), zero) + broadcast(diffs[1, c])
            t = where_equal(label, mine, one, zero)
            diff = fma(shares, p - t, p * (g - mean))
            store(planes, c * BLOCK + voxel, where_equal(label, nowhere, zero, diff))


@kernel
def add_dice(planes: Floats, end: int, classes: int, marks: Floats, sums: Doubles) -> None:
    """Add ``p * t``, ``p`` and ``t`` of each class to 16 sums each."""
    zero, one = broadcast(_ZERO), broadcast(_ONE)
    for c in range(classes):
        mine = broadcast(np.float32(class_of_plane(c, classes)))
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
