"""Layouts round-trip, agree with their offset functions, and keep padding lanes zero."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from kernels.base import buffers, layout
from kernels.base.buffers import empty, past_caches

sizes = st.integers(1, 5)
channels = st.integers(1, 40)


def numbered(*shape):
    """Distinct values, exact in float32; none is zero, so that padding cannot be mistaken."""
    return (1 + np.arange(np.prod(shape))).reshape(shape).astype(np.float32)


@given(MB=st.integers(1, 3), D=sizes, H=sizes, W=sizes, C=channels)
def test_activations_round_trip(MB, D, H, W, C):
    src = numbered(MB, D, H, W, C)
    blocked = layout.reorder_ndhwc_to_nCdhw16c(src)
    assert blocked.shape == (MB, layout.blocks(C), D, H, W, 16)
    assert_array_equal(layout.reorder_nCdhw16c_to_ndhwc(blocked, C), src)
    lanes = np.moveaxis(blocked, 1, 4).reshape(MB, D, H, W, -1)
    assert_array_equal(lanes[..., :C], src)
    assert not lanes[..., C:].any()


@given(MB=st.integers(1, 2), D=sizes, H=sizes, W=sizes, C=channels, data=st.data())
def test_offset_function_of_nCdhw16c(MB, D, H, W, C, data):  # noqa: N802
    src = numbered(MB, D, H, W, C)
    flat = layout.reorder_ndhwc_to_nCdhw16c(src).reshape(-1)
    n, d, h, w, c = (data.draw(st.integers(0, size - 1)) for size in src.shape)
    CB = layout.blocks(C)
    offset = ((((n * CB + c // 16) * D + d) * H + h) * W + w) * 16 + c % 16
    assert flat[offset] == src[n, d, h, w, c]


@given(OC=channels, IC=channels, KD=sizes, KH=sizes, KW=sizes)
def test_weights_round_trip(OC, IC, KD, KH, KW):
    weights = numbered(OC, IC, KD, KH, KW)
    blocked = np.full((layout.blocks(OC), layout.blocks(IC), KD, KH, KW, 16, 16), np.nan, np.float32)
    layout.pack_weights(weights, blocked.reshape(*blocked.shape[:2], -1, 16, 16))
    back = np.full((OC, IC, KD * KH * KW), np.nan, np.float32)
    layout.unpack_weights(blocked.reshape(1, *blocked.shape[:2], -1, 16, 16), back)
    assert_array_equal(back.reshape(weights.shape), weights)
    assert np.count_nonzero(blocked) == weights.size
    assert blocked[-1, -1, 0, -1, 0, (IC - 1) % 16, (OC - 1) % 16] == weights[-1, -1, 0, -1, 0]


def test_padding_lanes_are_dropped_on_the_way_back():
    blocked = np.full((1, 2, 1, 1, 3, 16), np.nan, np.float32)
    blocked[:, 0] = 1.0
    blocked[:, 1, ..., :4] = 2.0
    assert_array_equal(
        layout.reorder_nCdhw16c_to_ndhwc(blocked, 20),
        np.concatenate([np.ones((1, 1, 1, 3, 16)), np.full((1, 1, 1, 3, 4), 2.0)], axis=-1),
    )


@given(
    size=st.tuples(sizes, sizes, sizes),
    before=st.tuples(*[st.integers(0, 3)] * 3),
    after=st.tuples(*[st.integers(0, 3)] * 3),
    dilation=st.tuples(*[st.integers(1, 2)] * 3),
    C=st.sampled_from([1, 3, 4, 16, 20]),
)
def test_pack_src_surrounds_with_zeros(size, before, after, dilation, C):
    src = numbered(*size, C)
    width = C if C <= 4 else 16
    spread = [b + (s - 1) * k + 1 + a for b, s, k, a in zip(before, size, dilation, after, strict=True)]
    panel = np.full((-(-C // width), *spread, width), np.nan, np.float32)
    layout.pack_src(src, panel, before, dilation)
    slices = [slice(b, b + (s - 1) * k + 1, k) for b, s, k in zip(before, size, dilation, strict=True)]
    lanes = np.moveaxis(panel[(slice(None), *slices)], 0, 3).reshape(*size, -1)
    assert_array_equal(lanes[..., :C], src)
    assert np.count_nonzero(panel) == src.size


def test_pack_src_past_the_caches(monkeypatch):
    src = numbered(3, 4, 5, 20)
    expected = np.full((2, 5, 6, 7, 16), np.nan, np.float32)
    layout.pack_src(src, expected, (1, 1, 1), (1, 1, 1))
    monkeypatch.setattr(buffers, "_STREAMED", 0)
    panel = empty(expected.shape)
    panel[:] = np.nan
    assert past_caches(panel)
    layout.pack_src(src, panel, (1, 1, 1), (1, 1, 1))
    assert_array_equal(panel, expected)


@given(OC=channels, IC=channels, KD=sizes, KH=sizes, KW=sizes, lanes=st.sampled_from([16, 32]))
def test_adjoint_weights_are_reversed_and_transposed(OC, IC, KD, KH, KW, lanes):
    weights = numbered(OC, IC, KD, KH, KW)
    taps, groups, ICB = KD * KH * KW, -(-IC // lanes), layout.blocks(OC)
    panel = np.full((groups, ICB, taps, 16, lanes), np.nan, np.float32)
    layout.pack_weights(weights, panel, adjoint=True)
    back = panel.transpose(1, 3, 0, 4, 2).reshape(ICB * 16, groups * lanes, taps)
    assert_array_equal(back[:OC, :IC], weights.reshape(OC, IC, taps)[:, :, ::-1])
    assert np.count_nonzero(panel) == weights.size


@given(OC=channels, IC=channels, KD=sizes, KH=sizes, chunks=st.integers(1, 3))
def test_partial_weights_are_added_up(OC, IC, KD, KH, chunks):
    OCB, ICB, taps = layout.blocks(OC), layout.blocks(IC), KD * KH * 3
    partial = numbered(chunks, OCB, ICB, taps, 16, 16)
    dst = np.full((OC, IC, taps), np.nan, np.float32)
    layout.unpack_weights(partial, dst)
    total = partial.sum(axis=0).transpose(0, 4, 1, 3, 2).reshape(OCB * 16, ICB * 16, taps)
    assert_array_equal(dst, total[:OC, :IC])


def test_wrong_channel_counts_are_named():
    with pytest.raises(ValueError, match="2 channel blocks; 40 channels need 3"):
        layout.reorder_nCdhw16c_to_ndhwc(np.zeros((1, 2, 1, 1, 1, 16), np.float32), 40)


@pytest.mark.parametrize(
    "reorder",
    [
        lambda kind: layout.reorder_ndhwc_to_nCdhw16c(np.ones((1, 1, 1, 2, 16), kind)),
        lambda kind: layout.reorder_nCdhw16c_to_ndhwc(np.ones((1, 1, 1, 1, 2, 16), kind), 16),
    ],
)
def test_other_types_are_refused(reorder):
    for kind in (np.float64, np.int64):
        with pytest.raises(TypeError, match=rf"must be float32, got {np.dtype(kind)}"):
            reorder(kind)
