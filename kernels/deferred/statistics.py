"""What batch norm makes of moments and sums: the numbers that are deferred with a tensor.

Forward. A kernel that writes ``x`` leaves the moments of each of its bricks: count, mean, M2 (the sum of
squared deviations from the mean). For groups ``b`` of any sizes (Chan, Golub and LeVeque)::

    N = sum n_b        mean = sum n_b mean_b / N        M2 = sum M2_b + sum n_b (mean_b - mean)^2

    variance = M2 / N       rstd = 1 / sqrt(variance + epsilon)
    scale = gamma * rstd    shift = beta - mean * scale

so that ``scale * x + shift`` is what batch norm would have written.

Backward. With ``z = scale * x + shift`` and ``dz`` its gradient, the kernel that writes ``dz`` leaves

    S1 = sum dz        S2 = sum dz (x - mean)

With ``u = (x - mean) rstd``, batch norm is ``z = gamma u + beta``, so ``diff_beta = S1`` and
``diff_gamma = sum dz u = S2 rstd``. By the chain rule through mean and variance as well::

    dx = gamma rstd (dz - S1 / N - u diff_gamma / N)
       = a dz + b x + d       a = gamma rstd,   b = -a rstd^2 S2 / N,   d = -a S1 / N - b mean

Numerics   ``shift`` is made with the rounded ``scale``, and ``d`` with the rounded ``b``: what rounding
           took from a slope does not come back multiplied by a mean of 1000. Sums are float64, in the
           order of the partials, whose number depends on the shape alone.
Source     Chan, Golub and LeVeque, "Algorithms for computing the sample variance" (1983); Ioffe and
           Szegedy, "Batch normalization" (2015), section 3
"""

import math
from typing import NamedTuple

import numpy as np

from kernels.base.arguments import Combine, Doubles, Floats
from kernels.base.jit import kernel, parallel_kernel, prange
from kernels.base.simd import LANES, add_to_doubles, broadcast, fma, load
from kernels.deferred.masking import RUN, band_of_task, bands
from kernels.deferred.tensors import Shape


class BatchNorm(NamedTuple):
    """A batch norm's parameters, and its running statistics, which `finish_moments` updates."""

    gamma: Floats  # (C,)
    beta: Floats  # (C,)
    epsilon: float  # added to the variance
    momentum: float  # share of the running statistics that stays, as in Keras
    running_mean: Floats  # (C,)
    running_variance: Floats  # (C,), of the biased variance, as in Keras


class Normalisation(NamedTuple):
    """What `finish_moments` fills: arrays of CB * 16, with zeros past channel C."""

    scale: Floats
    shift: Floats
    mean: Floats
    rstd: Floats


class NormGradient(NamedTuple):
    """What `finish_gradient` fills: the source's gradient is ``a * dz + b * x + d``."""

    a: Floats  # (CB * 16,), with zeros past channel C
    b: Floats  # the same
    d: Floats  # the same
    diff_gamma: Floats  # (C,)
    diff_beta: Floats  # (C,)


@kernel
def finish_moments(moments: Doubles, norm: BatchNorm, out: Normalisation) -> None:
    """Statistics of a batch, what its normalisation is deferred as, and the running statistics.

    Parameters
    ----------
    moments : float64 array, shape=(bricks, 3, CB * 16)
        Count, mean and M2 of each brick and channel; a count may be 0.
    norm : BatchNorm
    out : Normalisation
        Filled.
    """
    C = norm.gamma.size
    count, total, squares = np.zeros(C), np.zeros(C), np.zeros(C)
    for brick in range(moments.shape[0]):
        for c in range(C):
            count[c] += moments[brick, 0, c]
            total[c] += moments[brick, 0, c] * moments[brick, 1, c]
    for brick in range(moments.shape[0]):
        for c in range(C):
            distance = moments[brick, 1, c] - total[c] / count[c]
            squares[c] += moments[brick, 2, c] + moments[brick, 0, c] * (distance * distance)
    for c in range(out.scale.size):
        out.scale[c] = out.shift[c] = out.mean[c] = out.rstd[c] = 0.0
    stays, comes = norm.momentum, 1.0 - norm.momentum
    for c in range(C):
        mean, variance = total[c] / count[c], squares[c] / count[c]
        rstd = 1.0 / math.sqrt(variance + norm.epsilon)
        out.mean[c], out.rstd[c] = mean, rstd
        # Where all values are equal, scale * x + shift would be beta and rounding, of any sign.
        out.scale[c] = norm.gamma[c] * rstd if variance != 0.0 else 0.0
        out.shift[c] = norm.beta[c] - mean * out.scale[c]
        norm.running_mean[c] = stays * norm.running_mean[c] + comes * mean
        norm.running_variance[c] = stays * norm.running_variance[c] + comes * variance


