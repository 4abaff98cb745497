"""All operators but convolution, a file each: a reference in NumPy beside one fast kernel.

A module is loaded when it is first used: ``ops.pooling.forward(...)`` loads nothing of batch norm.
``import kernels.ops.pooling`` works as well.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernels.ops import (
        activation,
        batch_norm,
        bfloat16,
        binary_cross_entropy,
        concat,
        edges,
        label_losses,
        last_layer,
        optimizers,
        pooling,
        softmax,
        transposed_conv,
        upsample,
    )

__all__ = [
    "activation",
    "batch_norm",
    "bfloat16",
    "binary_cross_entropy",
    "concat",
    "edges",
    "label_losses",
    "last_layer",
    "optimizers",
    "pooling",
    "softmax",
    "transposed_conv",
    "upsample",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
