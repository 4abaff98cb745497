"""bfloat16 by integer arithmetic against its definition, and what error feedback promises."""

import numpy as np
import pytest
from checkers import normal, unchanged
from hypothesis import given
from hypothesis import strategies as st

from kernels.base import machine
from kernels.base.buffers import CHUNK
from kernels.ops import bfloat16

SIZES = st.sampled_from([1, 7, CHUNK - 1, CHUNK + 1])


def encoded(values, residual=None):
    values = np.asarray(values, np.float32)
    residual = np.zeros_like(values) if residual is None else residual
    dst = np.empty(values.shape, np.uint16)
    bfloat16.encode(values, residual, dst)
    return dst, residual


def decoded(halves):
    return (np.asarray(halves, np.uint32) << 16).view(np.float32)


def nearest(values):
    """By definition: of the two neighbours the nearer one, of two as near the even one."""
    values = np.asarray(values, np.float32)
    low = values.view(np.uint32) >> 16
    below, above = decoded(low).astype(np.float64), decoded(low + 1).astype(np.float64)
    to_below, to_above = abs(values - below), abs(above - values)
    up = (to_above < to_below) | ((to_above == to_below) & (low % 2 == 1))
    return (low + up).astype(np.uint16)


@given(SIZES, st.sampled_from([1, machine.cores()]), st.integers(0, 99))
def test_it_rounds_to_nearest_and_keeps_the_difference(size, threads, seed):
    machine.set_threads(threads)
    values = normal(np.random.default_rng(seed), size)
    with unchanged(values):
        sent, residual = encoded(values)
    np.testing.assert_array_equal(sent, nearest(values))
    np.testing.assert_array_equal(decoded(sent) + residual, values)


def test_ties_go_to_the_even_number():
    # 1 + 1/256 lies between 1 and 1 + 1/128, 1 + 3/256 between 1 + 1/128 and 1 + 2/128.
    sent, _ = encoded([1 + 1 / 256, 1 + 3 / 256, -1 - 1 / 256])
    np.testing.assert_array_equal(decoded(sent), np.float32([1, 1 + 2 / 128, -1]))


def test_what_is_not_finite_stays_so_and_leaves_nothing():
    sneaky = np.uint32(0x7F800001).view(np.float32)
    sent, residual = encoded([np.inf, -np.inf, np.nan, sneaky, 3.4e38, 1.0])
    values = decoded(sent)
    np.testing.assert_array_equal(values[[0, 1, 5]], [np.inf, -np.inf, 1.0])
    assert np.isnan(values[2:4]).all()
    assert np.isinf(values[4])  # the next bfloat16 after the largest one
    np.testing.assert_array_equal(residual, 0)


def test_small_numbers_add_up_until_they_are_sent():
    # A thousandth beside 1 is below half a bit of bfloat16: without feedback it never arrives.
    value, total = np.float32([1.001]), np.zeros(1)
    residual = np.zeros(1, np.float32)
    for _ in range(1000):
        sent, residual = encoded(value, residual)
        total += decoded(sent)
    assert total[0] == pytest.approx(1001.0, abs=0.01)
    assert decoded(encoded(value)[0])[0] == 1.0


@given(SIZES, st.integers(1, 4))
def test_sums_are_taken_in_order(size, terms):
    src = np.stack([encoded(normal(np.random.default_rng(seed), size))[0] for seed in range(terms)])
    dst = np.full(size, np.nan, np.float32)
    bfloat16.decode_sum(src, dst)
    expected = decoded(src[0])
    for term in src[1:]:
        expected = expected + decoded(term)
    np.testing.assert_array_equal(dst, expected)


def test_arrays_of_other_shapes_and_types_are_refused():
    floats, halves = np.zeros(3, np.float32), np.zeros(3, np.uint16)
    with pytest.raises(ValueError, match="residual"):
        bfloat16.encode(floats, floats[:2], halves)
    with pytest.raises(TypeError, match="dst"):
        bfloat16.encode(floats, floats, floats)
    with pytest.raises(ValueError, match="src"):
        bfloat16.decode_sum(halves[:2].reshape(1, 2), floats)


def test_what_cannot_be_changed_in_place_is_refused():
    half, single = np.zeros((1, 4), np.uint16), np.zeros(8, np.float32)
    with pytest.raises(ValueError, match=r"^dst must be contiguous, got strides \(8,\)"):
        bfloat16.decode_sum(half, single[::2])
    fixed = np.zeros(4, np.float32)
    fixed.setflags(write=False)
    with pytest.raises(ValueError, match=r"^dst must be writeable"):
        bfloat16.decode_sum(half, fixed)
    with pytest.raises(ValueError, match=r"^residual must be writeable"):
        bfloat16.encode(single[:4], fixed, half[0])
    with pytest.raises(ValueError, match=r"^src must have the axes \(n\)"):
        bfloat16.encode(*(np.zeros((2, 4), kind) for kind in ("f4", "f4", "u2")))
