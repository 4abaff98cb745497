"""Fused transposed convolution: exactly the plain operators in float64, on whole numbers."""

import numpy as np
import pytest
from checkers import assert_close, assert_exact, integers, normal, unchanged
from deferred import (
    CHANNELS,
    SIZES,
    SLOPES,
    THREADS,
    blocked,
    blocked_shape,
    deferred,
    poisoned,
    totals,
    unblocked,
)
from hypothesis import given
from hypothesis import strategies as st

from kernels.base import machine
from kernels.ops import transposed_conv

# The U-Net's two, and one with another tile.
WINDOWS = st.sampled_from([(2, 2, 2), (1, 2, 2), (2, 2, 1)])
CASES = {
    "size": SIZES,
    "IC": CHANNELS,
    "OC": CHANNELS,
    "kernel": WINDOWS,
    "slope": SLOPES,
    "seed": st.integers(0, 99),
    "threads": THREADS,
}


def problem(size, IC, OC, kernel, slope, seed):
    generator = np.random.default_rng(seed)
    data = deferred(generator, (*size, IC), slope)
    weights, bias = integers(generator, IC, OC, *kernel), integers(generator, OC)
    MB, *sizes = size
    enlarged = (i * k for i, k in zip(sizes, kernel, strict=True))
    diff_dst = integers(generator, MB, *enlarged, OC)
    packed = transposed_conv.panels(weights.shape)
    with unchanged(weights):
        transposed_conv.pack(weights, packed)
    return data, weights, packed, bias, diff_dst


@given(**CASES, with_bias=st.booleans())
def test_forward(size, IC, OC, kernel, slope, seed, threads, with_bias):
    machine.set_threads(threads)
    data, weights, packed, bias, diff_dst = problem(size, IC, OC, kernel, slope, seed)
    exact_bias = np.float64(bias) if with_bias else None
    wanted = transposed_conv.forward(data.value(), np.float64(weights), exact_bias, kernel)
    source, dst = data.source, poisoned(*blocked_shape(diff_dst.shape))
    with unchanged(*source[:3], *packed, bias):
        transposed_conv.forward_blocked(source, packed, bias if with_bias else None, dst)
    assert_exact(unblocked(dst, OC), wanted)


@given(**CASES, accumulate=st.booleans(), masked=st.booleans())
def test_backward_data(size, IC, OC, kernel, slope, seed, threads, accumulate, masked):
    machine.set_threads(threads)
    data, weights, packed, _, diff_dst = problem(size, IC, OC, kernel, slope, seed)
    before = integers(np.random.default_rng(seed), *data.x.shape)
    wanted = transposed_conv.backward_data(np.float64(diff_dst), np.float64(weights), data.x.shape, kernel)
    dst = blocked(before) if accumulate else poisoned(*blocked_shape(before.shape))
    wanted = wanted + before if accumulate else wanted
    mask, diff = data.mask if masked else None, blocked(diff_dst)
    with unchanged(diff, *packed, *(mask[:3] if mask else ())):
        transposed_conv.backward_data_blocked(diff, packed, dst, accumulate, mask)
    if mask:
        wanted, *wanted_sums = data.masked(wanted)
        for name, *sums in zip(("S1", "S2"), totals(mask, IC), wanted_sums, strict=True):
            assert_exact(*sums, name)
    assert_exact(unblocked(dst, IC), wanted)


@given(**CASES)
def test_backward_weights(size, IC, OC, kernel, slope, seed, threads):
    machine.set_threads(threads)
    data, weights, _, bias, diff_dst = problem(size, IC, OC, kernel, slope, seed)
    wanted = transposed_conv.backward_weights(data.value(), np.float64(diff_dst), kernel, kernel)
    diff_weights, diff_bias = poisoned(*weights.shape), poisoned(*bias.shape)
    source, diff = data.source, blocked(diff_dst)
    with unchanged(*source[:3], diff):
        transposed_conv.backward_weights_blocked(source, diff, diff_weights, diff_bias)
    assert_exact(diff_weights, wanted[0], "diff_weights")
    assert_exact(diff_bias, wanted[1], "diff_bias")


def test_pack_refreshes():
    """Panels packed twice hold the second weights, and zeros past the last channel."""
    generator = np.random.default_rng(0)
    first, second = integers(generator, 2, 17, 3, 2, 2, 2)
    packed, fresh = transposed_conv.panels(first.shape), transposed_conv.panels(first.shape)
    transposed_conv.pack(first, packed)
    transposed_conv.pack(second, packed)
    transposed_conv.pack(second, fresh)
    for panel, wanted in zip(packed, fresh, strict=True):
        assert_exact(panel, wanted)
        assert panel.sum() == second.sum()


@pytest.mark.parametrize("size", [(1, 6, 6, 6), (1, 1, 9, 9), (2, 3, 50, 60)])
def test_error_and_repeats(size):
    """Within 4 sqrt(N) 2^-24 of float64 for sums of N, and the same whatever the threads."""
    IC, OC, kernel = 48, 24, (2, 2, 2)
    data, weights, packed, bias, diff_dst = problem(size, IC, OC, kernel, 0.0, 0)
    generator = np.random.default_rng(0)
    data = data._replace(x=normal(generator, *data.x.shape))
    diff_dst = normal(generator, *diff_dst.shape)
    exact = [np.float64(array) for array in (data.value(), weights, bias, diff_dst)]
    wanted = [
        transposed_conv.forward(*exact[:3], kernel),
        data.masked(transposed_conv.backward_data(exact[3], exact[1], exact[0].shape, kernel))[0],
        *transposed_conv.backward_weights(exact[0], exact[3], kernel, kernel),
    ]
    results = []
    for threads in (1, machine.cores()):
        machine.set_threads(threads)
        got = [
            poisoned(*blocked_shape(diff_dst.shape)),
            poisoned(*blocked_shape(data.x.shape)),
            poisoned(*weights.shape),
            poisoned(*bias.shape),
        ]
        mask = data.mask
        transposed_conv.forward_blocked(data.source, packed, bias, got[0])
        transposed_conv.backward_data_blocked(blocked(diff_dst), packed, got[1], mask=mask)
        transposed_conv.backward_weights_blocked(data.source, blocked(diff_dst), got[2], got[3])
        got[0], got[1] = unblocked(got[0], OC), unblocked(got[1], IC)
        results.append([*got, mask.sums])
    voxels = data.x[..., 0].size
    for got, again, exact_one, count in zip(
        *results, [*wanted, None], (IC, 8 * OC, voxels, 8 * voxels, None), strict=True
    ):
        assert_exact(again, got)
        if count:
            assert_close(got, exact_one, 4 * np.sqrt(count) * 2**-24)
