"""Batch normalisation over all axes but the last.

    mean[c], variance[c] = those of src[..., c]               (variance divides by the count: "biased")
    normalised           = (src - mean) / sqrt(variance + epsilon)
    dst                  = normalised * scale + shift

The forward pass in training reads ``src`` twice, for nothing can be normalised before the last item is
seen, and writes ``dst``. The backward pass has two sums to make first, too. Kept for backward: ``src``,
``mean`` and ``variance``; ``normalised`` is made again from them, which costs a subtraction and a
product where reading it would cost 4 bytes an item.

Idea       A row of ``C`` channels is short, and each channel has its own mean. So rows are taken
           as many at a time as make 256 items or more, and the per-channel vectors are repeated as
           often: the inner loop is long for any ``C``, and vectorises.
Numerics   Sums are float64, of float32 items converted first: the square of such an item is exact in
           float64, so ``E[x^2] - E[x]^2`` loses ``mean^2 / variance * 1e-16`` only: 1e-10 for mean 1000
           and deviation 1, where float32 would have nothing left. Where ``mean^2`` is above 1e7 variances,
           a second pass finds the variance (not over several processes). ``src - mean`` uses the float32
           mean, and what that rounding lost goes into the shift. Chunks are summed apart and added in their
           order: the result does not depend on the number of threads. float64 arrays take the NumPy
           expressions, with the variance in a second pass.

Together   Batch norm over several processes ("synchronised") needs what one process would sum over the
           whole batch: three numbers a channel each way. Both functions hand their sums to ``combine``,
           which replaces them by the sums of all; everything else is the same.

Conventions are those of Keras 3: ``epsilon`` is inside the root, and the running variance is fed with
the biased variance.

Source: Ioffe and Szegedy, "Batch normalization" (2015), algorithm 1 and section 3.
"""

from typing import Any

import numpy as np

from kernels.base.arguments import Array, Combine, Doubles, Floats, tensor
from kernels.base.buffers import empty
from kernels.base.jit import kernel, parallel_kernel, prange

# Rows whose sums are added up in registers before they go to memory.
_ROWS = 4
# Items that are summed by one thread, apart from the others: their sums are a row of float64 each.
_CHUNK = 1 << 16
# Length that a row of repeated channels has at least: 16 vectors of 16.
_ROW = 256


def forward_training(
    src: Array, scale: Array, shift: Array, epsilon: float = 1e-3, combine: Combine | None = None
) -> tuple[Array, Array, Array]:
    """Normalise with the statistics of ``src`` itself.

    Parameters
    ----------
    src : array, shape (..., C)
        float32 or float64.
    scale, shift : array, shape (C,)
        Of the dtype of ``src``.
    epsilon : float
        Added to the variance.
    combine : callable, optional
        Is given (3, C) numbers: count, sum and sum of squares. See "Together" above.

    Returns
    -------
    dst : array, shape (..., C)
    mean, variance : array, shape (C,)
        For the backward pass and the running statistics; the variance is the biased one, in float64:
        the square of a large float32 is none.

    Raises
    ------
    TypeError, ValueError
        If dtypes or channels differ, or ``epsilon`` is negative.
    """
    src = _checked_src(src, epsilon)
    scale, shift = _checked_channels(src, scale=scale, shift=shift)
    if src.dtype == np.float64 and combine is None:
        axes = tuple(range(src.ndim - 1))
        mean, variance = src.mean(axis=axes), src.var(axis=axes)
        return (src - mean) / np.sqrt(variance + epsilon) * scale + shift, mean, variance
    if src.dtype == np.float64:
        total, squares = _sum_voxels(src), _sum_voxels(src**2)
    else:
        total, squares = _sum_chunks(_moments, src)
    count, total, squares = _combined(src, total, squares, combine)
    exact_mean = total / count
    # Rounding can leave a variance of 0 just below 0.
    exact_variance = np.maximum(squares / count - exact_mean**2, 0.0)
    if combine is None:
        # Where the mean leaves few digits of the variance: a second pass over those channels.
        lost = exact_mean**2 > 1e7 * exact_variance
        if lost.any():
            apart = src[..., lost].astype(np.float64) - exact_mean[lost]
            exact_variance[lost] = np.mean(apart**2, axis=tuple(range(src.ndim - 1)))
    if src.dtype == np.float64:
        normalised = (src - exact_mean) / np.sqrt(exact_variance + epsilon)
        return normalised * scale + shift, exact_mean, exact_variance
    mean = exact_mean.astype(np.float32)
    slope = scale / np.sqrt(exact_variance + epsilon)
    dst = _normalise(src, mean, slope, shift - (exact_mean - mean) * slope)
    return dst, mean, exact_variance


