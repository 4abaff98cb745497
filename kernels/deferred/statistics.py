"""What a normalisation makes of moments and sums: the numbers that are deferred with a tensor.

Batch, instance and group norm differ only in which values share a mean and a variance (`Sharing`).

Forward. A kernel that writes ``x`` leaves the moments of each of its bricks: count, mean, M2 (the sum of
squared deviations from the mean). For bricks ``b`` of any sizes (Chan, Golub and LeVeque), and all of the
values that share a mean::

    N = sum n_b        mean = sum n_b mean_b / N        M2 = sum M2_b + sum n_b (mean_b - mean)^2

    variance = M2 / N       rstd = 1 / sqrt(variance + epsilon)
    scale = gamma * rstd    shift = beta - mean * scale

so that ``scale * x + shift`` is what the normalisation would have written.

Backward. With ``z = scale * x + shift`` and ``dz`` its gradient, the kernel that writes ``dz`` leaves

    S1 = sum dz        S2 = sum dz (x - mean)

of each channel. With ``u = (x - mean) rstd``, the normalisation is ``z = gamma u + beta``, so
``diff_beta = S1`` and ``diff_gamma = sum dz u = S2 rstd``. By the chain rule through mean and variance as
well, where ``sum`` is over the channels that share them::

    dx = rstd (gamma dz - sum(gamma S1) / N - u rstd sum(gamma S2) / N)
       = a dz + b x + d     a = gamma rstd,   b = -rstd^3 sum(gamma S2) / N,
                            d = -rstd sum(gamma S1) / N - b mean

Numerics   ``shift`` is made with the rounded ``scale``, and ``d`` with the rounded ``b``: what rounding
           took from a slope does not come back multiplied by a mean of 1000. Sums are float64, in the
           order of the partials, whose number depends on the shape alone.
Source     Chan, Golub and LeVeque, "Algorithms for computing the sample variance" (1983); Ioffe and
           Szegedy, "Batch normalization" (2015), section 3; Ulyanov, Vedaldi and Lempitsky, "Instance
           normalization" (2016); Wu and He, "Group normalization" (2018)
"""

import math
from typing import NamedTuple

import numpy as np

from kernels.base.arguments import Combine, Doubles, Floats
from kernels.base.jit import kernel, parallel_kernel, prange
from kernels.base.simd import LANES, add_to_doubles, broadcast, fma, load
from kernels.deferred.masking import RUN, band_of_task, bands
from kernels.deferred.tensors import Shape

_NO_STATISTICS = np.empty(0, np.float32)


class Sharing(NamedTuple):
    """Which values of a tensor share a mean and a variance.

    Batch norm's are those of a channel, in all images; instance norm's those of a channel in one image; group
    norm's those of some neighbouring channels in one image.
    """

    one_image: bool
    channels: int

    def count(self, shape: tuple[int, ...]) -> int:
        """How many values share a mean in a tensor of shape (MB, ..., C)."""
        return math.prod(shape[1:-1]) * (self.channels if self.one_image else shape[0])


BATCH = Sharing(one_image=False, channels=1)


class Norm(NamedTuple):
    """A normalisation's parameters, and batch norm's running statistics, which `finish_moments` updates."""

    gamma: Floats  # (C,)
    beta: Floats  # (C,)
    epsilon: float  # added to the variance
    sharing: Sharing
    momentum: float = 1.0  # share of the running statistics that stays, as in Keras
    running_mean: Floats = _NO_STATISTICS  # (C,), or of size 0
    running_variance: Floats = _NO_STATISTICS  # (C,), of the biased variance, as in Keras, or of size 0


class Normalisation(NamedTuple):
    """What `finish_moments` fills: arrays of (MB, CB * 16), with zeros past channel C."""

    scale: Floats
    shift: Floats
    mean: Floats
    rstd: Floats


class NormGradient(NamedTuple):
    """What `finish_gradient` fills: the source's gradient is ``a * dz + b * x + d``."""

    a: Floats  # (MB, CB * 16), with zeros past channel C
    b: Floats  # the same
    d: Floats  # the same
    diff_gamma: Floats  # (C,)
    diff_beta: Floats  # (C,)


