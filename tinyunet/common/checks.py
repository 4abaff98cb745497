"""Checks of numbers that users give: each returns the number, or raises ValueError of one line."""

import numbers
from typing import Any

import numpy as np

_LARGEST = float(np.finfo(np.float32).max)  # settings are handed to kernels in float32


def _check(name: str, value: float, is_right: bool, expected: str) -> float:
    if not is_right:
        raise ValueError(f"{name} must be {expected}, not {value}")
    return value


def at_least_zero(name: str, value: float) -> float:
    """Return ``value`` if it is 0 or more, and finite in float32 too."""
    return _check(name, value, is_real(value) and 0 <= value <= _LARGEST, "0 or more and finite")


def fraction(name: str, value: float) -> float:
    """Return ``value`` if it is from 0 up to, but not, 1."""
    return _check(name, value, is_real(value) and 0 <= value < 1, "at least 0 and below 1")


def share(name: str, value: float) -> float:
    """Return ``value`` if it is from 0 to 1."""
    return _check(name, value, is_real(value) and 0 <= value <= 1, "0 to 1")


def positive(name: str, value: int) -> int:
    """Return ``value`` if it is a whole number of 1 or more."""
    _check(name, value, isinstance(value, numbers.Integral), "a whole number of 1 or more")
    _check(name, value, value >= 1, "1 or more")
    return value


def is_real(value: Any) -> bool:
    """Whether it is one real number: of Python, of NumPy, or an array without axes."""
    if isinstance(value, np.ndarray):
        return value.shape == () and value.dtype.kind in "fiu"
    return isinstance(value, numbers.Real)
