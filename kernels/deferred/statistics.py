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

import numpy as np

from kernels.base.arguments import Combine, Doubles, Floats
from kernels.base.jit import kernel, parallel_kernel, prange
from kernels.base.simd import LANES, add_to_doubles, broadcast, fma, load
from kernels.deferred.masking import RUN, band_of_task, bands
from kernels.deferred.tensors import Shape


@kernel
def finish_moments(
    moments: Doubles,
    gamma: Floats,
    beta: Floats,
    epsilon: float,
    momentum: float,
    running_mean: Floats,
    running_variance: Floats,
    scale: Floats,
    shift: Floats,
    mean: Floats,
    rstd: Floats,
) -> None:
    """Statistics of a batch, what its normalisation is deferred as, and the running statistics.

    Parameters
    ----------
    moments : float64 array, shape=(bricks, 3, CB * 16)
        Count, mean and M2 of each brick and channel; a count may be 0.
    gamma, beta : float32 array, shape=(C,)
    epsilon : float
        Added to the variance.
    momentum : float
        Share of the running statistics that stays, as in Keras.
    running_mean, running_variance : float32 array, shape=(C,)
        Updated; the variance with the biased one, as in Keras.
    scale, shift, mean, rstd : float32 array, shape=(CB * 16,)
        Filled, with zeros past channel ``C``.
    """
    C = gamma.size
    count, total, squares = np.zeros(C), np.zeros(C), np.zeros(C)
    for brick in range(moments.shape[0]):
        for c in range(C):
            count[c] += moments[brick, 0, c]
            total[c] += moments[brick, 0, c] * moments[brick, 1, c]
    for brick in range(moments.shape[0]):
        for c in range(C):
            apart = moments[brick, 1, c] - total[c] / count[c]
            squares[c] += moments[brick, 2, c] + moments[brick, 0, c] * (apart * apart)
    for c in range(scale.size):
        scale[c] = shift[c] = mean[c] = rstd[c] = 0.0
    for c in range(C):
        exact_mean, variance = total[c] / count[c], squares[c] / count[c]
        exact_rstd = 1.0 / math.sqrt(variance + epsilon)
        mean[c], rstd[c] = exact_mean, exact_rstd
        # Where all values are equal, scale * x + shift would be beta and rounding, of any sign.
        scale[c] = gamma[c] * exact_rstd if variance != 0.0 else 0.0
        shift[c] = beta[c] - exact_mean * scale[c]
        running_mean[c] = momentum * running_mean[c] + (1.0 - momentum) * exact_mean
        running_variance[c] = momentum * running_variance[c] + (1.0 - momentum) * variance


