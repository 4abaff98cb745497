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

A kernel with many variants
    Its variants share one ``prange`` loop, a driver: compiled once, it calls a variant by the address of
    its machine code. The variant, a :func:`worker_kernel`, takes 1.9 s to compile, a loop of its own 3.

Code that only kernels call
    What is :func:`specialised`, and the body of a ``prange`` loop, is linked into the kernel that calls it,
    and optimised and assembled as a part of that. See `linking`.
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
from kernels.base.linking import PartCompiler, link_loops

Function = TypeVar("Function", bound=Callable[..., Any])

# A CPU named by the user (NUMBA_CPU_NAME=haswell) must not keep the instructions of this one.
if numba.config.CPU_NAME and numba.config.CPU_FEATURES is None:
    numba.config.CPU_FEATURES = ""

# GNU OpenMP takes 1.5 us to enter a parallel loop; "workqueue" is Numba's own and always there.
numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]


patch_numba()
link_loops()

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
    """Compile a function ``f(worker, *arguments)`` that only drivers call; see `run_workers`."""
    # Without reference counts: a worker makes no arrays, and an atomic count at each call of a stage
    # doubled the time of the small ones.
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


def specialised(*names: str) -> Callable[[Function], Function]:
    """Decorate what looks like a function for compiled kernels, but returns that function's code.

    It is called with the arguments' Numba types; of those called ``names``, integers that must be known at
    compile time, with their values. The code, of the same parameters, needs them under names of its own.
    As Numba's ``overload``; but this code is optimised only as a part of the kernels that call it, once.
    """

    def decorate(code_for: Function) -> Function:
        signature = inspect.signature(code_for)

        @functools.wraps(code_for)
        def definition(*_: Any) -> Any:
            raise NotImplementedError(f"{code_for.__name__} runs only inside a compiled kernel")

        def code_for_types(*arguments: Any) -> Any:
            given = signature.bind(*arguments).arguments
            if not all(isinstance(given[name], types.IntegerLiteral) for name in names):
                return None
            return code_for(**given | {name: given[name].literal_value for name in names})

        # Numba compares it with the code's, which has no annotations.
        parameters = signature.parameters.values()
        bare = [each.replace(annotation=inspect.Parameter.empty) for each in parameters]
        code_for_types.__signature__ = inspect.Signature(bare)  # type: ignore[attr-defined]
        options = {"pipeline_class": PartCompiler}
        overload(definition, prefer_literal=True, jit_options=options)(code_for_types)
        return cast(Function, definition)

    return decorate


_addresses: dict[Callable[..., None], int] = {}
_one_compiles = threading.Lock()


def run_workers(driver: Any, worker: Any, *arguments: Any) -> None:
    """Run ``driver(address of the worker, *arguments)``, which calls the worker on each thread.

    Parameters
    ----------
    driver : parallel_kernel
        Calls ``call_worker(address, index, *arguments)`` for each index of its ``prange`` loop.
    worker : worker_kernel
    *arguments
        Of the same types at each call of a driver: another type raises TypeError.

    Raises
    ------
    ValueError
        The first time, if an array is read-only, which is another type.
    """
    if worker not in _addresses:
        with _one_compiles:  # or a thread finds a driver closed that it is about to compile
            _compile_worker(driver, worker, arguments)
    driver(_addresses[worker], *arguments)


def _compile_worker(driver: Any, worker: Any, arguments: tuple[Any, ...]) -> None:
    if worker in _addresses:
        return
    signature = (types.int64, *map(numba.typeof, arguments))
    if any(map(_is_read_only, signature)):
        raise ValueError("arrays must be writable, got one that is read-only")
    worker.compile(signature)
    compiled = worker.overloads[signature]
    address = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)
    if not driver.signatures:
        driver.compile(signature)
        # The address is good for arguments of these types and no others.
        driver.disable_compile()
    _addresses[worker] = address


def _is_read_only(given: types.Type) -> bool:
    if isinstance(given, types.BaseTuple):  # type: ignore[attr-defined]
        return any(map(_is_read_only, given.types))
    return isinstance(given, types.Array) and not given.mutable


@intrinsic  # type: ignore[untyped-decorator]
def call_worker(typing_context: Any, address: Any, worker: Any, *arguments: Any) -> Any:
    """Call a worker's machine code; what it raises is lost."""
    given = types.Tuple(arguments)  # type: ignore[attr-defined]
    signature_types = (types.int64, *arguments)

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        convention = context.call_conv
        function = convention.get_function_type(types.none, signature_types)
        pointer = builder.inttoptr(values[0], function.as_pointer())
        rest = [builder.extract_value(values[2], i) for i in range(len(arguments))]
        convention.call_function(builder, pointer, types.none, signature_types, [values[1], *rest])
        return context.get_dummy_value()

    return types.void(address, types.int64, given), codegen


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
