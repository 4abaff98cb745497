"""Batch, instance and group norm: float32 kernels against NumPy in float64, gradients, large means."""

from functools import partial

import numpy as np
import pytest
from checkers import assert_close, assert_exact, check_gradients, normal, unchanged
from hypothesis import given
from hypothesis import strategies as st

from kernels.base import machine
from kernels.deferred.statistics import BATCH, Sharing
from kernels.ops import norms

EPSILON = 1e-3
NORMS = [BATCH, Sharing(True, 1), Sharing(True, 4)]
CHANNELS = st.sampled_from([1, 2, 3, 16, 17, 48, 255, 256, 257, 300])
THREADS = st.sampled_from([1, machine.cores()])


@st.composite
def volumes(draw):
    """At least 24 voxels, for a mean of fewer may cancel to nothing to compare with."""
    sizes = [draw(st.sampled_from([1, 2, 3])), *(draw(st.sampled_from([2, 3, 5, 8])) for _ in "dhw")]
    return (max(sizes[0], 3), *sizes[1:], draw(CHANNELS))


@st.composite
def sharings(draw, channels):
    """Those of batch norm, and of group norm with groups of any size."""
    sizes = [size for size in range(1, channels + 1) if channels % size == 0]
    return draw(st.one_of(st.just(BATCH), st.builds(Sharing, st.just(True), st.sampled_from(sizes))))


def problem(shape, seed, mean=0.0, dtype=np.float32):
    generator = np.random.default_rng(seed)
    src = (generator.standard_normal(shape) + mean).astype(dtype)
    diff_dst = normal(generator, *shape, dtype=dtype)
    scale, shift = (normal(generator, shape[-1], dtype=dtype) for _ in range(2))
    return src, diff_dst, scale, shift


def run(src, diff_dst, scale, shift, sharing=BATCH):
    dst, mean, variance = norms.forward(src, scale, shift, EPSILON, sharing)
    gradients = norms.backward(diff_dst, src, scale, mean, variance, EPSILON, sharing)
    return dict(
        zip(
            ("dst", "mean", "variance", "diff_src", "diff_scale", "diff_shift"),
            (dst, mean, variance, *gradients),
            strict=True,
        )
    )


@given(shape=volumes(), seed=st.integers(0, 99), threads=THREADS, data=st.data())
def test_equals_float64(shape, seed, threads, data):
    """A few roundings of 6e-8 an item; sums are exact beside them."""
    machine.set_threads(threads)
    arguments, sharing = problem(shape, seed), data.draw(sharings(shape[-1]))
    with unchanged(*arguments):
        actual = run(*arguments, sharing)
    expected = run(*(array.astype(np.float64) for array in arguments), sharing)
    for name, array in actual.items():
        assert array.dtype == (np.float64 if name == "variance" else np.float32)
        assert_close(array, expected[name], 1e-6, name)


@given(shape=volumes(), seed=st.integers(0, 99))
def test_inference_equals_the_formula(shape, seed):
    src, _, scale, shift = problem(shape, seed)
    generator = np.random.default_rng(seed)
    mean = normal(generator, shape[-1])
    variance = normal(generator, shape[-1]) ** 2
    arguments = (src, scale, shift, mean, variance)
    with unchanged(*arguments):
        dst = norms.forward_inference(*arguments, EPSILON)
    assert dst.dtype == np.float32
    x, a, b, m, v = (array.astype(np.float64) for array in arguments)
    expected = a * (x - m) / np.sqrt(v + EPSILON) + b
    assert_close(dst, expected, 1e-6)
    assert_close(norms.forward_inference(x, a, b, m, v, EPSILON), expected, 1e-14)


def test_statistics_are_numpys():
    src, _, scale, shift = problem((2, 3, 4, 5, 6), 0, dtype=np.float64)
    dst, mean, variance = norms.forward(src, scale, shift, EPSILON)
    flat = src.reshape(-1, 6)
    assert_close(mean[0], flat.mean(axis=0), 1e-15)
    assert_close(variance[0], ((flat - flat.mean(axis=0)) ** 2).mean(axis=0), 1e-14)
    assert_close(dst.reshape(-1, 6).mean(axis=0), shift, 1e-13)


