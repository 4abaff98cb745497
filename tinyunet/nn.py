"""Layers: modules that keep the parameters and settings of an operator, and call it."""

from collections.abc import Iterator, Sequence

import numpy as np

from kernels import ops
from kernels.base.arguments import Combine, triple
from tinyunet import functional
from tinyunet.autograd import Tensor
from tinyunet.common.checks import at_least_zero, fraction, positive, share
from tinyunet.functional import BATCH_NORM_MOMENTUM
from tinyunet.module import Generator as Generator
from tinyunet.module import Module as Module
from tinyunet.module import Parameter as Parameter
from tinyunet.tape import Array


class Sequential(Module):
    """Runs modules one after the other; their names are 0, 1, ..."""

    def __init__(self, *modules: Module) -> None:
        for module in modules:
            self.append(module)

    def append(self, module: Module) -> None:
        """Add a module at the end."""
        setattr(self, str(sum(1 for _ in self)), module)

    def __iter__(self) -> Iterator[Module]:
        return (part for part in list(vars(self).values()) if isinstance(part, Module))

    def __getitem__(self, index: int) -> Module:
        return list(self)[index]

    def forward(self, src: Tensor) -> Tensor:
        """Give each module the result of the module before it."""
        for module in self:
            src = module(src)
        return src


def he_uniform(shape: tuple[int, ...], generator: Generator | None = None) -> Array:
    """Draw from the uniform distribution of variance ``2 / fan_in`` (He et al. 2015), float32.

    ``fan_in`` is the kernel's volume times the channels on axis 1, as in Keras. These are the input channels
    of a convolution, and the *output* channels of a transposed convolution.
    """
    limit = np.sqrt(6 / int(np.prod(shape[1:])))
    return (generator or np.random.default_rng(0)).uniform(-limit, limit, shape).astype(np.float32)


class Conv3d(Module):
    """Convolution; he_uniform weights, zero bias.

    Parameters
    ----------
    in_channels, out_channels : int
    kernel, stride : int or three of int
    padding : "same" or "valid"
    generator : numpy Generator, optional
        Draws the weights; a new one of seed 0 if left out.
    bias : bool
        Whether a number is added to each output channel. A batch norm right after subtracts the bias again.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int | Sequence[int] = (3, 3, 3),
        stride: int | Sequence[int] = (1, 1, 1),
        padding: str = "same",
        generator: Generator | None = None,
        bias: bool = True,
    ) -> None:
        inputs, outputs = (positive("in_channels", in_channels), positive("out_channels", out_channels))
        self.weights = Parameter(he_uniform((outputs, inputs, *triple("kernel", kernel)), generator))
        self.bias = Parameter(np.zeros(outputs, np.float32)) if bias else None
        self.stride, self.padding = triple("stride", stride), padding

    def forward(self, src: Tensor) -> Tensor:
        """(MB, ID, IH, IW, IC) -> (MB, OD, OH, OW, OC)."""
        return functional.conv3d(src, self.weights, self.bias, self.stride, self.padding)


class ConvTranspose3d(Module):
    """Transposed convolution; parameters as of :class:`Conv3d`.

    With a stride as large as the kernel, each source voxel writes a block of the result that no other writes.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int | Sequence[int] = (2, 2, 2),
        stride: int | Sequence[int] = (2, 2, 2),
        padding: str = "same",
        generator: Generator | None = None,
        bias: bool = True,
    ) -> None:
        inputs, outputs = (positive("in_channels", in_channels), positive("out_channels", out_channels))
        self.weights = Parameter(he_uniform((inputs, outputs, *triple("kernel", kernel)), generator))
        self.bias = Parameter(np.zeros(outputs, np.float32)) if bias else None
        self.stride, self.padding = triple("stride", stride), padding

    def forward(self, src: Tensor) -> Tensor:
        """(MB, ID, IH, IW, IC) -> (MB, ID * SD, IH * SH, IW * SW, OC) with padding "same"."""
        return functional.conv_transpose3d(src, self.weights, self.bias, self.stride, self.padding)