def forward_inference(
    src: Array, scale: Array, shift: Array, mean: Array, variance: Array, epsilon: float = 1e-3
) -> Array:
    """Normalise with given statistics, the running ones of the training.

    Parameters
    ----------
    src : array, shape (..., C)
        float32 or float64.
    scale, shift, mean : array, shape (C,)
        Of the dtype of ``src``.
    variance : array, shape (C,)
        Float32 or float64.
    epsilon : float
        Added to the variance.

    Returns
    -------
    array, shape (..., C)

    Raises
    ------
    TypeError, ValueError
        If dtypes or channels differ, or ``epsilon`` is negative.
    """
    src = _checked_src(src, epsilon)
    scale, shift, mean = _checked_channels(src, scale=scale, shift=shift, mean=mean)
    variance = tensor("variance", variance, shape=src.shape[-1:])
    if src.dtype == np.float64:
        return (src - mean) / np.sqrt(variance + epsilon) * scale + shift
    slope = scale / np.sqrt(variance.astype(np.float64) + epsilon)
    return _normalise(src, mean, slope, shift.astype(np.float64))


def backward(
    diff_dst: Array,
    src: Array,
    scale: Array,
    mean: Array,
    variance: Array,
    epsilon: float = 1e-3,
    combine: Combine | None = None,
) -> tuple[Array, Array, Array]:
    """Gradients of :func:`forward_training`, through mean and variance as well.

    ::

        diff_shift = sum of diff_dst
        diff_scale = sum of diff_dst * normalised
        diff_src   = scale / sqrt(variance + epsilon)
                     * (diff_dst - diff_shift / count - normalised * diff_scale / count)

    Parameters
    ----------
    diff_dst, src : array, shape (..., C)
        Gradient of the output, and the source that was normalised.
    scale, mean, variance : array, shape (C,)
        As given to and returned from the forward pass: the variance in float64.
    epsilon : float
        As in the forward pass.
    combine : callable, optional
        Is given (3, C) numbers: count, sum of ``diff_dst`` and of ``diff_dst * (src - mean)``.

    Returns
    -------
    diff_src : array, shape (..., C)
    diff_scale, diff_shift : array, shape (C,)
        Of this source alone, also with ``combine``: they are summed with all other gradients.

    Raises
    ------
    TypeError, ValueError
        If dtypes, shapes or channels differ, or ``epsilon`` is negative.
    """
    src = _checked_src(src, epsilon)
    diff_dst = tensor("diff_dst", diff_dst, shape=src.shape, dtype=src.dtype)
    scale, mean = _checked_channels(src, scale=scale, mean=mean)
    variance = tensor("variance", variance, shape=src.shape[-1:], dtype=np.float64)
    rstd = 1.0 / np.sqrt(variance + epsilon)
    if src.dtype == np.float64:
        total, products = _sum_voxels(diff_dst), _sum_voxels(diff_dst * (src - mean))
    else:
        total, products = _sum_chunks(_moments_backward, diff_dst, src, mean)
    diff_shift, diff_scale = total, products * rstd
    count, total, products = _combined(src, total, products, combine)
    if src.dtype == np.float64:
        normalised = (src - mean) * rstd
        centred = diff_dst - total / count - normalised * (products * rstd / count)
        return scale * rstd * centred, diff_scale, diff_shift
    slope = scale * rstd
    tilt, level = -slope * rstd * (products * rstd) / count, -slope * total / count
    coefficients = _repeated(slope, mean, tilt, level)
    diff_src = empty(src.shape)
    _apply_backward(diff_dst.reshape(-1), src.reshape(-1), coefficients, diff_src.reshape(-1))
    return diff_src, diff_scale.astype(np.float32), diff_shift.astype(np.float32)


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


