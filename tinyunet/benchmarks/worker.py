"""A system in a process of its own: reads requests, a line of JSON each, and answers each with one.

    {"do": "start", "peer": module, "case": "step", "problem_file": file, "threads": 2, "options": {}}
                                     -> {"version": "2.21.0", "settings": ""}
    {"do": "check", "output": file}  -> {"losses": [...]} or, for infer, {} and the file is written
    {"do": "turn", "seconds": 1.5}   -> {"ms": [...]}, after one run that does not count
    {"do": "memory"}                 -> {"now_gb": 0.5, "peak_gb": 1.2}
    {"do": "convolve", "layer": [...], "output": file}   -> {}, and the file is written
    {"do": "time", "layer": [...], "seconds": 1.5}       -> {"forward": [ms, ...], ...}

What fails is answered with ``{"error": one line}``. Whatever a library prints goes to stderr. The
process ends with its input. It loads nothing but NumPy and the one system.
"""

import contextlib
import importlib
import json
import math
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from tinyunet.benchmarks import problem
from tinyunet.benchmarks.timing import timed

CHECKED_STEPS = 3


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
        """Tell the memory of this process."""
        return resident()

    def convolve(self, layer: list[list[int]], output: str) -> dict[str, Any]:
        """Compute a convolution in all directions, for others to compare."""
        directions = self.peer.convolution(*problem.convolution_arrays(*layer))
        arrays = {name: to_array(call()) for name, (call, to_array) in directions.items()}
        np.savez(output, **arrays)
        return {}

    def time(self, layer: list[list[int]], seconds: float) -> dict[str, Any]:
        """Time a convolution in all directions."""
        directions = self.peer.convolution(*problem.convolution_arrays(*layer))
        return {name: timed(call, seconds)[0] for name, (call, _) in directions.items()}


def resident() -> dict[str, float | None]:
    """GB of this process in memory, now and at most so far; None where the system does not tell.

    Not ``getrusage``: its peak is inherited from the process that started this one.
    """
    found: dict[str, float | None] = {"now_gb": None, "peak_gb": None}
    names = {"VmRSS": "now_gb", "VmHWM": "peak_gb"}
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name in names:
                found[names[name]] = int(value.split()[0]) * 1024 / 1e9
    return found


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