@pytest.mark.parametrize("together", [1, 2, 6])
def test_each_image_and_group_for_itself(together):
    """Instance norm and group norm, of float64, are batch norm of a piece."""
    src, _, scale, shift = problem((2, 3, 4, 5, 6), 0, dtype=np.float64)
    dst, mean, _ = norms.forward(src, scale, shift, EPSILON, Sharing(True, together))
    for image in range(2):
        for first in range(0, 6, together):
            piece = image, ..., slice(first, first + together)
            normalised = (src[piece] - src[piece].mean()) / np.sqrt(src[piece].var() + EPSILON)
            assert_close(dst[piece], normalised * scale[piece[2]] + shift[piece[2]], 1e-14)
            assert_close(mean[image, piece[2]], np.full(together, src[piece].mean()), 1e-14)


def test_instance_norm_of_one_voxel_is_the_shift():
    src, diff_dst, scale, shift = problem((3, 1, 1, 1, 5), 0)
    found = run(src, diff_dst, scale, shift, Sharing(True, 1))
    assert_exact(found["dst"], np.broadcast_to(shift, src.shape))
    # slope * dy and -slope * dy / 1, of a slope of up to 32 * 3.
    assert np.abs(found["diff_src"]).max() <= 1e-5
    assert_exact(found["diff_scale"], np.zeros(5, np.float32))


def two_passes(src):
    """Mean and variance as two passes over float32 give them, summed in float32 as NumPy does."""
    flat = src.reshape(-1, src.shape[-1])
    return flat.mean(axis=0), flat.var(axis=0)


@pytest.mark.parametrize("sharing", NORMS)
@pytest.mark.parametrize("outlier", [False, True])
def test_mean_1000_and_deviation_1(outlier, sharing):
    """As accurate as two passes, also if the first voxel is nothing like the others.

    ``src`` itself is rounded to 6e-5 here. ``mean`` and ``variance`` are right but for their own
    rounding; ``dst`` is as exact as with small numbers, as the mean's rounding goes into the shift; the
    gradients have an error of 3e-5, half a step of ``src``, from the mean that they take.
    """
    src, diff_dst, scale, shift = problem((2, 13, 17, 11, 16), 1, mean=1000.0)
    if outlier:
        src[:, 0, 0, 0] = 0.0
    actual = run(src, diff_dst, scale, shift, sharing)
    expected = run(*(array.astype(np.float64) for array in (src, diff_dst, scale, shift)), sharing)
    bounds = {"dst": 1e-6, "mean": 6e-8, "variance": 1e-7}
    for name, array in actual.items():
        assert_close(array, expected[name], bounds.get(name, 3e-5), name)
    if sharing is not BATCH:
        return
    _, variance = two_passes(src)
    error = np.abs(actual["variance"] - expected["variance"]).max()
    assert error <= np.abs(variance - expected["variance"]).max() + 6e-8 * expected["variance"].max()


def test_a_constant_channel_becomes_the_shift():
    src = np.full((1, 4, 5, 6, 3), 1234.5, np.float32)
    scale, shift = np.ones(3, np.float32), np.array([1, 2, 3], np.float32)
    dst, mean, variance = norms.forward(src, scale, shift, EPSILON)
    assert_exact(mean[0], src[0, 0, 0, 0])
    assert_exact(variance, np.zeros((1, 3), np.float32))
    assert_exact(dst, np.broadcast_to(shift, src.shape))


def test_nan_stays_in_its_channel():
    src, diff_dst, scale, shift = problem((1, 3, 4, 5, 4), 0)
    src[0, 1, 2, 3, 2] = np.nan
    for name, array in run(src, diff_dst, scale, shift).items():
        if name != "diff_shift":
            nan = np.isnan(array).reshape(-1, 4)
            assert nan[:, 2].all(), name
            assert not nan[:, [0, 1, 3]].any(), name


def test_repeats_bit_for_bit_whatever_the_threads():
    arguments = problem((1, 40, 41, 42, 16), 2)
    results = []
    for threads in (1, machine.cores(), machine.cores()):
        machine.set_threads(threads)
        results.append(run(*arguments))
    for name in results[0]:
        assert_exact(results[1][name], results[0][name], name)
        assert_exact(results[2][name], results[0][name], name)


@pytest.mark.parametrize("sharing", NORMS)
def test_gradients(sharing):
    src, _, scale, shift = problem((2, 3, 4, 2, 4), 0, dtype=np.float64)

    def forward(src, scale, shift):
        return norms.forward(src, scale, shift, EPSILON, sharing)[0]

    def backward(diff_dst):
        _, mean, variance = norms.forward(src, scale, shift, EPSILON, sharing)
        return norms.backward(diff_dst, src, scale, mean, variance, EPSILON, sharing)

    check_gradients(forward, backward, [src, scale, shift])


