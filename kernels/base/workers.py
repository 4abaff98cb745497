"""One parallel loop for every kernel that has many variants: the variant is called by its address.

A ``prange`` loop takes three seconds to compile, a function without one two. So a variant is a
`kernels.base.jit.worker_kernel` ``f(worker, job)`` without a loop, and this module has the loop. The job is a
NamedTuple of everything that the kernel needs, and may hold other tuples. Numba's loops cannot pass on tuples
in tuples, but machine code knows no tuples: it passes one number or array after another. So the loop gets
these *leaves* in one flat tuple::

    job (a, (b, c), d)  -->  leaves (a, b, c, d)  -->  f(worker, a, b, c, d), which is f(worker, job)
"""

import threading
from typing import Any

import numba
from numba.core import types
from numba.extending import intrinsic

from kernels.base.jit import parallel_kernel, prange, signed

_addresses: dict[Any, int] = {}
_drivers: dict[type, Any] = {}
_one_compiles = threading.Lock()


def run_workers(worker: Any, workers: int, job: Any) -> None:
    """Call ``worker(i, job)`` for each ``i`` below ``workers``, one on each thread.

    Parameters
    ----------
    worker : worker_kernel
    workers : int
    job : NamedTuple
        Of a class of its own for each list of types: other types at a later call raise TypeError.

    Raises
    ------
    ValueError
        The first time, if an array is read-only, which is another type.
    """
    if worker not in _addresses:
        with _one_compiles:  # or a thread finds a driver closed that this thread is about to compile
            _compile_worker(worker, job)
    _drivers[type(job)](_addresses[worker], workers, tuple(_leaves(job)))


def _leaves(job: tuple[Any, ...]) -> list[Any]:
    found: list[Any] = []  # a generator that calls itself takes four times as long: 30 us more a call
    for item in job:
        if isinstance(item, tuple):
            found += _leaves(item)
        else:
            found.append(item)
    return found


def _compile_worker(worker: Any, job: Any) -> None:
    if worker in _addresses:
        return
    leaves = tuple(map(numba.typeof, _leaves(job)))
    if any(isinstance(leaf, types.Array) and not leaf.mutable for leaf in leaves):
        raise ValueError("arrays must be writable, got one that is read-only")
    signature = types.int64, numba.typeof(job)
    worker.compile(signature)
    compiled = worker.overloads[signature]
    address = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)
    if type(job) not in _drivers:
        driver: Any = _make_driver()
        driver.compile((types.int64, types.int64, types.Tuple(leaves)))  # type: ignore[attr-defined]
        # The address is good for arguments of these types and no others.
        driver.disable_compile()
        _drivers[type(job)] = driver
    _addresses[worker] = address


def _make_driver() -> Any:
    @parallel_kernel
    def drive(address: int, workers: int, leaves: Any) -> None:
        for index in prange(workers):
            _call_worker(address, signed(index), leaves)

    return drive


@intrinsic  # type: ignore[untyped-decorator]
def _call_worker(typing_context: Any, address: Any, worker: Any, leaves: Any) -> Any:
    """Call a worker's machine code; what the worker raises is lost."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        convention, given = context.call_conv, (types.int64, *leaves)
        pointer = builder.inttoptr(values[0], convention.get_function_type(types.none, given).as_pointer())
        rest = [builder.extract_value(values[2], i) for i in range(len(leaves))]
        convention.call_function(builder, pointer, types.none, given, [values[1], *rest])
        return context.get_dummy_value()

    return types.void(address, types.int64, leaves), codegen
