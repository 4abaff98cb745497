"""3-D convolution and pooling against the numbers in TensorFlow's own tests.

They are written out there, in tensorflow/python/kernel_tests/nn_ops: conv_ops_3d_test.py (found with
SciPy's ``correlate``), conv3d_transpose_test.py and pooling_ops_3d_test.py. So they hold without TensorFlow,
and whatever version of it the other tests run. Axes there are (batch, depth, height, width, channels), and
of weights (depth, height, width, in, out).
"""

import numpy as np
import pytest
from checkers import assert_close, check_gradients

from kernels import conv3d
from kernels.ops import pooling, transposed_conv

DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])

ONE = (
    *(0.18518519, 0.22222222, 0.25925926, 0.40740741, 0.5, 0.59259259, 0.62962963, 0.77777778),
    *(0.92592593, 0.85185185, 1.05555556, 1.25925926, 1.07407407, 1.33333333, 1.59259259),
    *(1.2962963, 1.61111111, 1.92592593),
)
TWO = (
    *(3.77199074, 3.85069444, 3.92939815, 4.2650463, 4.35763889, 4.45023148, 6.73032407, 6.89236111),
    *(7.05439815, 7.22337963, 7.39930556, 7.57523148, 9.68865741, 9.93402778, 10.17939815),
    *(10.18171296, 10.44097222, 10.70023148),
)
DIFFERENT_STRIDES = (
    *(0.06071429, 0.08988095, 0.10238095, 0.11488095, 0.12738095, 0.13988095, 0.08452381),
    *(0.26071429, 0.35238095, 0.36488095, 0.37738095, 0.38988095, 0.40238095, 0.23452381),
    *(0.46071429, 0.61488095, 0.62738095, 0.63988095, 0.65238095, 0.66488095, 0.38452381),
    *(1.12738095, 1.48988095, 1.50238095, 1.51488095, 1.52738095, 1.53988095, 0.88452381),
    *(1.32738095, 1.75238095, 1.76488095, 1.77738095, 1.78988095, 1.80238095, 1.03452381),
    *(1.52738095, 2.01488095, 2.02738095, 2.03988095, 2.05238095, 2.06488095, 1.18452381),
    *(2.19404762, 2.88988095, 2.90238095, 2.91488095, 2.92738095, 2.93988095, 1.68452381),
    *(2.39404762, 3.15238095, 3.16488095, 3.17738095, 3.18988095, 3.20238095, 1.83452381),
    *(2.59404762, 3.41488095, 3.42738095, 3.43988095, 3.45238095, 3.46488095, 1.98452381),
)
STRIDE_THREE = (
    *(1.51140873, 1.57167659, 1.63194444, 1.56349206, 1.62673611, 1.68998016, 1.6155754),
    *(1.68179563, 1.74801587, 1.9280754, 2.01215278, 2.09623016, 1.98015873, 2.0672123),
    *(2.15426587, 2.03224206, 2.12227183, 2.21230159, 4.4280754, 4.65500992, 4.88194444),
    *(4.48015873, 4.71006944, 4.93998016, 4.53224206, 4.76512897, 4.99801587, 4.84474206),
    *(5.09548611, 5.34623016, 4.8968254, 5.15054563, 5.40426587, 4.94890873, 5.20560516),
    *(5.46230159,),
)
STRIDE_TWO_SAME = (
    *(3.77199074, 3.85069444, 3.92939815, 2.0162037, 2.06597222, 2.11574074, 9.68865741),
    *(9.93402778, 10.17939815, 4.59953704, 4.73263889, 4.86574074),
)
EVERY_SECOND = (0.03703704, 0.11111111, 0.25925926, 0.33333333, 0.7037037, 0.77777778, 0.92592593, 1)
KERNEL_BELOW_STRIDE = (
    *(0.54081633, 0.58017493, 0.28061224, 0.81632653, 0.85568513, 0.40306122, 0.41873178),
    *(0.4340379, 0.19642857, 2.46938776, 2.50874636, 1.1377551, 2.74489796, 2.78425656),
    *(1.26020408, 1.16873178, 1.1840379, 0.51785714, 1.09511662, 1.10604956, 0.44642857),
    *(1.17164723, 1.18258017, 0.47704082, 0.3691691, 0.37244898, 0.125),
)
KERNEL_BELOW_STRIDE_VALID = (
    *(0.540816, 0.580175, 0.816327, 0.855685, 2.469388, 2.508746, 2.744898, 2.784257),
)

# Source, weights, stride, padding, and what comes out. Both hold 1, 2, ..., n, divided by n.
CONVOLUTIONS = {
    "1^3, a": ((1, 2, 3, 1, 3), (1, 1, 1, 3, 3), 1, "valid", ONE),
    "1^3, b": ((1, 2, 1, 3, 3), (1, 1, 1, 3, 3), 1, "valid", ONE),
    "1^3, c": ((1, 1, 2, 3, 3), (1, 1, 1, 3, 3), 1, "valid", ONE),
    "2^3": ((1, 4, 2, 3, 3), (2, 2, 2, 3, 3), 1, "valid", TWO),
    "strides": ((1, 5, 8, 7, 1), (1, 2, 3, 1, 1), (2, 3, 1), "same", DIFFERENT_STRIDES),
    "2^3, stride 2": ((1, 4, 2, 3, 3), (2, 2, 2, 3, 3), 2, "valid", (*TWO[:3], *TWO[12:15])),
    "stride 3": ((1, 6, 7, 8, 2), (3, 2, 1, 2, 3), 3, "valid", STRIDE_THREE),
    "stride 2, same": ((1, 4, 2, 3, 3), (2, 2, 2, 3, 3), 2, "same", STRIDE_TWO_SAME),
    "1^3, stride 2, same": ((1, 3, 3, 3, 1), (1, 1, 1, 1, 1), 2, "same", EVERY_SECOND),
    "1^3, stride 2": ((1, 3, 3, 3, 1), (1, 1, 1, 1, 1), 2, "valid", EVERY_SECOND),
    "2^3, stride 3, same": ((1, 7, 7, 7, 1), (2, 2, 2, 1, 1), 3, "same", KERNEL_BELOW_STRIDE),
    "2^3, stride 3": ((1, 7, 7, 7, 1), (2, 2, 2, 1, 1), 3, "valid", KERNEL_BELOW_STRIDE_VALID),
    "kernel as large as the source": ((1, 2, 1, 2, 1), (2, 1, 2, 1, 2), 1, "valid", (1.5625, 1.875)),
}


