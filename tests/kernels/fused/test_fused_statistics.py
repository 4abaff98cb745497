"""Batch-norm statistics of deferred tensors: against NumPy in float64, and the plain batch norm."""

import numpy as np
import pytest
from checkers import assert_close, assert_exact, integers, normal, unchanged
from deferred import (
    CHANNELS,
    SIZES,
    SLOPES,
    THREADS,
    blocked,
    deferred,
    lanes,
    per_channel,
    poisoned,
    totals,
    unblocked,
)
from hypothesis import given
from hypothesis import strategies as st

from kernels.base import machine
from kernels.deferred import statistics
from kernels.deferred.masking import apply_mask, partials
from kernels.ops import batch_norm

EPSILON, MOMENTUM = 1e-3, 0.9
AXES = (0, 1, 2, 3)


def finish_moments(moments, gamma, beta, running):
    """Scale, shift, mean and rstd, each (CB * 16,)."""
    filled = [poisoned(lanes(gamma.size)) for _ in range(4)]
    with unchanged(moments, gamma, beta):
        norm = statistics.BatchNorm(gamma, beta, EPSILON, MOMENTUM, *running)
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


@given(size=SIZES, channels=CHANNELS, seed=st.integers(0, 99), threads=THREADS)
def test_normalises_as_batch_norm_does(size, channels, seed, threads):
    """Two passes in float64 on data of mean 1000 and deviation 1; also of one voxel."""
    machine.set_threads(threads)
    x, gamma, beta, running = problem(size, channels, seed, mean=1000.0)
    exact = x.astype(np.float64)
    mean, variance = exact.mean(axis=AXES), exact.var(axis=AXES)
    wanted_running = [
        MOMENTUM * old + (1 - MOMENTUM) * new for old, new in zip(running, (mean, variance), strict=True)
    ]
    scale, shift, got_mean, rstd = finish_moments(moments_of(x), gamma, beta, running)
    # The mean is rounded to float32; 2^-24 is half a unit in the last place.
    assert_close(got_mean, per_channel(mean), 2**-24)
    assert_close(rstd[:channels], 1 / np.sqrt(variance + EPSILON), 1e-6, "rstd")
    for got, wanted in zip(running, wanted_running, strict=True):
        assert_close(got, wanted, 1e-6, "running")
    # Of a single voxel the variance is 0, and scale is gamma * 32: shift has 1000 times that to round.
    wanted = batch_norm.forward_training(exact, *np.float64((gamma, beta)), EPSILON)[0]
    error = np.abs(scale[:channels].astype(np.float64) * exact + shift[:channels] - wanted).max()
    assert error <= 3e-6 * np.abs(wanted).max() + 1e-7 * np.abs(shift).max()
    assert_exact(scale[channels:], np.zeros(lanes(channels) - channels))
    assert_exact(shift[channels:], np.zeros(lanes(channels) - channels))


def test_moments_as_accurate_as_two_passes():
    """M2 of every band, relative; one pass in float32 would have nothing left."""
    x, gamma, beta, running = problem((2, 5, 40, 70), 16, 0, mean=1000.0)
    moments = moments_of(x)
    _, _, _, rstd = finish_moments(moments, gamma, beta, running)
    variance = 1 / rstd.astype(np.float64) ** 2 - EPSILON
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
    assert_close(mean, rows.mean(axis=0), 1e-7)
    assert_close(rstd, 1 / np.sqrt(rows.var(axis=0) + EPSILON), 2e-7)


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
@given(size=SIZES, channels=CHANNELS, seed=st.integers(0, 99))
def test_gradient_of_batch_norm(mean, size, channels, seed):
    """Mask, sums and the three numbers a channel together are ReLU's and batch norm's backward."""
    x, gamma, beta, running = problem(size, channels, seed, mean)
    dy = normal(np.random.default_rng(seed + 1), *x.shape)
    scale, shift, means, rstd = finish_moments(moments_of(x), gamma, beta, running)
    data = deferred(np.random.default_rng(0), x.shape, 0.0)
    source = data._replace(x=x, scale=scale[:channels], shift=shift[:channels])
    mask, diff = source._replace(mean=means[:channels]).mask, blocked(dy)
    apply_mask(diff, mask)
    dz = unblocked(diff, channels).astype(np.float64)

    coefficients = [poisoned(lanes(channels)) for _ in range(3)]
    diffs = [poisoned(channels) for _ in range(2)]
    with unchanged(mask.sums, gamma, means, rstd):
        out = statistics.NormGradient(*coefficients, *diffs)
        statistics.finish_gradient(mask.sums, x[..., 0].size, gamma, means, rstd, out)
    for name, vector in zip("abd", coefficients, strict=True):
        assert_exact(vector[channels:], np.zeros(lanes(channels) - channels), name)
    a, b, d = (vector[:channels].astype(np.float64) for vector in coefficients)
    exact = x.astype(np.float64)
    statistics_of_x = exact.mean(axis=AXES), exact.var(axis=AXES)
    diff_src, diff_gamma, diff_beta = batch_norm.backward(
        dz, exact, np.float64(gamma), *statistics_of_x, EPSILON
    )
    # The mean's rounding shifts every x - mean by up to 3e-5 at 1000, of a deviation of 1 or, in a
    # single voxel, of sqrt(epsilon).
    bound = 2e-6 if mean == 0.0 else 1e-3
    largest = np.abs(dz).max() * (np.abs(gamma) * rstd[:channels]).max() + 1e-30
    assert np.abs(a * dz + b * exact + d - diff_src).max() <= bound * largest
    count = x[..., 0].size
    assert np.abs(diffs[0] - diff_gamma).max() <= bound * (np.abs(dz).max() * count + 1e-30)
    assert np.abs(diffs[1] - diff_beta).max() <= 2e-6 * (np.abs(dz).max() * count + 1e-30)


def test_repeats_bit_for_bit_whatever_the_threads():
    x, *_ = problem((2, 3, 60, 70), 17, 0)
    moments = []
    for threads in (1, machine.cores()):
        machine.set_threads(threads)
        moments.append(moments_of(x))
    assert_exact(*moments)
