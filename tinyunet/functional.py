# ruff: noqa: D102 - forward and backward of every operator are described once, in Function
"""Differentiable operators: each forward kernel with its gradient kernels right below it.

Volumes are NDHWC tensors: batch, depth, height, width, channels. float32 runs the fast kernels,
float64 the references. Only the arrays that a ``forward`` saves stay in memory until backward. Models
call the functions at the end; each returns a new Tensor of the dtype of ``src``.

Common parameters
-----------------
src : Tensor, float32 or float64, shape = (MB, D, H, W, C)
    Norms, activations, softmax and dropout take any shape (MB, ..., C).
scale, shift : Tensor, shape = (C,)
epsilon : float
    Added to the variance, inside the root. The default is that of Keras.
generator : numpy Generator
    Draws the random numbers of dropout, at each call.

All functions raise TypeError if their tensors differ in dtype, and ValueError if a shape does not fit.
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
    """Saves the source for the gradient of the weights, and the weights for the gradient of the source."""

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
        if weights is not None:  # the first convolution of a net needs no gradient of its source
            diff_src = passes.backward_data(gradient, weights, ctx.src_shape, *ctx.settings)
        if src is not None:
            diff_weights, diff_bias = passes.backward_weights(src, gradient, ctx.kernel, *ctx.settings)
        return diff_src, diff_weights, diff_bias


class TransposedConvolution(Convolution):
    """The backward_data of a convolution, as an operator; weights are (IC, OC, KD, KH, KW)."""

    module = staticmethod(lambda: ops.transposed_conv)


class MaxPooling(Function):
    """Takes the maximum of each window, and saves its place in the window: one byte a window."""

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
    """Normalises with the batch's statistics, and moves the running statistics towards the batch's.

    Saves the source, and mean and variance of each channel; backward normalises the source again.
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
        with one_at_a_time:  # another thread may read or change the running statistics
            for running, batch in ((running_mean, mean[0]), (running_variance, variance[0])):
                running *= momentum
                running += (1 - momentum) * batch
        ctx.save(src, scale, mean, variance)
        ctx.epsilon, ctx.combine = epsilon, combine
        return dst

    @staticmethod
    def backward(ctx: Context, gradient: Array) -> Gradients:
        src, scale, mean, variance = ctx.saved
        return ops.norms.backward(gradient, src, scale, mean, variance, ctx.epsilon, combine=ctx.combine)


