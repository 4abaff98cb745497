"""Batch, instance and group normalisation: a mean and a variance for each channel, or some channels.

    mean[c], variance[c] = those of the values that share them  (variance divides by the count: "biased")
    normalised           = (src - mean) / sqrt(variance + epsilon)
    dst                  = normalised * scale + shift

Which values share them is all that differs (`kernels.deferred.statistics.Sharing`)::

    batch norm      those of a channel, in all images
    instance norm   those of a channel, in one image: batch norm, image by image
    group norm      those of some neighbouring channels, in one image

Training reads ``src`` twice: the statistics need all of it before the first item can be normalised. Backward
needs two sums first, too. It makes ``normalised`` again from ``src``, ``mean`` and ``variance``, a
subtraction and a product; reading it would cost 4 bytes an item. The compiled graph computes the same in
pieces that its convolutions take along (`kernels.deferred.statistics`).

Idea       A row of ``C`` channels is short, and each channel has its own mean. So the kernels take as many
           rows at a time as make 256 items or more, with the per-channel vectors repeated as often: the
           inner loop is long for any ``C``, and vectorises.
Numerics   Sums are float64. The square of a float32 is exact in float64, so ``E[x^2] - E[x]^2`` loses only
           ``mean^2 / variance * 1e-16``: 1e-10 for mean 1000 and deviation 1, where float32 would keep
           nothing. Where ``mean^2`` is above 1e7 variances, a second pass finds the variance (not over
           several processes). ``src - mean`` uses the float32 mean; the shift takes what that rounding lost.
           The kernels sum chunks by themselves and add the sums in their order, so the result does not depend
           on the number of threads. float64 runs the NumPy expressions, with the variance in a second pass.
Together   Batch norm over several processes ("synchronised") needs what one process would sum over the
           whole batch: three numbers a channel each way. Both passes hand their sums to ``combine``, which
           replaces them by the sums of all processes.

``epsilon`` is inside the root, and the running variance is fed with the biased one, as in Keras 3.

Source: Ioffe and Szegedy, "Batch normalization" (2015), algorithm 1 and section 3; Wu and He, "Group
normalization" (2018), section 3.

Common parameters
-----------------
src, diff_dst : float32 or float64 array, shape (MB, ..., C)
scale, shift : array, shape (C,)
    Of the dtype of ``src``.
mean, variance : array, shape (1, C), or (MB, C) where each image has its own
    The mean has the dtype of ``src``. The variance is the biased one, in float64, because float32 cannot hold
    the square of a large float32.
epsilon : float
    Added to the variance.
sharing : Sharing
    Whose statistics: `BATCH`, or those of one image.
combine : callable, optional
    Is given (3, C) sums; see "Together" above.

All functions raise TypeError or ValueError if dtypes, shapes or channels differ, or ``epsilon`` is negative.
"""

import numpy as np

from kernels.base.arguments import Array, Combine, Doubles, Floats, tensor
from kernels.base.buffers import empty
from kernels.base.jit import parallel_kernel, prange
from kernels.deferred.statistics import BATCH, Sharing

# Items that one thread sums by themselves: their sums are a row of float64 each.
_CHUNK = 1 << 16
# Length that a row of repeated channels has at least: 16 vectors of 16.
_ROW = 256


def forward(
    src: Array,
    scale: Array,
    shift: Array,
    epsilon: float = 1e-3,
    sharing: Sharing = BATCH,
    combine: Combine | None = None,
) -> tuple[Array, Array, Array]:
    """Normalise with the statistics of ``src`` itself: ``dst``, ``mean`` and ``variance``.

    The last two are for the backward pass and the running statistics. ``combine`` gets count, sum and sum
    of squares.
    """
    x = _parts(src, epsilon, sharing)
    scale, shift = _checked_channels(x, scale=scale, shift=shift)
    if x.dtype == np.float64 and combine is None:
        grouped = x.reshape(*x.shape[:2], -1, sharing.channels)
        found = grouped.mean(axis=(1, 3)), grouped.var(axis=(1, 3))
        mean, variance = (np.repeat(each, sharing.channels, axis=1) for each in found)
    else:
        sums = _combined(x, _sums(x, x, np.zeros((len(x), scale.size), x.dtype)), combine)
        count, total, squares = _added_up(sums, sharing)
        mean = total / count
        # Rounding can leave a variance of 0 just below 0.
        variance = np.maximum(squares / count - mean**2, 0.0)
        lost = mean**2 > 1e7 * variance
        for i in np.flatnonzero(lost.any(axis=1)) if combine is None else ():
            away, channels = x[i][:, lost[i]].astype(np.float64), (i, lost[i])
            away -= mean[channels]
            variance[channels] = _added_up(np.square(away).sum(axis=0), sharing) / count[channels]
    rounded = mean.astype(x.dtype)
    slope = scale / np.sqrt(variance + epsilon)
    dst = _apply(x, rounded, slope, shift - (mean - rounded) * slope)
    return dst.reshape(src.shape), rounded, variance


