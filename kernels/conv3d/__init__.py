"""3-D convolution: ``forward``, ``backward_data`` and ``backward_weights``, and the compiled graph's kernels.

The three functions run the rung ``direct`` in float32 and ``naive``, the reference, in float64. The other
rungs of the ladder (`kernels.ladder`) and ``winograd``, the last one, can be imported from here, too.

``operator``        convolutions that are fused with their neighbours
``bricks``          a plan, and how an output is cut; ``read`` packs a brick's source, ``write`` finishes and
                    stores it, ``prefetch`` is for what comes next
``direct_bricks``   direct convolution, brick by brick
``winograd``        minimal filtering as a rung. ``transform`` compiles its matrices, ``winograd_weights``
                    transforms weights, ``winograd_bricks`` is the loop nest, ``winograd_stages`` its steps;
                    ``first_layer`` and ``many_channels`` are for layers with very few or many channels
"""

from importlib import import_module
from types import ModuleType

import numpy as np

from kernels.base.arguments import Array, Triple, array
from kernels.ladder import direct as direct
from kernels.ladder import naive as naive
from kernels.ladder.shapes import Stride


def __getattr__(name: str) -> ModuleType:
    """The other rungs, which are loaded when somebody imports them from here."""
    if name in ("blocked", "im2col", "minimal_filtering"):
        return import_module(f"kernels.ladder.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _rung(**arrays: Array) -> ModuleType:
    for name, value in arrays.items():
        array(name, value)
    return direct if all(value.dtype == np.float32 for value in arrays.values()) else naive


def forward(
    src: Array, weights: Array, bias: Array | None = None, stride: Stride = 1, padding: str = "same"
) -> Array:
    """Convolve; arguments, result and errors as `Rung.forward`."""
    given = {"src": src, "weights": weights} | ({} if bias is None else {"bias": bias})
    return _rung(**given).forward(src, weights, bias, stride, padding)


def backward_data(
    diff_dst: Array, weights: Array, src_shape: tuple[int, ...], stride: Stride = 1, padding: str = "same"
) -> Array:
    """Gradient of ``src``; arguments, result and errors as `Rung.backward_data`."""
    rung = _rung(diff_dst=diff_dst, weights=weights)
    return rung.backward_data(diff_dst, weights, src_shape, stride, padding)


def backward_weights(
    src: Array, diff_dst: Array, kernel: Triple, stride: Stride = 1, padding: str = "same"
) -> tuple[Array, Array]:
    """Gradients of weights and bias; arguments, result and errors as `Rung.backward_weights`."""
    return _rung(src=src, diff_dst=diff_dst).backward_weights(src, diff_dst, kernel, stride, padding)
