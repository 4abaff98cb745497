"""How every kernel is compiled: the one place for compiler flags, each with its reason.

``cache=True``
    Machine code is kept beside the source in ``__pycache__``, so that only the first start compiles.
    Numba keys it on the source file and on the integers a factory closes over; `compiled_files` adds
    the modules that the file imports.
``nogil=True``
    Kernels may run in Python threads beside each other; on the threading layer "workqueue" they take turns.
    (A process that is forked after a kernel has run cannot run any: GNU OpenMP ends it. "spawn" starts one
    that can.)
``error_model="numpy"``
    Division by zero gives inf or nan, as in NumPy, and costs no branch in the loop.
``fastmath={"contract"}``
    ``a * b + c`` may become one fused multiply-add. Nothing else is relaxed: sums are not reordered
    (results repeat bit for bit) and NaN stays NaN (the tests rely on it).
``parallel=True``
    Only in :func:`parallel_kernel`: ``prange`` loops run on the threads of ``machine.threads()``.

Three kinds of functions are no kernels of their own: a :func:`worker_kernel` is one variant of many, which
share a ``prange`` loop; a :func:`specialised` function is compiled into the kernel that calls it, for the
constants of that call; a :func:`compile_time` function is run by the compiler.
"""

import errno
import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy
from numba.core import types
from numba.core.registry import CPUDispatcher
from numba.extending import intrinsic, overload

from kernels.base.compiled_files import patch_numba
from kernels.base.environment import refusal

Function = TypeVar("Function", bound=Callable[..., Any])

# A CPU named by the user (NUMBA_CPU_NAME=haswell) must not keep the instructions of this one.
if numba.config.CPU_NAME and numba.config.CPU_FEATURES is None:
    numba.config.CPU_FEATURES = ""

# GNU OpenMP takes 1.5 us to enter a parallel loop; "workqueue" is Numba's own and always there.
numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]


patch_numba()

_FLAGS: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy", "fastmath": {"contract"}}

prange = numba.prange


def kernel(function: Function) -> Function:
    """Compile a function for one thread, on its first call."""
    return _compiled(function, **_FLAGS)


def parallel_kernel(function: Function) -> Function:
    """Compile a function whose ``prange`` loops are shared among the threads, on its first call."""
    compiled: Any = _compiled(function, **_FLAGS, parallel=True)
    if isinstance(compiled, CPUDispatcher):  # not with NUMBA_DISABLE_JIT
        compiled.__class__ = _ParallelKernel
    return cast(Function, compiled)


_one_loop = threading.RLock()


class _ParallelKernel(CPUDispatcher):  # type: ignore[misc]
    """A kernel with loops. "workqueue" ends the process where two Python threads start one at once."""

    def __call__(self, *arguments: Any) -> Any:
        if _threads_may_meet():
            return super().__call__(*arguments)
        with _one_loop:
            return super().__call__(*arguments)


def _threads_may_meet() -> bool:
    try:
        return bool(numba.threading_layer() != "workqueue")
    except ValueError:  # none has been chosen before the first loop
        return False


def worker_kernel(function: Function) -> Function:
    """Compile a function ``f(worker, job)`` that only `kernels.base.workers` calls."""
    # Without reference counts ("_nrt"): a worker makes no arrays, and an atomic count at each call of a
    # stage doubled the time of small stages.
    flags = _FLAGS | {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "_nrt": False}
    return _compiled(function, **flags)


def _compiled(function: Function, **flags: Any) -> Function:
    try:
        compiled: Function = numba.njit(**flags)(function)
    except RuntimeError as error:
        if "CACHE_LOCATOR_CLASSES" in str(error):
            expected = "names of Numba's cache locators"
            raise refusal("NUMBA_CACHE_LOCATOR_CLASSES", expected) from None
        if "cannot cache" not in str(error):
            raise
        raise PermissionError(
            errno.EACCES,
            "compiled kernels can be kept neither here nor in a cache folder at home; "
            "set NUMBA_CACHE_DIR to a folder that can be written to",
            inspect.getfile(function),
        ) from None
    return compiled


def specialised(function: Function) -> Function:
    """Make a function a part of the kernels that call it, compiled for the constants that they pass.

    For example::

        @specialised
        def store_sums(sums, dst, at, kind, m):
            points = sizes(kind, m)[1]  # decorated by `compile_time`
            tile_store(tile_load(sums, 0, LANES, 0, 0, points, m, 1), dst, at, LANES, 0, 0)

    An integer that a caller knows at compile time (a literal, what a factory closes over, a result of
    `compile_time`, and a variable that is such an integer) is known in the function, too.
    """

    @functools.wraps(function)
    def definition(*_: Any) -> Any:
        raise NotImplementedError(f"{function.__name__} runs only inside a compiled kernel")

    overload(definition, prefer_literal=True, strict=False)(lambda *_: function)
    return cast(Function, definition)


def compile_time(function: Function) -> Function:
    """Let kernels call a function of integers when they are compiled: the results are constants.

    Arguments and results may be tuples of integers, too. Python calls the function as ever.
    """

    def code(*arguments: Any) -> Any:
        if not all(map(_is_constant, arguments)):
            return None
        value = function(*map(_value, arguments))

        @intrinsic  # type: ignore[untyped-decorator]
        def constant(typing_context: Any) -> Any:
            found = _constant_type(value)
            return found(), lambda context, builder, *_: _constant(context, builder, found)

        return lambda *_: constant()

    overload(function, prefer_literal=True, strict=False)(code)
    return function


def _is_constant(given: types.Type) -> bool:
    if isinstance(given, types.BaseTuple):  # type: ignore[attr-defined]
        return all(map(_is_constant, given.types))
    return isinstance(given, types.IntegerLiteral)


def _value(constant: Any) -> Any:
    if isinstance(constant, types.BaseTuple):  # type: ignore[attr-defined]
        return tuple(map(_value, constant.types))
    return constant.literal_value


def _constant_type(value: Any) -> Any:
    if isinstance(value, tuple):
        return types.Tuple(list(map(_constant_type, value)))  # type: ignore[attr-defined]
    return types.literal(value)  # type: ignore[attr-defined]


def _constant(context: Any, builder: Any, found: Any) -> Any:
    if isinstance(found, types.BaseTuple):  # type: ignore[attr-defined]
        parts = [_constant(context, builder, each) for each in found.types]
        return context.make_tuple(builder, found, parts)
    return context.get_constant(types.intp, found.literal_value)


@kernel
def signed(index: int) -> int:
    """The index of a ``prange`` loop, to count with.

    That index is unsigned, and NumPy's rules make a float of unsigned mixed with signed integers.
    """
    number: Any = numpy.int64(index)
    return number


@kernel
def split_index(index: int, size: int) -> tuple[int, int]:
    """``divmod(index, size)`` for the index of a ``prange`` loop; see `signed`."""
    return signed(index) // size, signed(index) % size