@kernel
def finish_moments(moments: Doubles, norm: Norm, out: Normalisation) -> None:
    """Statistics of a batch, what its normalisation is deferred as, and the running statistics.

    Parameters
    ----------
    moments : float64 array, shape=(bricks, 3, CB * 16)
        Count, mean and M2 of each brick and channel, as many bricks for each image, image by image; a count
        may be 0.
    norm : Norm
    out : Normalisation
        Filled.
    """
    C, images = norm.gamma.size, out.scale.shape[0]
    parts = images if norm.sharing.one_image else 1
    bricks = moments.shape[0] // parts
    for array in out:
        array[:] = 0.0
    stays, comes = norm.momentum, 1.0 - norm.momentum
    for part in range(parts):
        mean, variance = mean_and_variance(moments, part * bricks, bricks, C, norm.sharing.channels)
        for image in range(part * images // parts, (part + 1) * images // parts):
            for c in range(C):
                rstd = 1.0 / math.sqrt(variance[c] + norm.epsilon)
                out.mean[image, c], out.rstd[image, c] = mean[c], rstd
                # Where all values are equal, scale * x + shift would be beta and rounding, of any sign.
                out.scale[image, c] = norm.gamma[c] * rstd if variance[c] != 0.0 else 0.0
                out.shift[image, c] = norm.beta[c] - mean[c] * out.scale[image, c]
        for c in range(norm.running_mean.size):
            norm.running_mean[c] = stays * norm.running_mean[c] + comes * mean[c]
            norm.running_variance[c] = stays * norm.running_variance[c] + comes * variance[c]


@kernel
def mean_and_variance(
    moments: Doubles, first: int, bricks: int, C: int, together: int
) -> tuple[Doubles, Doubles]:
    """Mean and variance of each channel in some bricks; those of its group, if it shares them."""
    count, total, squares = np.zeros(C), np.zeros(C), np.zeros(C)
    for brick in range(first, first + bricks):
        for c in range(C):
            count[c] += moments[brick, 0, c]
            total[c] += moments[brick, 0, c] * moments[brick, 1, c]
    add_up(count, together)
    add_up(total, together)
    for brick in range(first, first + bricks):
        for c in range(C):
            distance = moments[brick, 1, c] - total[c] / count[c]
            squares[c] += moments[brick, 2, c] + moments[brick, 0, c] * (distance * distance)
    add_up(squares, together)
    return total / count, squares / count


@kernel
def add_up(sums: Doubles, together: int) -> None:
    """Give each of some neighbouring channels the sum over all of them; those of one channel stay."""
    for first in range(0, sums.size if together > 1 else 0, together):
        sums[first : first + together] = sums[first : first + together].sum()


@kernel
def finish_gradient(
    sums: Doubles, count: int, sharing: Sharing, gamma: Floats, mean: Floats, rstd: Floats, out: NormGradient
) -> None:
    """Gradients of the parameters of a normalisation, and what the gradient of its source is deferred as.

    Parameters
    ----------
    sums : float64 array, shape=(2, partials, CB * 16)
        S1 and S2, as many partials for each image, image by image.
    count : int
        Number of the values that share a mean.
    sharing : Sharing
    gamma : float32 array, shape=(C,)
    mean, rstd : float32 array, shape=(MB, CB * 16)
        Of the forward pass.
    out : NormGradient
        Filled.
    """
    C, images = gamma.size, out.a.shape[0]
    parts = images if sharing.one_image else 1
    partials = sums.shape[1] // parts
    for array in (out.a, out.b, out.d):
        array[:] = 0.0
    diff_gamma, diff_beta = np.zeros(C), np.zeros(C)
    for part in range(parts):
        s1, s2 = np.zeros(C), np.zeros(C)
        for partial in range(part * partials, (part + 1) * partials):
            for c in range(C):
                s1[c] += sums[0, partial, c]
                s2[c] += sums[1, partial, c]
        first = part * images // parts
        for c in range(C):
            slope, r = np.float64(gamma[c]) * rstd[first, c], np.float64(rstd[first, c])
            diff_gamma[c] += s2[c] * r
            diff_beta[c] += s1[c]
            s1[c], s2[c] = slope * s1[c], slope * r * r * s2[c]
        add_up(s1, sharing.channels)
        add_up(s2, sharing.channels)
        for image in range(first, (part + 1) * images // parts):
            for c in range(C):
                out.a[image, c] = np.float64(gamma[c]) * rstd[image, c]
                out.b[image, c] = -s2[c] / count
                out.d[image, c] = -s1[c] / count - np.float64(out.b[image, c]) * mean[image, c]
    out.diff_gamma[:] = diff_gamma
    out.diff_beta[:] = diff_beta


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
    bricks = moments.shape[0] // x.shape[0]
    for image, lane in np.ndindex(x.shape[0], moments.shape[2]):
        values = x[image, lane // LANES, ..., lane % LANES].astype(np.float64)
        mean = values.mean()
        moments[image * bricks, :, lane] = values.size, mean, np.square(values - mean).sum()


def combine_moments(moments: Doubles, combine: Combine) -> Doubles:
    """Moments (bricks, 3, CB * 16) of all processes as those of one brick, for `finish_moments`.

    ``combine`` is that of `kernels.ops.norms`; it gets counts, sums and sums of squares.
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

    ``combine`` is that of `kernels.ops.norms`; it gets counts, S1 and S2.
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
        channel = block % CB * LANES
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
