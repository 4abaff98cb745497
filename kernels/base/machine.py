"""The machine: its threads, its instruction set, and the register tile that fits.

The instruction set comes from no table of processor names. LLVM compiles a small function of ``<16 x float>``
for the processor that Numba compiles for, and the assembly tells which registers it uses: ``zmm`` (AVX-512),
``ymm`` (AVX2), else. So ``NUMBA_CPU_NAME=haswell`` gives the tiles of a Haswell.
"""

import functools
import platform
import time
from collections.abc import Callable

import llvmlite.binding as llvm
import numba

from kernels.base.limits import cores as cores

_PROBE = """
define <16 x float> @probe(<16 x float> %a, <16 x float> %b) {
  %sum = fadd <16 x float> %a, %b
  ret <16 x float> %sum
}
"""


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


def best_seconds(call: Callable[[], object], runs: int) -> float:
    """Time of the fastest of some runs, after one that does not count: caches are cold, threads asleep."""
    call()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
