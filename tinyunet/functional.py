# ruff: noqa: D102 - forward and backward of every operator are described once, in Function
"""Differentiable operators: each forward kernel with its gradient kernels right below it.

Volumes are NDHWC tensors: batch, depth, height, width, channels. float32 runs the fast kernels,
float64 the references. Only the arrays that a ``forward`` saves stay in memory until backward. Models
call the functions at the end.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

import kernels.conv3d
from kernels import ops
from kernels.base.arguments import Combine, Triple, tensor, triple
from tinyunet.autograd import Function, Tensor
from tinyunet.common.checks import fraction, positive
from tinyunet.common.turns import one_at_a_time
from tinyunet.tape import Array, Context, Gradients

if TYPE_CHECKING:
    from kernels.deferred.statistics import Sharing
    from kernels.ops.activation import Activation


class Convolution(Function):
    """Saves the source for the weights' gradient, the weights for the source's."""

    module: Callable[[], ModuleType] = staticmethod(lambda: kernels.conv3d)  # kernels of the three passes

    @staticmethod
    def forward(
        ctx: Context,
        src: Array,  # (MB, ID, IH, IW, IC)
        weights: Array,  # (OC, IC, KD, KH, KW)
        bias: Array | None,  # (OC,)
        stride: Triple,
        padding: str,
    ) -> Array:  # (MB, OD, OH, OW, OC)
        needs_src, needs_weights, needs_bias = ctx.needs_gradient[:3]
        ctx.save(src if needs_weights or needs_bias else None, weights if needs_src else None)
        ctx.settings, ctx.src_shape, ctx.kernel = (stride, padding), src.shape, weights.shape[2:]
        return ctx.function.module().forward(src, weights, bias, stride, padding)

    @staticmethod
    def backward(ctx: Context, gradient: Array) -> Gradients:
        (src, weights), passes = ctx.saved, ctx.function.module()
        diff_src = diff_weights = diff_bias = None
        if weights is not None:  # not so in the first convolution of a net
            diff_src = passes.backward_data(gradient, weights, ctx.src_shape, *ctx.settings)
        if src is not None:
            diff_weights, diff_bias = passes.backward_weights(src, gradient, ctx.kernel, *ctx.settings)
        return diff_src, diff_weights, diff_bias


class TransposedConvolution(Convolution):
    """A convolution's gradient by its source, as an operator; weights are (IC, OC, KD, KH, KW)."""

    module = staticmethod(lambda: ops.transposed_conv)


class MaxPooling(Function):
    """Saves one byte a window: which element was the maximum."""

    @staticmethod
    def forward(ctx: Context, src: Array, size: Triple) -> Array:
        ctx.src_shape, ctx.size = src.shape, size
        dst, argmax = ops.pooling.forward(src, size)
        ctx.save(argmax)
        return dst

    @staticmethod
    def backward(ctx: Context, gradient: Array) -> Gradients:
        (argmax,) = ctx.saved
        return (ops.pooling.backward(gradient, argmax, ctx.src_shape, ctx.size),)


class Upsampling(Function):
    """Repeats voxels, or interpolates between them. Saves nothing."""

    @staticmethod
    def forward(ctx: Context, src: Array, factor: Triple, mode: str) -> Array:
        ctx.factor, ctx.mode = factor, mode
        return ops.upsample.forward(src, factor, mode)

    @staticmethod
    def backward(ctx: Context, gradient: Array) -> Gradients:
        return (ops.upsample.backward(gradient, ctx.factor, ctx.mode),)


class BatchNormTraining(Function):
    """Normalises with the batch's own statistics and moves the running ones towards them.

    Saves the source and two numbers a channel; the normalised volume is made again in backward.
    """

    @staticmethod
    def forward(
        ctx: Context,
        src: Array,  # (..., C)
        scale: Array,  # (C,)
        shift: Array,  # (C,)
        running_mean: Array,  # (C,), changed
        running_variance: Array,  # (C,), changed
        momentum: float,
        epsilon: float,
        combine: Combine | None = None,
    ) -> Array:
        for name, running in (("mean", running_mean), ("variance", running_variance)):
            tensor(f"running_{name}", running, shape=scale.shape, dtype=scale.dtype)
        dst, mean, variance = ops.norms.forward(src, scale, shift, epsilon, combine=combine)
        with one_at_a_time:  # another thread may train, too, or predict with them
            for running, batch in ((running_mean, mean[0]), (running_variance, variance[0])):
                running *= momentum
                running += (1 - momentum) * batch
        ctx.save(src, scale, mean, variance)
        ctx.epsilon, ctx.combine = epsilon, combine
        return dst

    @staticmethod
    def backward(ctx: Context, gradient: Array) -> Gradients:
        from kernels.deferred.statistics import BATCH  # a net without norms does not load this module

        src, scale, mean, variance = ctx.saved
        settings = ctx.epsilon, BATCH, ctx.combine
        return ops.norms.backward(gradient, src, scale, mean, variance, *settings)


