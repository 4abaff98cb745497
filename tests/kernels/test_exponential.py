"""``exp``, ``log``, ``log1p`` and ``sigmoid`` of one float32 against float64, over their whole ranges."""

import numpy as np

from kernels.base.exponential import exp, log, log1p, sigmoid
from kernels.base.jit import kernel


@kernel
def exp_of(src, dst):
    for i in range(src.size):
        dst[i] = exp(src[i])


@kernel
def log_of(src, dst):
    for i in range(src.size):
        dst[i] = log(src[i])


@kernel
def log1p_of(src, dst):
    for i in range(src.size):
        dst[i] = log1p(src[i])


@kernel
def sigmoid_of(src, dst):
    for i in range(src.size):
        dst[i] = sigmoid(src[i])


def apply(function, values):
    src = np.asarray(values, np.float32)
    dst = np.empty_like(src)
    function(src, dst)
    return src.astype(np.float64), dst


def test_exp_has_a_relative_error_below_1e_7():
    src, dst = apply(exp_of, np.linspace(-87.3, 88.3, 1_000_001))
    assert np.abs(dst / np.exp(src) - 1).max() < 1e-7


def test_exp_at_its_ends():
    _, dst = apply(exp_of, [0.0, -0.0, -87.4, -1e30, -np.inf, np.nan])
    np.testing.assert_array_equal(dst, np.array([1, 1, 0, 0, 0, np.nan], np.float32))
    _, dst = apply(exp_of, [88.37, 89.0, 1e30, np.inf])
    assert np.isfinite(dst).all()
    assert (dst > 2.3e38).all()


def test_exp_does_not_fall():
    _, dst = apply(exp_of, np.linspace(-1, 1, 100_001))
    assert (np.diff(dst) >= 0).all()


def test_log_has_an_error_below_1e_7():
    src, dst = apply(log_of, np.exp(np.linspace(-80, 80, 1_000_001)))
    exact = np.log(src)
    assert (np.abs(dst - exact) / np.maximum(np.abs(exact), 1)).max() < 1e-7
    assert apply(log_of, [1.0])[1][0] == 0
    assert np.isnan(apply(log_of, [np.nan])[1][0])


def test_log1p_has_a_relative_error_below_3e_7():
    src, dst = apply(log1p_of, np.exp(np.linspace(-80, 3, 1_000_001)))
    assert np.abs(dst / np.log1p(src) - 1).max() < 3e-7
    assert apply(log1p_of, [0.0])[1][0] == 0


def test_sigmoid_has_a_relative_error_below_3e_7():
    src, dst = apply(sigmoid_of, np.linspace(-87.3, 100, 1_000_001))
    assert np.abs(dst * (1 + np.exp(-src)) - 1).max() < 3e-7


def test_sigmoid_at_its_ends():
    _, dst = apply(sigmoid_of, [-np.inf, -1e30, -87.4, 0.0, -0.0, 20, 1e30, np.inf, np.nan])
    np.testing.assert_array_equal(dst, np.float32([0, 0, 0, 0.5, 0.5, 1, 1, 1, np.nan]))
