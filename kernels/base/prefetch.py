"""Fetching what will be read soon while registers multiply: memory and arithmetic at the same time.

Packing a brick waits for memory, and multiplying it leaves memory idle. So the products of each plane of
points fetch a share of what comes next, a cache line for each step of their loops: what the next brick will
pack, and what this one's epilogue will read beside its results::

    plane of points    0        1        2        ...                    some 36
    its products fetch   source of the next brick, plane by plane  |  x of this brick

Rows of a brick lie one after the other in a plane of the volume, so a share is one run of lines. A line at a
time, because a processor waits for some ten to twenty lines at once; what is asked for beyond that stops the
arithmetic, or is dropped.
"""

from typing import NamedTuple

from kernels.base.arguments import Floats, Triple
from kernels.base.jit import kernel
from kernels.base.simd import LINE, address


class Tensors(NamedTuple):
    """Addresses of one or two blocked tensors, ``a`` and ``b``, which make ``blocks`` channel blocks.

    ``also_a`` and ``also_b`` are read beside them, voxel by voxel; 0 where there is none.
    """

    a: int
    also_a: int
    b: int
    also_b: int
    blocks_a: int
    blocks: int


NOTHING = Tensors(0, 0, 0, 0, 0, 0)


class Region(NamedTuple):
    """Rows ``start[1]`` to ``start[1] + rows`` of some planes of image ``n``, of all channel blocks."""

    n: int
    size: Triple
    start: Triple
    planes: int
    rows: int


@kernel
def tensors(a: Floats, also_a: Floats, b: Floats, also_b: Floats, blocks_a: int, blocks: int) -> Tensors:
    """Addresses of flat arrays, which may be empty."""
    return Tensors(
        address(a, 0) if a.size > 0 else 0,
        address(also_a, 0) if also_a.size > 0 else 0,
        address(b, 0) if b.size > 0 else 0,
        address(also_b, 0) if also_b.size > 0 else 0,
        blocks_a,
        blocks,
    )


@kernel
def lines(what: Tensors, region: Region) -> int:
    """How many lines of each tensor a region has; none where there is no tensor."""
    return region.planes * region.rows * region.size[2] * what.blocks if what.a else 0


@kernel
def place(what: Tensors, region: Region, line: int) -> tuple[int, int]:
    """Addresses of one of the `lines` of a region, and of the one read beside it (0 if there is none)."""
    D, H, W = region.size
    run = line // (region.rows * W)
    block, plane = run // region.planes, run % region.planes
    d, h = min(max(region.start[0] + plane, 0), D - 1), min(max(region.start[1], 0), H - 1)
    first, also, blocks = what.a, what.also_a, what.blocks_a
    if block >= what.blocks_a:
        first, also, blocks = what.b, what.also_b, what.blocks - what.blocks_a
        block -= what.blocks_a
    row = ((region.n * blocks + block) * D + d) * H + h
    at = (row * W + line % (region.rows * W)) * LINE
    return first + at, also + at if also else 0


@kernel
def upcoming(
    first: Tensors, region: Region, second: Tensors, second_region: Region, part: int, parts: int
) -> tuple[int, int, int]:
    """One of ``parts`` shares of two regions: addresses as in `place`, and how many lines."""
    before = lines(first, region)
    total = before + lines(second, second_region)
    line = part * total // parts
    if line < before:
        at, also = place(first, region, line)
    else:
        at, also = place(second, second_region, line - before)
    return at, also, total // parts + 1


@kernel
def part_of(share: tuple[int, int, int], part: int, parts: int, otherwise: int) -> tuple[int, int, int]:
    """One of ``parts`` of a share; beside it what is at ``otherwise``, if nothing else is read there."""
    at, also, count = share
    size = count // parts + 1
    offset = part * size * LINE
    return at + offset, also + offset if also else otherwise, size
