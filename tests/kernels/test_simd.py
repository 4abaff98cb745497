"""Vectors and register tiles do what their NumPy expressions do; machine figures make sense."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from kernels.base import buffers as memory
from kernels.base import machine, simd, tiles
from kernels.base.jit import kernel
from kernels.workbench import roofline


def test_vector_arithmetic():
    @kernel
    def combine(a, b, out):
        x, y = simd.load(a, 0), simd.load(b, 1)
        total = simd.fma(x, y, simd.broadcast(np.float32(2)))
        simd.store(out, 3, (total - x) * y + x)

    a = np.arange(16, dtype=np.float32)
    b = np.arange(17, dtype=np.float32) - 8
    out = np.full(20, np.nan, np.float32)
    combine(a, b, out)
    y = b[1:]
    assert_array_equal(out[3:19], ((a * y + 2) - a) * y + a)
    assert np.isnan(out[[0, 1, 2, 19]]).all()


@pytest.mark.parametrize(("high", "wide", "cols"), [(1, 1, 1), (2, 3, 1), (3, 2, 2), (1, 6, 4)])
def test_tile_is_an_outer_product(high, wide, cols):
    rows = high * wide

    @kernel
    def update(src, weights, bias, first, out):
        tile = tiles.tile_fill(bias, 0, high, wide, cols)
        for k in range(5):
            tile = tiles.tile_rank1(tile, src, k, 50, 7, weights, k * cols * 16)
        tiles.tile_store(tile, out, 0, wide * cols * 16, cols * 16, 16)
        again = tiles.tile_load(out, 0, wide * cols * 16, cols * 16, 16, high, wide, cols)
        tiles.tile_store(again, first, 0, wide * cols * 16, cols * 16, 16)
        tiles.tile_store(tiles.tile_zero(1, rows, cols), out, 0, 0, cols * 16, 16)

    generator = np.random.default_rng(0)
    src = generator.integers(-9, 9, 200).astype(np.float32)
    weights = generator.integers(-9, 9, (5, cols * 16)).astype(np.float32)
    bias = generator.integers(-9, 9, cols * 16).astype(np.float32)
    first = np.full(rows * cols * 16, np.nan, np.float32)
    zeroed = np.full_like(first, np.nan)
    update(src, weights.reshape(-1), bias, first, zeroed)
    assert_array_equal(zeroed, 0)
    expected = np.empty((high, wide, cols * 16), np.float32)
    for h in range(high):
        for w in range(wide):
            expected[h, w] = bias + src[h * 50 + w * 7 :][:5] @ weights
    assert_array_equal(first.reshape(expected.shape), expected)


def test_tile_transpose():
    @kernel
    def transpose(src, dst):
        tile = tiles.tile_load(src, 0, 20, 0, 0, 16, 1, 1)
        tiles.tile_store(tiles.tile_transpose(tile), dst, 0, 16, 0, 0)

    src = np.arange(16 * 20, dtype=np.float32)
    dst = np.full((16, 16), np.nan, np.float32)
    transpose(src, dst.reshape(-1))
    assert_array_equal(dst, src.reshape(16, 20)[:, :16].T)


def test_tile_add_takes_a_vector_or_a_tile():
    @kernel
    def add(src, dst):
        tile = tiles.tile_load(src, 0, 16, 0, 0, 3, 1, 1)
        total = tiles.tile_add(tiles.tile_add(tile, tile), simd.load(src, 48))
        tiles.tile_store(total, dst, 0, 16, 0, 0)

    src = np.arange(64, dtype=np.float32).reshape(4, 16)
    dst = np.full((3, 16), np.nan, np.float32)
    add(src.reshape(-1), dst.reshape(-1))
    assert_array_equal(dst, 2 * src[:3] + src[3])


def test_machine_figures_are_positive_and_plausible():
    found = roofline.describe()
    assert found.cores >= 1
    assert found.instruction_set in ("avx512", "avx2", "other")
    assert found.threading_layer in ("omp", "tbb", "workqueue")
    assert 1 < found.peak_gflops < 1000
    assert 1 < found.copy_gb_per_s < 2000


def test_threads_can_be_set_and_bad_counts_are_refused():
    before = machine.threads()
    try:
        machine.set_threads(1)
        assert machine.threads() == 1
        for count in (0, -1, 100_000):
            with pytest.raises(ValueError, match=f"threads is {count}"):
                machine.set_threads(count)
    finally:
        machine.set_threads(before)


def test_memory_is_aligned_and_scratchpads_are_kept():
    for shape in ((1,), (3, 5), (7, 11, 13)):
        array = memory.empty(shape)
        assert array.shape == shape
        assert array.dtype == np.float32
        assert array.ctypes.data % memory.ALIGNMENT == 0
    first = memory.scratchpad("test", 100)
    assert memory.scratchpad("test", 50).ctypes.data == first.ctypes.data
    assert memory.scratchpad("other", 50).ctypes.data != first.ctypes.data
    assert memory.scratchpad("test", 200).size >= 200


@pytest.mark.parametrize("slope", [0.0, 0.1, 1.0, 2.0])
def test_activation_of_extreme_numbers_is_the_eager_one(slope):
    """Infinity times a slope of 0 is no NaN, and NaN stays NaN."""

    @kernel
    def activate(test, value, slope, one, tile):
        slopes = simd.broadcast(slope)
        x, y = simd.load(test, 0), simd.load(value, 0)
        simd.store(one, 0, simd.where_positive(x, y, slopes))
        by = tiles.tile_load(test, 0, 0, 0, 0, 1, 1, 1)
        masked = tiles.tile_mask(tiles.tile_load(value, 0, 0, 0, 0, 1, 1, 1), by, slopes)
        tiles.tile_store(masked, tile, 0, 0, 0, 0)

    numbers = np.array([-np.inf, -3e38, -1, -1e-45, -0.0, 0.0, 1e-45, 3e38, np.inf, np.nan])
    found = np.full((2, 16), np.nan, np.float32)
    for test in (numbers, numbers[::-1]):
        x, y = (np.resize(a, 16).astype(np.float32) for a in (test, numbers))
        activate(x, y, np.float32(slope), *found)
        with np.errstate(all="ignore"):
            below = np.float32(slope) * y if slope else np.zeros_like(y)
        for array in found:
            assert_array_equal(array, np.where(x <= 0, below, y))
