"""What this machine has: cores, instruction set, register-tile shape, measured peak and bandwidth.

The instruction set is not looked up in a table of processor names. A small function of
``<16 x float>`` is compiled for the processor Numba compiles for, and its assembly tells which
registers it uses: ``zmm`` (AVX-512), ``ymm`` (AVX2), else. So ``NUMBA_CPU_NAME=haswell`` gives the
tiles of a Haswell.

The two measured figures are the roofline every speed is quoted against: the fused multiply-adds one
core does when nothing but registers is touched, and the bytes a copy moves.

Source: Williams, Waterman and Patterson, "Roofline" (2009).
"""

import functools
import platform
import time
from collections.abc import Callable
from typing import NamedTuple

import llvmlite.binding as llvm
import numba
import numpy as np

from kernels.base.arguments import Floats
from kernels.base.arrays import copy_vectors
from kernels.base.buffers import empty
from kernels.base.jit import kernel
from kernels.base.limits import cores as cores
from kernels.base.simd import LANES, tile_rank1, tile_store, tile_zero

# Times that each figure is measured.
_RUNS = 7

_PROBE = """
define <16 x float> @probe(<16 x float> %a, <16 x float> %b) {
  %sum = fadd <16 x float> %a, %b
  ret <16 x float> %sum
}
"""


class Machine(NamedTuple):
    """What a benchmark must say about where it ran."""

    processor: str
    cores: int
    instruction_set: str
    threading_layer: str
    peak_gflops: float
    copy_gb_per_s: float


def is_interpreted() -> bool:
    """Return whether ``NUMBA_DISABLE_JIT`` has kernels run as plain Python; those of tiles cannot."""
    return bool(numba.config.DISABLE_JIT)


def most_threads() -> int:
    """Threads that kernels can use at most: the cores, or fewer if ``NUMBA_NUM_THREADS`` says so."""
    return min(cores(), int(numba.config.NUMBA_NUM_THREADS))


def threads() -> int:
    """Threads that parallel kernels use when called from this thread."""
    return int(numba.get_num_threads())


def set_threads(count: int) -> None:
    """Let parallel kernels use ``count`` threads.

    Raises
    ------
    ValueError
        If ``count`` is below 1 or above what Numba was started with (``NUMBA_NUM_THREADS``).
    """
    most = int(numba.config.NUMBA_NUM_THREADS)
    if not 1 <= count <= most:
        raise ValueError(f"threads is {count}; this process can use 1 to {most}")
    numba.set_num_threads(count)


@functools.cache
def instruction_set() -> str:
    """``"avx512"``, ``"avx2"`` or ``"other"``: how ``<16 x float>`` is compiled here."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    name = numba.config.CPU_NAME or llvm.get_host_cpu_name()
    features = numba.config.CPU_FEATURES
    if features is None:
        features = llvm.get_host_cpu_features().flatten()
    target = llvm.Target.from_triple(llvm.get_process_triple())
    machine = target.create_target_machine(cpu=name, features=features, opt=2)
    assembly = machine.emit_assembly(llvm.parse_assembly(_PROBE))
    if "zmm" in assembly:
        return "avx512"
    return "avx2" if "ymm" in assembly else "other"


@functools.cache
def tile_vectors() -> int:
    """How many ``f32x16`` sums a register tile may hold, leaving registers for its operands.

    AVX-512 has 32 registers of one vector each: 24 sums. AVX2 has 16 of half a vector: 6 sums are 12
    registers, a weight vector is 2, a broadcast 1. With 16 registers of a quarter (SSE) 2 fit.
    """
    return {"avx512": 24, "avx2": 6, "other": 2}[instruction_set()]


@functools.cache
def threading_layer() -> str:
    """Name of the layer under ``prange``: ``omp``, ``tbb`` or ``workqueue``."""
    copy_vectors(np.zeros(LANES, np.float32), np.zeros(LANES, np.float32))  # starts the threads
    return str(numba.threading_layer())


def processor_name() -> str:
    """Processor as the system names it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe() -> Machine:
    """Measure and name this machine (about a second)."""
    return Machine(
        processor_name(), cores(), instruction_set(), threading_layer(), peak_gflops(), copy_bandwidth()
    )


def peak_gflops() -> float:
    """GFLOP/s of fused multiply-adds on one core, measured: the roof of every compute-bound kernel.

    The tile is as large as the convolution's, and its operands stay in registers; the best of several
    runs counts, because a roof is what is possible. Measured anew at each call (70 ms), because a core's
    clock follows what else the processor does: 2.7 to 3.5 GHz within a minute.
    """
    rows = tile_vectors()
    kernel_peak = _make_peak(rows)
    src, weights, dst = (empty((n,)) for n in (1, LANES, rows * LANES))
    src[:] = weights[:] = 0.5
    repeats = 2_000_000
    seconds = best_seconds(lambda: kernel_peak(src, weights, dst, repeats), _RUNS)
    return 2.0 * rows * LANES * repeats / seconds / 1e9


def copy_bandwidth() -> float:
    """GB/s read plus written by a copy on all threads, measured, far beyond the caches."""
    size = 64_000_000  # floats: 256 MB
    src, dst = empty((size,)), empty((size,))
    src[:] = dst[:] = 0.0
    return 8.0 * size / best_seconds(lambda: copy_vectors(src, dst), _RUNS) / 1e9


def best_seconds(call: Callable[[], object], runs: int) -> float:
    """Time of the fastest of some runs, after one that does not count: caches are cold, threads asleep."""
    call()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


@functools.cache
def _make_peak(rows: int) -> Callable[..., None]:
    @kernel
    def peak(src: Floats, weights: Floats, dst: Floats, repeats: int) -> None:
        sums = tile_zero(rows, 1)
        for _ in range(repeats):
            # A step of 0: every row takes the same scalar, so nothing but registers is touched.
            sums = tile_rank1(sums, src, 0, 0, 0, weights, 0, 1, rows, 1)
        tile_store(sums, dst, 0, 0, LANES, 0, 1, rows, 1)

    return peak
