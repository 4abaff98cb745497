"""Writing past the caches: what is too large to be found there when it is read next.

A store reads a cache line before it changes it, and drives out another. Where the line is filled whole and
will be gone before it is needed, both are for nothing: a third of a copy's traffic.
"""

from typing import Any

from kernels.base.arguments import Floats
from kernels.base.buffers import ALIGNMENT
from kernels.base.jit import kernel, specialised
from kernels.base.simd import store, stream, tile_store, tile_stream

# Bytes of a destination above which it is written past the caches: what a core's own cache may hold. One that
# all cores share may keep more, but not beside other ranks: steps of 64^3 take 1 % less than with 8 MB.
_STREAMED = 2 * 1024 * 1024


def past_caches(*destinations: Floats) -> bool:
    """Whether to write past the caches: what they could not keep anyhow, and starts at a cache line."""
    return sum(dst.nbytes for dst in destinations) > _STREAMED and at_lines(*destinations)


def at_lines(*destinations: Floats) -> bool:
    """Whether all start at a cache line, as what is written past the caches must."""
    return all(dst.ctypes.data % ALIGNMENT == 0 for dst in destinations)


@kernel
def put_vector(dst: Floats, at: int, vector: Any, streams: bool) -> None:
    """Store a vector, past the caches or not; `simd.fence` once at the end of what streams."""
    if streams:
        stream(dst, at, vector)
    else:
        store(dst, at, vector)


@specialised("high", "wide")
def put_tile(dst: Any, at: int, row: int, step: int, tile: Any, streams: bool, high: int, wide: int) -> Any:
    """Store a tile of ``high x wide`` vectors, past the caches or not."""
    H, W = high, wide

    def implementation(dst, at, row, step, tile, streams, high, wide):  # type: ignore[no-untyped-def]
        if streams:
            tile_stream(tile, dst, at, row, step, H, W)
        else:
            tile_store(tile, dst, at, row, step, 0, H, W, 1)

    return implementation
