"""Every operator's forward pass and all its gradients against TensorFlow, on shapes that hypothesis draws.

In float64 both are right to rounding, so the bound is tight and finds any wrong convention: padding,
the order of axes, which of two equal items wins, where epsilon goes. In float32 it is the fast kernels
that are compared, each side with its own order of summation.

Bounds     are relative to the largest number of an array. float64: 1e-12, thousands of roundings of
           1e-16. float32: a sum of N products errs by about ``sqrt(N) * 6e-8`` on each side; N is at most
           5*5*5*17 = 2125 here, so 3e-6 a side, and 1e-5 is allowed. What has no long sums gets 2e-6.
"""

import math
import os

import numpy as np
import pytest
from checkers import assert_close, assert_exact, normal
from hypothesis import given
from hypothesis import strategies as st

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")

from kernels import conv3d  # noqa: E402
from kernels.deferred.statistics import Sharing  # noqa: E402
from kernels.ops import (  # noqa: E402
    activation,
    concat,
    label_losses,
    norms,
    optimizers,
    pooling,
    softmax,
    transposed_conv,
    upsample,
)
from tinyunet import functional, nn  # noqa: E402
from tinyunet.autograd import Tensor  # noqa: E402

DTYPES = st.sampled_from([np.float32, np.float64])
SEEDS = st.integers(0, 999)
CHANNELS = st.sampled_from([1, 2, 4, 16, 17])
VOLUMES = st.tuples(st.integers(1, 2), *[st.integers(2, 7)] * 3)
PADDINGS = st.sampled_from(["same", "valid"])

SUMS = {np.float32: 1e-5, np.float64: 1e-12}
POINTWISE = {np.float32: 2e-6, np.float64: 1e-12}


def in_tensorflow(function, inputs, seed):
    """Output of a TensorFlow function, a random cotangent for it, and the gradients of the inputs."""
    variables = [tf.constant(array) for array in inputs]
    with tf.GradientTape() as tape:
        tape.watch(variables)
        output = function(*variables)
    dtype = output.dtype.as_numpy_dtype
    cotangent = normal(np.random.default_rng(seed + 1000), *output.shape, dtype=dtype)
    gradients = tape.gradient(output, variables, output_gradients=tf.constant(cotangent))
    return output.numpy(), cotangent, [tf.convert_to_tensor(g).numpy() for g in gradients]


def compare(ours, theirs, dtype, bound):
    for name, array in ours.items():
        assert array.dtype == dtype, name
        assert_close(array, theirs[name], bound[dtype], name)


@st.composite
def convolutions(draw):
    """Volume, kernel, stride and padding; TensorFlow wants a stride not above the kernel to be tested."""
    kernel = tuple(draw(st.sampled_from([1, 2, 3, 5])) for _ in "dhw")
    stride = tuple(draw(st.sampled_from([1, 2, 3][:k])) for k in kernel)
    padding = draw(PADDINGS)
    size = tuple(draw(st.integers(k if padding == "valid" else 1, 7)) for k in kernel)
    return (draw(st.integers(1, 2)), *size), kernel, stride, padding


@given(case=convolutions(), IC=CHANNELS, OC=CHANNELS, dtype=DTYPES, seed=SEEDS)
def test_conv3d(case, IC, OC, dtype, seed):
    volume, kernel, stride, padding = case
    generator = np.random.default_rng(seed)
    src = normal(generator, *volume, IC, dtype=dtype)
    weights, bias = (normal(generator, OC, IC, *kernel, dtype=dtype), normal(generator, OC, dtype=dtype))

    def function(src, weights, bias):
        filters = tf.transpose(weights, (2, 3, 4, 1, 0))
        return tf.nn.conv3d(src, filters, (1, *stride, 1), padding.upper()) + bias

    dst, diff_dst, gradients = in_tensorflow(function, (src, weights, bias), seed)
    diff_weights, diff_bias = conv3d.backward_weights(src, diff_dst, kernel, stride, padding)
    ours = {
        "dst": conv3d.forward(src, weights, bias, stride, padding),
        "diff_src": conv3d.backward_data(diff_dst, weights, src.shape, stride, padding),
        "diff_weights": diff_weights,
        "diff_bias": diff_bias,
    }
    compare(ours, dict(zip(ours, (dst, *gradients), strict=True)), dtype, SUMS)


