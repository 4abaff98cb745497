"""How a run is timed, the same for all."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_LEAST_RUNS, _MOST_RUNS = 2, 200


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