def forward_inference(
    src: Array, scale: Array, shift: Array, mean: Array, variance: Array, epsilon: float = 1e-3
) -> Array:
    """``dst`` with given statistics, (C,) each: the running ones of batch norm's training.

    The variance may be float32, too.
    """
    x = _parts(src, epsilon, BATCH)
    scale, shift, mean = _checked_channels(x, scale=scale, shift=shift, mean=mean)
    variance = tensor("variance", variance, shape=scale.shape)
    slope = scale / np.sqrt(variance.astype(np.float64) + epsilon)
    return _apply(x, mean[np.newaxis], slope[np.newaxis], shift[np.newaxis]).reshape(src.shape)


def backward(
    diff_dst: Array,
    src: Array,
    scale: Array,
    mean: Array,
    variance: Array,
    epsilon: float = 1e-3,
    sharing: Sharing = BATCH,
    combine: Combine | None = None,
) -> tuple[Array, Array, Array]:
    """Gradients of source, scale and shift, through the statistics as well.

    ::

        diff_shift = sum of diff_dst
        diff_scale = sum of diff_dst * normalised
        diff_src   = (g - mean of g - normalised * mean of g * normalised) / sqrt(variance + epsilon)

    with ``g = scale * diff_dst``, and means over what shares the statistics. ``combine`` gets count, sum of
    ``diff_dst`` and of ``diff_dst * (src - mean)``. ``diff_scale`` and ``diff_shift``, (C,), are of this
    source alone, also with ``combine``: they are summed with all other gradients.
    """
    x = _parts(src, epsilon, sharing)
    dy = tensor("diff_dst", diff_dst, shape=src.shape, dtype=src.dtype).reshape(x.shape)
    (scale,) = _checked_channels(x, scale=scale)
    mean = tensor("mean", mean, shape=(len(x), scale.size), dtype=x.dtype)
    variance = tensor("variance", variance, shape=mean.shape, dtype=np.float64)
    rstd = 1.0 / np.sqrt(variance + epsilon)
    slope, sums = scale * rstd, _sums(dy, x, mean)
    diff_shift, diff_scale = sums[0].sum(axis=0), (sums[1] * rstd).sum(axis=0)
    count, total, products = _combined(x, sums, combine)
    scaled = np.stack([count, slope * total, slope * rstd * (products * rstd)])
    count, total, products = _added_up(scaled, sharing)
    diff_src = _apply(x, mean, -products / count, -total / count, dy, slope)
    return diff_src.reshape(src.shape), diff_scale.astype(x.dtype), diff_shift.astype(x.dtype)


def _parts(src: Array, epsilon: float, sharing: Sharing) -> Array:
    """``src`` as (parts, voxels, C): a part is an image, or all of them, and has statistics of its own."""
    src = tensor("src", src)
    if src.ndim < 2:
        raise ValueError(f"src must have channels and at least one other axis, got {src.shape}")
    if not epsilon >= 0.0:
        raise ValueError(f"epsilon must be 0 or more, got {epsilon}")
    if src.shape[-1] % sharing.channels:
        raise ValueError(f"src must have channels in groups of {sharing.channels}, got {src.shape[-1]}")
    return src.reshape(src.shape[0] if sharing.one_image else 1, -1, src.shape[-1])


