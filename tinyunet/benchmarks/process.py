"""A system in a process of its own: our end, `Process`, sends the name of a method of `Worker` and arguments.

    start    load a peer                                            returns its version
    build    make a case: the net of a problem, or a convolution    returns the settings
    check    run for the first time                                 returns an array for each call
    time     run for some seconds                                   returns milliseconds for each call
    memory                                                          returns GB of the process, now and at most

The cases ``step`` and ``infer`` are one call, ``conv`` is three: one for each direction. The worker loads
nothing but NumPy and the one system, and ends when our end of the pipe is closed.
"""

import contextlib
import importlib
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tinyunet.benchmarks.problem import convolution_arrays
from tinyunet.common.errors import one_line

T = TypeVar("T")

_CHECKED_STEPS = 3
_LEAST_RUNS, _MOST_RUNS = 2, 200
# Compiling for a large machine can take minutes; nothing takes this long.
_LONGEST_SECONDS = 1800
_LEAST_FREE_SHARE = 0.02


# ---- our end ---------------------------------------------------------------------------------------


class WorkerError(Exception):
    """A system cannot go on; the message is one line."""


class Process:
    """A worker, held to as many cores as it has threads.

    Attributes
    ----------
    version : str
        Of the system, a module of :mod:`tinyunet.benchmarks.peers`.
    """

    def __init__(self, peer: str, threads: int) -> None:
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115 - closed in end()
        self._pipe, theirs = Pipe()
        # Libraries read these when they are loaded.
        limits = {f"{x}_NUM_THREADS": str(threads) for x in ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "NUMBA")}
        self._worker = subprocess.Popen(
            [sys.executable, "-m", "tinyunet.benchmarks.process", str(theirs.fileno())],
            stdout=self._printed,
            stderr=self._printed,
            pass_fds=[theirs.fileno()],
            env=os.environ | limits,
            # Ctrl-C is for us; and what the worker starts ends with it.
            start_new_session=True,
        )
        theirs.close()
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(self._worker.pid, sorted(os.sched_getaffinity(0))[:threads])
        try:
            self.version: str = self.ask("start", peer, threads)
        except BaseException:
            self.end()
            raise

    def ask(self, do: str, *arguments: Any) -> Any:
        """Return the worker's answer; an error, a death, silence or a lack of memory raises WorkerError."""
        end = time.monotonic() + _LONGEST_SECONDS
        try:
            self._pipe.send((do, arguments))
            while not self._pipe.poll(0.1):
                if time.monotonic() > end:
                    raise WorkerError(f"no answer in {_LONGEST_SECONDS // 60} minutes")
                total, free = machine_memory()
                if free < _LEAST_FREE_SHARE * total:
                    self.end()
                    raise WorkerError(f"stopped, because the machine's {total:.0f} GB of memory were used up")
            answer, error = self._pipe.recv()
        except (EOFError, OSError):
            raise WorkerError(self._last_words()) from None
        if error:
            raise WorkerError(one_line(error))
        return answer

    def _last_words(self) -> str:
        """Why a worker has died: the signal, or the last line it wrote."""
        code = self._worker.wait()
        if code == -signal.SIGKILL:
            return "killed by the system, most likely for want of memory"
        self._printed.seek(0)
        lines = self._printed.read().decode(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "no message")
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"{how}: {one_line(last)[:200]}"

    def end(self) -> None:
        """End the worker and all it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._worker.pid, signal.SIGKILL)
        self._worker.wait()
        self._pipe.close()
        self._printed.close()


def difference(
    found: NDArray[Any], expected: NDArray[Any], tolerance: float, failure: str = "wrong"
) -> float:
    """Return the largest difference of two arrays; beyond ``tolerance`` a time would mean nothing.

    WorkerError if it is beyond, NaN, or their shapes differ; its message begins with ``failure``.
    """
    if found.shape != expected.shape:
        raise WorkerError(f"{failure}: results of shape {found.shape}, not {expected.shape}")
    error = float(np.abs(found - expected).max())
    if not error <= tolerance:
        raise WorkerError(f"{failure}: results differ by {error:.1e}, more than {tolerance:g}")
    return error


def machine_memory() -> tuple[float, float]:
    """Return GB of this machine, and of them free for processes; infinite where the system does not say."""
    found = _gigabytes("/proc/meminfo")
    return found.get("MemTotal", math.inf), found.get("MemAvailable", math.inf)


def _gigabytes(path: str) -> dict[str, float]:
    """Read lines such as ``VmRSS:  1024 kB``."""
    found = {}
    with contextlib.suppress(OSError), open(path, encoding="ascii", errors="replace") as file:
        for line in file:
            name, _, value = line.partition(":")
            if value.endswith(" kB\n"):
                found[name] = int(value.split()[0]) * 1024 / 1e9
    return found


# ---- the worker's end ------------------------------------------------------------------------------


class Worker:
    """The worker: each method answers one request."""

    peer: Any
    calls: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]]  # to time; makes its result an array

    def start(self, peer: str, threads: int) -> str:
        """Load the system."""
        self.peer = importlib.import_module(peer)
        self.peer.use_threads(threads)
        return str(self.peer.VERSION)

    def build(self, case: str, options: dict[str, Any], *given: Any) -> str:
        """Make the calls of a case, which is given a problem, or the shapes of src and weights."""
        self.calls, peer = {}, self.peer
        if case == "conv":
            self.calls = peer.convolution(*convolution_arrays(*given), **options)
        else:
            run = getattr(peer, case)(*given, **options)
            self.calls[case] = run, self._losses if case == "step" else peer.to_array
        return str(peer.settings(case, **options)) if hasattr(peer, "settings") else ""

    def check(self) -> dict[str, NDArray[Any]]:
        """Run for the first time, for others to compare; a step several times."""
        return {name: np.array(to_array(call())) for name, (call, to_array) in self.calls.items()}

    def _losses(self, first: float) -> list[float]:
        call, _ = self.calls["step"]
        return [first, *(call() for _ in range(1, _CHECKED_STEPS))]

    def time(self, seconds: float, only: str = "") -> dict[str, list[float]]:
        """Time runs of each call, or of the one that is named."""
        times = {}
        for name, (call, _) in self.calls.items():
            if only not in ("", name):
                continue
            times[name], last = timed(call, seconds)
            if isinstance(last, float) and not math.isfinite(last):
                raise ArithmeticError(f"the loss has become {last}")
        return times

    def memory(self) -> tuple[float | None, float | None]:
        """Return GB of this process, now and at most so far; None where the system does not say.

        Not from ``getrusage``: its peak is inherited from the process that started this one.
        """
        found = _gigabytes("/proc/self/status")
        return found.get("VmRSS"), found.get("VmHWM")


def timed(call: Callable[[], T], seconds: float) -> tuple[list[float], T]:
    """Return the milliseconds of each run, and the result of the last.

    The first run does not count: caches are cold and threads asleep. The others take about ``seconds``
    together; there are two at least.
    """
    result = call()
    times: list[float] = []
    while len(times) < _LEAST_RUNS or (sum(times) < 1e3 * seconds and len(times) < _MOST_RUNS):
        start = time.perf_counter()
        result = call()
        times.append(1e3 * (time.perf_counter() - start))
    return times, result


def main() -> None:
    """Answer until there are no more requests."""
    # Should memory run out, the system is to end this process, not another.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    pipe, worker = Connection(int(sys.argv[1])), Worker()
    with contextlib.suppress(EOFError):
        while True:
            do, arguments = pipe.recv()
            try:
                answer = getattr(worker, do)(*arguments), ""
            except Exception as error:
                text = str(error).strip().partition("\n")[0]
                answer = None, f"{type(error).__name__}: {text}"[:200]
            pipe.send(answer)


if __name__ == "__main__":
    main()
