"""Adam and stochastic gradient descent, in place over flat buffers.

All parameters of a model lie in one flat buffer, so that a step is one pass, whatever the number of
layers: Adam reads four arrays and writes three, 28 bytes an item in float32, and does nothing else.
float32 buffers take the loops, float64 buffers the NumPy expressions, which are the reference. The scalars of
a step (the rate corrected for bias, the decay) are made in double precision and rounded once.

Source: Kingma and Ba, "Adam" (2015), section 2, last paragraph; Loshchilov and Hutter, "Decoupled
weight decay regularization" (2019); conventions as in Keras 3.

Common parameters
-----------------
parameters : float32 or float64 array, shape (N,)
    Changed in place, as are the averages ``m`` and ``v`` or ``velocity``, which start as zeros.
gradients : array, shape (N,)
    Not changed.
lr : float
    Learning rate.
weight_decay : float
    Decoupled: it shrinks the parameters and does not enter the averages.

Both functions raise TypeError or ValueError if the buffers differ in shape or dtype, or are not flat and
contiguous.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from kernels.base.arguments import Array, Floats, contiguous, in_place, tensor
from kernels.base.buffers import CHUNK, chunk_count
from kernels.base.jit import parallel_kernel, prange


def adam_step(
    parameters: Array,
    gradients: Array,
    m: Array,
    v: Array,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-7,
    weight_decay: float = 0.0,
) -> None:
    """One step of Adam, in place.

    ::

        m = beta1 * m + (1 - beta1) * gradients
        v = beta2 * v + (1 - beta2) * gradients**2
        parameters = parameters * (1 - lr * weight_decay)
                     - lr * sqrt(1 - beta2**step) / (1 - beta1**step) * m / (sqrt(v) + epsilon)

    Parameters
    ----------
    step : int
        Number of this step, from 1 on.
    beta1, beta2 : float
        Share of the running averages of the gradient and of its square that stays.
    epsilon : float
        Above 0. Added to the root outside of the bias correction, as Keras does ("epsilon hat" of the paper).
    """
    _check_buffers(("parameters", "gradients", "m", "v"), (parameters, gradients, m, v))
    if step < 1:
        raise ValueError(f"step must be 1 or more, got {step}")
    if not epsilon > 0:
        raise ValueError(f"epsilon must be above 0, or 0 / 0 is NaN, got {epsilon}")
    keep = 1.0 - lr * weight_decay
    rate = lr * math.sqrt(1.0 - beta2**step) / (1.0 - beta1**step)
    if parameters.dtype == np.float64:
        m += (1.0 - beta1) * (gradients - m)
        v += (1.0 - beta2) * (gradients * gradients - v)
        parameters *= keep
        parameters -= rate * m / (np.sqrt(v) + epsilon)
        return
    scalars = np.array([1.0 - beta1, 1.0 - beta2, epsilon, keep, rate], np.float32)
    _adam_step(parameters, gradients, m, v, scalars)


def sgd_step(
    parameters: Array,
    gradients: Array,
    velocity: Array,
    lr: float,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
) -> None:
    """One step of stochastic gradient descent with momentum, in place.

    ::

        velocity = momentum * velocity - lr * gradients
        parameters = parameters * (1 - lr * weight_decay) + velocity                             or
        parameters = parameters * (1 - lr * weight_decay) + momentum * velocity - lr * gradients

    the second with Nesterov's look ahead.

    ``momentum`` is the share of the velocity that stays.
    """
    _check_buffers(("parameters", "gradients", "velocity"), (parameters, gradients, velocity))
    keep = 1.0 - lr * weight_decay
    # Both rules are `parameters * keep + carry * velocity - push * gradients`.
    carry, push = (momentum, lr) if nesterov else (1.0, 0.0)
    if parameters.dtype == np.float64:
        velocity *= momentum
        velocity -= lr * gradients
        parameters *= keep
        parameters += carry * velocity - push * gradients
        return
    scalars = np.array([lr, momentum, keep, carry, push], np.float32)
    _sgd_step(parameters, gradients, velocity, scalars)


def _check_buffers(names: Sequence[str], buffers: Sequence[Any]) -> None:
    first = tensor(names[0], buffers[0], axes="N")
    for name, buffer in zip(names, buffers, strict=True):
        tensor(name, buffer, shape=first.shape, dtype=first.dtype)
        (contiguous if name == "gradients" else in_place)(name, buffer)


# --- float32 ------------------------------------------------------------------------------------------


@parallel_kernel
def _adam_step(parameters: Floats, gradients: Floats, m: Floats, v: Floats, scalars: Floats) -> None:
    new_m, new_v, epsilon, keep, rate = scalars[0], scalars[1], scalars[2], scalars[3], scalars[4]
    for chunk in prange(chunk_count(parameters.size)):
        at = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
        weights, gradient, means, squares = parameters[at], gradients[at], m[at], v[at]
        for i in range(weights.size):
            mean = means[i] + new_m * (gradient[i] - means[i])
            square = squares[i] + new_v * (gradient[i] * gradient[i] - squares[i])
            means[i] = mean
            squares[i] = square
            weights[i] = weights[i] * keep - rate * mean / (np.sqrt(square) + epsilon)


@parallel_kernel
def _sgd_step(parameters: Floats, gradients: Floats, velocity: Floats, scalars: Floats) -> None:
    lr, momentum, keep, carry, push = scalars[0], scalars[1], scalars[2], scalars[3], scalars[4]
    for chunk in prange(chunk_count(parameters.size)):
        at = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
        weights, gradient, speeds = parameters[at], gradients[at], velocity[at]
        for i in range(weights.size):
            speed = momentum * speeds[i] - lr * gradient[i]
            speeds[i] = speed
            weights[i] = weights[i] * keep + carry * speed - push * gradient[i]
