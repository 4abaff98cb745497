"""Adam and gradient descent against their textbook formulas, step after step, in double precision."""

import math

import numpy as np
import pytest
from checkers import assert_close, integers, normal, unchanged
from hypothesis import given
from hypothesis import strategies as st

from kernels.base import machine
from kernels.base.buffers import CHUNK
from kernels.ops import optimizers

SIZES = st.sampled_from([1, 5, 1000, CHUNK - 1, CHUNK + 1, 3 * CHUNK])
THREADS = st.sampled_from([1, machine.cores()])
DTYPES = st.sampled_from([np.float32, np.float64])
DECAYS = st.sampled_from([0.0, 0.1])
STEPS = 10

# Ten steps, each with a few roundings of 6e-8; divisions by sqrt(v) do not make them larger. Gradients may
# cancel in m, so its error is compared with the largest of them.
BOUND = {np.float32: 2e-6, np.float64: 1e-14}


def textbook_adam(parameters, gradients, lr, beta1, beta2, epsilon, decay):
    """Kingma and Ba (2015), algorithm 1, in the efficient order of section 2."""
    p, m, v = parameters.astype(np.float64), 0.0, 0.0
    for step, gradient in enumerate(gradients, start=1):
        g = gradient.astype(np.float64)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        rate = lr * math.sqrt(1 - beta2**step) / (1 - beta1**step)
        p = p - lr * decay * p - rate * m / (np.sqrt(v) + epsilon)
    return p, m, v


def textbook_sgd(parameters, gradients, lr, momentum, nesterov, decay):
    """Sutskever et al. (2013), equations 1 to 4, as Keras writes them."""
    p, velocity = parameters.astype(np.float64), 0.0
    for gradient in gradients:
        g = gradient.astype(np.float64)
        velocity = momentum * velocity - lr * g
        p = p - lr * decay * p + (momentum * velocity - lr * g if nesterov else velocity)
    return p, velocity


@given(size=SIZES, seed=st.integers(0, 99), threads=THREADS, dtype=DTYPES, decay=DECAYS)
def test_adam_follows_the_textbook(size, seed, threads, dtype, decay):
    machine.set_threads(threads)
    generator = np.random.default_rng(seed)
    parameters = normal(generator, size, dtype=dtype)
    gradients = [normal(generator, size, dtype=dtype) for _ in range(STEPS)]
    expected = textbook_adam(parameters, gradients, 0.01, 0.8, 0.95, 1e-7, decay)
    m, v = np.zeros_like(parameters), np.zeros_like(parameters)
    with unchanged(*gradients):
        for step, gradient in enumerate(gradients, start=1):
            optimizers.adam_step(parameters, gradient, m, v, step, 0.01, 0.8, 0.95, 1e-7, weight_decay=decay)
    assert parameters.dtype == m.dtype == v.dtype == dtype
    assert_close(parameters, expected[0], BOUND[dtype], "parameters")
    assert np.abs(m - expected[1]).max() <= BOUND[dtype] * np.abs(gradients).max()
    assert_close(v, expected[2], BOUND[dtype], "v")


@given(
    size=SIZES,
    seed=st.integers(0, 99),
    threads=THREADS,
    dtype=DTYPES,
    decay=DECAYS,
    momentum=st.sampled_from([0.0, 0.9]),
    nesterov=st.booleans(),
)
def test_sgd_follows_the_textbook(size, seed, threads, dtype, decay, momentum, nesterov):
    machine.set_threads(threads)
    generator = np.random.default_rng(seed)
    parameters = normal(generator, size, dtype=dtype)
    gradients = [normal(generator, size, dtype=dtype) for _ in range(STEPS)]
    expected = textbook_sgd(parameters, gradients, 0.01, momentum, nesterov, decay)
    velocity = np.zeros_like(parameters)
    with unchanged(*gradients):
        for gradient in gradients:
            optimizers.sgd_step(parameters, gradient, velocity, 0.01, momentum, nesterov, weight_decay=decay)
    for name, actual, wanted in zip(("p", "velocity"), (parameters, velocity), expected, strict=True):
        assert actual.dtype == dtype
        assert_close(actual, wanted, BOUND[dtype], name)


def test_first_adam_step_is_the_learning_rate():
    """Bias correction makes the first step ``lr * sign(gradient)``."""
    parameters = np.zeros(4, np.float32)
    gradients = np.array([-3.0, -0.1, 0.2, 5.0], np.float32)
    m, v = np.zeros_like(parameters), np.zeros_like(parameters)
    optimizers.adam_step(parameters, gradients, m, v, 1, lr=0.01)
    # epsilon against sqrt(0.001) * 0.1 is 3e-5.
    assert_close(parameters, -0.01 * np.sign(gradients), 1e-4)


def test_views_of_one_buffer_are_stepped_in_place():
    buffer = np.ones((2, 6), np.float32)
    optimizers.sgd_step(buffer[0], np.ones(6, np.float32), np.zeros(6, np.float32), lr=0.5)
    np.testing.assert_array_equal(buffer, [[0.5] * 6, [1.0] * 6])


def test_errors():
    p, g, v = (integers(np.random.default_rng(0), 6) for _ in range(3))
    with pytest.raises(ValueError, match="step must be 1 or more, got 0"):
        optimizers.adam_step(p, g, v, v, 0, 0.1)
    with pytest.raises(ValueError, match=r"gradients must have shape \(6,\), got \(5,\)"):
        optimizers.sgd_step(p, g[:5], v, 0.1)
    with pytest.raises(TypeError, match="velocity must be float32, got float64"):
        optimizers.sgd_step(p, g, v.astype(np.float64), 0.1)
    with pytest.raises(ValueError, match="parameters must have the axes"):
        optimizers.sgd_step(p.reshape(2, 3), g, v, 0.1)
    strided = np.zeros(12, np.float32)[::2]
    with pytest.raises(ValueError, match="parameters must be contiguous"):
        optimizers.sgd_step(strided, g, v, 0.1)
