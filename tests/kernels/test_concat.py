"""Concatenation and split against NumPy, exactly."""

import numpy as np
import pytest
from checkers import assert_exact, check_gradients, integers, normal, unchanged
from hypothesis import given
from hypothesis import strategies as st

from kernels.base import machine
from kernels.ops import concat

CHANNELS = st.sampled_from([1, 3, 8, 16, 17, 48])
VOXELS = st.tuples(st.integers(1, 2), *[st.sampled_from([1, 3, 7, 12])] * 3)


@given(
    voxels=VOXELS,
    channels=st.lists(CHANNELS, min_size=2, max_size=4),
    seed=st.integers(0, 99),
    threads=st.sampled_from([1, machine.cores()]),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_equals_numpy_and_splits_back(voxels, channels, seed, threads, dtype):
    machine.set_threads(threads)
    generator = np.random.default_rng(seed)
    sources = [integers(generator, *voxels, c, dtype=dtype) for c in channels]
    with unchanged(*sources):
        dst = concat.forward(*sources)
    assert dst.dtype == dtype
    assert_exact(dst, np.concatenate(sources, axis=-1))
    with unchanged(dst):
        parts = concat.backward(dst, *np.cumsum(channels[:-1]))
    for diff, source in zip(parts, sources, strict=True):
        assert diff.dtype == dtype
        assert diff.flags.c_contiguous
        assert_exact(diff, source)


def test_gradients():
    generator = np.random.default_rng(0)
    a, b = (normal(generator, 2, 3, 4, 5, c, dtype=np.float64) for c in (3, 2))
    check_gradients(concat.forward, lambda diff: concat.backward(diff, 3), [a, b])
    check_gradients(concat.forward, lambda diff: concat.backward(diff, 3, 5), [a, b, a + 1])


def test_errors():
    a = np.zeros((1, 2, 3, 4, 5), np.float32)
    with pytest.raises(ValueError, match=r"b must have shape \(1, 2, 3, 4\) before its channels"):
        concat.forward(a, np.zeros((1, 2, 3, 5, 5), np.float32))
    with pytest.raises(TypeError, match="b must be float32, got float64"):
        concat.forward(a, a.astype(np.float64))
    with pytest.raises(ValueError, match="a must have the axes"):
        concat.forward(a[0], a)
    with pytest.raises(ValueError, match=r"more\[1\] must have shape \(1, 2, 3, 4\) before its channels"):
        concat.forward(a, a, a, a[:, :1])
    with pytest.raises(ValueError, match="split must be from 3 to 4, got 2"):
        concat.backward(a, 2, 2)
    for split in (0, 5, -1):
        with pytest.raises(ValueError, match=f"split must be from 1 to 4, got {split}"):
            concat.backward(a, split)
