"""Fused convolutions against a float64 composition of what they fuse."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from kernels.base import layout, machine
from kernels.base.simd import LANES
from kernels.conv3d import many_channels
from kernels.conv3d import operator as fused
from kernels.deferred.statistics import BATCH, Norm, Normalisation, finish_moments
from kernels.deferred.tensors import NO_MASK, NO_SOURCE, Mask, Source, gradient, plain
from kernels.ladder import im2col

CASES = [
    # MB, D, H, W, channels of a, of b, OC, kernel, tile
    (1, 3, 5, 6, 16, 0, 16, (3, 3, 3), None),
    (2, 4, 3, 7, 5, 9, 20, (3, 3, 3), None),
    (1, 2, 3, 4, 32, 16, 36, (1, 1, 1), None),
    (1, 1, 1, 1, 16, 0, 4, (3, 3, 3), None),
    (1, 1, 9, 10, 8, 8, 16, (1, 3, 3), None),
    (1, 5, 7, 9, 16, 16, 32, (3, 3, 3), (2, 4, 4)),
    (2, 3, 5, 6, 8, 24, 16, (3, 3, 3), (2, 2, 2)),
    (1, 6, 5, 9, 20, 0, 40, (3, 3, 3), (4, 4, 4)),
    (1, 1, 9, 10, 12, 4, 16, (1, 3, 3), (1, 4, 4)),
    # Many channels: several bricks at a time and one left over; sums that allow but one block at a time.
    (5, 8, 7, 8, 32, 16, 48, (3, 3, 3), (4, 4, 4)),
    (1, 12, 11, 12, 48, 0, 64, (3, 3, 3), (4, 4, 4)),
]


def blocked(array):
    return layout.reorder_ndhwc_to_nCdhw16c(array.astype(np.float32))


def lanes(values, channels):
    """(..., C) to (..., CB * 16)."""
    values = np.asarray(values)
    padded = np.zeros((*values.shape[:-1], layout.blocks(channels) * LANES), np.float32)
    padded[..., :channels] = values
    return padded


def per_image(values, channels):
    """(MB, 1, 1, 1, C) to (MB, CB * 16)."""
    return lanes(values.reshape(-1, channels), channels)


class Problem:
    """Two deferred sources, a convolution, a deferred gradient; all in float64 too."""

    def __init__(self, MB, D, H, W, Ca, Cb, OC, kernel, tile):
        generator = np.random.default_rng(0)
        self.kernel, self.tile, self.OC, self.channels = kernel, tile, OC, (Ca, Cb)
        self.size = MB, D, H, W
        normal, each = generator.standard_normal, (MB, 1, 1, 1)
        self.raw, self.scales, self.shifts = [], [], []
        for channels in self.channels:
            self.raw.append(normal((*self.size, channels)).astype(np.float32))
            self.scales.append(normal((*each, channels)).astype(np.float32))
            self.shifts.append(normal((*each, channels)).astype(np.float32))
        self.slopes = (0.0, 0.25)
        self.weights = normal((OC, Ca + Cb, *kernel)).astype(np.float32)
        self.bias = normal(OC).astype(np.float32)
        self.dz, self.x = (normal((*self.size, OC)).astype(np.float32) for _ in range(2))
        self.abd = [normal((*each, OC)).astype(np.float32) for _ in range(3)]

    def sources(self):
        result = []
        for i in range(2):
            C = self.channels[i]
            if C == 0:
                result.append(NO_SOURCE)
                continue
            scale, shift = per_image(self.scales[i], C), per_image(self.shifts[i], C)
            result.append(Source(blocked(self.raw[i]), scale, shift, self.slopes[i]))
        return result

    def before_activation(self, i):
        return self.scales[i] * self.raw[i].astype(np.float64) + self.shifts[i]

    def src(self):
        parts = []
        for i in range(2):
            z = self.before_activation(i)
            parts.append(np.where(z > 0, z, self.slopes[i] * z))
        return np.concatenate(parts, axis=-1)

    def gradient(self):
        coefficients = [per_image(values, self.OC) for values in self.abd]
        return gradient(blocked(self.dz), blocked(self.x), *coefficients)

    def diff_dst(self):
        a, b, d = (values.astype(np.float64) for values in self.abd)
        return a * self.dz + b * self.x + d

    def diff_src(self):
        shape, weights = (*self.size, sum(self.channels)), self.weights.astype(np.float64)
        exact = im2col.backward_data(self.diff_dst(), weights, shape)
        return np.split(exact, [self.channels[0]], axis=-1)

    def destinations(self):
        MB, *size = self.size
        return tuple(nans(MB, layout.blocks(C), *size, LANES) for C in self.channels)

    def mean(self, i):
        return self.raw[i].mean(axis=(1, 2, 3), keepdims=True, dtype=np.float32)

    def masks(self, p):
        """Of both sources, for the adjoint plan ``p``; their sums are still to be filled."""
        found = []
        for i, C in enumerate(self.channels):
            if not C:
                found.append(NO_MASK)
                continue
            sums = nans(*fused.sums_shape(p, i), dtype=np.float64)
            found.append(Mask(*self.sources()[i][:4], per_image(self.mean(i), C), sums))
        return tuple(found)

    def plan(self):
        return fused.plan(self.channels, (self.OC, 0), self.size, self.kernel, self.tile)

    def adjoint_plan(self):
        return fused.plan((self.OC, 0), self.channels, self.size, self.kernel, self.tile)

    @property
    def tolerance(self):
        """Of the largest value: float32 sums of under 2000 products, or the transforms' rounding."""
        return {None: 4e-6, (2, 2, 2): 4e-6, (4, 4, 4): 1.2e-5}.get(self.tile, 6e-6)


