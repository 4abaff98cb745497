"""Every operator of `functional`: gradients against differences, and float32 against float64."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyunet import Tensor, functional
from tinyunet.testing import check_gradients, distinct

SEEDS = st.integers(0, 2**31)
SIDES = st.integers(1, 5)
SHAPES = st.tuples(st.integers(1, 2), SIDES, SIDES, SIDES, st.integers(1, 3))
TRIPLES = st.tuples(*[st.integers(1, 3)] * 3)
STRIDES = st.tuples(*[st.integers(1, 3)] * 3)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


@given(SHAPES, st.integers(1, 3), TRIPLES, STRIDES, st.sampled_from(["same", "valid"]), st.booleans(), SEEDS)
def test_conv3d(shape, OC, kernel, stride, padding, with_bias, seed):
    if padding == "valid":
        shape = (shape[0], *(max(n, k) for n, k in zip(shape[1:4], kernel, strict=True)), shape[4])
    arrays = [normal(seed, *shape), normal(seed + 1, OC, shape[-1], *kernel), normal(seed + 2, OC)]
    check_gradients(
        lambda *tensors: functional.conv3d(
            *tensors, **({} if with_bias else {"bias": None}), stride=stride, padding=padding
        ),
        *arrays[: 3 if with_bias else 2],
        seed=seed,
    )


@given(SHAPES, st.integers(1, 3), TRIPLES, STRIDES, st.sampled_from(["same", "valid"]), st.booleans(), SEEDS)
def test_conv_transpose3d(shape, OC, kernel, stride, padding, with_bias, seed):
    arrays = [normal(seed, *shape), normal(seed + 1, shape[-1], OC, *kernel), normal(seed + 2, OC)]
    check_gradients(
        lambda *tensors: functional.conv_transpose3d(
            *tensors, **({} if with_bias else {"bias": None}), stride=stride, padding=padding
        ),
        *arrays[: 3 if with_bias else 2],
        seed=seed,
    )


@given(SHAPES, TRIPLES, SEEDS)
def test_max_pool3d(shape, size, seed):
    shape = (shape[0], *(max(n, s) for n, s in zip(shape[1:4], size, strict=True)), shape[4])
    src = distinct(shape, np.random.default_rng(seed))
    check_gradients(lambda src: functional.max_pool3d(src, size), src, seed=seed)


@given(SHAPES, TRIPLES, SEEDS)
def test_upsample3d(shape, factor, seed):
    check_gradients(lambda src: functional.upsample3d(src, factor), normal(seed, *shape), seed=seed)


@given(SHAPES, st.booleans(), SEEDS)
def test_batch_norm(shape, training, seed):
    if training:  # of one voxel, the variance is zero and the source's gradient is rounding
        shape = (2, *shape[1:])
    C = shape[-1]
    mean, variance = normal(seed + 3, C), normal(seed + 4, C) ** 2 + 0.5

    def function(src, scale, shift):
        running = mean.copy(), variance.copy()
        return functional.batch_norm(src, scale, shift, *running, training, epsilon=1e-2)

    arrays = normal(seed, *shape), normal(seed + 1, C), normal(seed + 2, C)
    check_gradients(function, *arrays, seed=seed)


@given(SHAPES, st.booleans(), SEEDS)
def test_group_norm(shape, of_one_channel, seed):
    """Instance norm, and one group of all channels; of two planes, for the variance of a voxel is zero."""
    shape = (shape[0], 2, *shape[2:])
    C = shape[-1]

    def function(src, scale, shift):
        return functional.group_norm(src, scale, shift, C if of_one_channel else 1, epsilon=1e-2)

    check_gradients(function, normal(seed, *shape), normal(seed + 1, C), normal(seed + 2, C), seed=seed)


class TestBatchNorm:
    """The running statistics."""

    def test_moves_the_running_statistics_towards_the_batch(self):
        src = normal(0, 2, 3, 4, 5, 6) * 3 + 7
        mean, variance = np.full(6, 1.0), np.full(6, 2.0)
        one, zero = Tensor(np.ones(6)), Tensor(np.zeros(6))
        functional.batch_norm(Tensor(src), one, zero, mean, variance, True, momentum=0.75)
        axes = (0, 1, 2, 3)
        np.testing.assert_allclose(mean, 0.75 * 1 + 0.25 * src.mean(axis=axes), rtol=1e-12)
        np.testing.assert_allclose(variance, 0.75 * 2 + 0.25 * src.var(axis=axes), rtol=1e-12)

    def test_leaves_them_alone_in_inference(self):
        mean, variance = np.full(6, 1.0), np.full(6, 2.0)
        one, zero = Tensor(np.ones(6)), Tensor(np.zeros(6))
        src = Tensor(normal(0, 1, 2, 2, 2, 6))
        dst = functional.batch_norm(src, one, zero, mean, variance, False, epsilon=0.5)
        np.testing.assert_allclose(dst.data, (src.data - 1) / np.sqrt(2.5), rtol=1e-12)
        np.testing.assert_array_equal([mean, variance], [np.full(6, 1.0), np.full(6, 2.0)])


@given(SHAPES, SEEDS)
def test_activations(shape, seed):
    away_from_zero = distinct(shape, np.random.default_rng(seed))
    check_gradients(functional.relu, away_from_zero, seed=seed)
    check_gradients(lambda src: functional.leaky_relu(src, 0.2), away_from_zero, seed=seed)
    check_gradients(lambda src: functional.elu(src, 0.5), away_from_zero, seed=seed)
    for slopes in (1, shape[-1]):  # some of them negative
        check_gradients(functional.prelu, away_from_zero, normal(seed, slopes), seed=seed)
    check_gradients(functional.sigmoid, normal(seed, *shape), seed=seed)
    check_gradients(functional.softmax, normal(seed, *shape), seed=seed)


@given(SHAPES, st.lists(st.integers(1, 3), min_size=1, max_size=3), SEEDS)
def test_concatenate(shape, more, seed):
    arrays = [normal(seed + i, *shape[:-1], C) for i, C in enumerate([shape[-1], *more])]
    check_gradients(functional.concatenate, *arrays, seed=seed)


@given(SHAPES, st.tuples(*[st.integers(0, 2)] * 3), SEEDS)
def test_pad_end(shape, more, seed):
    size = tuple(n + m for n, m in zip(shape[1:4], more, strict=True))
    src = normal(seed, *shape)
    check_gradients(lambda src: functional.pad_end(src, size), src, seed=seed)
    expected = np.pad(src, [(0, 0), *((0, m) for m in more), (0, 0)])
    np.testing.assert_array_equal(functional.pad_end(Tensor(src), size).data, expected)


@pytest.mark.parametrize("dropout", [functional.dropout, functional.dropout3d])
@given(SHAPES, st.floats(0, 0.9), SEEDS)
def test_dropout(dropout, shape, rate, seed):
    check_gradients(
        lambda src: dropout(src, rate, np.random.default_rng(seed)), normal(seed, *shape), seed=seed
    )


@given(SHAPES, st.floats(0, 0.9), SEEDS)
def test_spatial_dropout_drops_whole_channels(shape, rate, seed):
    dst = functional.dropout3d(Tensor(np.ones(shape)), rate, np.random.default_rng(seed)).data
    assert set(np.unique(dst)) <= {0, 1 / (1 - rate)}
    np.testing.assert_array_equal(dst, np.broadcast_to(dst[:, :1, :1, :1], shape))
    if rate:
        kept = np.random.default_rng(seed).random((shape[0], shape[-1]), np.float32) >= rate
        np.testing.assert_array_equal(dst[:, 0, 0, 0] != 0, kept)


@pytest.mark.parametrize(
    ("dropout", "shape"),
    [(functional.dropout, (1, 50, 50, 50, 4)), (functional.dropout3d, (1000, 1, 1, 1, 500))],
)
def test_dropout_keeps_the_mean(dropout, shape):
    src = Tensor(np.ones(shape, np.float32))
    dst = dropout(src, 0.3, np.random.default_rng(0)).data
    assert set(np.unique(dst)) == {np.float32(0), np.float32(1 / 0.7)}
    # 500,000 draws: the standard deviation of the mean is sqrt(0.3 / 0.7 / 500000) = 0.0009.
    assert abs(dst.mean() - 1) < 0.005


def test_errors_name_the_operator():
    src = Tensor(np.ones((1, 4, 4, 4, 2), np.float32))
    with pytest.raises(ValueError, match="dropout: rate must be at least 0 and below 1, not 1"):
        functional.dropout(src, 1, np.random.default_rng(0))
    with pytest.raises(ValueError, match="dropout3d: rate must be at least 0 and below 1, not nan"):
        functional.dropout3d(src, np.nan, np.random.default_rng(0))
    with pytest.raises(TypeError, match=r"concatenate: src is float32, more\[0\] float64"):
        functional.concatenate(src, src, Tensor(np.ones((1, 4, 4, 4, 2))))
    with pytest.raises(ValueError, match=r"pad_end: size \(4, 4, 3\) is smaller"):
        functional.pad_end(src, (4, 4, 3))
    with pytest.raises(ValueError, match=r"^size must be three whole numbers"):
        functional.pad_end(src, (4, 4))
    one, running = Tensor(np.ones(2, np.float32)), np.ones(2, np.float32)
    for wrong in (np.full(1, 5, np.float32), np.ones(2), [1.0, 1.0]):
        with pytest.raises((TypeError, ValueError), match=r"^running_variance must "):
            functional.batch_norm(src, one, one, running, wrong, training=True)
    assert (running == 1).all()


CALLS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "conv3d": (functional.conv3d, [(2, 5, 6, 7, 3), (17, 3, 3, 3, 3), (17,)]),
    "conv3d 1x3x3": (functional.conv3d, [(2, 1, 6, 7, 3), (17, 3, 1, 3, 3), (17,)]),
    "conv_transpose3d": (functional.conv_transpose3d, [(2, 3, 2, 5, 17), (17, 3, 2, 2, 2), (3,)]),
    "max_pool3d": (functional.max_pool3d, [(2, 5, 6, 7, 3)]),
    "upsample3d": (functional.upsample3d, [(2, 2, 3, 1, 5)]),
    "relu": (functional.relu, [(2, 5, 6, 7, 3)]),
    "leaky_relu": (functional.leaky_relu, [(2, 5, 6, 7, 3)]),
    "elu": (functional.elu, [(2, 5, 6, 7, 3)]),
    "prelu": (functional.prelu, [(2, 5, 6, 7, 3), (3,)]),
    "prelu of one slope": (functional.prelu, [(2, 5, 6, 7, 3), (1,)]),
    "sigmoid": (functional.sigmoid, [(2, 5, 6, 7, 1)]),
    "softmax": (functional.softmax, [(2, 5, 6, 7, 4)]),
    "concatenate": (functional.concatenate, [(2, 3, 4, 5, 6), (2, 3, 4, 5, 1)]),
    "concatenate three": (functional.concatenate, [(2, 3, 4, 5, 6), (2, 3, 4, 5, 1), (2, 3, 4, 5, 17)]),
    "pad_end": (lambda src: functional.pad_end(src, (4, 4, 6)), [(2, 3, 4, 5, 6)]),
    "dropout": (lambda src: functional.dropout(src, 0.5, np.random.default_rng(7)), [(2, 3, 4, 5, 6)]),
    "dropout3d": (lambda src: functional.dropout3d(src, 0.5, np.random.default_rng(7)), [(2, 3, 4, 5, 6)]),
    "batch_norm": (
        lambda *tensors: functional.batch_norm(
            *tensors, *(np.ones(3, tensors[0].dtype) for _ in range(2)), True
        ),
        [(2, 5, 6, 7, 3), (3,), (3,)],
    ),
    "batch_norm inference": (
        lambda *tensors: functional.batch_norm(
            *tensors, *(np.ones(3, tensors[0].dtype) for _ in range(2)), False
        ),
        [(2, 5, 6, 7, 3), (3,), (3,)],
    ),
    "group_norm": (lambda *tensors: functional.group_norm(*tensors, 2), [(2, 5, 6, 7, 6), (6,), (6,)]),
    "instance_norm": (functional.instance_norm, [(2, 5, 6, 7, 3), (3,), (3,)]),
}


def run(function: Callable[..., Tensor], arrays: list[np.ndarray], dtype: type) -> list[np.ndarray]:
    tensors = [Tensor(array.astype(dtype), requires_grad=True) for array in arrays]
    result = function(*tensors)
    result.backward(np.random.default_rng(9).standard_normal(result.shape))
    return [result.data, *(tensor.grad for tensor in tensors)]


@pytest.mark.parametrize("name", CALLS)
def test_float32_against_float64(name):
    """The fast kernels reach the engine: result and gradients within rounding of the references.

    Errors are measured against the largest element. The longest sums here have 840 terms, whose
    float32 errors grow like their square root: 30 * 6e-8 = 2e-6, allowed is 1e-5.
    """
    function, shapes = CALLS[name]
    arrays = [normal(i, *shape).astype(np.float32) for i, shape in enumerate(shapes)]
    originals = [array.copy() for array in arrays]
    for single, double in zip(
        run(function, arrays, np.float32), run(function, arrays, np.float64), strict=True
    ):
        assert (single.dtype, double.dtype) == (np.float32, np.float64)
        assert np.max(np.abs(single - double)) <= 1e-5 * np.max(np.abs(double))
    for array, original in zip(arrays, originals, strict=True):
        np.testing.assert_array_equal(array, original)


@pytest.mark.parametrize("leaves", [(0,), (1,), (2,), (0, 2), (1, 2)])
@pytest.mark.parametrize("operator", ["conv3d", "conv_transpose3d"])
def test_gradients_that_nobody_wants_are_left_out(operator, leaves):
    """The first convolution of a net has no gradient by its source, a frozen one only that."""
    function, shapes = CALLS[operator]
    arrays = [normal(i, *shape) for i, shape in enumerate(shapes)]
    everything = run(function, arrays, np.float64)[1:]
    tensors = [Tensor(array, requires_grad=i in leaves) for i, array in enumerate(arrays)]
    result = function(*tensors)
    result.backward(np.random.default_rng(9).standard_normal(result.shape))
    for i, tensor in enumerate(tensors):
        if i in leaves:
            np.testing.assert_array_equal(tensor.grad, everything[i])
        else:
            assert tensor.grad is None
