"""Max pooling: float32 kernels against NumPy, exactly; NumPy against the definition; gradients."""

import itertools

import numpy as np
import pytest
from checkers import assert_exact, check_gradients, integers, normal, unchanged
from hypothesis import given
from hypothesis import strategies as st

from kernels.base import machine
from kernels.ops import pooling

# Each is compiled: the U-Net's two, and one with three different sizes.
WINDOWS = st.sampled_from([(2, 2, 2), (1, 2, 2), (3, 1, 2)])
CHANNELS = st.sampled_from([1, 3, 16, 17, 32])


@st.composite
def volumes(draw):
    """Volumes that the largest window fits into, with and without a rest at their end."""
    sizes = [draw(st.integers(low, 9)) for low in (3, 2, 2)]
    return (draw(st.integers(1, 2)), *sizes, draw(CHANNELS))


@given(
    shape=volumes(),
    size=WINDOWS,
    seed=st.integers(0, 99),
    threads=st.sampled_from([1, machine.cores()]),
    nan=st.booleans(),
)
def test_equals_reference_exactly(shape, size, seed, threads, nan):
    """Whole numbers from -4 to 4 have many ties."""
    machine.set_threads(threads)
    generator = np.random.default_rng(seed)
    src = integers(generator, *shape)
    if nan:
        src[generator.random(shape) < 0.1] = np.nan
    exact, exact_argmax = pooling.forward(src.astype(np.float64), size)
    diff_dst = integers(generator, *exact.shape)
    with unchanged(src, diff_dst):
        dst, argmax = pooling.forward(src, size)
        diff_src = pooling.backward(diff_dst, argmax, shape, size)
    assert dst.dtype == diff_src.dtype == np.float32
    assert argmax.dtype == exact_argmax.dtype == np.uint8
    assert_exact(dst, exact)
    assert_exact(argmax, exact_argmax)
    exact_diff = pooling.backward(diff_dst.astype(np.float64), argmax, shape, size)
    assert_exact(diff_src, exact_diff)


def test_reference_is_the_definition():
    generator = np.random.default_rng(0)
    KD, KH, KW = size = (2, 3, 1)
    src = integers(generator, 2, 5, 7, 3, 4, dtype=np.float64)
    dst, argmax = pooling.forward(src, size)
    assert dst.shape == (2, 2, 2, 3, 4)
    diff_dst = integers(generator, *dst.shape, dtype=np.float64)
    expected = np.zeros_like(src)
    for n, od, oh, ow, c in itertools.product(*map(range, dst.shape)):
        window = src[n, od * KD :, oh * KH :, ow * KW :, c][:KD, :KH, :KW]
        assert dst[n, od, oh, ow, c] == window.max()
        first = np.unravel_index(window.argmax(), size)
        assert argmax[n, od, oh, ow, c] == (first[0] * KH + first[1]) * KW + first[2]
        at = (n, od * KD + first[0], oh * KH + first[1], ow * KW + first[2], c)
        expected[at] = diff_dst[n, od, oh, ow, c]
    assert_exact(pooling.backward(diff_dst, argmax, src.shape, size), expected)


def test_first_of_equals_wins():
    src = np.ones((1, 2, 2, 2, 3), np.float32)
    dst, argmax = pooling.forward(src)
    assert_exact(dst, np.ones((1, 1, 1, 1, 3), np.float32))
    assert_exact(argmax, np.zeros((1, 1, 1, 1, 3), np.uint8))
    src[0, 1, 0, 1, 1] = 2
    assert_exact(pooling.forward(src)[1].ravel(), np.array([0, 5, 0], np.uint8))


def test_infinite_volumes():
    src = np.full((1, 2, 2, 2, 1), -np.inf, np.float32)
    dst, argmax = pooling.forward(src)
    assert dst.item() == -np.inf
    assert argmax.item() == 0


def test_gradients():
    src = normal(np.random.default_rng(0), 2, 5, 4, 7, 3, dtype=np.float64)
    _, argmax = pooling.forward(src)
    check_gradients(
        lambda src: pooling.forward(src)[0], lambda diff: [pooling.backward(diff, argmax, src.shape)], [src]
    )


def test_errors():
    src = np.zeros((1, 4, 4, 4, 2), np.float32)
    dst, argmax = pooling.forward(src)
    with pytest.raises(ValueError, match=r"size must fit into the volume \(4, 4, 4\)"):
        pooling.forward(src, (5, 2, 2))
    with pytest.raises(ValueError, match="size must have at most 256 taps"):
        pooling.forward(src, (8, 8, 8))
    with pytest.raises(ValueError, match="size must be three whole numbers from 1 on"):
        pooling.forward(src, (2, 2))
    with pytest.raises(ValueError, match="size must be three whole numbers from 1 on"):
        pooling.forward(src, (2, 0, 2))
    with pytest.raises(ValueError, match="src must have the axes"):
        pooling.forward(src[0])
    with pytest.raises(TypeError, match="argmax must be uint8"):
        pooling.backward(dst, argmax.astype(np.int32), src.shape)
    with pytest.raises(ValueError, match="diff_dst must have shape"):
        pooling.backward(dst, argmax, (1, 6, 4, 4, 2))
    with pytest.raises(ValueError, match="src_shape must have the axes"):
        pooling.backward(dst, argmax, (4, 4, 4))