class BatchNormInference(Function):
    """Normalises with given statistics, which are constants to the gradient."""

    @staticmethod
    def forward(
        ctx: Context, src: Array, scale: Array, shift: Array, mean: Array, variance: Array, epsilon: float
    ) -> Array:
        ctx.save(src, scale, mean, variance)
        ctx.epsilon = epsilon
        return ops.norms.forward_inference(src, scale, shift, mean, variance, epsilon)

    @staticmethod
    def backward(ctx: Context, gradient: Array) -> Gradients:
        src, scale, mean, variance = ctx.saved
        rstd = 1 / np.sqrt(variance + ctx.epsilon)
        axes = tuple(range(src.ndim - 1))
        diff_scale = (gradient * ((src - mean) * rstd)).sum(axis=axes, dtype=np.float64)
        diff_shift = gradient.sum(axis=axes, dtype=np.float64)
        return gradient * (scale * rstd), diff_scale, diff_shift


class GroupNorm(Function):
    """Normalises with the statistics of each image; saves what batch norm does, two numbers an image more."""

    @staticmethod
    def forward(
        ctx: Context, src: Array, scale: Array, shift: Array, sharing: "Sharing", epsilon: float
    ) -> Array:
        dst, mean, variance = ops.norms.forward(src, scale, shift, epsilon, sharing)
        ctx.save(src, scale, mean, variance)
        ctx.epsilon, ctx.sharing = epsilon, sharing
        return dst

    @staticmethod
    def backward(ctx: Context, gradient: Array) -> Gradients:
        src, scale, mean, variance = ctx.saved
        return ops.norms.backward(gradient, src, scale, mean, variance, ctx.epsilon, ctx.sharing)


class _Activation(Function):
    """Saves the result, which the next operator keeps anyway; not the source.

    ``kind`` returns what kernels know of the activation. A slope, or ``alpha``, is above 0: so the result has
    the sign of the source.
    """

    kind: "Callable[[float], Activation]"

    @staticmethod
    def forward(ctx: Context, src: Array, slope: float = 0.0) -> Array:
        ctx.activation = ctx.function.kind(slope)
        dst = ops.activation.forward(src, ctx.activation)
        ctx.save(dst)
        return dst

    @staticmethod
    def backward(ctx: Context, gradient: Array) -> Gradients:
        (dst,) = ctx.saved
        return (ops.activation.backward(gradient, dst, ctx.activation),)


class Relu(_Activation):
    """``max(src, 0)``."""

    kind = staticmethod(lambda slope: ops.activation.RELU)


class LeakyRelu(_Activation):
    """``src`` where positive, ``slope * src`` elsewhere."""

    kind = staticmethod(lambda slope: ops.activation.leaky_relu(slope))


class Elu(_Activation):
    """``src`` where positive, ``alpha * (exp(src) - 1)`` elsewhere."""

    kind = staticmethod(lambda alpha: ops.activation.elu(alpha))


class Sigmoid(_Activation):
    """``1 / (1 + exp(-src))``."""

    kind = staticmethod(lambda slope: ops.activation.SIGMOID)


class PRelu(Function):
    """Saves the source: a learned slope may be negative, and then the result does not tell its sign."""

    @staticmethod
    def forward(ctx: Context, src: Array, slope: Array) -> Array:
        ctx.save(src, slope)
        return ops.activation.prelu_forward(src, slope)

    @staticmethod
    def backward(ctx: Context, gradient: Array) -> Gradients:
        return ops.activation.prelu_backward(gradient, *ctx.saved)


class Softmax(Function):
    """Over the last axis; saves the result."""

    @staticmethod
    def forward(ctx: Context, src: Array) -> Array:
        dst = ops.softmax.forward(src)
        ctx.save(dst)
        return dst

    @staticmethod
    def backward(ctx: Context, gradient: Array) -> Gradients:
        (dst,) = ctx.saved
        return (ops.softmax.backward(gradient, dst),)


class Concatenation(Function):
    """Channels of ``a``, then of ``b``, then of ``more``; saves nothing.

    The gradient of a skip is not kept: the tape adds the encoder's gradient to it in place.
    """

    gives_away = True

    @staticmethod
    def forward(ctx: Context, a: Array, b: Array, *more: Array) -> Array:
        ctx.splits = list(accumulate(part.shape[-1] for part in (a, b, *more)))[:-1]
        return ops.concat.forward(a, b, *more)

    @staticmethod
    def backward(ctx: Context, gradient: Array) -> Gradients:
        return ops.concat.backward(gradient, *ctx.splits)


