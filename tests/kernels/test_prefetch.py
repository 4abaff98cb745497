"""What is prefetched is what will be read: the shares of all planes together, each line once."""

import numpy as np
import pytest

from kernels.base.buffers import empty
from kernels.base.simd import LINE
from kernels.conv3d.prefetch import (
    NO_REGION,
    Lines,
    Region,
    after,
    count_lines,
    part_of,
    place,
    tensors,
    upcoming,
)

EMPTY = np.zeros(0, np.float32)
SIZE = (3, 4, 5)


def volume(blocks: int) -> np.ndarray:
    return empty((2, blocks, *SIZE, 16))


def expected(array: np.ndarray, region: Region) -> list[int]:
    """Addresses of a region's voxels, block by block and plane by plane."""
    d, h, _ = region.start
    rows = slice(h, h + region.rows)
    offsets = np.arange(array.size // 16).reshape(array.shape[:-1])[region.n]
    part = offsets[:, d : d + region.planes, rows]
    return [array.ctypes.data + LINE * int(i) for i in part.reshape(-1)]


def test_place_walks_through_both_tensors_and_what_is_read_with_them() -> None:
    a, other, b = volume(2), volume(2), volume(1)
    what = tensors(a.reshape(-1), other.reshape(-1), b.reshape(-1), EMPTY, 2, 3)
    region = Region(what, 1, SIZE, (1, 2, 0), 2, 2)
    places = [place(region, i) for i in range(count_lines(region))]
    assert [at for at, _ in places] == expected(a, region) + expected(b, region)
    assert [second for _, second in places] == expected(other, region) + [0] * 20


@pytest.mark.parametrize("parts", [2, 4, 12])
def test_shares_cover_both_regions(parts: int) -> None:
    a, x = volume(1), volume(1)
    first = tensors(a.reshape(-1), EMPTY, EMPTY, EMPTY, 1, 1)
    second = tensors(x.reshape(-1), EMPTY, EMPTY, EMPTY, 1, 1)
    region, other = Region(first, 0, SIZE, (0, 0, 0), 3, 4), Region(second, 1, SIZE, (0, 0, 0), 3, 4)
    fetched: set[int] = set()
    for part in range(parts):
        share = upcoming(region, other, part, parts)
        for piece in range(3):
            at, b, count = part_of(share, piece, 3, -1)
            assert b == -1
            fetched |= {at + LINE * i for i in range(count)}
    assert fetched >= {*expected(a, region), *expected(x, other)}


def test_no_tensor_has_no_lines() -> None:
    nothing = tensors(EMPTY, EMPTY, EMPTY, EMPTY, 0, 0)
    assert nothing == NO_REGION.tensors
    assert count_lines(NO_REGION) == 0
    assert count_lines(Region(nothing, 0, SIZE, (0, 0, 0), 3, 4)) == 0


def test_planes_outside_of_the_volume_are_prefetched_from_inside() -> None:
    a = volume(1)
    what = tensors(a.reshape(-1), EMPTY, EMPTY, EMPTY, 1, 1)
    region = Region(what, 1, SIZE, (-1, -1, 0), 5, 4)
    inside = range(a.ctypes.data, a.ctypes.data + a.nbytes)
    assert all(place(region, i)[0] in inside for i in range(count_lines(region)))


def test_lines_end_after_their_count() -> None:
    lines = after(Lines(0, 1000, 3), 2)
    assert lines == (2 * LINE, 1000 + 2 * LINE, 1)
    assert after(after(lines, 1), 5)[:2] == (3 * LINE, 1000 + 3 * LINE)
