"""A student's pass among the rungs of the ladder: time with fresh inputs, speed, and the rung to read next.

Every run gets numbers that no run had before, and the last result is checked, so that nothing kept from an
earlier call helps. A time below what the machine can do at most is refused. All runs use one thread.
"""

import time
from collections.abc import Callable
from textwrap import wrap
from typing import Any, NamedTuple

import numpy as np

from kernels.base import machine
from kernels.ladder.shapes import Geometry
from kernels.workbench import roofline
from kernels.workbench.lessons import LESSONS, RUNGS, SLOW, SLOW_FLOPS, bytes_moved, planes
from kernels.workbench.trials import PASSES, Arrays, Trial, call, first_array, right, wrong
from kernels.workbench.verdict import Failure

# Taken now: while the student's kernel runs, the guard replaces the functions of the modules.
_PASSES = {key: {name: getattr(module, name) for name in PASSES} for key, module in RUNGS.items()}
_SECONDS, _LEAST_RUNS, _MOST_RUNS = 0.5, 3, 100
# F(4, 4, 4) skips seven of eight multiplications; no known method skips more here.
_SKIPPED = 8


class Place(NamedTuple):
    """A kernel's time."""

    name: str
    ms: float  # fastest run
    mine: bool = False


class Measured(NamedTuple):
    """A student's pass among the rungs, the slowest first."""

    name: str  # the pass
    g: Geometry
    places: list[Place]
    peak: float  # GFLOP/s of one core
    bandwidth: float  # GB/s of one core

    def text(self) -> str:
        """Return the table, the roofline and what the next rung does, as lines of a terminal."""
        width = max(len(p.name) for p in self.places)
        lines = [f"{self.name}, {Trial(self.g.src_shape, self.g.weights_shape)}, one core", ""]
        lines.append(f"{'':{width}s}         ms   GFLOP/s   of the peak")
        for p in self.places:
            gflops = self.g.flops / p.ms / 1e6
            mark = "   <- yours" if p.mine else ""
            lines.append(f"{p.name:{width}s} {p.ms:10.3g} {gflops:9.3g} {gflops / self.peak:10.0%}{mark}")
        mine = next(p for p in self.places if p.mine)
        intensity = self.g.flops / sum(bytes_moved("naive", self.g, self.name).values())
        drawn = mine.name, intensity, self.g.flops / mine.ms / 1e6, self.peak, self.bandwidth
        lines += ["", roofline.picture(*drawn), "", self._next(mine)]
        return "\n".join(lines)

    def _next(self, mine: Place) -> str:
        """Say what the slowest rung that is faster does."""
        faster = [p for p in self.places if p.ms < mine.ms]
        if not faster:
            return "It is faster than every rung here. Compare it with the compiled net: bench conv."
        after = faster[0]
        gain = mine.ms / after.ms
        words = f"The next rung, {after.name}, is {gain:.3g} times as fast: it {LESSONS[after.name].new}"
        return "\n".join(wrap(words, 100))


def measure(
    function: Callable[..., Any], name: str = "forward", label: str = "yours", size: int = 32
) -> Measured:
    """Time a pass and all rungs: 16 -> 16 channels, a cube with sides of ``size`` voxels, a kernel of 3^3.

    All run on one thread. Failure if a timed result is wrong, or the time is shorter than possible.
    """
    trial = Trial((1, size, size, size, 16), (16, 16, 3, 3, 3), name=name)
    g, threads = trial.geometry, machine.threads()
    machine.set_threads(1)
    try:
        peak = roofline.peak_gflops()
        places = [Place(label, _fastest(function, trial), mine=True)]
        for rung, passes in _PASSES.items():
            few = planes(g, SLOW_FLOPS) if rung == SLOW else size
            part = trial._replace(src_shape=(1, few, *trial.src_shape[2:]))
            places.append(Place(rung, _fastest(passes[name], part) * size / few))
        peak, bandwidth = max(peak, roofline.peak_gflops()), roofline.copy_bandwidth()
    finally:
        machine.set_threads(threads)
    least = g.flops / _SKIPPED / peak / 1e6
    if places[0].ms < least:
        raise Failure(
            f"{name}: {places[0].ms:.3g} ms cannot be: the peak of a core is {peak:.0f} GFLOP/s; even with "
            f"{_SKIPPED} times fewer multiplications the pass takes {least:.3g} ms; is the work done at all?"
        )
    return Measured(name, g, sorted(places, key=lambda p: -p.ms), peak, bandwidth)


def _fastest(function: Callable[..., Any], trial: Trial) -> float:
    """Return milliseconds of the fastest run, each on new numbers; Failure if the last result is wrong."""
    random, g = np.random.default_rng(), trial.geometry
    src, weights, diff_dst = (np.empty(s, np.float32) for s in (g.src_shape, g.weights_shape, g.dst_shape))
    given = Arrays(src, weights, None, diff_dst)
    times: list[float] = []
    result: Any = None
    while len(times) <= _LEAST_RUNS or (sum(times) < _SECONDS and len(times) < _MOST_RUNS):
        for array in (src, weights, diff_dst):
            random.standard_normal(out=array, dtype=np.float32)
        start = time.perf_counter()
        result = call(function, trial, given)
        times.append(time.perf_counter() - start)
    found, expected = first_array(result), right(trial, given)
    if found.shape != expected.shape or wrong(found, expected).any():
        text = "the last result of the timed runs is wrong; every call must compute"
        raise Failure(f"{trial.name}: {text}\n  on {trial}")
    return 1e3 * min(times[1:])  # the first call compiles
