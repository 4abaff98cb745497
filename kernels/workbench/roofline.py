"""The roofline that every speed is compared with: one core's multiply-adds, and the bandwidth of a copy.

The roofline says how fast a loop can be at most, given how many operations it does for each byte that goes
through memory (its intensity)::

    GFLOP/s = min(peak of the multiply-adds, intensity * bandwidth of memory)

So a kernel can be slower than its roof in two ways: its loop does more than multiply-adds (loads and stores
of sums, transforms), or its arrays do not stay in the caches. Minimal filtering can be faster than the roof,
because it skips multiplications of the definition.

Source: Williams, Waterman and Patterson, "Roofline" (2009).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numba
import numpy as np

from kernels.base.arguments import Floats
from kernels.base.arrays import copy_vectors
from kernels.base.buffers import empty
from kernels.base.jit import kernel
from kernels.base.machine import best_seconds, cores, instruction_set, processor_name, tile_vectors
from kernels.base.simd import LANES
from kernels.base.tiles import tile_rank1, tile_store, tile_zero

# Times that each figure is measured.
_RUNS = 7
_WIDTH, _HEIGHT = 60, 12  # of the picture, in characters


class Machine(NamedTuple):
    """The machine that a benchmark ran on."""

    processor: str
    cores: int
    instruction_set: str
    threading_layer: str
    peak_gflops: float
    copy_gb_per_s: float


def describe() -> Machine:
    """Measure and name this machine (about a second)."""
    return Machine(
        processor_name(), cores(), instruction_set(), threading_layer(), peak_gflops(), copy_bandwidth()
    )


def peak_gflops() -> float:
    """Return GFLOP/s of fused multiply-adds on one core, measured: the roof of every compute-bound kernel.

    The tile is as large as the convolution's, and its operands stay in registers; the best of several
    runs counts, because a roof is what is possible. Each call measures anew (70 ms), because a core's
    clock depends on the processor's other work: 2.7 to 3.5 GHz within a minute.
    """
    rows = tile_vectors()
    kernel_peak = _make_peak(rows)
    src, weights, dst = (empty((n,)) for n in (1, LANES, rows * LANES))
    src[:] = weights[:] = 0.5
    repeats = 2_000_000
    seconds = best_seconds(lambda: kernel_peak(src, weights, dst, repeats), _RUNS)
    return 2.0 * rows * LANES * repeats / seconds / 1e9


def copy_bandwidth() -> float:
    """Return GB/s read plus written by a copy on all threads, measured, far beyond the caches."""
    size = 64_000_000  # floats: 256 MB
    src, dst = empty((size,)), empty((size,))
    src[:] = dst[:] = 0.0
    return 8.0 * size / best_seconds(lambda: copy_vectors(src, dst), _RUNS) / 1e9


@functools.cache
def threading_layer() -> str:
    """Return the name of the layer under ``prange``: ``omp``, ``tbb`` or ``workqueue``."""
    copy_vectors(np.zeros(LANES, np.float32), np.zeros(LANES, np.float32))  # starts the threads
    return str(numba.threading_layer())


@functools.cache
def _make_peak(rows: int) -> Callable[..., None]:
    @kernel
    def peak(src: Floats, weights: Floats, dst: Floats, repeats: int) -> None:
        sums = tile_zero(1, rows, 1)
        for _ in range(repeats):
            # A step of 0: every row takes the same scalar, so nothing but registers is touched.
            sums = tile_rank1(sums, src, 0, 0, 0, weights, 0)
        tile_store(sums, dst, 0, 0, LANES, 0)

    return peak


def picture(name: str, intensity: float, gflops: float, peak: float, bandwidth: float) -> str:
    """Draw the roofline and one kernel as text, both axes logarithmic.

    ``intensity`` (to the right) is in operations a byte, ``gflops`` (upwards) and ``peak`` in GFLOP/s,
    ``bandwidth`` in GB/s.
    """
    ridge = peak / bandwidth
    left, right = np.log(min(intensity, ridge) / 4), np.log(max(intensity, ridge) * 4)
    top = np.log(max(peak, gflops) * 1.5)
    low = np.log(min(gflops, peak, np.exp(left) * bandwidth) / 1.5)
    grid = [[" "] * _WIDTH for _ in range(_HEIGHT)]

    def row_of(speed: float) -> int:
        place = (np.log(speed) - low) / (top - low)
        return int(np.clip(round((1 - place) * (_HEIGHT - 1)), 0, _HEIGHT - 1))

    for column, x in enumerate(np.exp(np.linspace(left, right, _WIDTH))):
        flat = x * bandwidth >= peak
        grid[row_of(min(peak, x * bandwidth))][column] = "-" if flat else "/"
    column, row = round((np.log(intensity) - left) / (right - left) * (_WIDTH - 1)), row_of(gflops)
    grid[row][column] = "*"
    start = column + 2 if column + 2 + len(name) < _WIDTH else column - 1 - len(name)
    grid[row][start : start + len(name)] = name
    labels = {row_of(peak): f"{peak:5.0f}", row: f"{gflops:5.3g}"}
    lines = [f"{labels.get(y, ''):>8s} |{''.join(cells)}".rstrip() for y, cells in enumerate(grid)]
    first, last = f"{np.exp(left):.2g}", f"{np.exp(right):.3g} operations a byte"
    axis = f"{'GFLOP/s':>8s} +{'-' * _WIDTH}"
    return "\n".join([*lines, axis, f"{'':10s}{first}{last:>{_WIDTH - len(first)}s}"])
