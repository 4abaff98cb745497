"""Transposed convolution: against its definition, and tied to the convolution; exactly, on integers."""

import itertools

import numpy as np
import pytest
from checkers import assert_close, assert_exact, check_gradients, integers, normal, unchanged
from hypothesis import given
from hypothesis import strategies as st

from kernels import conv3d
from kernels.base import machine
from kernels.ops import transposed_conv

NAMES = ("dst", "diff_src", "diff_weights", "diff_bias")
CHANNELS = st.sampled_from([1, 3, 8, 16, 17, 32, 40])
SIZES = st.tuples(st.integers(1, 2), *[st.sampled_from([1, 2, 3, 5, 13])] * 3)


@st.composite
def disjoint(draw):
    """Kernel equal to stride: what the register tiles take."""
    stride = draw(st.sampled_from([(2, 2, 2), (1, 2, 2), (2, 1, 1), (4, 3, 2)]))
    IC, OC = draw(CHANNELS), draw(CHANNELS)
    padding = draw(st.sampled_from(["same", "valid"]))
    return (*draw(SIZES), IC), (IC, OC, *stride), stride, padding


@st.composite
def general(draw):
    """Kernels and strides of 1 to 4; along W fewer, as each is compiled by itself."""
    kernel = (draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.sampled_from([1, 3])))
    stride = (draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 3])))
    IC, OC = draw(st.sampled_from([1, 3, 16])), draw(st.sampled_from([1, 5, 16]))
    size = (draw(st.integers(1, 2)), *(draw(st.integers(1, 5)) for _ in range(3)))
    return (*size, IC), (IC, OC, *kernel), stride, draw(st.sampled_from(["same", "valid"]))


def output_size(size, kernel, stride, padding):
    """As Keras documents it."""
    return size * stride + (max(kernel - stride, 0) if padding == "valid" else 0)


