"""What must hold before Numba loads and its threads start: variables that it can read, threads that sleep.

The package loads this module first, so that all ways in (a command, a notebook, a script, one kernel alone)
find the same threads.

How threads wait
    After a parallel loop a thread of GNU OpenMP spins for 3 ms or more before it sleeps, because another
    loop may follow. When other programs want the cores, the spinning thread keeps the thread that it waits
    for from running. So here threads spin for about a tenth of a millisecond, unless the environment says
    something about it. A step on two cores of an Intel Xeon, in ms, median (one thread takes 40 and 273)::

        GOMP_SPINCOUNT                          1,000   3,000   10,000   300,000, OpenMP's own
        16^3, no other program                     35      30       26        25
        16^3, another program computes             55      76      132       141
        16^3, a dozen programs compute            361               981     7,455
        64^3, no other program                    158     156      150       151

    OpenMP reads the environment once, when it is loaded. So it is loaded here with the variable set, and
    the variable is then removed: programs that this one starts do not inherit it, and neither does the
    OpenMP of another library (PyTorch and scikit-learn bring their own).

How many threads
    Numba starts a thread for each core of the affinity mask. In a container with a quota of two cores, on a
    machine of 64, these would be 64 threads that share the time of two. So here they are
    :func:`kernels.base.limits.cores`, unless the environment says how many.
"""

import contextlib
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib import import_module
from types import TracebackType
from typing import Any

from kernels.base import limits

_SPINS = "3000"
_LAYERS = ("default", "omp", "tbb", "workqueue", "safe", "threadsafe", "forksafe")
_VALUES = {"NUMBA_OPT": "0, 1, 2, 3 or max"}
_NEED_TBB = ("tbb", "safe")
_WITH_OPENMP = ("default", "omp", "threadsafe")
# A machine has fewer cores, and Numba takes memory for each thread before one is started.
_MOST_THREADS = 4096


class EnvironmentVariableError(OSError):
    """A variable of the environment that kernels cannot run with; the message is one line.

    Where nobody catches it, Python shows that line and no traceback: the place in the program says nothing.
    """


_usual_hook = sys.excepthook


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if isinstance(error, EnvironmentVariableError):
        print(f"{kind.__name__}: {error}", file=sys.stderr)
    else:
        _usual_hook(kind, error, trace)


def refusal(name: str, expected: str) -> EnvironmentVariableError:
    """Return the error for a variable that kernels cannot run with."""
    sys.excepthook = _show
    return EnvironmentVariableError(f"{name} is {os.environ.get(name)!r}; expected {expected}")


def _check_variables() -> None:
    """Check what Numba would end with a traceback for, here or at the first loop."""
    threads, layer = "NUMBA_NUM_THREADS", "NUMBA_THREADING_LAYER"
    if threads in os.environ:
        with contextlib.suppress(ValueError):
            if 1 <= int(os.environ[threads]) <= _MOST_THREADS:
                threads = ""
        if threads:
            raise refusal(threads, f"a whole number from 1 to {_MOST_THREADS}")
    if os.environ.get(layer, "default").lower() not in _LAYERS:
        raise refusal(layer, f"one of {', '.join(_LAYERS)}")
    features = os.environ.get("NUMBA_CPU_FEATURES", "")
    if not all(re.match(r"[+-]\w", each.strip()) for each in features.split(",") if features):
        raise refusal("NUMBA_CPU_FEATURES", "features with + or - before each, as +avx2,-fma")


