"""Arrays aligned to cache lines, and scratchpads that are kept between calls.

A 64-byte vector that straddles two cache lines costs two accesses. NumPy aligns to 16 bytes only, so
kernels allocate their outputs here. A scratchpad (packed source, packed weights, partial sums) is
needed only during a call; taking it anew each time would have the system clear its pages each time,
which costs about as much as filling them, so each thread keeps one for each purpose.

For the same reason this process does not give freed memory back to the system: see
:func:`keep_freed_memory`.
"""

import contextlib
import ctypes
import math
import threading
from typing import Any

import numpy as np
import numpy.typing as npt

ALIGNMENT = 64

_local = threading.local()


# Numbers of glibc's parameters, from <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Have the C library keep what is freed for the next allocation; done when this module is imported.

    glibc maps an array of more than 32 MiB anew each time, and unmaps it when it is freed. The system
    then clears each page on first use: a tensor of 56 MB (96^3 voxels, 16 channels) takes 17 ms to make
    and fill instead of 6. A training step allocates the same arrays over and over; kept memory is
    found again at once. The process stays as large as it once was.

    Returns
    -------
    bool
        Whether it could be done; elsewhere than with glibc nothing changes.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
    return False


keep_freed_memory()


def empty(shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
    """Like ``np.empty``, with the first item at the start of a cache line."""
    item = np.dtype(dtype)
    size = math.prod(shape) * item.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(item).reshape(shape)


def scratchpad(purpose: str, *shape: int) -> npt.NDArray[np.float32]:
    """Temporary float32 array of a shape, with undefined contents.

    The same memory is handed out again on the next call with this ``purpose`` from this thread, so
    that nothing in it outlives the kernel that asked.
    """
    pads: dict[str, npt.NDArray[np.float32]] = _local.__dict__.setdefault("pads", {})
    pad, size = pads.get(purpose), math.prod(shape)
    if pad is None or pad.size < size:
        pad = pads[purpose] = empty((size,))
    return pad[:size].reshape(shape)