@kernel
def finish_gradient(
    sums: Doubles,
    count: int,
    gamma: Floats,
    mean: Floats,
    rstd: Floats,
    a: Floats,
    b: Floats,
    d: Floats,
    diff_gamma: Floats,
    diff_beta: Floats,
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
    a, b, d : float32 array, shape=(CB * 16,)
        Filled, with zeros past channel ``C``: the source's gradient is ``a * dz + b * x + d``.
    diff_gamma, diff_beta : float32 array, shape=(C,)
        Filled.
    """
    C = gamma.size
    s1, s2 = np.zeros(C), np.zeros(C)
    for partial in range(sums.shape[1]):
        for c in range(C):
            s1[c] += sums[0, partial, c]
            s2[c] += sums[1, partial, c]
    for c in range(a.size):
        a[c] = b[c] = d[c] = 0.0
    for c in range(C):
        slope, r = np.float64(gamma[c]) * rstd[c], np.float64(rstd[c])
        a[c] = slope
        b[c] = -slope * r * r * s2[c] / count
        d[c] = -slope * s1[c] / count - np.float64(b[c]) * mean[c]
        diff_gamma[c] = s2[c] * r
        diff_beta[c] = s1[c]


def mend_moments(x: Floats, moments: Doubles) -> None:
    """Gather moments again, in float64, if squares of large values were infinite in float32.

    Parameters
    ----------
    x : float32 array, shape=(MB, CB, D, H, W, 16)
    moments : float64 array, shape=(bricks, 3, CB * 16)
        Of ``x``; changed if one is not finite, which is so from deviations of 1e19 on.
    """
    if np.isfinite(moments.sum()):
        return
    moments[:] = 0.0
    for lane in range(moments.shape[2]):
        values = x[:, lane // LANES, ..., lane % LANES].astype(np.float64)
        mean = values.mean()
        moments[0, :, lane] = values.size, mean, np.square(values - mean).sum()


def combine_moments(moments: Doubles, combine: Combine) -> Doubles:
    """Moments of several processes as those of one brick, for :func:`finish_moments`.

    Parameters
    ----------
    moments : float64 array, shape=(bricks, 3, CB * 16)
        Count, mean and M2 of this process' bricks.
    combine : callable
        As in :mod:`kernels.ops.batch_norm`: is given count, sum and sum of squares.

    Returns
    -------
    float64 array, shape=(1, 3, CB * 16)
    """
    count, mean, squared = moments[:, 0], moments[:, 1], moments[:, 2]
    sums = np.stack([count.sum(axis=0), (count * mean).sum(axis=0), (squared + count * mean**2).sum(axis=0)])
    combine(sums)
    # Padding lanes count nothing.
    voxels = np.maximum(sums[0], 1.0)
    mean = sums[1] / voxels
    return np.stack([sums[0], mean, np.maximum(sums[2] - voxels * mean**2, 0.0)])[np.newaxis]


def combine_sums(sums: Doubles, count: int, combine: Combine) -> tuple[Doubles, int]:
    """Sums and count of several processes, for :func:`finish_gradient`.

    Parameters
    ----------
    sums : float64 array, shape=(2, partials, CB * 16)
        S1 and S2 of this process.
    count : int
        Of this process.
    combine : callable
        As in :mod:`kernels.ops.batch_norm`: is given count, S1 and S2.

    Returns
    -------
    sums : float64 array, shape=(2, 1, CB * 16)
    count : int
    """
    total = sums.sum(axis=1)
    both = np.concatenate([np.full_like(total[:1], count), total])
    combine(both)
    return np.ascontiguousarray(both[1:, np.newaxis]), int(both[0, 0])


def gather_moments(x: Floats, moments: Doubles) -> None:
    """Moments of a whole tensor, for kernels that do not gather them.

    Parameters
    ----------
    x : float32 array, shape=(MB, CB, D, H, W, 16)
    moments : float64 array, shape=(partials(x.shape), 3, CB * 16)
        Filled with count, mean and M2 of each band (`kernels.deferred.masking`).
    """
    _gather_moments(x.reshape(-1), x.shape, moments.reshape(-1))
    mend_moments(x, moments)


@parallel_kernel
def _gather_moments(x: Floats, shape: Shape, moments: Doubles) -> None:
    MB, CB, D, H, W, _ = shape
    lanes = CB * LANES
    for task in prange(MB * CB * D * bands(H, W)):
        first, count, block, partial = band_of_task(task, shape)
        at = partial * 3 * lanes + block * LANES
        for lane in range(LANES):
            moments[at + lane] = count
            moments[at + lanes + lane] = moments[at + 2 * lanes + lane] = 0.0
        # Deviations from the first voxel: nothing large cancels.
        pivot = load(x, first * LANES)
        for run in range(first, first + count, RUN):
            total = square = broadcast(np.float32(0))
            for voxel in range(run, min(run + RUN, first + count)):
                deviation = load(x, voxel * LANES) - pivot
                total = total + deviation
                square = fma(deviation, deviation, square)
            add_to_doubles(moments, at + lanes, total)
            add_to_doubles(moments, at + 2 * lanes, square)
        for lane in range(LANES):
            total_deviation = moments[at + lanes + lane]
            moments[at + lanes + lane] = x[first * LANES + lane] + total_deviation / count
            moments[at + 2 * lanes + lane] -= total_deviation * total_deviation / count
