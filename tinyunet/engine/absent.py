"""An array that has a shape and a type but no numbers: what a tensor holds while a model is traced.

A trace runs a model's own ``forward`` and computes nothing. So whatever asks such an array for numbers, be it
an ``if``, an index or a function of NumPy, is refused here: what depends on the data can never become a
constant of a graph unseen.
"""

import math
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt


class NeedsNumbersError(RuntimeError):
    """Somebody asked an absent array for its numbers; ``name`` is that of the array."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} is being traced: it has a shape, but no numbers")
        self.name = name


class Absent(np.lib.mixins.NDArrayOperatorsMixin):
    """Stands for an array of this shape and type."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        self.name, self.shape, self.dtype = name, shape, np.dtype(dtype)
        self.ndim, self.size = len(shape), math.prod(shape)

    def __len__(self) -> int:
        return self.shape[0]

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise NeedsNumbersError(self.name)

    __array__ = __array_ufunc__ = __array_function__ = _refuse
    __getitem__ = __setitem__ = __iter__ = __contains__ = _refuse
    __bool__ = __float__ = __int__ = __index__ = __complex__ = _refuse

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("_"):  # copy, pickle and NumPy ask for names that need not be there
            raise AttributeError(attribute)
        raise NeedsNumbersError(self.name)
