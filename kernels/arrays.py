"""What is done to whole arrays, whatever is in them, on all threads: copied, or summed word by word.

NumPy does both on one core, which moves half of what the memory could.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from kernels.chunks import CHUNK, chunk_count
from kernels.compiler import kernel, parallel_kernel, prange
from kernels.simd import LANES, load, store

_Words = npt.NDArray[np.uint32]
_Floats = npt.NDArray[np.float32]


def copy(src: npt.NDArray[Any], dst: npt.NDArray[Any]) -> None:
    """Copy an array to another of its shape, as `numpy.copyto` does."""
    alike = src.dtype == dst.dtype and src.shape == dst.shape
    if not (alike and src.flags.c_contiguous and dst.flags.c_contiguous):
        np.copyto(dst, src)
        return
    source, target = (array.reshape(-1).view(np.uint8) for array in (src, dst))
    whole = source.size // (4 * LANES) * 4 * LANES
    copy_vectors(source[:whole].view(np.float32), target[:whole].view(np.float32))
    target[whole:] = source[whole:]


@parallel_kernel
def copy_vectors(src: _Floats, dst: _Floats) -> None:
    """Copy flat float32 arrays of whole vectors."""
    for block in prange(src.size // LANES):
        store(dst, block * LANES, load(src, block * LANES))


def sum_of_words(array: npt.NDArray[Any]) -> int:
    """Sum of an array's bits, taken as unsigned numbers of 32 bits.

    Parameters
    ----------
    array : ndarray, contiguous, of an item size that is a multiple of 4
    """
    words = array.reshape(-1).view(np.uint32)
    if words.size <= CHUNK:  # one thread's work: to call all of them takes longer
        return int(_sum_chunk(words))
    sums = np.zeros(int(chunk_count(words.size)), np.uint64)
    _sum_words(words, sums)
    return int(sums.sum())


@kernel
def _sum_chunk(words: _Words) -> np.uint64:
    total = np.uint64(0)
    for i in range(words.size):
        total += np.uint64(words[i])
    return total


@parallel_kernel
def _sum_words(words: _Words, sums: npt.NDArray[np.uint64]) -> None:
    for chunk in prange(sums.size):
        sums[chunk] = _sum_chunk(words[chunk * CHUNK : (chunk + 1) * CHUNK])
