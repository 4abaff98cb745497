"""Arrays copied and summed by words, as NumPy does."""

import numpy as np
import pytest
from checkers import assert_exact
from hypothesis import given
from hypothesis import strategies as st

from kernels.base import machine
from kernels.base.arrays import checksum, copy
from kernels.base.buffers import CHUNK

DTYPES = st.sampled_from([np.uint8, np.float32, np.float64])


@given(size=st.sampled_from([0, 1, 5, 65_535, 200_001]), dtype=DTYPES, threads=st.integers(1, 2))
def test_copy(size, dtype, threads):
    machine.set_threads(min(threads, machine.cores()))
    src = np.random.default_rng(size).integers(0, 255, size).astype(dtype)
    dst = np.ones(size, dtype)
    copy(src, dst)
    assert_exact(dst, src)


def test_copy_of_what_is_not_alike():
    src = np.arange(24).reshape(4, 6)
    strided = np.zeros((6, 4), np.float32)
    copy(src.T, strided)
    assert_exact(strided, src.T)
    with pytest.raises(ValueError, match="broadcast"):
        copy(src, strided)


@given(size=st.sampled_from([0, 1, 5, 65_535, 200_001]), threads=st.integers(1, 2))
def test_checksum_depends_on_contents_and_their_order(size, threads):
    machine.set_threads(min(threads, machine.cores()))
    array = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    found = checksum(array)
    assert found == checksum(array.copy())
    if size > 1:
        for other in (-array, array[::-1].copy(), np.roll(array, 1), np.roll(array, CHUNK)):
            assert checksum(other) != found or np.array_equal(other, array)


@given(signs=st.lists(st.sampled_from([-1.0, 1.0]), min_size=1, max_size=40))
def test_checksum_sees_signs(signs):
    array = np.array(signs, np.float32)
    assert checksum(array) != checksum(-array)


@given(st.binary(max_size=20))
def test_checksum_of_any_type(content):
    array = np.frombuffer(content, np.uint8)
    assert checksum(array) == checksum(array.copy())
    assert not content or checksum(array ^ np.uint8(1)) != checksum(array)


def test_copy_of_what_numpy_alone_can_do():
    fixed = np.zeros(64, np.float32)
    fixed.setflags(write=False)
    with pytest.raises(ValueError, match="read-only"):
        copy(np.ones(64, np.float32), fixed)
    assert not fixed.any()
    long = np.arange(400_000, dtype=np.float32)
    expected = long.copy()
    expected[16:] = long[:-16]
    copy(long[:-16], long[16:])
    np.testing.assert_array_equal(long, expected)
    objects = np.array([1, None])
    copy(np.array([None, 3]), objects)
    assert objects.tolist() == [None, 3]