def test_errors():
    src, diff_dst, scale, shift = problem((1, 2, 3, 4, 5), 0)
    mean = scale[np.newaxis]
    with pytest.raises(ValueError, match=r"scale must have shape \(5,\), got \(4,\)"):
        norms.forward(src, scale[:4], shift)
    with pytest.raises(TypeError, match="shift must be float32, got float64"):
        norms.forward(src, scale, shift.astype(np.float64))
    with pytest.raises(ValueError, match="epsilon must be 0 or more"):
        norms.forward(src, scale, shift, -1.0)
    with pytest.raises(ValueError, match="src must have channels and at least one other axis"):
        norms.forward(shift, scale, shift)
    with pytest.raises(ValueError, match="diff_dst must have shape"):
        norms.backward(diff_dst[:, :1], src, scale, mean, mean)
    with pytest.raises(ValueError, match=r"mean must have shape \(1, 5\), got \(5,\)"):
        norms.backward(diff_dst, src, scale, scale, shift)
    with pytest.raises(ValueError, match="src must have channels in groups of 2, got 5"):
        norms.forward(src, scale, shift, sharing=Sharing(True, 2))
    with pytest.raises(TypeError, match="mean must be float32"):
        norms.forward_inference(src, scale, shift, scale.astype(np.float64), shift)
    with pytest.raises(TypeError, match="variance must be float64, got float32"):
        norms.backward(diff_dst, src, scale, mean, mean)


@pytest.mark.parametrize("large", [1e18, 1e25, 1e36])
def test_squares_that_float32_cannot_hold(large):
    src, diff_dst, scale, shift = problem((1, 4, 5, 6, 3), 0)
    src *= np.float32(large)
    actual = run(src, diff_dst, scale, shift)
    expected = run(*(a.astype(np.float64) for a in (src, diff_dst, scale, shift)))
    for name, array in actual.items():
        # What multiplies the source in its gradient is below what float32 holds from 1e19 on.
        if name != "diff_src" or large < 1e19:
            assert_close(array, expected[name], 1e-6, name)


def test_halves_that_combine_their_sums_are_the_whole():
    """Synchronised: what the other half sums up is played by ``combine``."""
    generator = np.random.default_rng(0)
    for dtype, bound in ((np.float32, 2e-6), (np.float64, 1e-13)):
        src, diff = (normal(generator, 6, 5, 4, 3, dtype=dtype) + 3 for _ in range(2))
        scale, shift = (normal(generator, 3, dtype=dtype) for _ in range(2))
        whole, mean, variance = norms.forward(src, scale, shift)
        gradients = norms.backward(diff, src, scale, mean, variance)

        sums = []
        halves = (slice(2), slice(2, 6))
        for half in halves:
            norms.forward(src[half], scale, shift, combine=sums.append)
            norms.backward(diff[half], src[half], scale, mean, variance, combine=sums.append)
        totals = [sums[0] + sums[2], sums[1] + sums[3]]
        of_halves = []
        for half in halves:
            found = norms.forward(src[half], scale, shift, combine=partial(np.copyto, src=totals[0]))
            for actual, expected in zip(found, (whole[half], mean, variance), strict=True):
                assert_close(actual, expected, bound)
            of_halves.append(
                norms.backward(
                    diff[half], src[half], scale, mean, variance, combine=partial(np.copyto, src=totals[1])
                )
            )
        first, second = of_halves
        assert_close(np.concatenate([first[0], second[0]]), gradients[0], bound)
        assert_close(first[1] + second[1], gradients[1], bound)
        assert_close(first[2] + second[2], gradients[2], bound)


@pytest.mark.parametrize("sharing", NORMS[:2])
def test_mean_of_a_million(sharing):
    """Where sums of squares have few digits left, the variance is found in a second pass."""
    src = (1e6 + np.random.default_rng(0).standard_normal((2, 20, 20, 20, 3))).astype(np.float32)
    axes = (1, 2, 3) if sharing.one_image else (0, 1, 2, 3)
    src[..., 1] -= 1e6
    ones, zeros = np.ones(3, np.float32), np.zeros(3, np.float32)
    dst, _, variance = norms.forward(src, ones, zeros, 0.0, sharing)
    exact = src.astype(np.float64)
    centred = exact - exact.mean(axis=axes, keepdims=True)
    np.testing.assert_allclose(variance, centred.var(axis=axes).reshape(-1, 3), rtol=1e-6)
    np.testing.assert_allclose(dst, centred / centred.std(axis=axes, keepdims=True), atol=1e-5)
