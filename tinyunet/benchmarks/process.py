"""A system in a process of its own, both ends: a request is a line of JSON, and so is its answer.

    {"do": "start", "peer": module, "case": "step", "threads": 2, "options": {}, "problem_file": file}
                                     -> {"version": "2.21.0", "settings": ""}
    {"do": "check", "output": file}  -> {"losses": [...]} or, for infer, {} and the file is written
    {"do": "turn", "seconds": 1.5}   -> {"ms": [...]}, after one run that does not count
    {"do": "memory"}                 -> {"now_gb": 0.5, "peak_gb": 1.2}
    {"do": "convolve", "shapes": [...], "options": {}, "output": file}    -> {}, and the file is written
    {"do": "time", "shapes": [...], "options": {}, "seconds": 1.5}        -> {"forward": [ms, ...], ...}

An error is answered with ``{"error": one line}``. Whatever a library prints goes to stderr. The worker ends
with its input, and loads nothing but NumPy and the one system.
"""

import contextlib
import importlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from tinyunet.benchmarks import problem
from tinyunet.common.errors import one_line

T = TypeVar("T")

CHECKED_STEPS = 3
_LEAST_RUNS, _MOST_RUNS = 2, 200
# Compiling for a large machine can take minutes; nothing takes this long.
_LONGEST_SECONDS = 1800
_LEAST_FREE_SHARE = 0.02


# ---- our end ---------------------------------------------------------------------------------------


class WorkerError(Exception):
    """A system cannot go on; the message is one line."""


class Process:
    """A worker, held to as many cores as it has threads."""

    def __init__(self, threads: int) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in end()
        # Libraries read these when they are loaded.
        limits = {f"{x}_NUM_THREADS": str(threads) for x in ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "NUMBA")}
        self._worker = subprocess.Popen(
            [sys.executable, "-m", "tinyunet.benchmarks.process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | limits,
            # Ctrl-C is for us; and what the worker starts ends with it.
            start_new_session=True,
        )
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(self._worker.pid, sorted(os.sched_getaffinity(0))[:threads])

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises
        ------
        WorkerError
            The worker reports an error, has died, takes too long, or would take the last memory.
        """
        assert self._worker.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._worker.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self._worker.stdin.flush()
        answer: dict[str, Any] = json.loads(self._line())
        if "error" in answer:
            raise WorkerError(one_line(answer["error"]))
        return answer

    def _line(self) -> bytes:
        """Wait for a line, and meanwhile watch the machine's memory."""
        assert self._worker.stdout is not None
        end = time.monotonic() + _LONGEST_SECONDS
        while not select.select([self._worker.stdout], [], [], 0.1)[0]:
            if time.monotonic() > end:
                raise WorkerError(f"no answer in {_LONGEST_SECONDS // 60} minutes")
            total, free = machine_memory()
            if free < _LEAST_FREE_SHARE * total:
                self.end()
                raise WorkerError(f"stopped, because the machine's {total:.0f} GB of memory were used up")
        line = self._worker.stdout.readline()
        if not line:
            raise WorkerError(self._last_words())
        return line

    def _last_words(self) -> str:
        """Why a worker has died: the signal, or the last line it wrote."""
        code = self._worker.wait()
        if code == -signal.SIGKILL:
            return "killed by the system, most likely for want of memory"
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "no message")
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"{how}: {one_line(last)[:200]}"

    def end(self) -> None:
        """End the worker and all it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._worker.pid, signal.SIGKILL)
        self._worker.wait()
        for stream in (self._worker.stdin, self._worker.stdout, self._errors):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


def machine_memory() -> tuple[float, float]:
    """GB of this machine, and of them free for processes; infinite where the system does not say."""
    found = _kilobytes("/proc/meminfo")
    total, free = (found.get(name, math.inf) for name in ("MemTotal", "MemAvailable"))
    return total * 1024 / 1e9, free * 1024 / 1e9


def _kilobytes(path: str) -> dict[str, int]:
    """Read lines such as ``VmRSS:  1024 kB``."""
    found = {}
    with contextlib.suppress(OSError), open(path, encoding="ascii", errors="replace") as file:
        for line in file:
            name, _, value = line.partition(":")
            if value.endswith(" kB\n"):
                found[name] = int(value.split()[0])
    return found


# ---- the worker's end ------------------------------------------------------------------------------


class Worker:
    """What is kept from one request to the next; each method answers one."""

    peer: Any
    run: Callable[[], Any]
    case: str

    def start(
        self, peer: str, case: str, threads: int, options: dict[str, Any], problem_file: str = ""
    ) -> dict[str, Any]:
        """Load the system and, but for single convolutions, build its net."""
        self.peer, self.case = importlib.import_module(peer), case
        self.peer.use_threads(threads)
        if case != "conv":
            self.run = getattr(self.peer, case)(problem.load(problem_file), **options)
        settings = self.peer.settings(case, **options) if hasattr(self.peer, "settings") else ""
        return {"version": self.peer.VERSION, "settings": settings}

    def check(self, output: str) -> dict[str, Any]:
        """Run for the first time, for others to compare."""
        if self.case == "step":
            return {"losses": [self.run() for _ in range(CHECKED_STEPS)]}
        np.save(output, self.peer.to_array(self.run()))
        return {}

    def turn(self, seconds: float) -> dict[str, Any]:
        """Time runs."""
        times, last = timed(self.run, seconds)
        if self.case == "step" and not math.isfinite(last):
            raise ArithmeticError(f"the loss has become {last}")
        return {"ms": times}

    def memory(self) -> dict[str, Any]:
        """GB of this process, now and at most so far; None where the system does not say.

        Not from ``getrusage``: its peak is inherited from the process that started this one.
        """
        found = _kilobytes("/proc/self/status")
        names = {"now_gb": "VmRSS", "peak_gb": "VmHWM"}
        return {key: found[name] * 1024 / 1e9 if name in found else None for key, name in names.items()}

    def convolve(self, shapes: list[Sequence[int]], options: dict[str, Any], output: str) -> dict[str, Any]:
        """Compute a convolution in all directions, for others to compare."""
        directions = self.peer.convolution(*problem.convolution_arrays(*shapes), **options)
        np.savez(output, **{name: to_array(call()) for name, (call, to_array) in directions.items()})
        return {}

    def time(self, shapes: list[Sequence[int]], options: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Time a convolution in all directions."""
        directions = self.peer.convolution(*problem.convolution_arrays(*shapes), **options)
        return {name: timed(call, seconds)[0] for name, (call, _) in directions.items()}


def timed(call: Callable[[], T], seconds: float) -> tuple[list[float], T]:
    """Run again and again; return the milliseconds of each run, and what the last returned.

    Parameters
    ----------
    call : callable
        Its first run does not count: caches are cold and threads asleep.
    seconds : float
        What the runs take together, about; there are two at least.
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
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception as error:
            text = str(error).strip().partition("\n")[0]
            answer = {"error": f"{type(error).__name__}: {text}"[:200]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