def counted(shape, dtype, first=1):
    size = np.prod(shape)
    return (np.arange(first, first + size) / size).reshape(shape).astype(dtype)


def of_tensorflow(weights):
    return np.ascontiguousarray(weights.transpose(4, 3, 0, 1, 2))


@DTYPES
@pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolution(case, dtype):
    source, kernel, stride, padding, wanted = case
    strides = stride if isinstance(stride, tuple) else (stride,) * 3
    weights = of_tensorflow(counted(kernel, dtype))
    dst = conv3d.forward(counted(source, dtype), weights, None, strides, padding)
    assert dst.dtype == dtype
    # They are given to nine digits, some to seven.
    np.testing.assert_allclose(dst.ravel(), wanted, rtol=1e-6)


# Batch, source, kernel, channels in and out, stride, padding.
GRADIENTS = (
    *((2, (3, 5, 4), (3, 3, 3), 2, 3, 1, "valid"), (4, (4, 6, 5), (2, 2, 2), 2, 3, 1, "valid")),
    *((2, (6, 3, 5), (3, 3, 3), 2, 3, 2, "valid"), (2, (7, 6, 5), (2, 2, 2), 2, 3, 2, "valid")),
    *((2, (3, 7, 6), (3, 3, 3), 2, 3, 3, "valid"), (2, (4, 4, 7), (4, 4, 4), 2, 3, 3, "valid")),
    *((2, (3, 2, 2), (3, 2, 1), 2, 1, 1, "same"), (2, (3, 6, 5), (2, 2, 2), 2, 3, 1, "same")),
    *((2, (6, 3, 4), (3, 3, 3), 2, 3, 2, "same"), (4, (7, 3, 5), (2, 2, 2), 2, 3, 2, "same")),
    *((2, (9, 3, 6), (3, 3, 3), 2, 3, 3, "same"), (2, (9, 4, 7), (4, 4, 4), 2, 3, 3, "same")),
    (1, (5, 8, 7), (1, 2, 3), 2, 3, (2, 3, 1), "same"),
    (2, (5, 4, 3), (5, 4, 3), 2, 3, 1, "valid"),
    *((2, (3, 5, 4), (2, 2, 2), 8, 2, 1, "valid"), (2, (4, 6, 5), (2, 2, 2), 8, 2, 1, "valid")),
)


@pytest.mark.parametrize("case", GRADIENTS, ids=str)
def test_gradients_of_convolution(case):
    """Of source and weights, on all shapes there: by differences in float64, and float32 as float64."""
    batch, size, kernel, inputs, outputs, stride, padding = case
    strides = stride if isinstance(stride, tuple) else (stride,) * 3
    src = counted((batch, *size, inputs), np.float64, first=0)
    weights = of_tensorflow(counted((*kernel, inputs, outputs), np.float64, first=0))

    def backward(diff):
        x, w = (array.astype(diff.dtype) for array in (src, weights))
        diff_src = conv3d.backward_data(diff, w, src.shape, strides, padding)
        return diff_src, conv3d.backward_weights(x, diff, kernel, strides, padding)[0]

    def forward(x, w):
        return conv3d.forward(x, w, None, strides, padding)

    check_gradients(forward, backward, [src, weights])
    diff = np.random.default_rng(0).standard_normal(forward(src, weights).shape)
    for ours, exact in zip(backward(diff.astype(np.float32)), backward(diff), strict=True):
        assert ours.dtype == np.float32
        assert_close(ours, exact, 3e-6)


# Of ones, with a kernel of 3: how many taps of an axis meet at each place of the result.
TAPS = {
    "stride 1": (1, "same", [[2, 3, 3, 3, 2], [2, 3, 3, 3, 3, 2], [2, 3, 3, 2]]),
    "stride 2": (2, "same", [[1, 1, *[2, 1] * (n - 1)] for n in (5, 6, 4)]),
    "stride 2, valid": (2, "valid", [[1, 1, *[2, 1] * (n - 1), 1] for n in (5, 6, 4)]),
}


@DTYPES
@pytest.mark.parametrize("case", TAPS.values(), ids=TAPS)
def test_transposed_convolution(case, dtype):
    stride, padding, (d, h, w) = case
    src, weights = np.ones((2, 5, 6, 4, 3), dtype), np.ones((3, 2, 3, 3, 3), dtype)
    dst = transposed_conv.forward(src, weights, None, (stride,) * 3, padding)
    wanted = 3 * np.einsum("d,h,w->dhw", d, h, w)
    np.testing.assert_array_equal(dst, np.broadcast_to(wanted[None, ..., None], dst.shape))
    assert dst.shape[1:4] == wanted.shape


@DTYPES
def test_max_pooling(dtype):
    src = np.arange(1, 82).reshape(1, 3, 3, 3, 3).astype(dtype)
    dst, _ = pooling.forward(src, (2, 2, 2))
    np.testing.assert_array_equal(dst.ravel(), [40, 41, 42])
