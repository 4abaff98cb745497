"""Nearest-neighbour upsampling against NumPy, exactly, and its adjoint."""

import itertools

import numpy as np
import pytest
from checkers import assert_exact, check_gradients, integers, normal, unchanged
from hypothesis import given
from hypothesis import strategies as st

from kernels.base import machine
from kernels.ops import upsample

FACTORS = st.sampled_from([(2, 2, 2), (1, 2, 2), (3, 1, 2), (1, 1, 1)])
CHANNELS = st.sampled_from([1, 3, 16, 17, 32])
VOLUMES = st.tuples(st.integers(1, 2), *[st.integers(1, 7)] * 3, CHANNELS)


@given(shape=VOLUMES, factor=FACTORS, seed=st.integers(0, 99), threads=st.sampled_from([1, machine.cores()]))
def test_equals_reference_exactly(shape, factor, seed, threads):
    machine.set_threads(threads)
    generator = np.random.default_rng(seed)
    src = integers(generator, *shape)
    exact = upsample.forward(src.astype(np.float64), factor)
    diff_dst = integers(generator, *exact.shape)
    with unchanged(src, diff_dst):
        dst = upsample.forward(src, factor)
        diff_src = upsample.backward(diff_dst, factor)
    assert dst.dtype == diff_src.dtype == np.float32
    assert_exact(dst, exact)
    assert_exact(diff_src, upsample.backward(diff_dst.astype(np.float64), factor))
    # <upsample x, y> = <x, backward y>
    assert np.vdot(dst, diff_dst) == np.vdot(src, diff_src)


def test_reference_is_the_definition():
    src = integers(np.random.default_rng(0), 2, 3, 2, 1, 4, dtype=np.float64)
    dst = upsample.forward(src, (2, 3, 4))
    assert dst.shape == (2, 6, 6, 4, 4)
    for d, h, w in itertools.product(range(6), range(6), range(4)):
        assert_exact(dst[:, d, h, w], src[:, d // 2, h // 3, w // 4])


def test_gradients():
    src = normal(np.random.default_rng(0), 2, 3, 4, 2, 3, dtype=np.float64)
    check_gradients(upsample.forward, lambda diff: [upsample.backward(diff)], [src])


def test_errors():
    src = np.zeros((1, 4, 4, 4, 2), np.float32)
    with pytest.raises(ValueError, match="factor must be three whole numbers from 1 on"):
        upsample.forward(src, (2, 2, 1.5))
    with pytest.raises(ValueError, match="src must have the axes"):
        upsample.forward(src[0])
    with pytest.raises(TypeError, match="src must be float32 or float64"):
        upsample.forward(src.astype(np.float16))
    with pytest.raises(ValueError, match=r"diff_dst must be a multiple of the factor \(3, 2, 2\)"):
        upsample.backward(src, (3, 2, 2))