def definition(src, weights, bias, stride, padding):
    """Add the scaled kernel at each source voxel; "same" cuts what hangs over, the smaller half first."""
    MB, *sizes, _ = src.shape
    OC, *kernel = weights.shape[1:]
    out = [output_size(*axis, padding) for axis in zip(sizes, kernel, stride, strict=True)]
    before = [max(k - s, 0) // 2 if padding == "same" else 0 for k, s in zip(kernel, stride, strict=True)]
    # Room for the whole of the last kernel, and for the stride after it.
    dst = np.zeros((MB, *(o + k + s for o, k, s in zip(out, kernel, stride, strict=True)), OC))
    for voxel in itertools.product(*map(range, sizes)):
        for tap in itertools.product(*map(range, kernel)):
            at = tuple(v * s + t for v, s, t in zip(voxel, stride, tap, strict=True))
            dst[(slice(None), *at)] += src[(slice(None), *voxel)] @ weights[(..., *tap)]
    return dst[(slice(None), *(slice(b, b + o) for b, o in zip(before, out, strict=True)))] + bias


def problem(src_shape, weights_shape, stride, padding, seed=0, make=integers, dtype=np.float32):
    generator = np.random.default_rng(seed)
    out = [
        output_size(*axis, padding) for axis in zip(src_shape[1:4], weights_shape[2:], stride, strict=True)
    ]
    dst_shape = (src_shape[0], *out, weights_shape[1])
    shapes = (src_shape, weights_shape, weights_shape[1:2], dst_shape)
    return *(make(generator, *shape, dtype=dtype) for shape in shapes), stride, padding


def run(src, weights, bias, diff_dst, stride, padding):
    kernel = weights.shape[2:]
    return (
        transposed_conv.forward(src, weights, bias, stride, padding),
        transposed_conv.backward_data(diff_dst, weights, src.shape, stride, padding),
        *transposed_conv.backward_weights(src, diff_dst, kernel, stride, padding),
    )


def in_float64(arguments):
    return (*(array.astype(np.float64) for array in arguments[:4]), *arguments[4:])


@given(
    case=st.one_of(disjoint(), general()),
    seed=st.integers(0, 99),
    threads=st.sampled_from([1, machine.cores()]),
)
def test_equals_reference_exactly(case, seed, threads):
    machine.set_threads(threads)
    arguments = problem(*case, seed=seed)
    with unchanged(*arguments[:4]):
        actual = run(*arguments)
    for name, got, wanted in zip(NAMES, actual, run(*in_float64(arguments)), strict=True):
        assert got.dtype == np.float32, name
        assert got.flags.c_contiguous, name
        assert_exact(got, wanted, name)


@given(case=general(), seed=st.integers(0, 99))
def test_reference_is_the_definition(case, seed):
    arguments = problem(*case, seed=seed, dtype=np.float64)
    src, weights, bias, _, stride, padding = arguments
    dst = transposed_conv.forward(src, weights, bias, stride, padding)
    assert_exact(dst, definition(src, weights, bias, stride, padding))


@given(case=st.one_of(disjoint(), general()), seed=st.integers(0, 99))
def test_adjoint_identity(case, seed):
    """<convT x, y> = <x, backward_data y> = <w, backward_weights(x, y)>, and it is conv3d's transpose."""
    src, weights, _, diff_dst, stride, padding = problem(*case, seed=seed)
    zero = np.zeros(weights.shape[1], np.float32)
    dst, diff_src, diff_weights, _ = run(src, weights, zero, diff_dst, stride, padding)
    product = np.vdot(dst.astype(np.float64), diff_dst)
    assert product == np.vdot(src.astype(np.float64), diff_src)
    assert product == np.vdot(weights.astype(np.float64), diff_weights)
    assert_exact(diff_src, conv3d.forward(diff_dst, weights, None, stride, padding))


@pytest.mark.parametrize(("IC", "OC", "size"), [(64, 32, 3), (32, 16, 12), (32, 16, 24)])
def test_shapes_of_the_unet(IC, OC, size):
    case = ((1, size, size, size, IC), (IC, OC, 2, 2, 2), (2, 2, 2), "same")
    arguments = problem(*case)
    for name, got, wanted in zip(NAMES, run(*arguments), run(*in_float64(arguments)), strict=True):
        assert_exact(got, wanted, name)


def test_error_against_float64():
    """Rounding of N products summed in float32 is about sqrt(N) * 2^-24 of the largest; 4 times allowed.

    forward sums 32 products, backward_data 8 * 16, backward_weights 6 * 7 * 8 voxels.
    """
    case = ((1, 6, 7, 8, 32), (32, 16, 2, 2, 2), (2, 2, 2), "same")
    arguments = problem(*case, make=normal)
    expected = run(*in_float64(arguments))
    counts = (32, 8 * 16, 6 * 7 * 8, 8 * 6 * 7 * 8)
    for name, got, wanted, count in zip(NAMES, run(*arguments), expected, counts, strict=True):
        assert_close(got, wanted, 4 * np.sqrt(count) * 2**-24, name)


def test_repeats_bit_for_bit_whatever_the_threads():
    case = ((2, 13, 14, 15, 32), (32, 16, 2, 2, 2), (2, 2, 2), "same")
    arguments = problem(*case, make=normal)
    results = []
    for threads in (1, machine.cores(), machine.cores()):
        machine.set_threads(threads)
        results.append(run(*arguments))
    for name, *values in zip(NAMES, *results, strict=True):
        assert_exact(values[1], values[0], name)
        assert_exact(values[2], values[0], name)


@pytest.mark.parametrize("stride", [(2, 2, 2), (1, 2, 1)])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_gradients(stride, padding):
    case = ((2, 3, 2, 4, 3), (3, 2, 2, 3, 2), stride, padding)
    src, weights, bias, *_ = problem(*case, make=normal, dtype=np.float64)

    def forward(*inputs):
        return transposed_conv.forward(*inputs, stride, padding)

    def backward(diff_dst):
        return run(src, weights, bias, diff_dst, stride, padding)[1:]

    check_gradients(forward, backward, [src, weights, bias])


def test_default_is_doubling_without_bias():
    src, weights, *_ = problem((1, 2, 3, 4, 5), (5, 6, 2, 2, 2), (2, 2, 2), "same")
    dst = transposed_conv.forward(src, weights)
    assert_exact(dst, definition(src, weights, np.zeros(6), (2, 2, 2), "same"))


def test_errors():
    src, weights, bias, diff_dst, *_ = problem((1, 2, 3, 4, 5), (5, 6, 2, 2, 2), (2, 2, 2), "same")
    forward, backward = transposed_conv.forward, transposed_conv.backward_data
    with pytest.raises(ValueError, match="src must have 4 channels to go with weights"):
        forward(src, weights[:4])
    with pytest.raises(ValueError, match=r"bias must have shape \(6,\), got \(5,\)"):
        forward(src, weights, bias[:5])
    with pytest.raises(TypeError, match="weights must be float32, got float64"):
        forward(src, weights.astype(np.float64))
    with pytest.raises(ValueError, match='padding must be "same" or "valid", got \'full\''):
        forward(src, weights, bias, (2, 2, 2), "full")
    with pytest.raises(ValueError, match="stride must be three whole numbers"):
        forward(src, weights, bias, (2, 2))
    with pytest.raises(ValueError, match="stride must be three whole numbers"):
        forward(src, weights, bias, 0)
    with pytest.raises(ValueError, match=r"diff_dst must have shape \(1, 4, 6, 8, 6\)"):
        backward(diff_dst[:, :3], weights, src.shape)
    with pytest.raises(ValueError, match=r"src_shape must be \(MB, ID, IH, IW, 5\)"):
        backward(diff_dst, weights, (1, 2, 3, 4, 6))
    with pytest.raises(ValueError, match="diff_dst must have shape"):
        transposed_conv.backward_weights(src, diff_dst, (3, 3, 3), (2, 2, 2), "valid")
    with pytest.raises(ValueError, match="kernel must be three whole numbers"):
        transposed_conv.backward_weights(src, diff_dst, (2, 2))
