"""The U-Net of IntelAI/unet: 3-D, or 2-D with kernels of depth one.

Source: Ronneberger et al. 2015 (the net), Çiçek et al. 2016 (in three dimensions), and the reference
code (``3D/model.py``) for every detail: padding "same", batch norm between
convolution and ReLU, [upsampled, skip] in this order, and half as many filters out of a transposed
convolution as go into it. The reference code's 2-D net (``2D/model.py``) has no batch norm, and drops whole
channels: ``UNet(dim=2, norm=None, spatial_dropout=0.2)``.
"""

import itertools
import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from kernels.base.arguments import Triple
from tinyunet import functional
from tinyunet.autograd import Tensor, real_numbers
from tinyunet.common.checks import at_least_zero, fraction, share
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

#: Makes the layer between convolution and activation, from its channels, batch norm's momentum and epsilon.
NORMS: dict[str | None, Callable[[int, float, float], Module | None]] = {
    "batch": BatchNorm,
    "instance": lambda channels, momentum, epsilon: InstanceNorm(channels, epsilon),
    "group": lambda channels, momentum, epsilon: GroupNorm(math.gcd(8, channels), channels, epsilon),
    None: lambda channels, momentum, epsilon: None,
}
#: Makes the activation after the normalisation, from its channels.
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
        norm: Callable[[int], Module | None],
        activation: Callable[[int], Module],
        spatial_dropout: Dropout3d | None = None,
        dropout: Dropout | None = None,
    ) -> None:
        self.conv0 = Conv3d(in_channels, out_channels, kernel, generator=generator)
        self.norm0 = norm(out_channels)
        self.conv1 = Conv3d(out_channels, out_channels, kernel, generator=generator)
        self.norm1 = norm(out_channels)
        self.activation0, self.activation1 = activation(out_channels), activation(out_channels)
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
        Channels of the output. The result is their softmax; for one class, the sigmoid.
    filters : int
        Channels on the first level; each level below has twice as many.
    depth : int
        Number of levels.
    use_upsampling : bool or "trilinear"
        The decoder's upsampling: False learns a transposed convolution, True repeats voxels, "trilinear"
        interpolates between voxels.
    dropout : float
        Share of elements dropped at the end of the two lowest encoder levels (Ronneberger et al.
        2015, section 3.1).
    seed : int
        Seed of the generators that draw weights and dropout.
    momentum : float
        Momentum of all batch norms: see :class:`tinyunet.nn.BatchNorm`.
    norm : "batch", "instance", "group" or None
        The layer between a convolution and its activation; None is no layer. "group" has gcd(8, channels)
        groups: eight, if eight divides the channels.
    spatial_dropout : float
        Share of channels dropped between the two convolutions of each of the two encoder levels above the
        lowest, as in the reference code's 2-D net.
    activation : "relu", "leaky_relu", "elu" or "prelu"
        The layer after each normalisation; "prelu" learns a slope for each channel.
    epsilon : float
        What all normalisations add to the variance. PyTorch's default is 1e-5, Keras' is 1e-3.
    deep_supervision : bool or "levels"
        Each level of the decoder makes logits of its own, so that the loss reaches it directly. "levels":
        only in training, where they are in ``lower_logits`` for
        :func:`tinyunet.losses.of_levels` (Lee et al. 2015; nnU-Net). True: they are upsampled and added to
        those of the level above, also in a prediction (Isensee et al., "Brain tumor segmentation and
        radiomics survival prediction", 2017).

    Attributes
    ----------
    config : dict
        The arguments, without later ones at their default: ``UNet(**config)`` is this net with new weights.
    lower_logits : tuple of Tensor
        With deep supervision of "levels", the logits of the last pass in training below the highest level,
        the higher level first; whoever reads them empties it.

    Raises
    ------
    ValueError
        An argument is out of range; the message names the argument.

    Notes
    -----
    With one channel in, one class out and otherwise the defaults, parameters and buffers hold 5,650,801
    numbers. Sizes need not be even: the decoder pads an upsampled tensor with zeros at its end to the size
    of the skip.
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
        epsilon: float = 1e-3,
        deep_supervision: bool | str = False,
    ) -> None:
        given = {name: value for name, value in locals().items() if name != "self"}
        config = self.config = _checked(**given)
        filters, depth, use_upsampling = config["filters"], config["depth"], config["use_upsampling"]
        kernel, two = ((3, 3, 3), (2, 2, 2)) if dim == 3 else ((1, 3, 3), (1, 2, 2))
        generator = np.random.default_rng(seed)
        widths = [filters * 2**level for level in range(depth)]
        inner = (lambda channels: NORMS[norm](channels, momentum, epsilon)), ACTIVATIONS[activation]

        self.encoder = Sequential()
        for level, (above, width) in enumerate(itertools.pairwise([config["in_channels"], *widths])):
            drops, lowest = (dropout and level >= depth - 2), level == depth - 1
            drops_channels = spatial_dropout and level >= depth - 3 and not lowest
            spatial = Dropout3d(spatial_dropout, seed + depth + level) if drops_channels else None
            single = Dropout(dropout, seed + level) if drops else None
            self.encoder.append(Block(above, width, kernel, generator, *inner, spatial, single))
        self.pool = MaxPool3d(two)
        self.up, self.decoder = Sequential(), Sequential()
        for width, below in zip(widths[-2::-1], widths[:0:-1], strict=True):
            if use_upsampling:
                self.up.append(Upsample3d(two, "nearest" if use_upsampling is True else "trilinear"))
            else:
                self.up.append(ConvTranspose3d(below, width, two, two, generator=generator))
            coming_up = below if use_upsampling else width
            self.decoder.append(Block(coming_up + width, width, kernel, generator, *inner))
        self.head = Conv3d(filters, config["classes"], (1, 1, 1), generator=generator)
        self.lower_heads, self.lower_logits = Sequential(), tuple[Tensor, ...]()
        for width in widths[-2:0:-1] if deep_supervision else ():
            self.lower_heads.append(Conv3d(width, config["classes"], (1, 1, 1), generator=generator))

    def forward(self, src: Tensor | npt.ArrayLike) -> Tensor:
        """Return the class probabilities of each voxel.

        Parameters
        ----------
        src : Tensor or array, shape = (MB, D, H, W, in_channels), or (MB, H, W, in_channels) with ``dim`` 2

        Returns
        -------
        Tensor, shape = (MB, D, H, W, classes), or (MB, H, W, classes)

        Raises
        ------
        ValueError
            The shape does not fit, or a side is too short to be halved on each level.
        TypeError
            ``src`` is a tensor of another dtype than the weights.
        """
        logits = self.logits(src)
        return functional.sigmoid(logits) if logits.shape[-1] == 1 else functional.softmax(logits)

    def logits(self, src: Tensor | npt.ArrayLike) -> Tensor:
        """Return the logits: the result before softmax or sigmoid, for losses with ``from_logits=True``.

        An array is converted to the dtype of the weights; a tensor must have this dtype. Shapes and errors
        are those of :meth:`forward`.
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
            found = self._volume_logits(src)
        else:
            MB, H, W, C = src.shape
            volumes = self._volume_logits(src.reshape(MB, 1, H, W, C))
            found = [dst.reshape(MB, *dst.shape[2:]) for dst in volumes]
        if len(found) > 1:
            self.lower_logits = tuple(found[1:])
        return found[0]

    def _volume_logits(self, src: Tensor) -> list[Tensor]:
        """Return the logits, and those of lower levels that a loss asks for."""
        skips: list[Tensor] = []
        for block in self.encoder:
            src = block(self.pool(src) if skips else src)
            skips.append(src)
        skips.pop()
        added, logits = self.config.get("deep_supervision") is True, None
        lower: list[Tensor] = []
        heads = itertools.chain(self.lower_heads, itertools.repeat(self.head))
        for up, block, head in zip(self.up, self.decoder, heads, strict=False):
            skip = skips.pop()
            src = functional.pad_end(up(src), skip.shape[1:4])
            src = block(functional.concatenate(src, skip))
            if added:
                found = head(src)
                if logits is not None:
                    below = functional.upsample3d(logits, self.pool.size)
                    found = found + functional.pad_end(below, found.shape[1:4])
                logits = found
            elif head is not self.head and self.training:
                lower.insert(0, head(src))
        return [self.head(src) if logits is None else logits, *lower]

    def __call__(self, src: Tensor | npt.ArrayLike) -> Tensor:
        """Run the net on a tensor or an array; see :meth:`forward`."""
        return self.forward(src)  # logits() makes the tensor, in the precision of the weights

    def output_of(self, layer: str) -> str:
        """Return the shape of a layer's output in words: ``MB, D/2, H/2, W/2, 32`` on the second level."""
        part, _, rest = layer.partition(".")
        if part == "head":
            level, channels = 0, self.config["classes"]
        else:
            number = int(rest.partition(".")[0])
            level = number if part == "encoder" else self.config["depth"] - 2 - number
            channels = self.config["classes" if part == "lower_heads" else "filters"]
            channels <<= 0 if part == "lower_heads" else level
        letters = "DHW"[-self.config["dim"] :]
        return ", ".join(["MB", *(f"{x}/{2**level}" if level else x for x in letters), str(channels)])

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        axes = "(MB, D, H, W, C)" if self.config["dim"] == 3 else "(MB, H, W, C)"
        channels, shortest = self.config["in_channels"], 2 ** (self.config["depth"] - 1)
        if len(shape) != self.config["dim"] + 2:
            raise ValueError(f"UNet: input must be {axes}, not of shape {shape}")
        if shape[-1] != channels:
            raise ValueError(f"UNet: input of shape {shape} must have {channels} channels, last")
        if min(shape[1:-1]) < shortest:
            raise ValueError(f"UNet: input of shape {shape} needs sides of {shortest} or more")


