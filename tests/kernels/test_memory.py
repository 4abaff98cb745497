"""Aligned arrays, scratchpads, and memory that is kept."""

import os
import platform
import resource
import subprocess
import sys

import numpy as np
import pytest

from kernels.base import buffers as memory


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 4, 5, 7), (1000, 1000)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8])
def test_empty_starts_at_a_cache_line(shape, dtype):
    array = memory.empty(shape, dtype)
    assert array.shape == shape
    assert array.dtype == dtype
    assert array.flags.c_contiguous
    assert array.flags.writeable
    assert array.ctypes.data % memory.ALIGNMENT == 0


def test_arrays_do_not_overlap():
    a, b = memory.empty((100,)), memory.empty((100,))
    assert not np.shares_memory(a, b)


def test_scratchpad_is_kept_and_grows():
    small = memory.scratchpad("test", 100)
    assert small.size >= 100
    assert np.shares_memory(memory.scratchpad("test", 50), small)
    assert not np.shares_memory(memory.scratchpad("another test", 50), small)
    assert memory.scratchpad("test", 10_000).size >= 10_000


def page_faults() -> int:
    """Pages that the system clears for 20 arrays of 40 MB, made and freed one after the other."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        memory.empty((10_000_000,))[::512] = 1.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a parameter of glibc's malloc")
def test_freed_memory_is_kept():
    """In a process of its own, for others may have been here before."""
    # With pages of 4 KiB the count says more: 40 MB are 9766 of them.
    environment = os.environ | {"NUMPY_MADVISE_HUGEPAGE": "0"}
    code = "import test_memory; print(test_memory.page_faults())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env=environment,
        cwd=__file__.rpartition("/")[0],
    )
    # Cleared once, not 20 times.
    assert int(run.stdout) < 2 * 9766
