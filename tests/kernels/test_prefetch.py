"""What is fetched ahead is what will be read: the shares of all planes together, each line once."""

import numpy as np
import pytest

from kernels.base.buffers import empty
from kernels.base.prefetch import Region, lines, part_of, place, tensors, upcoming
from kernels.base.simd import LINE

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


def test_place_walks_through_both_tensors_and_what_is_read_beside_them() -> None:
    a, also, b = volume(2), volume(2), volume(1)
    what = tensors(a.reshape(-1), also.reshape(-1), b.reshape(-1), EMPTY, 2, 3)
    region = Region(1, SIZE, (1, 2, 0), 2, 2)
    places = [place(what, region, i) for i in range(lines(what, region))]
    assert [at for at, _ in places] == expected(a, region) + expected(b, region)
    assert [beside for _, beside in places] == expected(also, region) + [0] * 20


@pytest.mark.parametrize("parts", [2, 4, 12])
def test_shares_cover_both_regions(parts: int) -> None:
    a, x = volume(1), volume(1)
    first = tensors(a.reshape(-1), EMPTY, EMPTY, EMPTY, 1, 1)
    second = tensors(x.reshape(-1), EMPTY, EMPTY, EMPTY, 1, 1)
    region, other = Region(0, SIZE, (0, 0, 0), 3, 4), Region(1, SIZE, (0, 0, 0), 3, 4)
    fetched: set[int] = set()
    for part in range(parts):
        share = upcoming(first, region, second, other, part, parts)
        for piece in range(3):
            at, beside, count = part_of(share, piece, 3, -1)
            assert beside == -1
            fetched |= {at + LINE * i for i in range(count)}
    assert fetched >= {*expected(a, region), *expected(x, other)}


def test_no_tensor_has_no_lines() -> None:
    nothing = tensors(EMPTY, EMPTY, EMPTY, EMPTY, 0, 0)
    assert lines(nothing, Region(0, SIZE, (0, 0, 0), 3, 4)) == 0


def test_planes_outside_of_the_volume_are_fetched_from_inside() -> None:
    a = volume(1)
    what = tensors(a.reshape(-1), EMPTY, EMPTY, EMPTY, 1, 1)
    region = Region(1, SIZE, (-1, -1, 0), 5, 4)
    inside = range(a.ctypes.data, a.ctypes.data + a.nbytes)
    assert all(place(what, region, i)[0] in inside for i in range(lines(what, region)))
