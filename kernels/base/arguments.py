"""Checks of what users pass to the kernels.

Each raises with one line that names the argument, what is wrong with it and what would be right. `tensor`
returns the array C-contiguous, so that a kernel may count on it. And the types that kernels' signatures use.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating[Any]]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]
Labels = Bytes
Triple = tuple[int, int, int]
#: Replaces sums, in place, by the sums over all processes that normalise together.
Combine = Callable[[Doubles], None]

NDHWC = "MB, D, H, W, C"


def array(name: str, value: Any) -> None:
    """Refuse what is not a NumPy array, by TypeError: nothing is converted silently."""
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array, got {type(value).__name__}")


def tensor(
    name: str,
    value: Any,
    *,
    axes: str | None = None,
    shape: tuple[int, ...] | None = None,
    dtype: npt.DTypeLike | None = None,
) -> npt.NDArray[Any]:
    """``value`` as a C-contiguous array, if it is one that a kernel can take.

    Parameters
    ----------
    name : str
        What the user calls it.
    value : Any
        What the user gave.
    axes : str, optional
        Names of the axes, ``"MB, D, H, W, C"``: their number is the rank wanted.
    shape : tuple of int, optional
        The shape wanted.
    dtype : dtype, optional
        The type wanted; float32 or float64 if not given.

    Raises
    ------
    TypeError
        If it is not a NumPy array or of another type: nothing is converted silently.
    ValueError
        If rank or shape differ, or there is nothing in it.
    """
    array(name, value)
    if dtype is None and value.dtype not in (np.float32, np.float64):
        raise TypeError(f"{name} must be float32 or float64, got {value.dtype}")
    if dtype is not None and value.dtype != dtype:
        raise TypeError(f"{name} must be {np.dtype(dtype)}, got {value.dtype}")
    if axes is not None and value.ndim != axes.count(",") + 1:
        raise ValueError(f"{name} must have the axes ({axes}), got shape {value.shape}")
    if shape is not None and value.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {value.shape}")
    if value.size == 0:
        raise ValueError(f"{name} must not be empty, got shape {value.shape}")
    return np.asarray(value, order="C")


def contiguous(name: str, value: npt.NDArray[Any]) -> None:
    """Refuse, by ValueError, an array that a kernel cannot take as it lies there."""
    if not value.flags.c_contiguous:
        raise ValueError(f"{name} must be contiguous, got strides {value.strides}")


def in_place(name: str, value: npt.NDArray[Any]) -> None:
    """Refuse, by ValueError, what a kernel cannot change where it is: a copy would be changed in vain."""
    contiguous(name, value)
    if not value.flags.writeable:
        raise ValueError(f"{name} must be writeable, got a read-only array")


def triple(name: str, value: int | Sequence[int]) -> Triple:
    """Depth, height and width of a window, stride or factor: whole numbers from 1 on; one stands for all.

    Raises
    ------
    ValueError
        If there are not three, or one is below 1 or not whole.
    """
    numbers = tuple(value) if isinstance(value, Iterable) else (value,) * 3
    whole = all(isinstance(number, (int, np.integer)) and number >= 1 for number in numbers)
    if len(numbers) != 3 or not whole:
        raise ValueError(f"{name} must be three whole numbers from 1 on, got {value!r}")
    return (int(numbers[0]), int(numbers[1]), int(numbers[2]))