@st.composite
def transposed_convolutions(draw):
    """As a U-Net has them, and others."""
    if draw(st.booleans()):
        kernel = stride = draw(st.sampled_from([(2, 2, 2), (1, 2, 2), (3, 3, 2)]))
    else:
        kernel = tuple(draw(st.sampled_from([1, 2, 3])) for _ in "dhw")
        stride = tuple(draw(st.sampled_from([1, 2, 3])) for _ in "dhw")
    return draw(VOLUMES), kernel, stride, draw(PADDINGS)


@given(case=transposed_convolutions(), IC=CHANNELS, OC=CHANNELS, dtype=DTYPES, seed=SEEDS)
def test_conv_transpose3d(case, IC, OC, dtype, seed):
    volume, kernel, stride, padding = case
    generator = np.random.default_rng(seed)
    src = normal(generator, *volume, IC, dtype=dtype)
    weights, bias = (normal(generator, IC, OC, *kernel, dtype=dtype), normal(generator, OC, dtype=dtype))

    def function(src, weights, bias):
        filters = tf.transpose(weights, (2, 3, 4, 1, 0))
        return keras.ops.conv_transpose(src, filters, stride, padding) + bias

    dst, diff_dst, gradients = in_tensorflow(function, (src, weights, bias), seed)
    diff_weights, diff_bias = transposed_conv.backward_weights(src, diff_dst, kernel, stride, padding)
    ours = {
        "dst": transposed_conv.forward(src, weights, bias, stride, padding),
        "diff_src": transposed_conv.backward_data(diff_dst, weights, src.shape, stride, padding),
        "diff_weights": diff_weights,
        "diff_bias": diff_bias,
    }
    compare(ours, dict(zip(ours, (dst, *gradients), strict=True)), dtype, SUMS)


@given(
    volume=VOLUMES, C=CHANNELS, size=st.sampled_from([(2, 2, 2), (1, 2, 2)]), ties=st.booleans(), seed=SEEDS
)
def test_max_pool(volume, C, size, ties, seed):
    """TensorFlow has it in float32 only.

    Of equal items the first gets the gradient here, as in TensorFlow's 2-D pooling. Its 3-D pooling gives
    it to each item within 1e-5 of the maximum, so that is compared where no two are so close. After a ReLU,
    as in a U-Net, the only equal items are zeros, whose gradient the ReLU drops: there the two agree.
    """
    size_of_all = math.prod(volume) * C
    src = np.random.default_rng(seed).permutation(size_of_all).reshape(*volume, C).astype(np.float32)
    if ties:
        src = np.round(src / 100)

    def function(src):
        return tf.nn.max_pool3d(src, (1, *size, 1), (1, *size, 1), "VALID")

    expected, diff_dst, (diff_src,) = in_tensorflow(function, (src,), seed)
    dst, argmax = pooling.forward(src, size)
    assert_exact(dst, expected)
    if not ties:
        assert_exact(pooling.backward(diff_dst, argmax, src.shape, size), diff_src)


@given(volume=VOLUMES, C=CHANNELS, seed=SEEDS)
def test_max_pool_after_relu(volume, C, seed):
    src = normal(np.random.default_rng(seed), *volume, C)

    def function(src):
        return tf.nn.max_pool3d(tf.nn.relu(src), 2, 2, "VALID")

    expected, diff_dst, (diff_src,) = in_tensorflow(function, (src,), seed)
    rectified = activation.forward(src, activation.RELU)
    dst, argmax = pooling.forward(rectified)
    assert_exact(dst, expected)
    diff_rectified = pooling.backward(diff_dst, argmax, src.shape)
    assert_exact(activation.backward(diff_rectified, rectified, activation.RELU), diff_src)


@given(volume=VOLUMES, C=CHANNELS, factor=st.sampled_from([(2, 2, 2), (1, 2, 2)]), dtype=DTYPES, seed=SEEDS)
def test_upsample(volume, C, factor, dtype, seed):
    src = normal(np.random.default_rng(seed), *volume, C, dtype=dtype)
    layer = keras.layers.UpSampling3D(factor, dtype=np.dtype(dtype).name)
    expected, diff_dst, (diff_src,) = in_tensorflow(layer, (src,), seed)
    assert_exact(upsample.forward(src, factor), expected)
    compare({"diff_src": upsample.backward(diff_dst, factor)}, {"diff_src": diff_src}, dtype, SUMS)


