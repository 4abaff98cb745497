"""Checks of numbers that users give; each raises with one line that says what would be right."""

import numpy as np


def at_least_zero(name: str, value: float) -> float:
    """``value``, if it is finite and not below zero; else ValueError."""
    if not 0 <= value < np.inf:
        raise ValueError(f"{name} must be 0 or more and finite, not {value}")
    return value


def fraction(name: str, value: float) -> float:
    """``value``, if it is a part of a whole and not all of it; else ValueError."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be at least 0 and below 1, not {value}")
    return value


def positive(name: str, value: int) -> int:
    """``value``, if it is 1 or more; else ValueError."""
    if value < 1:
        raise ValueError(f"{name} must be 1 or more, not {value}")
    return value