def _load_numba() -> Any:
    """Load Numba; it warns, with a traceback, of each variable that it cannot read."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Environment variable 'NUMBA_", RuntimeWarning)
        try:
            import numba
        except RuntimeWarning as warning:
            name = str(warning).split("'")[1]
            is_number = "invalid literal for int()" in str(warning)
            expected = "a whole number" if is_number else "what Numba can read"
            raise refusal(name, _VALUES.get(name, expected)) from None
    return numba


def _check_layer(numba: Any) -> None:
    """Check that the threading layer that the user wants is here."""
    if str(numba.config.THREADING_LAYER).lower() in _NEED_TBB:
        from numba.np.ufunc import parallel

        try:
            getattr(parallel, "_check_tbb_version_compatible", lambda: None)()
            import_module("numba.np.ufunc.tbbpool")
        except ImportError:
            expected = "omp or workqueue, because TBB is not installed (pip install tbb)"
            raise refusal("NUMBA_THREADING_LAYER", expected) from None


def _check_processor(numba: Any) -> None:
    """Check a processor and features named by the user: LLVM ignores what it does not know, then crashes."""
    name, features = numba.config.CPU_NAME, numba.config.CPU_FEATURES
    if not name and not features:
        return
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    target = llvm.Target.from_triple(llvm.get_process_triple())
    said = _said_while(lambda: target.create_target_machine(cpu=name or "", features=features or ""))
    unknown = re.search(r"'([^']*)' is not a recognized (processor|feature)", said)
    if unknown:
        variable = {"processor": "NUMBA_CPU_NAME", "feature": "NUMBA_CPU_FEATURES"}[unknown[2]]
        raise refusal(variable, f"what LLVM knows; it has no {unknown[2]} {unknown[1]!r}")


def _said_while(call: Callable[[], object]) -> str:
    """Return what a library writes to the terminal meanwhile, past Python."""
    with tempfile.TemporaryFile() as file:
        terminal = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            call()
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
        file.seek(0)
        return file.read().decode(errors="replace")


def _load_openmp(numba: Any) -> None:
    """Load Numba's OpenMP layer, and with it GNU OpenMP, so that its threads sleep."""
    layer = str(numba.config.THREADING_LAYER).lower()
    chosen = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys()
    if chosen or layer not in _WITH_OPENMP or sys.platform != "linux":
        return
    before = _loaded_openmp()
    os.environ["GOMP_SPINCOUNT"] = _SPINS
    try:
        import_module("numba.np.ufunc.omppool")
    except ImportError:  # where Numba comes without it
        return
    finally:
        del os.environ["GOMP_SPINCOUNT"]
    # Another library may have brought one, which is of another file.
    if before and before == _loaded_openmp():
        warnings.warn(
            "GNU OpenMP was loaded before tinyunet, so its threads spin between kernels, which is slow "
            f"beside other programs: import tinyunet first, or set GOMP_SPINCOUNT={_SPINS}",
            stacklevel=2,
        )


def _loaded_openmp() -> set[str]:
    """Files of OpenMP that this process has loaded."""
    with contextlib.suppress(OSError), open("/proc/self/maps", errors="replace") as maps:
        return {line.split()[-1] for line in maps if re.search(r"/lib(g|i)?omp[^/]*$", line)}
    return set()


def _limit_threads(numba: Any) -> None:
    """Let Numba start no more threads than there are cores for; it has read how many it would."""
    from numba.np.ufunc import parallel

    cores = limits.cores()
    if "NUMBA_NUM_THREADS" in os.environ or parallel.NUM_THREADS <= cores:
        return
    private = "_is_initialized", "snt_check", "gen_snt_check", "ol_snt_check"
    if not all(hasattr(parallel, name) for name in private) or parallel._is_initialized:
        # Another version of Numba, or threads that somebody else's loop has started.
        numba.set_num_threads(min(numba.get_num_threads(), cores))
        return
    # Numba reads the variable again whenever another of its own has changed, and must find the same.
    os.environ["NUMBA_NUM_THREADS"] = str(cores)
    numba.config.NUMBA_NUM_THREADS = parallel.NUM_THREADS = cores
    parallel.snt_check = parallel.gen_snt_check()
    numba.extending.overload(parallel.snt_check)(parallel.ol_snt_check)


def _prepare() -> None:
    _check_variables()
    numba = _load_numba()
    _check_layer(numba)
    _check_processor(numba)
    _load_openmp(numba)
    _limit_threads(numba)


_prepare()