@given(
    volume=VOLUMES,
    C=CHANNELS,
    factor=st.sampled_from([(2, 2, 2), (1, 2, 2), (3, 1, 2)]),
    dtype=DTYPES,
    seed=SEEDS,
)
def test_trilinear_upsample(volume, C, factor, dtype, seed):
    """TensorFlow resizes images: height and width of each slice, then depth, of one image of all columns."""

    def function(src):
        MB, D, H, W = volume
        FD, FH, FW = factor
        slices = tf.reshape(src, (MB * D, H, W, C))
        slices = tf.cast(tf.image.resize(slices, (H * FH, W * FW)), dtype)
        columns = tf.reshape(slices, (MB, D, H * FH * W * FW, C))
        columns = tf.cast(tf.image.resize(columns, (D * FD, H * FH * W * FW)), dtype)
        return tf.reshape(columns, (MB, D * FD, H * FH, W * FW, C))

    src = normal(np.random.default_rng(seed), *volume, C, dtype=dtype)
    expected, diff_dst, (diff_src,) = in_tensorflow(function, (src,), seed)
    ours = {
        "dst": upsample.forward(src, factor, "trilinear"),
        "diff_src": upsample.backward(diff_dst, factor, "trilinear"),
    }
    # TensorFlow interpolates in float32, whatever it is given.
    bound = {np.float32: 2e-6, np.float64: 2e-6}
    compare(ours, {"dst": expected, "diff_src": diff_src}, dtype, bound)


@given(volume=VOLUMES, C=CHANNELS, dtype=DTYPES, mean=st.sampled_from([0.0, 10.0]), seed=SEEDS)
def test_batch_norm(volume, C, dtype, mean, seed):
    """Training, gradients through the statistics, what feeds the running ones, and inference.

    A mean of 10 costs TensorFlow's float32 a digit.
    """
    bound = {np.float32: 1e-5 * (1 + mean), np.float64: 1e-11}
    generator = np.random.default_rng(seed)
    src = normal(generator, *volume, C, dtype=dtype) + dtype(mean)
    scale, shift = (normal(generator, C, dtype=dtype) for _ in range(2))
    momentum, epsilon = 0.9, 1e-3
    layer = keras.layers.BatchNormalization(momentum=momentum, epsilon=epsilon, dtype=np.dtype(dtype).name)
    layer.build(src.shape)

    def function(src, scale, shift):
        layer.moving_mean.assign(np.zeros(C))
        layer.moving_variance.assign(np.zeros(C))
        with keras.StatelessScope([(layer.gamma, scale), (layer.beta, shift)]) as scope:
            output = layer(src, training=True)
        layer.moving_mean.assign(scope.get_current_value(layer.moving_mean))
        layer.moving_variance.assign(scope.get_current_value(layer.moving_variance))
        return output

    expected, diff_dst, gradients = in_tensorflow(function, (src, scale, shift), seed)
    dst, mean_of_src, variance = norms.forward(src, scale, shift, epsilon)
    backward = norms.backward(diff_dst, src, scale, mean_of_src, variance, epsilon)
    compare_gradients(backward, gradients, diff_dst, scale, bound[dtype])
    assert variance.dtype == np.float64
    compare(
        {"dst": dst, "mean": mean_of_src[0], "variance": variance[0].astype(dtype)},
        {
            "dst": expected,
            "mean": layer.moving_mean.numpy() / (1 - momentum),
            "variance": layer.moving_variance.numpy() / (1 - momentum),
        },
        dtype,
        bound,
    )
    layer.gamma.assign(scale)
    layer.beta.assign(shift)
    running = layer.moving_mean.numpy(), layer.moving_variance.numpy()
    inference = norms.forward_inference(src, scale, shift, *running, epsilon)
    compare({"inference": inference}, {"inference": layer(src, training=False).numpy()}, dtype, bound)


def compare_gradients(actual, expected, diff_dst, scale, bound):
    """Those of a normalisation: the source's may be far below what it is the difference of."""
    reach = float(np.abs(diff_dst).max() * np.abs(scale).max())
    for name, got, wanted in zip(("diff_src", "diff_scale", "diff_shift"), actual, expected, strict=True):
        assert got.dtype == scale.dtype
        assert np.abs(got - wanted).max() <= bound * max(reach, np.abs(wanted).max()), name