class BatchNorm(Module):
    """Batch normalisation over all axes but the last.

    Parameters
    ----------
    channels : int
    momentum : float
        Share of the running statistics that stays at each training step, as in Keras; PyTorch's momentum is
        one minus this share. `functional.BATCH_NORM_MOMENTUM` says why 0.9; long trainings may take more.
    epsilon : float
        Added to the variance. It must be above 0, because a channel may be constant.

    Attributes
    ----------
    combine : callable or None
        Sums the statistics over several processes (:mod:`kernels.ops.norms`).
    """

    def __init__(self, channels: int, momentum: float = BATCH_NORM_MOMENTUM, epsilon: float = 1e-3) -> None:
        self.scale = Parameter(np.ones(channels, np.float32))
        self.shift = Parameter(np.zeros(channels, np.float32))
        self.running_mean: Array = np.zeros(channels, np.float32)
        self.running_variance: Array = np.ones(channels, np.float32)
        self.momentum = share("momentum", momentum)
        self.epsilon = _above_zero(epsilon)
        self.combine: Combine | None = None

    def forward(self, src: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return functional.batch_norm(
            src,
            self.scale,
            self.shift,
            self.running_mean,
            self.running_variance,
            self.training,
            self.momentum,
            self.epsilon,
            self.combine,
        )


class GroupNorm(Module):
    """Normalisation over each image and group of neighbouring channels; the same in training and inference.

    Parameters
    ----------
    groups, channels : int
        ``groups`` of channels // groups neighbours share a mean and a variance. With one group all values of
        an image share them, as in layer norm; each channel has its own scale and shift.
    epsilon : float
        Added to the variance. It must be above 0, because a group may be constant.

    Raises
    ------
    ValueError
        ``groups`` does not divide ``channels``, or an argument is not above 0.
    """

    def __init__(self, groups: int, channels: int, epsilon: float = 1e-3) -> None:
        if positive("channels", channels) % positive("groups", groups):
            raise ValueError(f"groups must divide the {channels} channels, not {groups}")
        self.scale = Parameter(np.ones(channels, np.float32))
        self.shift = Parameter(np.zeros(channels, np.float32))
        self.groups, self.epsilon = groups, _above_zero(epsilon)

    def forward(self, src: Tensor) -> Tensor:
        """(MB, ..., C) -> (MB, ..., C)."""
        return functional.group_norm(src, self.scale, self.shift, self.groups, self.epsilon)


class InstanceNorm(GroupNorm):
    """Normalisation over each image and channel: a :class:`GroupNorm` with groups of one channel."""

    def __init__(self, channels: int, epsilon: float = 1e-3) -> None:
        super().__init__(channels, channels, epsilon)


def _above_zero(epsilon: float) -> float:
    if not at_least_zero("epsilon", epsilon) > 0:
        raise ValueError(f"epsilon must be above 0, not {epsilon}: a channel may be constant")
    return epsilon


class ReLU(Module):
    """``max(src, 0)`` of each element."""

    def forward(self, src: Tensor) -> Tensor:
        """Any shape."""
        return functional.relu(src)


class LeakyReLU(Module):
    """``src`` where it is positive, else ``slope * src``; ValueError unless ``slope`` > 0."""

    def __init__(self, slope: float = 0.01) -> None:
        self.slope = ops.activation.leaky_relu(slope).slope

    def forward(self, src: Tensor) -> Tensor:
        """Any shape."""
        return functional.leaky_relu(src, self.slope)


class ELU(Module):
    """``src`` where it is positive, else ``alpha * (exp(src) - 1)``; ValueError unless ``alpha`` > 0."""

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = ops.activation.elu(alpha).slope

    def forward(self, src: Tensor) -> Tensor:
        """Any shape."""
        return functional.elu(src, self.alpha)


class PReLU(Module):
    """``src`` where it is positive, else ``slope * src``; the slopes are learned.

    Parameters
    ----------
    channels : int
        Number of slopes: one for each channel, or 1 for all channels. ValueError if it is below 1.
    slope : float
        Value of each slope at the start.
    """

    def __init__(self, channels: int = 1, slope: float = 0.25) -> None:
        self.slope = Parameter(np.full(positive("channels", channels), slope, np.float32))

    def forward(self, src: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return functional.prelu(src, self.slope)


class MaxPool3d(Module):
    """Maximum of each window of ``size``, an int or three of int; windows do not overlap."""

    def __init__(self, size: int | Sequence[int] = (2, 2, 2)) -> None:
        self.size = triple("size", size)

    def forward(self, src: Tensor) -> Tensor:
        """(MB, D, H, W, C) -> (MB, D // size, H // size, W // size, C)."""
        return functional.max_pool3d(src, self.size)


class Upsample3d(Module):
    """Upsampling by ``factor``, ``mode`` "nearest" or "trilinear": :func:`tinyunet.functional.upsample3d`."""

    def __init__(self, factor: int | Sequence[int] = (2, 2, 2), mode: str = "nearest") -> None:
        self.factor, self.interpolation = triple("factor", factor), ops.upsample.checked_mode(mode)

    def forward(self, src: Tensor) -> Tensor:
        """(MB, D, H, W, C) -> (MB, D * factor, H * factor, W * factor, C)."""
        return functional.upsample3d(src, self.factor, self.interpolation)


class Dropout(Module):
    """Zero elements in training with probability ``rate``; return ``src`` itself in inference.

    Each layer draws from its own generator, which begins at ``seed``. ValueError unless 0 <= ``rate`` < 1.
    """

    def __init__(self, rate: float, seed: int = 0) -> None:
        self.rate = fraction("rate", rate)
        self.generator = np.random.default_rng(seed)

    def forward(self, src: Tensor) -> Tensor:
        """Any shape."""
        return functional.dropout(src, self.rate, self.generator) if self.training else src


class Dropout3d(Dropout):
    """Zero whole channels of an image in training (Keras: spatial dropout); arguments as of `Dropout`."""

    def forward(self, src: Tensor) -> Tensor:
        """(MB, ..., C) -> (MB, ..., C)."""
        return functional.dropout3d(src, self.rate, self.generator) if self.training else src
