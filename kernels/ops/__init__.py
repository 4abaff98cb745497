"""All operators but convolution, a file each: a reference in NumPy beside one fast kernel.

A module is loaded when it is first used: ``ops.pooling.forward(...)`` loads nothing of batch norm.
``import kernels.ops.pooling`` works as well.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernels.ops import activation as activation
    from kernels.ops import bfloat16 as bfloat16
    from kernels.ops import binary_cross_entropy as binary_cross_entropy
    from kernels.ops import concat as concat
    from kernels.ops import edges as edges
    from kernels.ops import label_losses as label_losses
    from kernels.ops import last_layer as last_layer
    from kernels.ops import norms as norms
    from kernels.ops import optimizers as optimizers
    from kernels.ops import pooling as pooling
    from kernels.ops import softmax as softmax
    from kernels.ops import transposed_conv as transposed_conv
    from kernels.ops import upsample as upsample


def __getattr__(name: str) -> Any:
    if name in (module.name for module in pkgutil.iter_modules(__path__)):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