_CHOICES = {
    "dim": (2, 3),
    "use_upsampling": (True, False, "trilinear"),
    "norm": NORMS,
    "activation": ACTIVATIONS,
    "deep_supervision": (False, True, "levels"),
}
# Later arguments, which older checkpoints lack: a configuration holds only those that are not the default.
_LATER = {"momentum": BATCH_NORM_MOMENTUM, "norm": "batch", "spatial_dropout": 0.0, "activation": "relu"}
_LATER |= {"epsilon": 1e-3, "deep_supervision": False}


def _checked(**config: Any) -> dict[str, Any]:
    """Return the arguments of a U-Net as Python's own numbers, which JSON needs; without later defaults.

    Raises
    ------
    ValueError
        Names the argument, its value and the values that are allowed.
    """
    for name, allowed in _CHOICES.items():
        config[name] = _choice(name, config[name], tuple(allowed))
    for name in ("in_channels", "classes", "filters", "depth"):
        config[name] = _whole(name, config[name])
    numbers = {"dropout": fraction, "momentum": share, "spatial_dropout": fraction, "epsilon": at_least_zero}
    for name, check in numbers.items():
        config[name] = float(check(f"UNet: {name}", config[name]))
    config["seed"] = operator.index(config["seed"])
    if config["spatial_dropout"] and config["depth"] == 1:
        raise ValueError("UNet: spatial_dropout needs a depth of 2 or more: the lowest level has none")
    return {name: value for name, value in config.items() if name not in _LATER or value != _LATER[name]}


def _choice(name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    """Return the ``allowed`` value that an argument equals: Python's True for NumPy's."""
    for known in allowed:
        if isinstance(value, str | bool | int | np.generic | None) and known == value:
            return known
    raise ValueError(f"UNet: {name} must be one of {', '.join(map(repr, allowed))}, not {value!r}")


def _whole(name: str, value: Any) -> int:
    """Return a size as Python's integer: a NumPy integer may have 8 bits, and JSON cannot hold it."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise ValueError(f"UNet: {name} must be an integer above 0, not {value!r}")
    return int(value)
