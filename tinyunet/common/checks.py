"""Checks of numbers that users give: each returns the number, or raises ValueError of one line."""

import numbers
from typing import Any

import numpy as np

# Settings are handed to kernels in float32.
_LARGEST = float(np.finfo(np.float32).max)


def at_least_zero(name: str, value: float) -> float:
    """Return ``value`` if it is 0 or more, and finite in float32 too."""
    if not (is_real(value) and 0 <= value <= _LARGEST):
        raise ValueError(f"{name} must be 0 or more and finite, not {value}")
    return value


def fraction(name: str, value: float) -> float:
    """Return ``value`` if it is from 0 up to, but not, 1."""
    if not (is_real(value) and 0 <= value < 1):
        raise ValueError(f"{name} must be at least 0 and below 1, not {value}")
    return value


def share(name: str, value: float) -> float:
    """Return ``value`` if it is from 0 to 1."""
    if not (is_real(value) and 0 <= value <= 1):
        raise ValueError(f"{name} must be 0 to 1, not {value}")
    return value


def positive(name: str, value: int) -> int:
    """Return ``value`` if it is a whole number of 1 or more."""
    if not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} must be a whole number of 1 or more, not {value}")
    if value < 1:
        raise ValueError(f"{name} must be 1 or more, not {value}")
    return value


def is_real(value: Any) -> bool:
    """Whether it is one real number: of Python, of NumPy, or an array without axes."""
    if isinstance(value, np.ndarray):
        return value.shape == () and value.dtype.kind in "fiu"
    return isinstance(value, numbers.Real)
