"""How every kernel is compiled: the one place for compiler flags, each with its reason.

``cache=True``
    Machine code is kept beside the source in ``__pycache__``, so that only the first start compiles.
    Numba keys it on the source file and on the integers a factory closes over. It does not look
    into functions called from other modules: after a change there, ``make clean-cache``.
``nogil=True``
    Kernels may run in Python threads beside each other.
``error_model="numpy"``
    Division by zero gives inf or nan, as in NumPy, and costs no branch in the loop.
``fastmath={"contract"}``
    ``a * b + c`` may become one fused multiply-add. Nothing else is relaxed: sums are not reordered
    (results repeat bit for bit) and NaN stays NaN (the tests rely on it).
``parallel=True``
    Only in :func:`parallel_kernel`: ``prange`` loops run on the threads of ``machine.threads()``.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy

Function = TypeVar("Function", bound=Callable[..., Any])

# A CPU named by the user (NUMBA_CPU_NAME=haswell) must not keep the instructions of this one.
if numba.config.CPU_NAME and numba.config.CPU_FEATURES is None:
    numba.config.CPU_FEATURES = ""

# GNU OpenMP takes 1.5 us to enter a parallel loop; "workqueue" is Numba's own and always there.
numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]

_FLAGS: dict[str, Any] = {
    "cache": True,
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"contract"},
}

prange = numba.prange


def kernel(function: Function) -> Function:
    """Compile a function for one thread, on its first call."""
    compiled: Function = numba.njit(**_FLAGS)(function)
    return compiled


def parallel_kernel(function: Function) -> Function:
    """Compile a function whose ``prange`` loops are shared among the threads, on its first call."""
    compiled: Function = numba.njit(**_FLAGS, parallel=True)(function)
    return compiled


@kernel
def split_index(index: int, size: int) -> tuple[int, int]:
    """``divmod(index, size)`` for the index of a ``prange`` loop.

    That index is unsigned, and NumPy's rules make a float of unsigned mixed with signed integers.
    """
    signed: Any = numpy.int64(index)
    return signed // size, signed % size