def nans(*shape, dtype=np.float32):
    return np.full(shape, np.nan, dtype)


def assert_close(got, wanted, tolerance):
    assert np.abs(got - wanted).max() <= tolerance * np.abs(wanted).max()


@pytest.fixture(params=CASES, ids=str)
def problem(request):
    return Problem(*request.param)


@pytest.fixture(params=["brick after brick", "group after group"])
def form(request, monkeypatch):
    """Of Winograd convolutions, whatever there are more of, weights or tiles."""
    limit = np.inf if request.param == "brick after brick" else 0.0
    monkeypatch.setattr(many_channels, "_WEIGHTS_PER_TILE", limit)


@pytest.mark.parametrize("threads", [1, 2])
def test_forward_and_moments(problem, form, threads):
    machine.set_threads(min(threads, machine.cores()))
    p = problem.plan()
    packed = nans(*fused.packed_shape(p))
    fused.pack(p, problem.weights, packed)
    MB, D, H, W = problem.size
    OCB = layout.blocks(problem.OC)
    dst, moments = nans(MB, OCB, D, H, W, LANES), nans(*fused.moments_shape(p), dtype=np.float64)
    bias = lanes(problem.bias, problem.OC)
    fused.forward(p, *problem.sources(), packed, bias, dst, moments)
    exact = im2col.forward(problem.src(), problem.weights.astype(np.float64), problem.bias.astype(np.float64))
    got = layout.reorder_nCdhw16c_to_ndhwc(dst, problem.OC)
    assert_close(got, exact, problem.tolerance)
    assert not dst[:, -1, ..., (problem.OC - 1) % LANES + 1 :].any()

    C = problem.OC
    parameters = np.ones(C, np.float32), np.zeros(C, np.float32)
    running = np.zeros(C, np.float32), np.zeros(C, np.float32)
    outputs = [nans(MB, OCB * LANES) for _ in range(4)]
    finish_moments(moments, Norm(*parameters, 0.0, BATCH, 0.0, *running), Normalisation(*outputs))
    voxels = got.reshape(-1, C).astype(np.float64)
    assert_close(running[0], voxels.mean(axis=0), 1e-6)
    if len(voxels) > 1:
        assert_close(running[1], voxels.var(axis=0), 1e-5)


def test_backward_data_masked_and_plain(problem, form):
    p = problem.adjoint_plan()
    packed = nans(*fused.packed_shape(p))
    fused.pack(p, problem.weights, packed, adjoint=True)
    dst = problem.destinations()
    fused.backward_data(p, problem.gradient(), packed, dst)
    for got, wanted, C in zip(dst, problem.diff_src(), problem.channels, strict=True):
        if C:
            assert_close(layout.reorder_nCdhw16c_to_ndhwc(got, C), wanted, problem.tolerance)

    masks = problem.masks(p)
    fused.backward_data(p, problem.gradient(), packed, dst, masks)
    assert_masked(problem, dst, masks)


def assert_masked(problem, dst, masks):
    """Both gradients are those of the exact convolution, masked, and their sums are theirs."""
    for i, C in enumerate(problem.channels):
        if not C:
            continue
        slope = np.where(problem.before_activation(i) > 0, 1.0, problem.slopes[i])
        dz = problem.diff_src()[i] * slope
        got = layout.reorder_nCdhw16c_to_ndhwc(dst[i], C)
        # A value within rounding of the kink may fall on either side of it.
        away = np.abs(problem.before_activation(i)) > 1e-5
        assert_close(got * away, dz * away, problem.tolerance)
        s1, s2 = masks[i].sums.sum(axis=1)[:, :C]
        flat = got.reshape(-1, C).astype(np.float64)
        centred = (problem.raw[i].astype(np.float64) - problem.mean(i)).reshape(-1, C)
        assert np.abs(s1 - flat.sum(axis=0)).max() <= 1e-6 * np.abs(flat).sum(axis=0).max()
        wanted = (flat * centred).sum(axis=0)
        assert np.abs(s2 - wanted).max() <= 1e-6 * np.abs(flat * centred).sum(axis=0).max()