def _combined(
    src: Array, first: Doubles, second: Doubles, combine: Combine | None
) -> tuple[Doubles, Doubles, Doubles]:
    """Count and two sums of each channel, of this source or of all that belong together."""
    count = np.full(src.shape[-1], src.size // src.shape[-1], np.float64)
    sums = np.stack([count, first, second])
    if combine is not None:
        combine(sums)
    count, first, second = sums
    return count, first, second


def _sum_voxels(values: Array) -> Doubles:
    return values.sum(axis=tuple(range(values.ndim - 1)))


# --- float32 ------------------------------------------------------------------------------------------


def _repeated(*vectors: Array) -> Floats:
    """Per-channel vectors, one a row, repeated to the length of the inner loop."""
    stacked = np.stack(vectors).astype(np.float32)
    return np.tile(stacked, -(-_ROW // stacked.shape[1]))


def _normalise(src: Array, mean: Array, slope: Array, shift: Array) -> Array:
    dst = empty(src.shape)
    _apply(src.reshape(-1), _repeated(mean, slope, shift), dst.reshape(-1))
    return dst


def _sum_chunks(kernel_of_sums: Any, *arrays: Array) -> Doubles:
    """Two sums per channel, shape (2, C), of arrays of shape (..., C); a last (C,) is repeated."""
    channels = arrays[0].shape[-1]
    row = channels * -(-_ROW // channels)
    flat = [_repeated(a)[0] if a.ndim == 1 else a.reshape(-1) for a in arrays]
    chunk = row * max(1, _CHUNK // row)
    partial = np.empty((-(-flat[0].size // chunk), 2, row))
    kernel_of_sums(*flat, partial)
    return partial.sum(axis=0).reshape(2, -1, channels).sum(axis=1)


@kernel
def _moments_rows(src: Floats, sums: Doubles, squares: Doubles) -> None:
    for i in range(sums.size):
        total, square = sums[i], squares[i]
        for k in range(_ROWS):
            x = np.float64(src[k, i])
            total += x
            square += x * x
        sums[i] = total
        squares[i] = square


@kernel
def _moments_row(src: Floats, sums: Doubles, squares: Doubles) -> None:
    for i in range(src.size):
        x = np.float64(src[i])
        sums[i] += x
        squares[i] += x * x


@parallel_kernel
def _moments(src: Floats, partial: Doubles) -> None:
    row = partial.shape[2]
    chunk = row * max(1, _CHUNK // row)
    for i in prange(partial.shape[0]):
        partial[i] = 0.0
        start, end = i * chunk, min((i + 1) * chunk, src.size)
        while start + _ROWS * row <= end:
            rows = src[start : start + _ROWS * row].reshape(_ROWS, row)
            _moments_rows(rows, partial[i, 0], partial[i, 1])
            start += _ROWS * row
        while start < end:
            _moments_row(src[start : min(start + row, end)], partial[i, 0], partial[i, 1])
            start += row


@parallel_kernel
def _apply(src: Floats, coefficients: Floats, dst: Floats) -> None:
    row = coefficients.shape[1]
    rows = (src.size + row - 1) // row
    for i in prange(rows):
        at = slice(i * row, (i + 1) * row)
        x, y = src[at], dst[at]
        mean, slope, shift = coefficients[0], coefficients[1], coefficients[2]
        for k in range(x.size):
            y[k] = (x[k] - mean[k]) * slope[k] + shift[k]


@parallel_kernel
def _moments_backward(diff_dst: Floats, src: Floats, mean: Floats, partial: Doubles) -> None:
    row = partial.shape[2]
    chunk = row * max(1, _CHUNK // row)
    for i in prange(partial.shape[0]):
        partial[i] = 0.0
        sums, products = partial[i, 0], partial[i, 1]
        for start in range(i * chunk, min((i + 1) * chunk, src.size), row):
            at = slice(start, start + row)
            dy, x = diff_dst[at], src[at]
            for k in range(x.size):
                diff = np.float64(dy[k])
                sums[k] += diff
                products[k] += diff * (np.float64(x[k]) - mean[k])


@parallel_kernel
def _apply_backward(diff_dst: Floats, src: Floats, coefficients: Floats, diff_src: Floats) -> None:
    row = coefficients.shape[1]
    rows = (src.size + row - 1) // row
    for i in prange(rows):
        at = slice(i * row, (i + 1) * row)
        dy, x, dx = diff_dst[at], src[at], diff_src[at]
        slope, mean = coefficients[0], coefficients[1]
        tilt, level = coefficients[2], coefficients[3]
        for k in range(x.size):
            dx[k] = dy[k] * slope[k] + ((x[k] - mean[k]) * tilt[k] + level[k])