class ZeroPadding(Function):
    """Zeros at the end of depth, height and width; backward cuts them off."""

    @staticmethod
    def forward(ctx: Context, src: Array, size: Triple) -> Array:
        if any(old > new for old, new in zip(src.shape[1:4], size, strict=True)):
            raise ValueError(f"pad_end: size {size} is smaller than the volume {src.shape[1:4]}")
        ctx.inside = tuple(slice(n) for n in src.shape)
        dst = np.zeros((src.shape[0], *size, src.shape[-1]), src.dtype)
        dst[ctx.inside] = src
        return dst

    @staticmethod
    def backward(ctx: Context, gradient: Array) -> Gradients:
        return (gradient[ctx.inside],)


class Dropout(Function):
    """Zeroes elements at random; saves one byte an element: which are kept."""

    @staticmethod
    def drawn(shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the random numbers for a source of this shape."""
        return shape

    @staticmethod
    def forward(ctx: Context, src: Array, rate: float, generator: np.random.Generator) -> Array:
        shape = ctx.function.drawn(src.shape)
        with one_at_a_time:  # while another thread traces, to draw looks as if the model did beside this
            kept: NDArray[np.bool_] = generator.random(shape, dtype=np.float32) >= rate
        ctx.save(kept)
        ctx.factor = 1 / (1 - rate)
        dst = src * kept
        dst *= ctx.factor
        return dst

    @staticmethod
    def backward(ctx: Context, gradient: Array) -> Gradients:
        (kept,) = ctx.saved
        diff_src = gradient * kept
        diff_src *= ctx.factor
        return (diff_src,)


class SpatialDropout(Dropout):
    """Zeroes whole channels of an image at random; saves one byte an image and channel."""

    @staticmethod
    def drawn(shape: tuple[int, ...]) -> tuple[int, ...]:
        """One number an image and channel."""
        return (shape[0], *(1,) * (len(shape) - 2), shape[-1])


#: Share of batch norm's running statistics that stays at each step, if nothing else is said. After n steps
#: ``momentum ** n`` of them is still the start, mean 0 and variance 1: of Keras' default 0.99 more than half
#: after sixty steps, when inference, which normalises with them, goes wrong; of 0.9 nothing after forty.
BATCH_NORM_MOMENTUM = 0.9


# ---- what models call ------------------------------------------------------------------------


def _check_types(operator: str, src: Tensor, **others: Tensor | Array | None) -> None:
    """Refuse tensors of several types: a kernel takes one type, and cannot know which one was meant."""
    for name, other in others.items():
        if other is not None and other.dtype != src.dtype:
            raise TypeError(
                f"{operator}: src is {src.dtype}, {name} {other.dtype}; expected one type (np.ones(4) is "
                "float64, and what is computed with it; layers are float32)"
            )


def conv3d(
    src: Tensor,
    weights: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = (1, 1, 1),
    padding: str = "same",
) -> Tensor:
    """Convolve (MB, ID, IH, IW, IC) with (OC, IC, KD, KH, KW) to (MB, OD, OH, OW, OC).

    ``padding`` is "same" (as TensorFlow has it) or "valid"; ``bias`` is (OC,).
    """
    _check_types("conv3d", src, weights=weights, bias=bias)
    return Convolution.apply(src, weights, bias, triple("stride", stride), padding)


def conv_transpose3d(
    src: Tensor,
    weights: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = (2, 2, 2),
    padding: str = "same",
) -> Tensor:
    """Transposed convolution of (MB, ID, IH, IW, IC) with (IC, OC, KD, KH, KW); ``bias`` is (OC,).

    The result's size is ``I * S`` for padding "same", ``I * S + max(K - S, 0)`` for "valid".
    """
    _check_types("conv_transpose3d", src, weights=weights, bias=bias)
    return TransposedConvolution.apply(src, weights, bias, triple("stride", stride), padding)


def max_pool3d(src: Tensor, size: int | Sequence[int] = (2, 2, 2)) -> Tensor:
    """Maximum of each ``size`` window; windows do not overlap, a rest at the end is left out."""
    return MaxPooling.apply(src, triple("size", size))


def upsample3d(src: Tensor, factor: int | Sequence[int] = (2, 2, 2), mode: str = "nearest") -> Tensor:
    """Enlarge depth, height and width ``factor`` times.

    ``mode`` "nearest" repeats each voxel; "trilinear" interpolates between the centres of voxels, as PyTorch
    does with ``align_corners=False``.
    """
    return Upsampling.apply(src, triple("factor", factor), ops.upsample.checked_mode(mode))


def batch_norm(
    src: Tensor,
    scale: Tensor,
    shift: Tensor,
    running_mean: Array,
    running_variance: Array,
    training: bool,
    momentum: float = BATCH_NORM_MOMENTUM,
    epsilon: float = 1e-3,
    combine: Combine | None = None,
) -> Tensor:
    """``(src - mean) / sqrt(variance + epsilon) * scale + shift``, for each channel (last axis).

    In training, mean and (biased) variance are the batch's, and the running ones become
    ``momentum * running + (1 - momentum) * batch``, in place; otherwise they are the running ones. (This
    is Keras' meaning of the word; PyTorch's ``momentum`` is one minus this.)
    With ``combine`` the batch is that of several processes (:mod:`kernels.ops.norms`).
    """
    statistics = running_mean, running_variance
    _check_types("batch_norm", src, scale=scale, shift=shift)
    if training:
        return BatchNormTraining.apply(src, scale, shift, *statistics, momentum, epsilon, combine)
    return BatchNormInference.apply(src, scale, shift, *statistics, epsilon)


def group_norm(src: Tensor, scale: Tensor, shift: Tensor, groups: int, epsilon: float = 1e-3) -> Tensor:
    """As :func:`batch_norm`, with mean and variance of each image and group of neighbouring channels.

    The channels (last axis) fall into ``groups`` of the same size. Training and inference are the same.
    """
    channels = src.shape[-1]
    if positive("group_norm: groups", groups) > channels or channels % groups:
        raise ValueError(f"group_norm: {channels} channels cannot be divided into {groups} groups")
    _check_types("group_norm", src, scale=scale, shift=shift)
    from kernels.deferred.statistics import Sharing

    return GroupNorm.apply(src, scale, shift, Sharing(True, channels // groups), epsilon)


def instance_norm(src: Tensor, scale: Tensor, shift: Tensor, epsilon: float = 1e-3) -> Tensor:
    """As :func:`batch_norm`, with mean and variance of each image and channel."""
    return group_norm(src, scale, shift, src.shape[-1], epsilon)


def relu(src: Tensor) -> Tensor:
    """``max(src, 0)``."""
    return Relu.apply(src)


def leaky_relu(src: Tensor, slope: float = 0.01) -> Tensor:
    """``src`` where positive, ``slope * src`` elsewhere; ``slope`` is above 0."""
    return LeakyRelu.apply(src, slope)


def elu(src: Tensor, alpha: float = 1.0) -> Tensor:
    """``src`` where positive, ``alpha * (exp(src) - 1)`` elsewhere; ``alpha`` is above 0."""
    return Elu.apply(src, alpha)


def prelu(src: Tensor, slope: Tensor) -> Tensor:
    """``src`` where positive, ``slope * src`` elsewhere; ``slope`` is (C,), or (1,) for all channels."""
    _check_types("prelu", src, slope=slope)
    return PRelu.apply(src, slope)


def sigmoid(src: Tensor) -> Tensor:
    """``1 / (1 + exp(-src))``."""
    return Sigmoid.apply(src)


def softmax(src: Tensor) -> Tensor:
    """Exponentials that sum to one over the last axis, the classes."""
    return Softmax.apply(src)


def concatenate(a: Tensor, b: Tensor, *more: Tensor) -> Tensor:
    """Channels of ``a``, followed by those of ``b``, and of ``more``."""
    _check_types("concatenate", a, b=b, **{f"more[{i}]": part for i, part in enumerate(more)})
    return Concatenation.apply(a, b, *more)


def pad_end(src: Tensor, size: Sequence[int]) -> Tensor:
    """Grow depth, height and width to ``size`` with zeros at the end of each."""
    whole = triple("size", size)
    return ZeroPadding.apply(src, whole) if src.shape[1:4] != whole else src


def dropout(src: Tensor, rate: float, generator: np.random.Generator) -> Tensor:
    """Zero elements with probability ``rate``; the others grow by ``1 / (1 - rate)``."""
    return Dropout.apply(src, rate, generator) if fraction("dropout: rate", rate) else src


def dropout3d(src: Tensor, rate: float, generator: np.random.Generator) -> Tensor:
    """Zero whole channels of an image with probability ``rate``; the others grow by ``1 / (1 - rate)``.

    Neighbouring voxels of a channel say almost the same, so dropping single elements hides little from the
    next convolution. Source: Tompson et al. 2015, section 3.2; Keras calls it spatial dropout.
    """
    return SpatialDropout.apply(src, rate, generator) if fraction("dropout3d: rate", rate) else src
