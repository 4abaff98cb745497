"""The U-Net of IntelAI/unet: 3-D, or 2-D with kernels of depth one.

Source: Ronneberger et al. 2015 (the net), Çiçek et al. 2016 (in three dimensions), and the reference
code (``3D/model.py``) for every detail: padding "same", batch norm between
convolution and ReLU, [upsampled, skip] in this order, and half as many filters out of a transposed
convolution as into it. The reference code's 2-D net (``2D/model.py``) has no batch norm, and drops whole
channels: ``UNet(dim=2, norm=None, spatial_dropout=0.2)``.
"""

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from kernels.base.arguments import Triple
from tinyunet import functional
from tinyunet.autograd import Tensor, real_numbers
from tinyunet.common.checks import fraction, share
from tinyunet.functional import BATCH_NORM_MOMENTUM
from tinyunet.module import Generator, Module
from tinyunet.nn import (
    ELU,
    BatchNorm,
    Conv3d,
    ConvTranspose3d,
    Dropout,
    Dropout3d,
    GroupNorm,
    InstanceNorm,
    LeakyReLU,
    MaxPool3d,
    PReLU,
    ReLU,
    Sequential,
    Upsample3d,
)

#: The layer between convolution and ReLU, from its channels and the momentum of batch norm.
NORMS: dict[str | None, Callable[[int, float], Module | None]] = {
    "batch": BatchNorm,
    "instance": lambda channels, momentum: InstanceNorm(channels),
    "group": lambda channels, momentum: GroupNorm(math.gcd(8, channels), channels),
    None: lambda channels, momentum: None,
}
#: The activation after it, from its channels.
ACTIVATIONS: dict[str, Callable[[int], Module]] = {
    "relu": lambda channels: ReLU(),
    "leaky_relu": lambda channels: LeakyReLU(),
    "elu": lambda channels: ELU(),
    "prelu": PReLU,
}


