"""Memory of kernels: arrays aligned to cache lines, scratchpads, and how flat arrays are cut for threads.

Aligned
    A 64-byte vector that straddles two cache lines costs two accesses. NumPy aligns to 16 bytes only, so
    kernels allocate their outputs with `empty`.

Kept
    The system clears each new page, which costs about as much as filling it. So each thread keeps one
    `scratchpad` for each purpose, and the process keeps freed memory: see `keep_freed_memory`.

Cut
    A flat array is cut into chunks by its size alone, never by the number of threads. One thread sums a
    chunk in a fixed order, and the chunks' sums are added in order: every result repeats bit for bit. Inside
    a chunk a kernel takes a view and runs over ``range(view.size)``. Numba then knows that no index is
    negative, and leaves out the test for indices from the end, which would keep LLVM from vectorising.
"""

import contextlib
import ctypes
import math
import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from kernels.base.arguments import Floats
from kernels.base.jit import kernel

ALIGNMENT = 64
# 64 KiB of float32: large beside the 1.5 us to enter a parallel loop, small beside the L2 cache.
CHUNK = 1 << 14
# Bytes of a destination above which it is written past the caches: what a core's own cache may hold. A cache
# that all cores share may keep more, but other ranks use it too: steps of 64^3 take 1 % less than with 8 MB.
_STREAMED = 2 * 1024 * 1024
# Numbers of glibc's parameters, from <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4

_local = threading.local()


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next allocation; done when this module is imported.

    glibc maps an array of more than 32 MiB anew each time, and unmaps it when it is freed. The system
    then clears each page on first use: a tensor of 56 MB (96^3 voxels, 16 channels) takes 17 ms to make
    and fill instead of 6. A training step allocates the same arrays over and over, and finds kept memory
    again at once. The process never shrinks. With another C library nothing changes.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        if mallopt(_M_MMAP_MAX, 0):
            mallopt(_M_TRIM_THRESHOLD, -1)


keep_freed_memory()


def empty(shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
    """Like ``np.empty``, with the first item at the start of a cache line."""
    item = np.dtype(dtype)
    size = math.prod(shape) * item.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(item).reshape(shape)


def scratchpad(purpose: str, *shape: int) -> Floats:
    """Temporary float32 array of a shape, with undefined contents.

    The next call with this ``purpose`` from this thread returns the same memory, so nothing in it outlives
    the kernel that asked.
    """
    pads: dict[str, Floats] = _local.__dict__.setdefault("pads", {})
    pad, size = pads.get(purpose), math.prod(shape)
    if pad is None or pad.size < size:
        pad = pads[purpose] = empty((size,))
    return pad[:size].reshape(shape)


@kernel
def chunk_count(size: int) -> int:
    """How many chunks of at most ``CHUNK`` items ``size`` items make."""
    return (size + CHUNK - 1) // CHUNK


def past_caches(*destinations: Floats) -> bool:
    """Whether kernels should `simd.stream` to these: too large for the caches, and aligned to cache lines.

    A store reads a cache line before it changes it, and drives out another line. For a line that is filled
    whole and gone before it is needed, both are wasted: a third of a copy's traffic.
    """
    return sum(dst.nbytes for dst in destinations) > _STREAMED and at_lines(*destinations)


def at_lines(*destinations: Floats) -> bool:
    """Whether all start at a cache line, as streamed arrays must."""
    return all(dst.ctypes.data % ALIGNMENT == 0 for dst in destinations)
