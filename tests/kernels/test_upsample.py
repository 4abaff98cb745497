"""Upsampling, nearest and trilinear: float32 against float64, that against the definition; the adjoint."""

import itertools

import numpy as np
import pytest
from checkers import assert_close, assert_exact, check_gradients, integers, normal, unchanged
from hypothesis import given
from hypothesis import strategies as st

from kernels.base import machine
from kernels.ops import upsample

FACTORS = st.sampled_from([(2, 2, 2), (1, 2, 2), (3, 1, 2), (4, 3, 1), (1, 1, 1)])
CHANNELS = st.sampled_from([1, 3, 16, 17, 32])
VOLUMES = st.tuples(st.integers(1, 2), *[st.integers(1, 7)] * 3, CHANNELS)
MODES = pytest.mark.parametrize("mode", ["nearest", "trilinear"])


@MODES
@given(shape=VOLUMES, factor=FACTORS, seed=st.integers(0, 99), threads=st.sampled_from([1, machine.cores()]))
def test_against_float64(mode, shape, factor, seed, threads):
    """Exactly, where the weights are 1 or quarters; thirds and eighths of trilinear weights round."""
    machine.set_threads(threads)
    generator = np.random.default_rng(seed)
    src = integers(generator, *shape)
    exact = upsample.forward(src.astype(np.float64), factor, mode)
    diff_dst = integers(generator, *exact.shape)
    exact_diff = upsample.backward(diff_dst.astype(np.float64), factor, mode)
    with unchanged(src, diff_dst):
        dst = upsample.forward(src, factor, mode)
        diff_src = upsample.backward(diff_dst, factor, mode)
    assert dst.dtype == diff_src.dtype == np.float32
    # <upsample x, y> = <x, backward y>
    products = np.vdot(exact, diff_dst), np.vdot(src, exact_diff)
    if mode == "nearest" or 3 not in factor:
        assert_exact(dst, exact)
        assert_exact(diff_src, exact_diff)
        assert products[0] == products[1]
    else:
        assert np.abs(dst - exact).max() <= 5e-7 * np.abs(src).max()
        FD, FH, FW = factor
        bound = 3e-7 * FD * FH * FW * (FD * FH + FW)
        assert np.abs(diff_src - exact_diff).max() <= bound * np.abs(diff_dst).max()
        assert abs(products[0] - products[1]) <= 1e-13 * np.abs(exact * diff_dst).sum()


@pytest.mark.parametrize("factor", [(2, 3, 4), (1, 2, 2), (5, 1, 3)])
def test_reference_is_the_definition(factor):
    src = integers(np.random.default_rng(0), 2, 3, 2, 1, 4, dtype=np.float64)
    dst, smooth = upsample.forward(src, factor), upsample.forward(src, factor, "trilinear")
    assert dst.shape == smooth.shape == (2, *np.multiply((3, 2, 1), factor), 4)
    for at in itertools.product(*map(range, dst.shape[1:4])):
        d, h, w = np.floor_divide(at, factor)
        assert_exact(dst[:, *at], src[:, d, h, w])
        # Between the two centres around this voxel's own, along one axis after the other.
        plane = src
        for place, scale in zip(at, factor, strict=True):
            x = (place + 0.5) / scale - 0.5
            below, size = int(np.floor(x)), plane.shape[1]
            first, second = (plane[:, min(max(i, 0), size - 1)] for i in (below, below + 1))
            plane = (1 - (x - below)) * first + (x - below) * second
        assert_close(smooth[:, *at], plane, 1e-14)


@MODES
def test_gradients(mode):
    src = normal(np.random.default_rng(0), 2, 3, 4, 2, 3, dtype=np.float64)
    factor = (2, 3, 2)
    check_gradients(
        lambda src: upsample.forward(src, factor, mode),
        lambda diff: [upsample.backward(diff, factor, mode)],
        [src],
    )


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
    for function in (upsample.forward, upsample.backward):
        with pytest.raises(ValueError, match='mode must be "nearest" or "trilinear", got \'cubic\''):
            function(src, 2, "cubic")