def _checked_channels(src: Array, **vectors: Array) -> tuple[Array, ...]:
    shape = src.shape[-1:]
    return tuple(tensor(name, v, shape=shape, dtype=src.dtype) for name, v in vectors.items())


def _combined(x: Array, sums: Doubles, combine: Combine | None) -> Doubles:
    """Count and two sums of each channel, of this source or of all processes': (3, parts, C)."""
    found = np.concatenate([np.full_like(sums[:1], x.shape[1]), sums])
    if combine is not None:
        combine(found.reshape(3, -1))
    return found


def _added_up(sums: Doubles, sharing: Sharing) -> Doubles:
    """The sum over the channels of a group in the place of each: (..., C)."""
    if sharing.channels == 1:
        return sums
    groups = sums.reshape(*sums.shape[:-1], -1, sharing.channels).sum(axis=-1)
    return np.repeat(groups, sharing.channels, axis=-1)


# --- The two passes over memory, each in NumPy for float64 and compiled for float32 -----------------------


def _sums(a: Array, x: Array, mean: Array) -> Doubles:
    """Sums over the voxels of ``a`` and of ``a * (x - mean)``: (2, parts, C)."""
    if a.dtype == np.float64:
        return np.stack([a.sum(axis=1), (a * (x - mean[:, np.newaxis])).sum(axis=1)])
    sums = np.empty((2, *mean.shape))
    for i in range(len(a)):
        repeated = _repeated(mean[i])[0]
        chunk = repeated.size * max(1, _CHUNK // repeated.size)
        partial = np.empty((-(-a[i].size // chunk), 2, repeated.size))
        _sum_chunks(a[i].reshape(-1), x[i].reshape(-1), repeated, partial)
        sums[:, i] = partial.sum(axis=0).reshape(2, -1, a.shape[-1]).sum(axis=1)
    return sums


def _apply(
    x: Array, mean: Array, tilt: Array, level: Array, diff: Array | None = None, slope: Array | None = None
) -> Array:
    """``(x - mean) * tilt + level``, and ``diff * slope`` added if it is given; vectors are (parts, C)."""
    if x.dtype == np.float64:
        dst: Array = (x - mean[:, np.newaxis]) * tilt[:, np.newaxis] + level[:, np.newaxis]
        return dst if diff is None or slope is None else dst + diff * slope[:, np.newaxis]
    dst, none = empty(x.shape), np.empty(0, np.float32)
    for i in range(len(x)):
        vectors = _repeated(mean[i], tilt[i], level[i], mean[i] if slope is None else slope[i])
        dy = none if diff is None else diff[i].reshape(-1)
        _apply_rows(x[i].reshape(-1), dy, vectors, dst[i].reshape(-1))
    return dst


def _repeated(*vectors: Array) -> Floats:
    """Per-channel vectors, one a row, repeated to the length of the inner loop."""
    stacked = np.stack(vectors).astype(np.float32)
    return np.tile(stacked, -(-_ROW // stacked.shape[1]))


@parallel_kernel
def _sum_chunks(a: Floats, x: Floats, mean: Floats, partial: Doubles) -> None:
    row = mean.size
    chunk = row * max(1, _CHUNK // row)
    for i in prange(partial.shape[0]):
        partial[i] = 0.0
        sums, products = partial[i, 0], partial[i, 1]
        for start in range(i * chunk, min((i + 1) * chunk, a.size), row):
            first, second = a[start : start + row], x[start : start + row]
            for k in range(first.size):
                value = np.float64(first[k])
                sums[k] += value
                products[k] += value * (np.float64(second[k]) - mean[k])


@parallel_kernel
def _apply_rows(src: Floats, diff: Floats, vectors: Floats, dst: Floats) -> None:
    row = vectors.shape[1]
    for i in prange((src.size + row - 1) // row):
        at = slice(i * row, (i + 1) * row)
        x, y = src[at], dst[at]
        mean, tilt, level, slope = vectors[0], vectors[1], vectors[2], vectors[3]
        if diff.size > 0:
            dy = diff[at]
            for k in range(x.size):
                y[k] = dy[k] * slope[k] + ((x[k] - mean[k]) * tilt[k] + level[k])
        else:
            for k in range(x.size):
                y[k] = (x[k] - mean[k]) * tilt[k] + level[k]
