"""Statistics of deferred tensors, of all three norms: against NumPy in float64."""

import numpy as np
import pytest
from checkers import assert_close, assert_exact, integers, normal, unchanged
from deferred import CHANNELS, SIZES, SLOPES, THREADS, blocked, deferred, lanes, poisoned, totals, unblocked
from hypothesis import given
from hypothesis import strategies as st

from kernels.base import machine
from kernels.deferred import statistics
from kernels.deferred.masking import apply_mask, partials
from kernels.deferred.statistics import BATCH, Sharing

EPSILON, MOMENTUM = 1e-3, 0.9
AXES = (0, 1, 2, 3)
INSTANCE = Sharing(one_image=True, channels=1)


@st.composite
def norms(draw):
    """Channels, and which of them share a mean: those of batch, instance and group norm."""
    channels = draw(CHANNELS)
    groups = [Sharing(True, together) for together in range(2, channels + 1) if channels % together == 0]
    return channels, draw(st.sampled_from([BATCH, INSTANCE, *groups]))


def shared(values, sharing, reduce=np.mean):
    """Their mean over what shares one, in float64: (MB, 1, 1, 1, C)."""
    MB, *_, C = values.shape
    grouped = values.astype(np.float64).reshape(*values.shape[:4], -1, sharing.channels)
    found = reduce(grouped, axis=(1, 2, 3, 5) if sharing.one_image else (0, 1, 2, 3, 5), keepdims=True)
    return np.broadcast_to(found, (MB, 1, 1, 1, *grouped.shape[4:])).reshape(MB, 1, 1, 1, C)


def finish_moments(moments, gamma, beta, running, sharing=BATCH, MB=1):
    """Scale, shift, mean and rstd, each (MB, CB * 16)."""
    filled = [poisoned(MB, lanes(gamma.size)) for _ in range(4)]
    with unchanged(moments, gamma, beta):
        norm = statistics.Norm(gamma, beta, EPSILON, sharing, MOMENTUM, *running)
        statistics.finish_moments(moments, norm, statistics.Normalisation(*filled))
    return filled


def problem(size, channels, seed, mean=0.0, deviation=1.0):
    generator = np.random.default_rng(seed)
    x = mean + deviation * normal(generator, *size, channels, dtype=np.float64)
    gamma, beta, *running = normal(generator, 4, channels)
    return x.astype(np.float32), gamma, beta, running


def moments_of(x):
    src = blocked(x)
    moments = poisoned(partials(src.shape), 3, src.shape[1] * 16, dtype=np.float64)
    with unchanged(src):
        statistics.gather_moments(src, moments)
    return moments


@given(size=SIZES, norm=norms(), seed=st.integers(0, 99), threads=THREADS)
def test_normalises_as_the_formula_does(size, norm, seed, threads):
    """Two passes in float64 on data of mean 1000 and deviation 1; also of one voxel."""
    machine.set_threads(threads)
    channels, sharing = norm
    x, gamma, beta, running = problem(size, channels, seed, mean=1000.0)
    exact = x.astype(np.float64)
    mean, variance = shared(x, sharing), shared(x, sharing, np.var)
    wanted_running = [
        MOMENTUM * old + (1 - MOMENTUM) * new[0] for old, new in zip(running, (mean, variance), strict=True)
    ]
    running = running if sharing is BATCH else []
    outputs = finish_moments(moments_of(x), gamma, beta, running, sharing, size[0])
    for vector in outputs:
        assert_exact(vector[:, channels:], np.zeros((size[0], lanes(channels) - channels)))
    scale, shift, got_mean, rstd = (v[:, :channels].reshape(mean.shape) for v in outputs)
    # The mean is rounded to float32; 2^-24 is half a unit in the last place.
    assert_close(got_mean, mean, 2**-24)
    assert_close(rstd, 1 / np.sqrt(variance + EPSILON), 1e-6, "rstd")
    for got, wanted in zip(running, wanted_running, strict=False):
        assert_close(got, wanted[0, 0, 0], 1e-6, "running")
    # Of a single voxel the variance is 0, and scale is gamma * 32: shift has 1000 times that to round.
    wanted = np.float64(gamma) * (exact - mean) / np.sqrt(variance + EPSILON) + beta
    error = np.abs(scale.astype(np.float64) * exact + shift - wanted).max()
    assert error <= 3e-6 * np.abs(wanted).max() + 1e-7 * np.abs(shift).max()


def test_moments_as_accurate_as_two_passes():
    """M2 of every band, relative; one pass in float32 would have nothing left."""
    x, gamma, beta, running = problem((2, 5, 40, 70), 16, 0, mean=1000.0)
    moments = moments_of(x)
    _, _, _, rstd = finish_moments(moments, gamma, beta, running)
    variance = 1 / rstd[0].astype(np.float64) ** 2 - EPSILON
    assert_close(variance, x.astype(np.float64).var(axis=AXES), 5e-7)
    two_passes = x.var(axis=AXES)
    assert abs(two_passes / x.astype(np.float64).var(axis=AXES) - 1).max() > 1e-7
    assert_exact(moments[:, 0].sum(axis=0), np.full(16, x[..., 0].size))


