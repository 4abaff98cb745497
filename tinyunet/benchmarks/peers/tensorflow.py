"""TensorFlow: the U-Net in Keras' functional API, run as a graph.

A training step is one ``tf.function``: forward, ``GradientTape``, Adam. TensorFlow rewrites the
graph for oneDNN (blocked layouts; fused bias and ReLU in inference). It does so of itself on processors with
VNNI; here it must on all: on one of AVX2 a step took 15,027 ms without oneDNN and 3,805 with it.

XLA (``jit_compile``) leaves oneDNN aside on a CPU: on one thread at 32^3 a step took 1440 ms instead of 180,
a prediction 528 instead of 44. A frozen graph, with constants for variables, predicted no faster.
"""

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "1"  # read when TensorFlow is loaded

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from numpy.typing import NDArray

from tinyunet.benchmarks import problem as common
from tinyunet.benchmarks.peers import Convolution
from tinyunet.benchmarks.problem import Problem

VERSION = str(tf.__version__)

# This project's names of what a layer holds, and Keras'.
_VARIABLES = {"weights": "kernel", "bias": "bias", "scale": "gamma", "shift": "beta"}
_VARIABLES |= {"running_mean": "moving_mean", "running_variance": "moving_variance"}


def settings(case: str) -> str:
    """Return the settings chosen for speed."""
    return f"TF_ENABLE_ONEDNN_OPTS={os.environ['TF_ENABLE_ONEDNN_OPTS']}, tf.function"


def use_threads(threads: int) -> None:
    """Set the threads inside an operator; operators run one after the other."""
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def block(x: Any, width: int, name: str) -> Any:
    """Twice [convolution, batch norm, ReLU]."""
    for i in (0, 1):
        x = layers.Conv3D(width, 3, padding="same", name=f"{name}_conv{i}")(x)
        norm = {"momentum": common.NORM_MOMENTUM, "epsilon": common.NORM_EPSILON}
        x = layers.BatchNormalization(**norm, name=f"{name}_norm{i}")(x)
        x = layers.Activation("relu")(x)
    return x


def unet(problem: Problem) -> Any:
    """Build the model and give it the problem's weights."""
    inputs = x = layers.Input(problem.image.shape[1:])
    widths = [problem.filters << level for level in range(common.DEPTH)]
    skips = []
    for level, width in enumerate(widths):
        x = block(x, width, f"encoder_{level}")
        if level < common.DEPTH - 1:
            skips.append(x)
            x = layers.MaxPooling3D(2)(x)
    for i, width in enumerate(reversed(widths[:-1])):
        x = layers.Conv3DTranspose(width, 2, strides=2, padding="same", name=f"up_{i}")(x)
        x = block(layers.Concatenate()([x, skips.pop()]), width, f"decoder_{i}")
    x = layers.Conv3D(common.CLASSES, 1, name="head")(x)
    model = keras.Model(inputs, layers.Softmax()(x))
    for name, array in problem.weights.items():
        layer, _, variable = name.rpartition(".")
        # OIdhw -> dhwIO, and likewise (IC, OC, ...) -> (..., OC, IC) of a transposed convolution.
        value = array.transpose(2, 3, 4, 1, 0) if array.ndim == 5 else array
        keras_layer = model.get_layer(layer.replace(".", "_"))
        getattr(keras_layer, _VARIABLES[variable]).assign(value)
    return model


def soft_dice(probabilities: Any, target: Any) -> Any:
    """Return one minus the mean Dice over images and classes."""
    voxels, smoothing = (1, 2, 3), common.DICE_SMOOTHING
    intersection = tf.reduce_sum(probabilities * target, voxels)
    total = tf.reduce_sum(probabilities, voxels) + tf.reduce_sum(target, voxels)
    return 1 - tf.reduce_mean((2 * intersection + smoothing) / (total + smoothing))


def step(problem: Problem) -> Callable[[], float]:
    """Return a training step."""
    model = unet(problem)
    optimizer = keras.optimizers.Adam(common.LEARNING_RATE, epsilon=common.ADAM_EPSILON)
    optimizer.build(model.trainable_variables)

    @tf.function
    def train(image: Any, target: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = soft_dice(model(image, training=True), target)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    image, target = tf.constant(problem.image), tf.constant(problem.one_hot())
    return lambda: float(train(image, target))


def infer(problem: Problem) -> Callable[[], Any]:
    """Return a prediction."""
    model = unet(problem)
    image = tf.constant(problem.image)
    predict = tf.function(lambda image: model(image, training=False))
    return lambda: predict(image)


def convolution(
    src: NDArray[np.float32], weights: NDArray[np.float32], diff_dst: NDArray[np.float32]
) -> Convolution:
    """Return a single convolution in all directions; stride 1, padding "same"."""
    x, dy = tf.constant(src), tf.constant(diff_dst)
    w = tf.constant(weights.transpose(2, 3, 4, 1, 0))  # OIdhw -> dhwIO
    how = {"strides": [1] * 5, "padding": "SAME"}
    of_data, of_weights = tf.raw_ops.Conv3DBackpropInputV2, tf.raw_ops.Conv3DBackpropFilterV2
    forward = tf.function(lambda x, w: tf.nn.conv3d(x, w, **how))
    to_data = tf.function(lambda w, dy: of_data(input_sizes=src.shape, filter=w, out_backprop=dy, **how))
    to_weights = tf.function(lambda x, dy: of_weights(input=x, filter_sizes=w.shape, out_backprop=dy, **how))
    return {
        "forward": (lambda: forward(x, w), to_array),
        "backward_data": (lambda: to_data(w, dy), to_array),
        "backward_weights": (lambda: to_weights(x, dy), lambda dw: dw.numpy().transpose(4, 3, 0, 1, 2)),
    }


def to_array(probabilities: Any) -> NDArray[np.float32]:
    """Return a prediction as this project has it: NDHWC."""
    return np.asarray(probabilities)
