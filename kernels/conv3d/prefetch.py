"""Prefetch what the kernel will read next while registers multiply: memory and arithmetic work together.

Packing a brick waits for memory; multiplying leaves memory idle. So the products of each plane of points
prefetch a share of what comes next, a line or two at each step of their loops: the source of the next brick,
and what the epilogue of this brick will read::

    plane of points      0        1        2        ...                       some 36
    products prefetch    source of the next brick, plane by plane  |  x of this brick

The rows of a brick follow each other in a plane of the volume, so a share is one run of lines in a tensor,
or in two that are read together. A step prefetches one line of each, because a processor waits for ten to
twenty lines at once; more requests stop the arithmetic, or are dropped.
"""

from typing import NamedTuple

from kernels.base.arguments import Floats, Triple
from kernels.base.jit import kernel
from kernels.base.simd import LINE, address, prefetch


class Tensors(NamedTuple):
    """Addresses of one or two blocked tensors, ``a`` and ``b``, which make ``blocks`` channel blocks.

    The kernel reads ``other_a`` and ``other_b`` together with them; 0 where there is none.
    """

    a: int
    other_a: int
    b: int
    other_b: int
    blocks_a: int
    blocks: int


class Region(NamedTuple):
    """Rows ``start[1]`` to ``start[1] + rows`` of some planes of image ``n``, of all channel blocks."""

    tensors: Tensors
    n: int
    size: Triple
    start: Triple
    planes: int
    rows: int


NO_REGION = Region(Tensors(0, 0, 0, 0, 0, 0), 0, (0, 0, 0), (0, 0, 0), 0, 0)


class Lines(NamedTuple):
    """Cache lines to prefetch: ``left`` lines from address ``a`` on, and as many from ``b`` on."""

    a: int
    b: int
    left: int


@kernel
def fetch(lines: Lines, step: int) -> None:
    """Prefetch line ``step`` of both runs; the first lines again where no line is left."""
    offset = step * (LINE if lines.left > 0 else 0)
    prefetch(lines.a + offset)
    prefetch(lines.b + offset)


@kernel
def after(lines: Lines, steps: int) -> Lines:
    """What is left to prefetch after some steps of `fetch`."""
    offset = steps * (LINE if lines.left > 0 else 0)
    return Lines(lines.a + offset, lines.b + offset, lines.left - steps)


@kernel
def tensors(a: Floats, other_a: Floats, b: Floats, other_b: Floats, blocks_a: int, blocks: int) -> Tensors:
    """Addresses of flat arrays, which may be empty."""
    return Tensors(
        address(a, 0) if a.size > 0 else 0,
        address(other_a, 0) if other_a.size > 0 else 0,
        address(b, 0) if b.size > 0 else 0,
        address(other_b, 0) if other_b.size > 0 else 0,
        blocks_a,
        blocks,
    )


@kernel
def count_lines(region: Region) -> int:
    """Lines of each tensor in a region; none where there is no tensor."""
    what = region.tensors
    return region.planes * region.rows * region.size[2] * what.blocks if what.a else 0


@kernel
def place(region: Region, line: int) -> tuple[int, int]:
    """Addresses of one of a region's lines in a tensor and in the other one (0 if there is none)."""
    what, (D, H, W) = region.tensors, region.size
    run = line // (region.rows * W)
    block, plane = run // region.planes, run % region.planes
    d, h = min(max(region.start[0] + plane, 0), D - 1), min(max(region.start[1], 0), H - 1)
    first, other, blocks = what.a, what.other_a, what.blocks_a
    if block >= what.blocks_a:
        first, other, blocks = what.b, what.other_b, what.blocks - what.blocks_a
        block -= what.blocks_a
    row = ((region.n * blocks + block) * D + d) * H + h
    at = (row * W + line % (region.rows * W)) * LINE
    return first + at, other + at if other else 0


@kernel
def upcoming(first: Region, second: Region, part: int, parts: int) -> Lines:
    """One of ``parts`` shares of the lines of two regions."""
    before = count_lines(first)
    total = before + count_lines(second)
    line = part * total // parts
    if line < before:
        a, b = place(first, line)
    else:
        a, b = place(second, line - before)
    return Lines(a, b, total // parts + 1)


@kernel
def part_of(lines: Lines, part: int, parts: int, otherwise: int) -> Lines:
    """One of ``parts`` parts of a share; the second run is at ``otherwise`` if there is none."""
    size = lines.left // parts + 1
    offset = part * size * LINE
    return Lines(lines.a + offset, lines.b + offset if lines.b else otherwise, size)