@given(
    volume=VOLUMES, C=CHANNELS, dtype=DTYPES, mean=st.sampled_from([0.0, 10.0]), seed=SEEDS, data=st.data()
)
def test_group_norm(volume, C, dtype, mean, seed, data):
    """As many groups as channels are instance norm. TensorFlow computes a mean of 10 a digit worse."""
    bound = {np.float32: 1e-5 * (1 + mean), np.float64: 1e-11}
    groups = data.draw(st.sampled_from([n for n in range(1, C + 1) if C % n == 0]))
    generator = np.random.default_rng(seed)
    src = normal(generator, *volume, C, dtype=dtype) + dtype(mean)
    scale, shift = (normal(generator, C, dtype=dtype) for _ in range(2))
    layer = keras.layers.GroupNormalization(-1 if groups == C else groups, dtype=np.dtype(dtype).name)
    layer.build(src.shape)

    def function(src, scale, shift):
        with keras.StatelessScope([(layer.gamma, scale), (layer.beta, shift)]):
            return layer(src)

    expected, diff_dst, gradients = in_tensorflow(function, (src, scale, shift), seed)
    dst, *statistics = norms.forward(src, scale, shift, layer.epsilon, Sharing(True, C // groups))
    backward = norms.backward(diff_dst, src, scale, *statistics, layer.epsilon, Sharing(True, C // groups))
    compare_gradients(backward, gradients, diff_dst, scale, bound[dtype])
    compare({"dst": dst}, {"dst": expected}, dtype, bound)


def ours(which):
    """Forward and backward of an activation."""
    return (
        lambda src: activation.forward(src, which),
        lambda diff_dst, dst: activation.backward(diff_dst, dst, which),
    )


ACTIVATIONS = {
    "relu": (tf.nn.relu, *ours(activation.RELU)),
    # TensorFlow keeps the slope in float32, also for float64.
    "leaky_relu": (lambda src: tf.nn.leaky_relu(src, 0.125), *ours(activation.leaky_relu(0.125))),
    "elu": (tf.nn.elu, *ours(activation.elu(1.0))),
    "sigmoid": (tf.math.sigmoid, *ours(activation.SIGMOID)),
    "softmax": (tf.nn.softmax, softmax.forward, softmax.backward),
}


@pytest.mark.parametrize(("theirs", "forward", "backward"), ACTIVATIONS.values(), ids=ACTIVATIONS)
@given(volume=VOLUMES, C=st.sampled_from([2, 4, 16, 17]), dtype=DTYPES, seed=SEEDS)
def test_activation(theirs, forward, backward, volume, C, dtype, seed):
    src = normal(np.random.default_rng(seed), *volume, C, dtype=dtype)
    expected, diff_dst, (diff_src,) = in_tensorflow(theirs, (src,), seed)
    dst = forward(src)
    compare(
        {"dst": dst, "diff_src": backward(diff_dst, dst)},
        {"dst": expected, "diff_src": diff_src},
        dtype,
        POINTWISE,
    )


@given(volume=VOLUMES, C=CHANNELS, dtype=DTYPES, seed=SEEDS)
def test_prelu(volume, C, dtype, seed):
    """Keras' layer, with slopes that it shares over all voxels; some are negative."""
    generator = np.random.default_rng(seed)
    src, slope = normal(generator, *volume, C, dtype=dtype), normal(generator, C, dtype=dtype)
    layer = keras.layers.PReLU(shared_axes=[1, 2, 3], dtype=np.dtype(dtype).name)
    layer.build(src.shape)

    def function(src, slope):
        with keras.StatelessScope([(layer.alpha, slope[None, None, None])]):
            return layer(src)

    expected, diff_dst, gradients = in_tensorflow(function, (src, slope), seed)
    dst = activation.prelu_forward(src, slope)
    compare({"dst": dst}, {"dst": expected}, dtype, POINTWISE)
    names, found = ("diff_src", "diff_slope"), activation.prelu_backward(diff_dst, src, slope)
    compare(*(dict(zip(names, a, strict=True)) for a in (found, gradients)), dtype, SUMS)


@given(volume=VOLUMES, channels=st.lists(CHANNELS, min_size=2, max_size=4), dtype=DTYPES, seed=SEEDS)
def test_concat(volume, channels, dtype, seed):
    generator = np.random.default_rng(seed)
    sources = [normal(generator, *volume, C, dtype=dtype) for C in channels]
    expected, diff_dst, gradients = in_tensorflow(lambda *all: tf.concat(all, -1), sources, seed)
    assert_exact(concat.forward(*sources), expected)
    splits = np.cumsum(channels[:-1])
    for actual, wanted in zip(concat.backward(diff_dst, *splits), gradients, strict=True):
        assert_exact(actual, wanted)


@given(volume=VOLUMES, C=CHANNELS, more=st.tuples(*[st.integers(0, 3)] * 3), dtype=DTYPES, seed=SEEDS)
def test_pad_end(volume, C, more, dtype, seed):
    src = normal(np.random.default_rng(seed), *volume, C, dtype=dtype)
    ends = [(0, 0), *((0, n) for n in more), (0, 0)]
    expected, diff_dst, (diff_src,) = in_tensorflow(lambda x: tf.pad(x, ends), (src,), seed)
    leaf = Tensor(src, requires_grad=True)
    dst = functional.pad_end(leaf, expected.shape[1:4])
    dst.backward(diff_dst)
    assert_exact(dst.data, expected)
    assert_exact(leaf.grad, diff_src)


def compare_kept(kept, ours, theirs, dtype):
    """Compare results and gradients of the source where both sides keep an element."""
    names = ("dst", "diff_src")
    actual, expected = ({n: a * kept for n, a in zip(names, s, strict=True)} for s in (ours, theirs))
    compare(actual, expected, dtype, POINTWISE)


@given(volume=VOLUMES, C=CHANNELS, rate=st.floats(0.1, 0.9), dtype=DTYPES, seed=SEEDS)
def test_dropout(volume, C, rate, dtype, seed):
    """Each side draws for itself: what both keep is compared, the rest of ours is zero."""
    src = normal(np.random.default_rng(seed), *volume, C, dtype=dtype)
    tf.random.set_seed(seed)
    expected, diff_dst, (wanted,) = in_tensorflow(lambda x: tf.nn.dropout(x, rate), (src,), seed)
    leaf, layer = Tensor(src, requires_grad=True), nn.Dropout(rate, seed)
    dst = layer(leaf)
    dst.backward(diff_dst)
    kept = dst.data != 0
    assert_exact(leaf.grad != 0, kept)
    compare_kept(kept & (expected != 0), (dst.data, leaf.grad), (expected, wanted), dtype)
    in_inference = keras.layers.Dropout(rate, dtype=np.dtype(dtype).name)(src, training=False)
    assert_exact(layer.eval()(leaf).data, in_inference.numpy())


@given(volume=VOLUMES, C=CHANNELS, rate=st.floats(0.1, 0.9), dtype=DTYPES, seed=SEEDS)
def test_spatial_dropout(volume, C, rate, dtype, seed):
    """Each side draws for itself: what both keep is compared. Channels go as a whole."""
    src = normal(np.random.default_rng(seed), *volume, C, dtype=dtype)
    theirs = keras.layers.SpatialDropout3D(rate, seed=seed, dtype=np.dtype(dtype).name)
    expected, diff_dst, (wanted,) = in_tensorflow(lambda x: theirs(x, training=True), (src,), seed)
    leaf, layer = Tensor(src, requires_grad=True), nn.Dropout3d(rate, seed)
    dst = layer(leaf)
    dst.backward(diff_dst)
    kept = dst.data != 0
    for which in (kept, expected != 0):  # whole channels, of ours and of theirs
        assert_exact(which, np.broadcast_to(which[:, :1, :1, :1], src.shape))
    assert_exact(leaf.grad != 0, kept)
    compare_kept(kept & (expected != 0), (dst.data, leaf.grad), (expected, wanted), dtype)
    assert_exact(layer.eval()(leaf).data, theirs(src, training=False).numpy())


def segmentation(volume, classes, dtype, seed):
    generator = np.random.default_rng(seed)
    logits = 3 * normal(generator, *volume, classes, dtype=dtype)
    return logits, generator.integers(0, max(classes, 2), volume).astype(np.uint8)


@given(volume=VOLUMES, classes=st.sampled_from([1, 2, 4]), dtype=DTYPES, seed=SEEDS)
def test_dice_sums(volume, classes, dtype, seed):
    logits, labels = segmentation(volume, classes, dtype, seed)

    def function(logits):
        if classes == 1:
            p, t = tf.math.sigmoid(logits), tf.cast(labels[..., None], dtype)
        else:
            p, t = tf.nn.softmax(logits), tf.one_hot(labels, classes, dtype=dtype)
        axes = (1, 2, 3)
        return tf.stack([tf.reduce_sum(p * t, axes), tf.reduce_sum(p, axes), tf.reduce_sum(t, axes)])

    expected, cotangent, (diff_logits,) = in_tensorflow(function, (logits,), seed)
    sums = np.stack(label_losses.dice_forward(logits, labels))
    assert_close(sums, expected, POINTWISE[dtype])
    diff_intersection, diff_prediction, _ = cotangent.astype(np.float64)
    actual = label_losses.dice_backward(logits, labels, diff_intersection, diff_prediction)
    assert actual.dtype == dtype
    assert np.abs(actual - diff_logits).max() <= POINTWISE[dtype] * np.abs(cotangent).max()


@given(volume=VOLUMES, classes=st.sampled_from([1, 2, 4]), dtype=DTYPES, seed=SEEDS)
def test_cross_entropy(volume, classes, dtype, seed):
    logits, labels = segmentation(volume, classes, dtype, seed)

    def function(logits):
        if classes == 1:
            targets = tf.cast(labels[..., None], dtype)
            losses = tf.nn.sigmoid_cross_entropy_with_logits(targets, logits)
        else:
            targets = labels.astype(np.int32)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits)
        return tf.reduce_mean(losses)

    expected, diff_loss, (diff_logits,) = in_tensorflow(function, (logits,), seed)
    loss = label_losses.cross_entropy_forward(logits, labels)
    assert_close(np.float64(loss), expected, POINTWISE[dtype])
    actual = label_losses.cross_entropy_backward(logits, labels, float(diff_loss))
    assert actual.dtype == dtype
    bound = POINTWISE[dtype] * abs(float(diff_loss)) / labels.size
    assert np.abs(actual - diff_logits).max() <= bound


def trajectory(optimizer, parameters, gradients):
    """Parameters after each gradient was applied by a Keras optimizer."""
    variable = keras.Variable(parameters, dtype=parameters.dtype.name)
    optimizer.build([variable])
    for gradient in gradients:
        optimizer.apply([tf.constant(gradient)])
    return variable.numpy()


@given(size=st.integers(1, 40), decay=st.sampled_from([None, 0.1]), dtype=DTYPES, seed=SEEDS)
def test_adam(size, decay, dtype, seed):
    """Keras takes the powers of beta in the type of the variable and its rate in float32."""
    generator = np.random.default_rng(seed)
    parameters = normal(generator, size, dtype=dtype)
    gradients = [normal(generator, size, dtype=dtype) for _ in range(10)]
    optimizer = keras.optimizers.Adam(0.01, weight_decay=decay)
    expected = trajectory(optimizer, parameters, gradients)
    m, v = np.zeros_like(parameters), np.zeros_like(parameters)
    for step, gradient in enumerate(gradients, start=1):
        optimizers.adam_step(parameters, gradient, m, v, step, 0.01, weight_decay=decay or 0.0)
    # 1 - 0.999**step loses three digits in float32.
    assert_close(parameters, expected, 5e-5)


@given(
    size=st.integers(1, 40),
    momentum=st.sampled_from([0.0, 0.9]),
    nesterov=st.booleans(),
    decay=st.sampled_from([None, 0.1]),
    dtype=DTYPES,
    seed=SEEDS,
)
def test_sgd(size, momentum, nesterov, decay, dtype, seed):
    generator = np.random.default_rng(seed)
    parameters = normal(generator, size, dtype=dtype)
    gradients = [normal(generator, size, dtype=dtype) for _ in range(10)]
    # Without momentum Keras has no velocity to look ahead with.
    nesterov = nesterov and momentum > 0
    optimizer = keras.optimizers.SGD(0.01, momentum, nesterov, weight_decay=decay)
    expected = trajectory(optimizer, parameters, gradients)
    velocity = np.zeros_like(parameters)
    for gradient in gradients:
        optimizers.sgd_step(
            parameters, gradient, velocity, 0.01, momentum, nesterov, weight_decay=decay or 0.0
        )
    # The learning rate of Keras is float32.
    assert_close(parameters, expected, 2e-6)
