"""What the tests of kernels and operators compare with; `test_checkers` sees that each can fail."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def integers(generator: np.random.Generator, *shape: int, dtype: Any = np.float32) -> Array:
    """Whole numbers from -4 to 4: float32 adds and multiplies them exactly, in any order."""
    return generator.integers(-4, 5, shape).astype(dtype)


def normal(generator: np.random.Generator, *shape: int, dtype: Any = np.float32) -> Array:
    """Standard normal numbers."""
    return generator.standard_normal(shape).astype(dtype)


def assert_exact(actual: Array, expected: Array, name: str = "") -> None:
    """The same shape and, value for value, the same numbers (NaN equals NaN)."""
    __tracebackhide__ = True
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, not {expected.shape}"
    np.testing.assert_array_equal(actual, expected, err_msg=name)


def assert_close(actual: Array, expected: Array, bound: float, name: str = "") -> None:
    """The same shape, finite, and no error above ``bound`` times the largest number expected."""
    __tracebackhide__ = True
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, not {expected.shape}"
    assert np.isfinite(expected).all(), f"{name}: expected numbers are not finite"
    largest = np.abs(expected).max()
    error = np.abs(actual.astype(np.float64) - expected).max()
    # Written so that NaN fails.
    assert error <= bound * largest, f"{name}: error {error:.3g} of {largest:.3g}, bound {bound:.3g}"


@contextmanager
def unchanged(*arrays: Array) -> Iterator[None]:
    """Inside, none of the arrays may change."""
    before = [array.copy() for array in arrays]
    yield
    for array, copy in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, copy, err_msg="an input was changed")


def check_gradients(
    forward: Callable[..., Array],
    backward: Callable[[Array], Sequence[Array]],
    inputs: Sequence[Array],
    seed: int = 0,
    step: float = 1e-5,
) -> None:
    """Compare ``backward`` with finite differences of ``forward``, for one input after the other.

    Along a random direction, with a random cotangent, in float64: the central difference has an error
    of the order of ``step**2``, and of ``1e-16 / step`` from rounding, both below the 1e-6 allowed.
    """
    generator = np.random.default_rng(seed)
    cotangent = normal(generator, *np.shape(forward(*inputs)), dtype=np.float64)
    for which, gradient in enumerate(backward(cotangent)):
        assert gradient.shape == inputs[which].shape, f"shape of gradient {which}"
        direction = normal(generator, *gradient.shape, dtype=np.float64)
        ends = []
        for sign in (1.0, -1.0):
            moved = list(inputs)
            moved[which] = inputs[which] + sign * step * direction
            ends.append(np.sum(forward(*moved) * cotangent))
        numeric = (ends[0] - ends[1]) / (2.0 * step)
        analytic = np.sum(gradient * direction)
        scale = np.linalg.norm(gradient) * np.linalg.norm(direction)
        error = abs(numeric - analytic)
        assert error <= 1e-6 * abs(analytic) + 1e-8 * scale + 1e-9, (
            f"gradient {which}: {analytic}, by differences {numeric}"
        )