def test_bricks_of_any_size():
    """Bricks of different counts, and an empty one, combine to the moments of the whole."""
    x, gamma, beta, running = problem((1, 1, 1, 1000), 16, 0, mean=100.0, deviation=3.0)
    rows = x.reshape(-1, 16).astype(np.float64)
    bricks = []
    for brick in (rows[:1], rows[1:13], rows[13:990], rows[990:]):
        bricks.append([np.full(16, len(brick)), brick.mean(axis=0), brick.var(axis=0) * len(brick)])
    bricks.insert(2, np.zeros((3, 16)))
    _, _, mean, rstd = finish_moments(np.array(bricks, np.float64), gamma, beta, running)
    assert_close(mean[0], rows.mean(axis=0), 1e-7)
    assert_close(rstd[0], 1 / np.sqrt(rows.var(axis=0) + EPSILON), 2e-7)


@pytest.mark.parametrize("sharing", [BATCH, INSTANCE])
def test_squares_that_float32_cannot_hold(sharing):
    """Moments that are infinite are gathered again, those of each image for itself."""
    x, gamma, beta, running = problem((2, 3, 4, 5), 3, 0, deviation=1e25)
    mean, rstd = finish_moments(moments_of(x), gamma, beta, running, sharing, 2)[2:]
    assert_close(mean[:, :3].reshape(2, 1, 1, 1, 3), shared(x, sharing), 1e-6)
    assert_close(rstd[:, :3].reshape(2, 1, 1, 1, 3), 1 / np.sqrt(shared(x, sharing, np.var)), 1e-6)


@given(size=SIZES, channels=CHANNELS, slope=SLOPES, seed=st.integers(0, 99), threads=THREADS)
def test_mask_exactly(size, channels, slope, seed, threads):
    machine.set_threads(threads)
    generator = np.random.default_rng(seed)
    data = deferred(generator, (*size, channels), slope)
    dy = integers(generator, *size, channels)
    mask, diff = data.mask, blocked(dy)
    with unchanged(*mask[:3], mask.mean):
        apply_mask(diff, mask)
    dz, s1, s2 = data.masked(dy)
    assert_exact(unblocked(diff, channels), dz)
    for name, *sums in zip(("S1", "S2"), totals(mask, channels), (s1, s2), strict=True):
        assert_exact(*sums, name)


@pytest.mark.parametrize("mean", [0.0, 1000.0])
@given(size=SIZES, norm=norms(), seed=st.integers(0, 99))
def test_gradient_of_a_norm(mean, size, norm, seed):
    """Mask, sums and the three numbers a channel together are ReLU's and the norm's backward."""
    channels, sharing = norm
    x, gamma, beta, running = problem(size, channels, seed, mean)
    dy = normal(np.random.default_rng(seed + 1), *x.shape)
    vectors = finish_moments(moments_of(x), gamma, beta, running, sharing, size[0])
    data = deferred(np.random.default_rng(0), x.shape, 0.0)
    scale, shift, means = (v[:, :channels].reshape(data.scale.shape) for v in vectors[:3])
    source = data._replace(x=x, scale=scale, shift=shift)
    mask, diff = source._replace(mean=means).mask, blocked(dy)
    apply_mask(diff, mask)
    dz = unblocked(diff, channels).astype(np.float64)

    coefficients = [poisoned(size[0], lanes(channels)) for _ in range(3)]
    diffs = [poisoned(channels) for _ in range(2)]
    count = sharing.count(x.shape)
    with unchanged(mask.sums, gamma, *vectors):
        out = statistics.NormGradient(*coefficients, *diffs)
        statistics.finish_gradient(mask.sums, count, sharing, gamma, *vectors[2:], out)
    for name, vector in zip("abd", coefficients, strict=True):
        assert_exact(vector[:, channels:], np.zeros((size[0], lanes(channels) - channels)), name)
    a, b, d = (v[:, :channels].reshape(scale.shape).astype(np.float64) for v in coefficients)
    exact, rstd = x.astype(np.float64), 1 / np.sqrt(shared(x, sharing, np.var) + EPSILON)
    u, g = (exact - shared(x, sharing)) * rstd, gamma * dz
    diff_src = rstd * (g - shared(g, sharing) - u * shared(g * u, sharing))
    # The mean's rounding shifts every x - mean by up to 3e-5 at 1000, of a deviation of 1 or, in a
    # single voxel, of sqrt(epsilon).
    bound = 2e-6 if mean == 0.0 else 1e-3
    largest = np.abs(dz).max() * (np.abs(gamma) * rstd).max() + 1e-30
    assert np.abs(a * dz + b * exact + d - diff_src).max() <= bound * largest
    of = np.abs(dz).max() * x[..., 0].size + 1e-30
    assert np.abs(diffs[0] - (dz * u).sum(axis=AXES)).max() <= bound * of
    assert np.abs(diffs[1] - dz.sum(axis=AXES)).max() <= 2e-6 * of


def test_repeats_bit_for_bit_whatever_the_threads():
    x, *_ = problem((2, 3, 60, 70), 17, 0)
    moments = []
    for threads in (1, machine.cores()):
        machine.set_threads(threads)
        moments.append(moments_of(x))
    assert_exact(*moments)
