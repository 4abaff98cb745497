"""tinyunet: a small engine that trains a 3-D U-Net on brain MRI, with its own kernels.

    from tinyunet import UNet, Tensor, no_grad

Names are loaded on first use: ``import tinyunet`` itself costs nothing, so that a command line can
answer ``--help`` without waiting for Numba.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinyunet.autograd import Function, Tensor, no_grad
    from tinyunet.compiler import compile
    from tinyunet.nn import Module, Parameter
    from tinyunet.optim import SGD, Adam
    from tinyunet.unet import UNet

_HOMES = {
    "Adam": "tinyunet.optim",
    "Function": "tinyunet.autograd",
    "Module": "tinyunet.nn",
    "Parameter": "tinyunet.nn",
    "SGD": "tinyunet.optim",
    "Tensor": "tinyunet.autograd",
    "UNet": "tinyunet.unet",
    "compile": "tinyunet.compiler",
    "no_grad": "tinyunet.autograd",
}
__all__ = ["SGD", "Adam", "Function", "Module", "Parameter", "Tensor", "UNet", "compile", "no_grad"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tinyunet' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
