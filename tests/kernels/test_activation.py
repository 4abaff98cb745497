"""Activations: float32 loops against the NumPy expressions, gradients, NaN, errors."""

import numpy as np
import pytest
from checkers import assert_close, assert_exact, check_gradients, integers, normal, unchanged
from hypothesis import given
from hypothesis import strategies as st

from kernels.base import machine
from kernels.base.buffers import CHUNK
from kernels.ops import activation

# One item, less than a vector, and around the end of a chunk.
SHAPES = [(1,), (1, 1, 1, 1, 1), (2, 3, 5, 7, 3), (CHUNK - 1,), (CHUNK,), (CHUNK + 1,), (3, CHUNK)]
THREADS = st.sampled_from([1, machine.cores()])
SLOPE, ALPHA = 0.25, 0.5


def relu_forward(src):
    return activation.forward(src, activation.RELU)


def relu_backward(diff_dst, dst):
    return activation.backward(diff_dst, dst, activation.RELU)


def sigmoid_forward(src):
    return activation.forward(src, activation.SIGMOID)


def sigmoid_backward(diff_dst, dst):
    return activation.backward(diff_dst, dst, activation.SIGMOID)


def leaky_forward(src):
    return activation.forward(src, activation.leaky_relu(SLOPE))


def leaky_backward(diff_dst, dst):
    return activation.backward(diff_dst, dst, activation.leaky_relu(SLOPE))


def elu_forward(src):
    return activation.forward(src, activation.elu(ALPHA))


def elu_backward(diff_dst, dst):
    return activation.backward(diff_dst, dst, activation.elu(ALPHA))


PIECEWISE = {"relu": (relu_forward, relu_backward), "leaky": (leaky_forward, leaky_backward)}
SMOOTH = {"sigmoid": (sigmoid_forward, sigmoid_backward), "elu": (elu_forward, elu_backward)}
ALL = PIECEWISE | SMOOTH


@pytest.mark.parametrize(("forward", "backward"), PIECEWISE.values(), ids=PIECEWISE.keys())
@given(shape=st.sampled_from(SHAPES), seed=st.integers(0, 99), threads=THREADS)
def test_piecewise_linear_equals_reference_exactly(forward, backward, shape, seed, threads):
    machine.set_threads(threads)
    generator = np.random.default_rng(seed)
    src, diff_dst = integers(generator, *shape), integers(generator, *shape)
    with unchanged(src, diff_dst):
        dst = forward(src)
        diff_src = backward(diff_dst, dst)
    assert dst.dtype == diff_src.dtype == np.float32
    exact = forward(src.astype(np.float64))
    assert_exact(dst, exact)
    assert_exact(diff_src, backward(diff_dst.astype(np.float64), exact))


@pytest.mark.parametrize(("forward", "backward"), SMOOTH.values(), ids=SMOOTH.keys())
@given(shape=st.sampled_from(SHAPES), seed=st.integers(0, 99), threads=THREADS)
def test_smooth_ones_are_close_to_reference(forward, backward, shape, seed, threads):
    """The exponential, a sum and a quotient or product: each rounds by 6e-8."""
    machine.set_threads(threads)
    generator = np.random.default_rng(seed)
    src, diff_dst = 5 * normal(generator, *shape), normal(generator, *shape)
    with unchanged(src, diff_dst):
        dst = forward(src)
        diff_src = backward(diff_dst, dst)
    assert dst.dtype == diff_src.dtype == np.float32
    exact = forward(src.astype(np.float64))
    assert np.abs(dst / exact - 1).max() < 3e-7
    assert_close(diff_src, backward(diff_dst.astype(np.float64), dst.astype(np.float64)), 3e-7)


def test_elu_of_small_numbers_keeps_all_digits():
    """``exp(x) - 1`` would lose them: of 1e-8 nothing would be left."""
    src = -np.logspace(-37, 2, 200).astype(np.float32)
    assert np.abs(elu_forward(src) / (ALPHA * np.expm1(src.astype(np.float64))) - 1).max() < 3e-7


# Voxels, channels, and slopes: one each, some of them 0 or negative; or one for all.
PRELUS = st.tuples(st.sampled_from([1, 2, 97, 5000]), st.sampled_from([1, 3, 16, 17, 300]), st.booleans())


@given(PRELUS, st.integers(0, 99), THREADS)
def test_prelu_equals_reference(case, seed, threads):
    """Whole numbers: float32 is exact, also the sums of the slopes' gradients."""
    machine.set_threads(threads)
    voxels, channels, one = case
    generator = np.random.default_rng(seed)
    src, diff_dst = integers(generator, voxels, channels), integers(generator, voxels, channels)
    slope = integers(generator, 1 if one else channels)
    with unchanged(src, diff_dst, slope):
        dst = activation.prelu_forward(src, slope)
        found = activation.prelu_backward(diff_dst, src, slope)
    assert_exact(dst, np.where(src > 0, src, slope * src))
    below = np.where(src > 0, 0, diff_dst * src)
    assert_exact(found[0], np.where(src > 0, diff_dst, slope * diff_dst))
    assert_exact(found[1], below.sum(keepdims=True)[0] if one else below.sum(axis=0))
    exact = [array.astype(np.float64) for array in (diff_dst, src, slope)]
    assert_exact(dst, activation.prelu_forward(*exact[1:]))
    for single, double in zip(found, activation.prelu_backward(*exact), strict=True):
        assert (single.dtype, double.dtype) == (np.float32, np.float64)
        assert_exact(single, double)


