"""Batch normalisation over all axes but the last.

    mean[c], variance[c] = those of src[..., c]               (variance divides by the count: "biased")
    normalised           = (src - mean) / sqrt(variance + epsilon)
    dst                  = normalised * scale + shift

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

Source: Ioffe and Szegedy, "Batch normalization" (2015), algorithm 1 and section 3.

Common parameters
-----------------
src, diff_dst : float32 or float64 array, shape (..., C)
scale, shift, mean : array, shape (C,)
    Of the dtype of ``src``.
epsilon : float
    Added to the variance.

All functions raise TypeError or ValueError if dtypes, shapes or channels differ, or ``epsilon`` is negative.
"""

import numpy as np

from kernels.base.arguments import Array, Combine, Doubles, Floats, tensor
from kernels.base.buffers import empty
from kernels.base.jit import parallel_kernel, prange

# Items that one thread sums by themselves: their sums are a row of float64 each.
_CHUNK = 1 << 16
# Length that a row of repeated channels has at least: 16 vectors of 16.
_ROW = 256
_NONE = np.empty(0, np.float32)


def forward_training(
    src: Array, scale: Array, shift: Array, epsilon: float = 1e-3, combine: Combine | None = None
) -> tuple[Array, Array, Array]:
    """Normalise with the statistics of ``src`` itself.

    Parameters
    ----------
    src, scale, shift, epsilon
        See the module.
    combine : callable, optional
        Is given (3, C) numbers: count, sum and sum of squares. See "Together" above.

    Returns
    -------
    dst : array, shape (..., C)
    mean, variance : array, shape (C,)
        For the backward pass and the running statistics. The variance is the biased one, in float64, because
        float32 cannot hold the square of a large float32.
    """
    src = _checked_src(src, epsilon)
    scale, shift = _checked_channels(src, scale=scale, shift=shift)
    axes = tuple(range(src.ndim - 1))
    if src.dtype == np.float64 and combine is None:
        mean, variance = src.mean(axis=axes), src.var(axis=axes)
    else:
        count, total, squares = _combined(src, *_sums(src, src, np.zeros_like(scale)), combine)
        mean = total / count
        # Rounding can leave a variance of 0 just below 0.
        variance = np.maximum(squares / count - mean**2, 0.0)
        lost = mean**2 > 1e7 * variance
        if combine is None and lost.any():
            variance[lost] = np.mean((src[..., lost].astype(np.float64) - mean[lost]) ** 2, axis=axes)
    rounded = mean.astype(src.dtype)
    slope = scale / np.sqrt(variance + epsilon)
    return _apply(src, rounded, slope, shift - (mean - rounded) * slope), rounded, variance


def forward_inference(
    src: Array, scale: Array, shift: Array, mean: Array, variance: Array, epsilon: float = 1e-3
) -> Array:
    """Normalise with given statistics, the running ones of the training.

    Parameters
    ----------
    src, scale, shift, mean, epsilon
        See the module.
    variance : array, shape (C,)
        float32 or float64.

    Returns
    -------
    array, shape (..., C)
    """
    src = _checked_src(src, epsilon)
    scale, shift, mean = _checked_channels(src, scale=scale, shift=shift, mean=mean)
    variance = tensor("variance", variance, shape=src.shape[-1:])
    slope = scale / np.sqrt(variance.astype(np.float64) + epsilon)
    return _apply(src, mean, slope, shift)


def backward(
    diff_dst: Array,
    src: Array,
    scale: Array,
    mean: Array,
    variance: Array,
    epsilon: float = 1e-3,
    combine: Combine | None = None,
) -> tuple[Array, Array, Array]:
    """Gradients of source, scale and shift, through the statistics as well.

    ::

        diff_shift = sum of diff_dst
        diff_scale = sum of diff_dst * normalised
        diff_src   = scale / sqrt(variance + epsilon)
                     * (diff_dst - diff_shift / count - normalised * diff_scale / count)

    Parameters
    ----------
    diff_dst, src, scale, epsilon
        See the module.
    mean, variance : array, shape (C,)
        From the forward pass: the variance in float64.
    combine : callable, optional
        Is given (3, C) numbers: count, sum of ``diff_dst`` and of ``diff_dst * (src - mean)``.

    Returns
    -------
    diff_src : array, shape (..., C)
    diff_scale, diff_shift : array, shape (C,)
        Of this source alone, also with ``combine``: they are summed with all other gradients.
    """
    src = _checked_src(src, epsilon)
    diff_dst = tensor("diff_dst", diff_dst, shape=src.shape, dtype=src.dtype)
    scale, mean = _checked_channels(src, scale=scale, mean=mean)
    variance = tensor("variance", variance, shape=src.shape[-1:], dtype=np.float64)
    rstd = 1.0 / np.sqrt(variance + epsilon)
    total, products = _sums(diff_dst, src, mean)
    diff_shift, diff_scale = total.astype(src.dtype), (products * rstd).astype(src.dtype)
    count, total, products = _combined(src, total, products, combine)
    slope = scale * rstd
    tilt, level = -slope * rstd * (products * rstd) / count, -slope * total / count
    return _apply(src, mean, tilt, level, diff_dst, slope), diff_scale, diff_shift


def _checked_src(src: Array, epsilon: float) -> Array:
    src = tensor("src", src)
    if src.ndim < 2:
        raise ValueError(f"src must have channels and at least one other axis, got {src.shape}")
    if not epsilon >= 0.0:
        raise ValueError(f"epsilon must be 0 or more, got {epsilon}")
    return src


def _checked_channels(src: Array, **vectors: Array) -> tuple[Array, ...]:
    shape = src.shape[-1:]
    return tuple(tensor(name, v, shape=shape, dtype=src.dtype) for name, v in vectors.items())


def _combined(src: Array, first: Doubles, second: Doubles, combine: Combine | None) -> Doubles:
    """Count and two sums of each channel, of this source or of all that belong together: (3, C)."""
    count = np.full(src.shape[-1], src.size // src.shape[-1], np.float64)
    sums = np.stack([count, first, second])
    if combine is not None:
        combine(sums)
    return sums


# --- The two passes over memory, each in NumPy for float64 and compiled for float32 -----------------------


def _sums(a: Array, x: Array, mean: Array) -> tuple[Doubles, Doubles]:
    """Sums over the voxels of ``a`` and of ``a * (x - mean)``."""
    channels = a.shape[-1]
    if a.dtype == np.float64:
        voxels = tuple(range(a.ndim - 1))
        return a.sum(axis=voxels), (a * (x - mean)).sum(axis=voxels)
    repeated = _repeated(mean)[0]
    chunk = repeated.size * max(1, _CHUNK // repeated.size)
    partial = np.empty((-(-a.size // chunk), 2, repeated.size))
    _sum_chunks(a.reshape(-1), x.reshape(-1), repeated, partial)
    first, second = partial.sum(axis=0).reshape(2, -1, channels).sum(axis=1)
    return first, second


def _apply(
    src: Array, mean: Array, tilt: Array, level: Array, diff: Array = _NONE, slope: Array = _NONE
) -> Array:
    """``(src - mean) * tilt + level``, and ``diff * slope`` added if it is given."""
    given = diff.size > 0
    if src.dtype == np.float64:
        dst: Array = (src - mean) * tilt + level
        return dst + diff * slope if given else dst
    dst = empty(src.shape)
    vectors = _repeated(mean, tilt, level, slope if given else mean)
    _apply_rows(src.reshape(-1), diff.reshape(-1), vectors, dst.reshape(-1))
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
