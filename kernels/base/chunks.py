"""How work on flat arrays is cut for threads.

The cut depends on the array alone, never on the number of threads. A sum over a chunk is made by one
thread in a fixed order, and the sums of the chunks are added in the order of the chunks: so every
result repeats bit for bit, whatever the number of threads.

Inside a chunk a kernel takes a view and runs over ``range(view.size)``. Numba then knows that no index
is negative, and leaves out the test for indices from the end, which would keep LLVM from vectorising.
"""

from kernels.base.jit import kernel

# 64 KiB of float32: large beside the 1.5 us to enter a parallel loop, small beside the L2 cache.
CHUNK = 1 << 14


@kernel
def chunk_count(size: int) -> int:
    """How many chunks of at most ``CHUNK`` items ``size`` items make."""
    return (size + CHUNK - 1) // CHUNK