def test_backward_weights(problem):
    diff_weights, diff_bias = nans(*problem.weights.shape), nans(problem.OC)
    arguments = problem.plan(), *problem.sources(), problem.gradient()
    fused.backward_weights(*arguments, diff_weights, diff_bias)
    exact, exact_bias = im2col.backward_weights(problem.src(), problem.diff_dst(), problem.kernel)
    assert_close(diff_weights, exact, problem.tolerance)
    assert_close(diff_bias, exact_bias, 2e-6)
    machine.set_threads(1)
    again, again_bias = nans(*problem.weights.shape), nans(problem.OC)
    fused.backward_weights(*arguments, again, again_bias)
    machine.set_threads(machine.cores())
    assert_array_equal(again, diff_weights)
    assert_array_equal(again_bias, diff_bias)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "case",
    [
        (1, 1, 1, 1, 16, 0, 16, (3, 3, 3), (2, 2, 2)),
        (2, 3, 5, 6, 8, 24, 16, (3, 3, 3), (2, 2, 2)),
        (1, 5, 7, 9, 16, 16, 32, (3, 3, 3), (2, 4, 4)),
        (1, 9, 6, 5, 20, 0, 40, (3, 3, 3), (4, 4, 4)),
        (2, 5, 9, 13, 16, 0, 5, (3, 3, 3), (4, 4, 4)),
        (1, 1, 9, 10, 12, 4, 16, (1, 3, 3), (1, 4, 4)),
    ],
    ids=str,
)
def test_both_gradients_in_one_pass(case, threads):
    machine.set_threads(min(threads, machine.cores()))
    problem = Problem(*case)
    arguments = (problem.OC, 0), problem.channels, problem.size, problem.kernel, problem.tile
    p = fused.plan(*arguments, keeps_both=True)
    packed = nans(*fused.packed_shape(p))
    fused.pack(p, problem.weights, packed, adjoint=True)
    found = []
    for _ in range(2):
        dst, masks = problem.destinations(), problem.masks(p)
        diff_weights = nans(*problem.weights.shape)
        sources = problem.sources()
        fused.backward(p, problem.gradient(), packed, *sources, dst, masks, diff_weights)
        assert_masked(problem, dst, masks)
        exact, _ = im2col.backward_weights(problem.src(), problem.diff_dst(), problem.kernel)
        assert_close(diff_weights, exact, problem.tolerance)
        found.append((*dst, diff_weights))
    for first, again in zip(*found, strict=True):
        assert_array_equal(first, again)


