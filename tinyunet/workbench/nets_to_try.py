"""Nets that a pass of the compiler is tried on, each with three channels in and three classes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyunet import functional
from tinyunet.autograd import Function, Tensor
from tinyunet.nn import BatchNorm, Conv3d, Module, ReLU, Sequential
from tinyunet.unet import UNet

Array = npt.NDArray[Any]
CLASSES = 3


class Squash(Function):
    """An operator that the compiler has no kernel for: ``x / (1 + |x|)``."""

    @staticmethod
    def forward(ctx: Any, x: Array) -> Array:
        """Return the result."""
        ctx.save(x)
        return np.asarray(x / (1 + np.abs(x)))

    @staticmethod
    def backward(ctx: Any, gradient: Array) -> tuple[Array]:
        """Return the gradient of ``x``."""
        (x,) = ctx.saved
        return (np.asarray(gradient / (1 + np.abs(x)) ** 2),)


class _Between(Module):
    """Convolutions with an operator between them that has no kernel on blocked tensors."""

    def __init__(self, operator: Callable[[Tensor], Tensor]) -> None:
        self.first, self.second = Conv3d(3, 16), Conv3d(16, CLASSES, 1)
        self.operator = operator

    def forward(self, images: Tensor) -> Tensor:
        return self.second(self.operator(self.first(images)))


class _Residual(Module):
    """A sum and a concatenation, with channels that fill no block."""

    def __init__(self) -> None:
        self.first, self.second, self.last = Conv3d(3, 17), Conv3d(17, 17), Conv3d(20, CLASSES, 1)
        self.norm = BatchNorm(17)

    def forward(self, images: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.first(images)))
        x = x + functional.leaky_relu(self.second(x))
        return self.last(functional.concatenate(x, images))


#: Nets by name, each with 3 channels in and 3 classes.
NETS: dict[str, Callable[[], Module]] = {
    "conv, norm, ReLU": lambda: Sequential(
        Conv3d(3, 16), BatchNorm(16), ReLU(), Conv3d(16, 16), ReLU(), Conv3d(16, CLASSES, 1)
    ),
    "U-Net": lambda: UNet(3, CLASSES, filters=8, depth=2),
    "residual": _Residual,
    "ELU between": lambda: _Between(functional.elu),
    "sigmoid between": lambda: _Between(functional.sigmoid),
    "own operator between": lambda: _Between(Squash.apply),
}
