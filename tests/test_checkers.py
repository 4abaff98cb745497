"""The checkers must fail on NaN, on zeros, on a wrong shape and on an error of 0.1 %."""

import numpy as np
import pytest
from checkers import assert_close, assert_exact, check_gradients, integers, normal, unchanged

RIGHT = normal(np.random.default_rng(0), 5, 7, dtype=np.float64)

WRONG = {
    "nan": np.where(RIGHT == RIGHT[2, 3], np.nan, RIGHT),
    "zeros": np.zeros_like(RIGHT),
    "shape": RIGHT[:, :1],
    "error of 0.1 %": RIGHT * 1.001,
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_comparisons_fail(wrong):
    with pytest.raises(AssertionError):
        assert_close(wrong, RIGHT, 1e-5)
    with pytest.raises(AssertionError):
        assert_exact(wrong, RIGHT)


def test_comparisons_pass():
    assert_close(RIGHT + 1e-6, RIGHT, 1e-5)
    assert_exact(RIGHT.copy(), RIGHT)


def test_nothing_is_close_to_nan():
    with pytest.raises(AssertionError):
        assert_close(WRONG["nan"], WRONG["nan"], 1e-5)


def test_a_changed_input_is_seen():
    array = RIGHT.copy()
    with pytest.raises(AssertionError, match="changed"), unchanged(array):
        array[1, 1] += 1.0


def test_integers_are_exact_in_float32():
    array = integers(np.random.default_rng(0), 1000)
    assert set(array) == set(range(-4, 5))


@pytest.mark.parametrize("wrong", [1.001, 0.0, np.nan])
def test_gradient_check_fails(wrong):
    def forward(x, y):
        return x**2 * y

    def backward(cotangent, factor=1.0):
        return 2 * RIGHT * RIGHT * cotangent, RIGHT**2 * cotangent * factor

    check_gradients(forward, backward, [RIGHT, RIGHT])
    with pytest.raises(AssertionError, match="gradient 1"):
        check_gradients(forward, lambda c: backward(c, wrong), [RIGHT, RIGHT])