@pytest.mark.parametrize("C", [1, 3, 4])
def test_first_layer_reads_its_channels_last(C):
    generator = np.random.default_rng(1)
    src = generator.integers(-3, 4, (2, 5, 6, 7, C)).astype(np.float32)
    weights = generator.integers(-3, 4, (20, C, 3, 3, 3)).astype(np.float32)
    diff_dst = generator.integers(-3, 4, (2, 5, 6, 7, 20)).astype(np.float32)
    p = fused.plan((C, 0), (20, 0), src.shape[:4], (3, 3, 3), channels_last=True)
    packed = nans(*fused.packed_shape(p))
    fused.pack(p, weights, packed)
    source = NO_SOURCE._replace(data=src)
    dst = nans(2, 2, 5, 6, 7, LANES)
    fused.forward(p, source, NO_SOURCE, packed, np.zeros(32, np.float32), dst)
    assert_array_equal(layout.reorder_nCdhw16c_to_ndhwc(dst, 20), im2col.forward(src, weights))
    one = lanes(np.ones((2, 20)), 20)
    diff = gradient(blocked(diff_dst), NO_SOURCE.data, one, 0 * one, 0 * one)
    diff_weights, diff_bias = nans(*weights.shape), nans(20)
    fused.backward_weights(p, source, NO_SOURCE, diff, diff_weights, diff_bias)
    exact = im2col.backward_weights(src, diff_dst, (3, 3, 3))
    assert_array_equal(diff_weights, exact[0])
    assert_array_equal(diff_bias, exact[1])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("size", "C", "OC", "kernel", "tile"),
    [
        ((1, 9, 6, 12), 4, 16, (3, 3, 3), (4, 4, 1)),
        ((2, 5, 7, 16), 3, 20, (3, 3, 5), (4, 4, 1)),
        ((1, 1, 1, 16), 1, 36, (3, 3, 3), (2, 2, 1)),
        ((2, 1, 9, 8), 2, 16, (1, 3, 3), (1, 4, 1)),
        ((1, 3, 10, 4), 4, 4, (1, 3, 1), (1, 2, 1)),
    ],
    ids=str,
)
def test_first_layer_is_transformed_along_two_axes(size, C, OC, kernel, tile, threads):
    machine.set_threads(min(threads, machine.cores()))
    generator = np.random.default_rng(4)
    src = generator.integers(-3, 4, (*size, C)).astype(np.float32)
    weights = generator.integers(-3, 4, (OC, C, *kernel)).astype(np.float32)
    diff_dst = generator.integers(-3, 4, (*size, OC)).astype(np.float32)
    bias = generator.integers(-3, 4, OC).astype(np.float32)
    p = fused.plan((C, 0), (OC, 0), size, kernel, tile, channels_last=True)
    packed = nans(*fused.packed_shape(p))
    fused.pack(p, weights, packed)
    source = NO_SOURCE._replace(data=src)
    dst, moments = nans(*blocked(diff_dst).shape), nans(*fused.moments_shape(p), dtype=np.float64)
    fused.forward(p, source, NO_SOURCE, packed, lanes(bias, OC), dst, moments)
    exact = im2col.forward(src, weights, bias)
    # Of the transforms, as F(2, 2, 2) and F(2, 4, 4) have them along two axes.
    tolerance = 1e-6 if tile[1] == 2 else 5e-6
    assert_close(layout.reorder_nCdhw16c_to_ndhwc(dst, OC), exact, tolerance)
    assert not dst.transpose(0, 2, 3, 4, 1, 5).reshape(*size, -1)[..., OC:].any()
    counts = moments[:, 0, :OC]
    assert_array_equal(counts.sum(axis=0), np.prod(size))
    means = (counts * moments[:, 1, :OC]).sum(axis=0) / np.prod(size)
    assert_close(means, exact.mean(axis=(0, 1, 2, 3), dtype=np.float64), 1e-5)
    one = lanes(np.ones((size[0], OC)), OC)
    diff = gradient(blocked(diff_dst), NO_SOURCE.data, one, 0 * one, 0 * one)
    diff_weights, diff_bias = nans(*weights.shape), nans(OC)
    fused.backward_weights(p, source, NO_SOURCE, diff, diff_weights, diff_bias)
    wanted = im2col.backward_weights(src, diff_dst, kernel)
    assert_close(diff_weights, wanted[0], tolerance)
    assert_array_equal(diff_bias, wanted[1])


def test_moments_are_as_accurate_as_two_passes():
    """Mean 1000, deviation 1: float32 resolves 6e-5 there, the variance must still come out at 1e-5."""
    generator = np.random.default_rng(2)
    src = (1000 + generator.standard_normal((1, 20, 30, 40, 16))).astype(np.float32)
    weights = np.eye(16, dtype=np.float32).reshape(16, 16, 1, 1, 1)
    p = fused.plan((16, 0), (16, 0), src.shape[:4], (1, 1, 1))
    packed = nans(*fused.packed_shape(p))
    fused.pack(p, weights, packed)
    source = plain(blocked(src), 16)
    dst, moments = nans(1, 1, 20, 30, 40, LANES), nans(*fused.moments_shape(p), dtype=np.float64)
    fused.forward(p, source, NO_SOURCE, packed, np.zeros(16, np.float32), dst, moments)
    running = np.zeros(16, np.float32), np.zeros(16, np.float32)
    one, zero = np.ones(16, np.float32), np.zeros(16, np.float32)
    outputs = [nans(1, 16) for _ in range(4)]
    finish_moments(moments, Norm(one, zero, 0.0, BATCH, 0.0, *running), Normalisation(*outputs))
    voxels = src.reshape(-1, 16).astype(np.float64)
    assert_close(running[0], voxels.mean(axis=0), 1e-7)
    assert_close(running[1], voxels.var(axis=0), 1e-5)


def test_what_has_no_algorithm_is_refused():
    with pytest.raises(ValueError, match="sizes 1, 3 and 5"):
        fused.plan((16, 0), (16, 0), (1, 4, 4, 4), (2, 2, 2))
    with pytest.raises(ValueError, match="no Winograd form"):
        fused.plan((16, 0), (16, 0), (1, 4, 4, 4), (1, 3, 3), (2, 4, 4))
    with pytest.raises(ValueError, match=r"channels_in is \(5, 0\); channels_last takes one"):
        fused.plan((5, 0), (16, 0), (1, 4, 4, 4), (3, 3, 3), channels_last=True)
    with pytest.raises(ValueError, match="no Winograd form"):
        fused.plan((4, 0), (16, 0), (1, 4, 4, 4), (3, 3, 3), (4, 4, 4), channels_last=True)
    with pytest.raises(ValueError, match=r"size is \(1, 4, 4, 5\); a row of 4 channels"):
        fused.plan((4, 0), (16, 0), (1, 4, 4, 5), (3, 3, 3), (4, 4, 1), channels_last=True)
