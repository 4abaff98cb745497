"""Copies and checksums of whole arrays on all threads.

NumPy does both on one core, which reaches half of the memory's bandwidth.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from kernels.base.arguments import Floats
from kernels.base.buffers import CHUNK, chunk_count
from kernels.base.jit import kernel, parallel_kernel, prange
from kernels.base.simd import LANES, load, store

# 2^64 divided by the golden ratio: its multiples are spread evenly (Knuth, vol. 3, section 6.4).
_ODD = np.uint64(0x9E3779B97F4A7C15)

_Words = npt.NDArray[np.uint32]


def copy(src: npt.NDArray[Any], dst: npt.NDArray[Any]) -> None:
    """Copy an array to another of its shape, as `numpy.copyto` does."""
    alike = src.dtype == dst.dtype and src.shape == dst.shape and not src.dtype.hasobject
    flat = src.flags.c_contiguous and dst.flags.c_contiguous and dst.flags.writeable
    if not (alike and flat) or np.may_share_memory(src, dst):
        np.copyto(dst, src)
        return
    source, target = (array.reshape(-1).view(np.uint8) for array in (src, dst))
    whole = source.size // (4 * LANES) * 4 * LANES
    copy_vectors(source[:whole].view(np.float32), target[:whole].view(np.float32))
    target[whole:] = source[whole:]


@parallel_kernel
def copy_vectors(src: Floats, dst: Floats) -> None:
    """Copy flat float32 arrays of whole vectors."""
    for block in prange(src.size // LANES):
        store(dst, block * LANES, load(src, block * LANES))


def checksum(array: npt.NDArray[Any]) -> int:
    """A number of 64 bits that hardly any other contents, or order of contents, would have.

    Words of 32 bits, each mixed with its place, are summed in chunks; so are the chunks.

    Parameters
    ----------
    array : ndarray, any shape and type but objects
    """
    bits = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    whole = bits.size // 4 * 4
    words, rest = bits[:whole].view(np.uint32), int.from_bytes(bits[whole:].tobytes(), "little")
    sums = np.zeros(max(int(chunk_count(words.size)), 1), np.uint64)
    if words.size <= CHUNK:  # one thread's work: waking all threads takes longer
        sums[0] = _sum_chunk(words)
    else:
        _sum_words(words, sums)
    places = 2 * np.arange(sums.size, dtype=np.uint64) + 1
    return int((sums * places).sum()) + rest


@kernel
def _sum_chunk(words: _Words) -> np.uint64:
    total = np.uint64(0)
    for i in range(words.size):
        mixed = (np.uint64(words[i]) ^ (np.uint64(i) << np.uint64(32))) * _ODD
        # Were it a plain sum of products, changed signs could cancel.
        total += (mixed ^ (mixed >> np.uint64(29))) * _ODD
    return total


@parallel_kernel
def _sum_words(words: _Words, sums: npt.NDArray[np.uint64]) -> None:
    for chunk in prange(sums.size):
        sums[chunk] = _sum_chunk(words[chunk * CHUNK : (chunk + 1) * CHUNK])