class BatchNormInference(Function):
    """Normalises with given statistics, which have no gradient."""

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
    """Normalises each image with its own statistics.

    Saves the source, and mean and variance of each image and channel.
    """

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
    """Saves the result, which the next operator keeps anyway, and not the source.

    ``kind`` returns the activation's record for kernels. A slope, and ELU's ``alpha``, is above 0; so the
    result has the sign of the source, and backward needs the result alone.
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
    """Saves source and slope: with a negative slope the result does not show the sign of the source."""

    @staticmethod
    def forward(ctx: Context, src: Array, slope: Array) -> Array:
        ctx.save(src, slope)
        return ops.activation.prelu_forward(src, slope)

    @staticmethod
    def backward(ctx: Context, gradient: Array) -> Gradients:
        return ops.activation.prelu_backward(gradient, *ctx.saved)


class Softmax(Function):
    """Softmax over the last axis. Saves the result."""

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
    """Joins the channels of ``a``, then of ``b``, then of ``more``. Saves nothing.

    Nobody else holds the gradients that backward returns: the tape adds to them in place.
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
    """Appends zeros to depth, height and width; backward cuts their gradient off."""

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
    """Zeroes elements at random. Saves which elements are kept: one byte an element."""

    @staticmethod
    def drawn(shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the random numbers for a source of this shape."""
        return shape

    @staticmethod
    def forward(ctx: Context, src: Array, rate: float, generator: np.random.Generator) -> Array:
        shape = ctx.function.drawn(src.shape)
        with one_at_a_time:  # a trace in another thread compares the generator before and after the trace
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
    """Zeroes whole channels of an image at random. Saves one byte for each image and channel."""

    @staticmethod
    def drawn(shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape with one number for each image and channel."""
        return (shape[0], *(1,) * (len(shape) - 2), shape[-1])


#: The default share of batch norm's running statistics that stays at each step. After n steps the share
#: ``momentum ** n`` of the statistics is still their start, mean 0 and variance 1. With Keras' default 0.99
#: that is 55 % after sixty steps, and inference goes wrong; with 0.9 it is 1.5 % after forty.
BATCH_NORM_MOMENTUM = 0.9


# ---- what models call ------------------------------------------------------------------------


def _check_types(operator: str, src: Tensor, **others: Tensor | Array | None) -> None:
    """Raise TypeError if tensors differ in type: a kernel takes one type."""
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

    ``padding`` is "same" (TensorFlow's definition) or "valid"; ``bias`` has the shape (OC,).
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
    """Convolve, transposed, (MB, ID, IH, IW, IC) with (IC, OC, KD, KH, KW); ``bias`` is (OC,).

    The size of the result is ``I * S`` for padding "same", ``I * S + max(K - S, 0)`` for "valid".
    """
    _check_types("conv_transpose3d", src, weights=weights, bias=bias)
    return TransposedConvolution.apply(src, weights, bias, triple("stride", stride), padding)


def max_pool3d(src: Tensor, size: int | Sequence[int] = (2, 2, 2)) -> Tensor:
    """Return the maximum of each window: (MB, D, H, W, C) to (MB, D // size, H // size, W // size, C).

    Windows do not overlap. Voxels at the end that fill no window are left out.
    """
    return MaxPooling.apply(src, triple("size", size))


def upsample3d(src: Tensor, factor: int | Sequence[int] = (2, 2, 2), mode: str = "nearest") -> Tensor:
    """Enlarge (MB, D, H, W, C) to (MB, D * factor, H * factor, W * factor, C).

    Parameters
    ----------
    factor : int or three of int, 1 or more
    mode : "nearest" or "trilinear"
        Repeat each voxel; or interpolate linearly along each axis between the centres of voxels, and repeat
        the outermost voxel beyond its centre: PyTorch's ``align_corners=False``. Equation and errors are in
        :mod:`kernels.ops.upsample`. Any other mode raises ValueError.
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
    """Return ``(src - mean) / sqrt(variance + epsilon) * scale + shift``, for each channel (last axis).

    In training, mean and (biased) variance are those of the batch, and each of the running statistics, (C,),
    becomes ``momentum * running + (1 - momentum) * batch``, in place. In inference mean and variance are the
    running statistics. ``momentum`` has Keras' meaning; PyTorch's ``momentum`` is one minus Keras'.
    With ``combine`` the batch is that of several processes (:mod:`kernels.ops.norms`).

    Source: Ioffe and Szegedy, "Batch normalization" (2015).
    """
    statistics = running_mean, running_variance
    _check_types("batch_norm", src, scale=scale, shift=shift)
    if training:
        return BatchNormTraining.apply(src, scale, shift, *statistics, momentum, epsilon, combine)
    return BatchNormInference.apply(src, scale, shift, *statistics, epsilon)


def group_norm(src: Tensor, scale: Tensor, shift: Tensor, groups: int, epsilon: float = 1e-3) -> Tensor:
    """Normalise as :func:`batch_norm`, with the mean and variance of each image and group of channels.

    The channels (last axis) are cut into ``groups`` of C // groups neighbours, which share mean and variance;
    each channel has its own scale and shift. There are no running statistics: training and inference are the
    same. ValueError if ``groups`` is below 1 or does not divide C.

    Source: Wu and He, "Group normalization" (2018).
    """
    channels = src.shape[-1]
    if positive("group_norm: groups", groups) > channels or channels % groups:
        raise ValueError(f"group_norm: {channels} channels cannot be divided into {groups} groups")
    _check_types("group_norm", src, scale=scale, shift=shift)
    from kernels.deferred.statistics import Sharing

    return GroupNorm.apply(src, scale, shift, Sharing(True, channels // groups), epsilon)


def instance_norm(src: Tensor, scale: Tensor, shift: Tensor, epsilon: float = 1e-3) -> Tensor:
    """Normalise as :func:`batch_norm`, with the mean and variance of each image and channel.

    There are no running statistics: training and inference are the same.

    Source: Ulyanov, Vedaldi and Lempitsky, "Instance normalization" (2016).
    """
    return group_norm(src, scale, shift, src.shape[-1], epsilon)


def relu(src: Tensor) -> Tensor:
    """Return ``max(src, 0)`` of each element."""
    return Relu.apply(src)


def leaky_relu(src: Tensor, slope: float = 0.01) -> Tensor:
    """Return ``src`` where it is positive, else ``slope * src``; ValueError unless ``slope`` is above 0."""
    return LeakyRelu.apply(src, slope)


def elu(src: Tensor, alpha: float = 1.0) -> Tensor:
    """Return ``src`` where it is positive, else ``alpha * (exp(src) - 1)``.

    ValueError unless ``alpha`` is above 0 and finite. Source: Clevert et al. 2016.
    """
    return Elu.apply(src, alpha)


def prelu(src: Tensor, slope: Tensor) -> Tensor:
    """Return ``src`` where it is positive, else ``slope * src``, with learned slopes.

    ``slope`` has the shape (C,), or (1,) for all channels; any other shape raises ValueError. A slope may be
    negative. Source: He et al., "Delving deep into rectifiers" (2015).
    """
    _check_types("prelu", src, slope=slope)
    return PRelu.apply(src, slope)


def sigmoid(src: Tensor) -> Tensor:
    """Return ``1 / (1 + exp(-src))`` of each element."""
    return Sigmoid.apply(src)


def softmax(src: Tensor) -> Tensor:
    """Return ``exp(src)`` divided by its sum over the last axis, the classes."""
    return Softmax.apply(src)


def concatenate(a: Tensor, b: Tensor, *more: Tensor) -> Tensor:
    """Return a tensor with the channels of ``a``, then of ``b``, then of ``more``; other axes are equal."""
    _check_types("concatenate", a, b=b, **{f"more[{i}]": part for i, part in enumerate(more)})
    return Concatenation.apply(a, b, *more)


def pad_end(src: Tensor, size: Sequence[int]) -> Tensor:
    """Append zeros to depth, height and width up to ``size``; ValueError if ``src`` is larger."""
    whole = triple("size", size)
    return ZeroPadding.apply(src, whole) if src.shape[1:4] != whole else src


def dropout(src: Tensor, rate: float, generator: np.random.Generator) -> Tensor:
    """Zero elements with probability ``rate``, and multiply the others by ``1 / (1 - rate)``.

    ValueError unless ``rate`` is at least 0 and below 1. Source: Srivastava et al. 2014.
    """
    return Dropout.apply(src, rate, generator) if fraction("dropout: rate", rate) else src


def dropout3d(src: Tensor, rate: float, generator: np.random.Generator) -> Tensor:
    """Zero channels of an image with probability ``rate``, and multiply the others by ``1 / (1 - rate)``.

    ``src`` is (MB, ..., C); one number is drawn for each image and channel. Neighbouring voxels of a channel
    are almost equal, so the next convolution loses little if single elements are dropped. Keras calls this
    operator spatial dropout. ValueError unless ``rate`` is at least 0 and below 1.

    Source: Tompson et al. 2015, section 3.2.
    """
    return SpatialDropout.apply(src, rate, generator) if fraction("dropout3d: rate", rate) else src