def test_definitions():
    src = np.array([-2.0, 0.0, 3.0], np.float32)
    ones = np.ones(3, np.float32)
    assert_exact(relu_forward(src), np.array([0, 0, 3], np.float32))
    assert_exact(relu_backward(ones, relu_forward(src)), src > 0)
    assert_exact(leaky_forward(src), np.array([-0.5, 0, 3], np.float32))
    assert_exact(leaky_backward(ones, leaky_forward(src)), np.array([0.25, 0.25, 1], np.float32))
    assert_close(sigmoid_forward(src), 1 / (1 + np.exp([2.0, 0.0, -3.0])), 1e-7)


@pytest.mark.parametrize(("forward", "backward"), ALL.values(), ids=ALL.keys())
def test_gradients(forward, backward):
    generator = np.random.default_rng(3)
    src = normal(generator, 2, 3, 4, 5, 3, dtype=np.float64)
    # Away from the kink, further than the finite differences step.
    src += np.sign(src) * 0.01
    check_gradients(forward, lambda diff: [backward(diff, forward(src))], [src])


def test_sigmoid_of_float64_is_exact_far_out():
    src = np.linspace(-700, 700, 1401)
    exact = 1 / (1 + np.exp(-src))
    assert np.abs(sigmoid_forward(src) / exact - 1).max() < 1e-15


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sigmoid_saturates(dtype):
    src = np.array([-np.inf, -1e4, -100.0, 100.0, 1e4, np.inf], dtype)
    dst = sigmoid_forward(src)
    assert_exact(dst[:2], np.zeros(2, dtype))
    assert 0 <= dst[2] < 1e-43
    assert_exact(dst[3:], np.ones(3, dtype))


def test_all_at_infinity_as_in_float64():
    src = np.array([-np.inf, -3e38, -88.0, -1e-40, 0, 1e-40, 88, 3e38, np.inf], np.float32)
    for name, (forward, backward) in ALL.items():
        dst, exact = forward(src), forward(src.astype(np.float64))
        np.testing.assert_allclose(dst, exact, rtol=3e-7, atol=1e-37, err_msg=name)
        diff = backward(np.ones_like(src), dst)
        np.testing.assert_allclose(diff, backward(np.ones(9), exact), atol=1e-7, err_msg=name)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("forward", "backward"), ALL.values(), ids=ALL.keys())
def test_nan_stays_nan(forward, backward, dtype):
    src = np.array([1.0, np.nan, -1.0], dtype)
    assert_exact(np.isnan(forward(src)), np.isnan(src))
    assert_exact(np.isnan(backward(src, np.ones_like(src))), np.isnan(src))


def test_takes_arrays_that_are_not_contiguous():
    src = integers(np.random.default_rng(0), 4, 6, 8)
    assert_exact(relu_forward(src[:, ::2]), np.maximum(src[:, ::2], 0))
    assert_exact(relu_forward(src.T), np.maximum(src.T, 0))


def test_errors():
    src = np.zeros((2, 3), np.float32)
    with pytest.raises(TypeError, match="src must be a NumPy array, got list"):
        relu_forward([1.0])
    with pytest.raises(TypeError, match="src must be float32 or float64, got int64"):
        sigmoid_forward(np.zeros(3, np.int64))
    with pytest.raises(TypeError, match="diff_dst must be float32, got float64"):
        relu_backward(src.astype(np.float64), src)
    with pytest.raises(ValueError, match=r"diff_dst must have shape \(2, 3\), got \(3, 2\)"):
        sigmoid_backward(np.zeros((3, 2), np.float32), src)
    with pytest.raises(ValueError, match="slope must be above 0"):
        activation.leaky_relu(0.0)
    with pytest.raises(ValueError, match="slope must be above 0"):
        activation.leaky_relu(float("nan"))
    with pytest.raises(ValueError, match="slope must be above 0 and finite"):
        activation.leaky_relu(float("inf"))
    for alpha in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="alpha must be above 0 and finite"):
            activation.elu(alpha)
    with pytest.raises(ValueError, match=r"slope must have shape \(3,\), or \(1,\), got \(2,\)"):
        activation.prelu_forward(src, np.ones(2, np.float32))
    with pytest.raises(TypeError, match="slope must be float32, got float64"):
        activation.prelu_backward(src, src, np.ones(3))
    with pytest.raises(ValueError, match=r"diff_dst must have shape \(2, 3\), got \(3, 2\)"):
        activation.prelu_backward(np.zeros((3, 2), np.float32), src, np.ones(3, np.float32))
    with pytest.raises(ValueError, match="src must not be empty"):
        relu_forward(np.zeros((0, 3), np.float32))


def test_a_single_number_keeps_its_shape():
    assert relu_forward(np.array(1, np.float32)).shape == ()