@kernel
def finish_gradient(
    sums: Doubles, count: int, gamma: Floats, mean: Floats, rstd: Floats, out: NormGradient
) -> None:
    """Gradients of batch norm's parameters, and what the gradient of its source is deferred as.

    Parameters
    ----------
    sums : float64 array, shape=(2, partials, CB * 16)
        S1 and S2.
    count : int
        Voxels of a channel, all images counted.
    gamma : float32 array, shape=(C,)
    mean, rstd : float32 array, shape=(CB * 16,)
        Of the forward pass.
    out : NormGradient
        Filled.
    """
    C = gamma.size
    s1, s2 = np.zeros(C), np.zeros(C)
    for partial in range(sums.shape[1]):
        for c in range(C):
            s1[c] += sums[0, partial, c]
            s2[c] += sums[1, partial, c]
    for c in range(out.a.size):
        out.a[c] = out.b[c] = out.d[c] = 0.0
    for c in range(C):
        slope, r = np.float64(gamma[c]) * rstd[c], np.float64(rstd[c])
        out.a[c] = slope
        out.b[c] = -slope * r * r * s2[c] / count
        out.d[c] = -slope * s1[c] / count - np.float64(out.b[c]) * mean[c]
        out.diff_gamma[c] = s2[c] * r
        out.diff_beta[c] = s1[c]


@kernel
def close_moments(moments: Doubles, brick: int, channel: int, pivots: Floats, at: int, count: int) -> None:
    """Turn sums of a brick's deviations from ``pivots[at:]``, and of their squares, into count, mean and M2.

    Sums are in rows 1 and 2 of ``moments``, for 16 channels from ``channel`` on; an empty array stays so.
    """
    if moments.size == 0:
        return
    for lane in range(LANES):
        c = channel + lane
        total = moments[brick, 1, c]
        moments[brick, 0, c] = count
        moments[brick, 1, c] = pivots[at + lane] + total / count
        moments[brick, 2, c] -= total * total / count


def mend_moments(x: Floats, moments: Doubles) -> None:
    """Gather the moments of ``x`` again, in float64, if squares of large values were infinite in float32.

    This is so from deviations of 1e19 on: then a moment is not finite.
    """
    if np.isfinite(moments.sum()):
        return
    moments[:] = 0.0
    for lane in range(moments.shape[2]):
        values = x[:, lane // LANES, ..., lane % LANES].astype(np.float64)
        mean = values.mean()
        moments[0, :, lane] = values.size, mean, np.square(values - mean).sum()


def combine_moments(moments: Doubles, combine: Combine) -> Doubles:
    """Moments (bricks, 3, CB * 16) of all processes as those of one brick, for `finish_moments`.

    ``combine`` is that of `kernels.ops.batch_norm`; it gets counts, sums and sums of squares.
    """
    count, mean, squared = moments[:, 0], moments[:, 1], moments[:, 2]
    sums = np.stack([count.sum(axis=0), (count * mean).sum(axis=0), (squared + count * mean**2).sum(axis=0)])
    combine(sums)
    # Padding lanes count nothing.
    voxels = np.maximum(sums[0], 1.0)
    mean = sums[1] / voxels
    return np.stack([sums[0], mean, np.maximum(sums[2] - voxels * mean**2, 0.0)])[np.newaxis]


def combine_sums(sums: Doubles, count: int, combine: Combine) -> tuple[Doubles, int]:
    """Sums (2, partials, CB * 16) and count of all processes as one partial, for `finish_gradient`.

    ``combine`` is that of `kernels.ops.batch_norm`; it gets counts, S1 and S2.
    """
    total = sums.sum(axis=1)
    both = np.concatenate([np.full_like(total[:1], count), total])
    combine(both)
    return np.ascontiguousarray(both[1:, np.newaxis]), int(both[0, 0])


def gather_moments(x: Floats, moments: Doubles) -> None:
    """Fill moments (partials, 3, CB * 16) of each band of a tensor, for kernels that do not gather them."""
    _gather_moments(x.reshape(-1), x.shape, moments)
    mend_moments(x, moments)


@parallel_kernel
def _gather_moments(x: Floats, shape: Shape, moments: Doubles) -> None:
    MB, CB, D, H, W, _ = shape
    lanes = CB * LANES
    for task in prange(MB * CB * D * bands(H, W)):
        first, count, block, partial = band_of_task(task, shape)
        channel = block * LANES
        totals = (partial * 3 + 1) * lanes + channel
        for lane in range(LANES):
            moments[partial, 1, channel + lane] = moments[partial, 2, channel + lane] = 0.0
        # Deviations from the first voxel: nothing large cancels.
        pivot = load(x, first * LANES)
        for run in range(first, first + count, RUN):
            total = square = broadcast(np.float32(0))
            for voxel in range(run, min(run + RUN, first + count)):
                deviation = load(x, voxel * LANES) - pivot
                total = total + deviation
                square = fma(deviation, deviation, square)
            add_to_doubles(moments, totals, total)
            add_to_doubles(moments, totals + lanes, square)
        close_moments(moments, partial, channel, x, first * LANES, count)
