"""Arrays copied and summed by words, as NumPy does."""

import numpy as np
import pytest
from checkers import assert_exact
from hypothesis import given
from hypothesis import strategies as st

from kernels import machine
from kernels.arrays import copy, sum_of_words

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
def test_sum_of_words(size, threads):
    machine.set_threads(min(threads, machine.cores()))
    array = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    assert sum_of_words(array) == sum(array.view(np.uint32).tolist())
    assert sum_of_words(-array) != sum_of_words(array) or size == 0
