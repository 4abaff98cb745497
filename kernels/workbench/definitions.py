"""Definitions of whole operators in float64, and their gradients by finite differences.

A definition takes a volume (MB, D, H, W, C), and vectors with a number for each channel. It returns a volume
of the same shape. A student may also bring a definition of his or her own.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kernels.base.arguments import Array

Definition = Callable[..., Array]
_EPSILON = 1e-3  # of the norms, as in tinyunet.nn
_STEP = 4e-6
_VOXELS = (1, 2, 3)
_erf = np.vectorize(math.erf, otypes=[np.float64])


def relu(src: Array) -> Array:
    """``max(src, 0)``."""
    return np.maximum(src, 0)


def leaky_relu(src: Array) -> Array:
    """``src`` where positive, ``0.01 src`` elsewhere."""
    return np.where(src > 0, src, 0.01 * src)


def elu(src: Array) -> Array:
    """``src`` where positive, ``exp(src) - 1`` elsewhere."""
    return np.where(src > 0, src, np.expm1(np.minimum(src, 0)))


def sigmoid(src: Array) -> Array:
    """``1 / (1 + exp(-src))``, by way of tanh, which never overflows."""
    return 0.5 + 0.5 * np.tanh(0.5 * src)


def tanh(src: Array) -> Array:
    """``tanh(src)``."""
    return np.tanh(src)


def softplus(src: Array) -> Array:
    """``log(1 + exp(src))``."""
    return np.logaddexp(0, src)


def silu(src: Array) -> Array:
    """``src sigmoid(src)``."""
    return src * sigmoid(src)


def gelu(src: Array) -> Array:
    """``src (1 + erf(src / sqrt 2)) / 2``."""
    return 0.5 * src * (1 + _erf(src / math.sqrt(2)))


def softmax(src: Array) -> Array:
    """``exp(src) / sum of exp(src)`` over channels."""
    powers = np.exp(src - src.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _normalized(src: Array, axes: tuple[int, ...], epsilon: float) -> tuple[Array, Array]:
    rstd = 1 / np.sqrt(src.var(axes, keepdims=True) + epsilon)
    return (src - src.mean(axes, keepdims=True)) * rstd, rstd


def batch_norm(src: Array, scale: Array, shift: Array, epsilon: float = _EPSILON) -> Array:
    """``(src - mean) / sqrt(variance + epsilon) scale + shift``, over images and voxels of a channel."""
    return _normalized(src, (0, *_VOXELS), epsilon)[0] * scale + shift


def instance_norm(src: Array, scale: Array, shift: Array, epsilon: float = _EPSILON) -> Array:
    """``(src - mean) / sqrt(variance + epsilon) scale + shift``, over the voxels of an image and channel."""
    return _normalized(src, _VOXELS, epsilon)[0] * scale + shift


def layer_norm(src: Array, scale: Array, shift: Array, epsilon: float = _EPSILON) -> Array:
    """``(src - mean) / sqrt(variance + epsilon) scale + shift``, over the channels of a voxel."""
    return _normalized(src, (4,), epsilon)[0] * scale + shift


_AXES = {"batch_norm": (0, *_VOXELS), "instance_norm": _VOXELS, "layer_norm": (4,)}
_ALL = (relu, leaky_relu, elu, sigmoid, tanh, softplus, silu, gelu, softmax)
#: By name; a student's file names one: ``operator = "elu"``.
DEFINITIONS: dict[str, Definition] = {f.__name__: f for f in (*_ALL, batch_norm, instance_norm, layer_norm)}


def parameters(definition: Definition) -> list[str]:
    """Return the names of the arrays that an operator takes: all arguments without a default."""
    found = inspect.signature(definition).parameters.values()
    return [p.name for p in found if p.default is p.empty]


def gradients(definition: Definition, inputs: Sequence[Array], diff_dst: Array) -> list[Array]:
    """Return the gradient of ``sum(diff_dst * definition(*inputs))`` by each input: central differences.

    Each number is moved by 4e-6 to either side: exact to about 1e-9, a long way from kinks.
    """
    moved = [np.array(array, np.float64) for array in inputs]
    found: list[Array] = [np.empty(array.shape) for array in moved]
    for array, gradient in zip(moved, found, strict=True):
        for at in np.ndindex(array.shape):
            value = array[at]
            sums = []
            for step in (_STEP, -_STEP):
                array[at] = value + step
                sums.append(float(np.vdot(diff_dst, definition(*moved))))
            array[at] = value
            gradient[at] = (sums[0] - sums[1]) / (2 * _STEP)
    return found


def usual_results(name: str, inputs: Sequence[Array]) -> dict[str, Array]:
    """Return wrong results that usual mistakes in forward give, by words."""
    if name not in _AXES:
        return {}
    (src, scale, shift), axes, definition = inputs, _AXES[name], DEFINITIONS[name]
    count = np.prod([src.shape[axis] for axis in axes])
    x = _normalized(src, axes, _EPSILON)[0]
    centred, std = src - src.mean(axes, keepdims=True), src.std(axes, keepdims=True)
    found = {
        "the scale is missing": x + shift,
        "the shift is missing": x * scale,
        "the shift is added before the scale": (x + shift) * scale,
        "epsilon is added to the standard deviation, not to the variance": (
            centred / (std + _EPSILON) * scale + shift
        ),
        f"epsilon is missing; expected {_EPSILON}": definition(src, scale, shift, 1e-30),
    }
    for epsilon in (1e-5, 1e-2):
        found[f"epsilon is {epsilon}; expected {_EPSILON}"] = definition(src, scale, shift, epsilon)
    if count > 1:
        unbiased = centred / np.sqrt(std**2 * count / (count - 1) + _EPSILON)
        found["the variance divides by N - 1; expected N"] = unbiased * scale + shift
    return found


def usual_mistakes(name: str, inputs: Sequence[Array], diff_dst: Array) -> dict[str, list[Any]]:
    """Return wrong gradients that usual mistakes in backward give, for each input (None: none is known)."""
    if name not in _AXES:
        return {}
    src, scale, axes = inputs[0], inputs[1], _AXES[name]
    x, rstd = _normalized(src, axes, _EPSILON)
    diff = diff_dst * scale
    of_mean, of_variance = diff.mean(axes, keepdims=True), x * (diff * x).mean(axes, keepdims=True)
    first = {
        "mean and variance pass no gradient": rstd * diff,
        "the mean passes no gradient": rstd * (diff - of_variance),
        "the variance passes no gradient": rstd * (diff - of_mean),
    }
    plain = diff_dst - diff_dst.mean(axes, keepdims=True)
    without = rstd * (plain - x * (diff_dst * x).mean(axes, keepdims=True))
    unscaled = (diff_dst * src).sum((0, *_VOXELS))
    found: dict[str, list[Any]] = {words: [value, None, None] for words, value in first.items()}
    found["the scale is missing"] = [without, None, None]
    found["src is taken as it is, not normalised"] = [None, unscaled, None]
    return found