class Block(Module):
    """Twice [convolution with bias, normalisation or none, activation, perhaps dropout]."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Triple,
        generator: Generator,
        dropout: Dropout | None = None,
        momentum: float = BATCH_NORM_MOMENTUM,
        norm: str | None = "batch",
        spatial_dropout: Dropout3d | None = None,
        activation: str = "relu",
    ) -> None:
        self.conv0 = Conv3d(in_channels, out_channels, kernel, generator=generator)
        self.norm0 = NORMS[norm](out_channels, momentum)
        self.conv1 = Conv3d(out_channels, out_channels, kernel, generator=generator)
        self.norm1 = NORMS[norm](out_channels, momentum)
        self.activation0, self.activation1 = (ACTIVATIONS[activation](out_channels) for _ in range(2))
        self.spatial_dropout, self.dropout = spatial_dropout, dropout

    def forward(self, src: Tensor) -> Tensor:
        """(MB, D, H, W, IC) -> (MB, D, H, W, OC)."""
        for layers in (
            (self.conv0, self.norm0, self.activation0, self.spatial_dropout),
            (self.conv1, self.norm1, self.activation1, self.dropout),
        ):
            for layer in layers:
                src = src if layer is None else layer(src)
        return src


class UNet(Module):
    """An encoder that halves the volume, a decoder that doubles it, and skips across.

    Parameters
    ----------
    dim : int
        3 for volumes (MB, D, H, W, C), 2 for images (MB, H, W, C).
    in_channels : int
        Channels of the input: one an MRI sequence.
    classes : int
        Channels of the output. Their softmax is the result; for one class, its sigmoid.
    filters : int
        Channels on the first level; each level below has twice as many.
    depth : int
        Number of levels.
    use_upsampling : bool or "trilinear"
        Repeat voxels, or interpolate between them, instead of learning a transposed convolution.
    dropout : float
        Share of elements dropped at the end of the two lowest encoder levels (Ronneberger et al.
        2015, section 3.1).
    seed : int
        Seed of the generators that draw weights and dropout.
    momentum : float
        Of all batch norms: see :class:`tinyunet.nn.BatchNorm`.
    norm : "batch", "instance", "group" or None
        The layer between a convolution and its ReLU: batch, instance or group norm, of eight groups (or as
        many as divide eight and the channels), or no layer.
    spatial_dropout : float
        Share of channels dropped between the two convolutions of each of the two encoder levels above the
        lowest, as in the reference code's 2-D net.
    activation : "relu", "leaky_relu", "elu" or "prelu"
        After each normalisation; "prelu" learns a slope for each channel.

    Attributes
    ----------
    config : dict
        These arguments: ``UNet(**model.config)`` is the same model with new weights.

    Notes
    -----
    With the defaults, but one channel in and one class out, parameters and buffers hold 5,650,801
    numbers. Sizes that cannot be halved evenly work: the upsampled tensor is padded with zeros at its end
    to the size of the skip.
    """

    def __init__(
        self,
        dim: int = 3,
        in_channels: int = 4,
        classes: int = 4,
        filters: int = 16,
        depth: int = 5,
        use_upsampling: bool | str = False,
        dropout: float = 0.0,
        seed: int = 0,
        momentum: float = BATCH_NORM_MOMENTUM,
        norm: str | None = "batch",
        spatial_dropout: float = 0.0,
        activation: str = "relu",
    ) -> None:
        if dim not in (2, 3):
            raise ValueError(f"UNet: dim must be 2 or 3, not {dim!r}")
        if not isinstance(use_upsampling, bool | np.bool_) and use_upsampling != "trilinear":
            raise ValueError(
                f'UNet: use_upsampling must be True, False or "trilinear", not {use_upsampling!r}'
            )
        if norm not in NORMS:
            raise ValueError(f"UNet: norm must be one of {', '.join(map(repr, NORMS))}, not {norm!r}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"UNet: activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
        fraction("UNet: dropout", dropout)
        # Python's own kinds of numbers: NumPy's are not written to JSON.
        self.config: dict[str, Any] = {
            "dim": int(dim),
            "in_channels": (in_channels := _whole("in_channels", in_channels)),
            "classes": (classes := _whole("classes", classes)),
            "filters": (filters := _whole("filters", filters)),
            "depth": (depth := _whole("depth", depth)),
            "use_upsampling": "trilinear" if use_upsampling == "trilinear" else bool(use_upsampling),
            "dropout": (dropout := float(dropout)),
            "seed": (seed := operator.index(seed)),
        }
        if share("UNet: momentum", momentum) != BATCH_NORM_MOMENTUM:
            self.config["momentum"] = float(momentum)  # not always: older files have none
        if norm != "batch":
            self.config["norm"] = norm
        if fraction("UNet: spatial_dropout", spatial_dropout):
            self.config["spatial_dropout"] = float(spatial_dropout)
            if depth == 1:
                raise ValueError(
                    "UNet: spatial_dropout needs a depth of 2 or more: the lowest level has none"
                )
        if activation != "relu":
            self.config["activation"] = activation
        kernel, two = ((3, 3, 3), (2, 2, 2)) if dim == 3 else ((1, 3, 3), (1, 2, 2))
        generator = np.random.default_rng(seed)
        widths = [filters * 2**level for level in range(depth)]

        self.encoder = Sequential()
        for level, width in enumerate(widths):
            above = widths[level - 1] if level else in_channels
            dropping = Dropout(dropout, seed + level) if dropout and level >= depth - 2 else None
            between = spatial_dropout and depth - 3 <= level < depth - 1
            spatial = Dropout3d(spatial_dropout, seed + depth + level) if between else None
            self.encoder.append(
                Block(above, width, kernel, generator, dropping, momentum, norm, spatial, activation)
            )
        self.pool = MaxPool3d(two)
        self.up, self.decoder = Sequential(), Sequential()
        for width, below in zip(widths[-2::-1], widths[:0:-1], strict=True):
            coming_up = below if use_upsampling else width
            self.up.append(
                Upsample3d(two, "trilinear" if use_upsampling == "trilinear" else "nearest")
                if use_upsampling
                else ConvTranspose3d(below, width, two, two, generator=generator)
            )
            common = momentum, norm, None, activation
            self.decoder.append(Block(coming_up + width, width, kernel, generator, None, *common))
        self.head = Conv3d(filters, classes, (1, 1, 1), generator=generator)

    def forward(self, src: Tensor | npt.ArrayLike) -> Tensor:
        """Class probabilities of each voxel.

        Parameters
        ----------
        src : Tensor or array, shape = (MB, D, H, W, in_channels), or (MB, H, W, in_channels) with ``dim`` 2

        Returns
        -------
        Tensor, shape = (MB, D, H, W, classes), or (MB, H, W, classes)

        Raises
        ------
        ValueError
            The shape does not fit, or a side is so short that nothing is left on the lowest level.
        """
        logits = self.logits(src)
        return functional.sigmoid(logits) if logits.shape[-1] == 1 else functional.softmax(logits)

    def logits(self, src: Tensor | npt.ArrayLike) -> Tensor:
        """Return the logits: the result before softmax or sigmoid, for losses with ``from_logits=True``.

        An array takes the precision of the weights; a tensor must have it.
        """
        dtype = self.head.weights.dtype
        if not isinstance(src, Tensor):
            src = Tensor(real_numbers("UNet: input", src).astype(dtype, copy=False))
        if src.dtype != dtype:
            raise TypeError(
                f"UNet: input is a tensor of {src.dtype}, the weights are {dtype}; expected one type: "
                "perhaps it was computed with an array or Parameter like np.ones(4), which is float64"
            )
        self._check_shape(src.shape)
        if self.config["dim"] == 3:
            return self._volume_logits(src)
        MB, H, W, C = src.shape
        dst = self._volume_logits(src.reshape(MB, 1, H, W, C))
        return dst.reshape(MB, H, W, dst.shape[-1])

    def _volume_logits(self, src: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for block in self.encoder:
            src = block(self.pool(src) if skips else src)
            skips.append(src)
        skips.pop()
        for up, block in zip(self.up, self.decoder, strict=True):
            skip = skips.pop()
            src = functional.pad_end(up(src), skip.shape[1:4])
            src = block(functional.concatenate(src, skip))
        return self.head(src)

    def __call__(self, src: Tensor | npt.ArrayLike) -> Tensor:
        """Run the net on a tensor or an array; see :meth:`forward`."""
        return self.forward(src)  # logits() makes the tensor, in the precision of the weights

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        axes = "(MB, D, H, W, C)" if self.config["dim"] == 3 else "(MB, H, W, C)"
        channels, shortest = self.config["in_channels"], 2 ** (self.config["depth"] - 1)
        if len(shape) != self.config["dim"] + 2:
            raise ValueError(f"UNet: input must be {axes}, not of shape {shape}")
        if shape[-1] != channels:
            raise ValueError(f"UNet: input of shape {shape} must have {channels} channels, last")
        if min(shape[1:-1]) < shortest:
            raise ValueError(f"UNet: input of shape {shape} needs sides of {shortest} or more")


def _whole(name: str, value: Any) -> int:
    """Return a size as Python's integer: NumPy's may have 8 bits, and JSON cannot hold them."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise ValueError(f"UNet: {name} must be an integer above 0, not {value!r}")
    return int(value)
