"""What the graph knows of each operator without running it: the shape it makes, and what it keeps.

An operator that is not listed here is run once on small change to find out (see ``trace``), so that
any :class:`Function` can be part of a graph. Listed are those whose arrays would be large.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kernels.conv3d.shapes import geometry
from tinyunet import functional, losses
from tinyunet.autograd import Function, Reshape

Arguments = Mapping[str, Any]  # of ``Function.forward`` by name; arrays have shape and dtype only
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Operator:
    """One operator of ``tinyunet.functional`` or ``tinyunet.losses``.

    Attributes
    ----------
    name : str
        In the graph.
    shape : callable
        Shape of the result, from the arguments.
    saves : tuple of str
        What its ``forward`` saves for ``backward``: names of arguments, "dst", or of workspaces.
    workspaces : mapping of name to callable
        Shape and type of arrays that only ``backward`` reads, from the arguments and the result's
        shape.
    dtype : numpy type, optional
        Of the result; that of the first argument if left out.
    """

    name: str
    shape: Callable[[Arguments], Shape]
    saves: tuple[str, ...] = ()
    workspaces: Mapping[str, Callable[[Arguments, Shape], tuple[Shape, npt.DTypeLike]]] = field(
        default_factory=dict
    )
    dtype: npt.DTypeLike | None = None


def _same(a: Arguments) -> Shape:
    return tuple(a["src"].shape)


def _convolution(a: Arguments) -> Shape:
    return geometry(a["src"].shape, a["weights"].shape, a["stride"], a["padding"]).dst_shape


def _transposed_convolution(a: Arguments) -> Shape:
    MB, *sizes, _ = a["src"].shape
    _, OC, *kernel = a["weights"].shape
    valid = a["padding"] == "valid"
    axes = zip(sizes, kernel, a["stride"], strict=True)
    return (MB, *[i * s + (max(k - s, 0) if valid else 0) for i, k, s in axes], OC)


def _pooled(a: Arguments) -> Shape:
    MB, *sizes, C = a["src"].shape
    return (MB, *[i // k for i, k in zip(sizes, a["size"], strict=True)], C)


def _upsampled(a: Arguments) -> Shape:
    MB, *sizes, C = a["src"].shape
    return (MB, *[i * f for i, f in zip(sizes, a["factor"], strict=True)], C)


def _concatenated(a: Arguments) -> Shape:
    first, second = a["a"].shape, a["b"].shape
    if first[:-1] != second[:-1]:
        raise ValueError(f"concatenate: shapes {first} and {second} differ before their channels")
    return (*first[:-1], first[-1] + second[-1])


def _padded(a: Arguments) -> Shape:
    return (a["src"].shape[0], *a["size"], a["src"].shape[-1])


def _reshaped(a: Arguments) -> Shape:
    known = math.prod(n for n in a["shape"] if n != -1)
    return tuple(math.prod(a["a"].shape) // known if n == -1 else n for n in a["shape"])


def _dice_sums(a: Arguments) -> Shape:
    return (3, a["logits"].shape[0], a["logits"].shape[-1])


def _channels(a: Arguments, _: Shape) -> tuple[Shape, npt.DTypeLike]:
    return a["src"].shape[-1:], a["src"].dtype


OPERATORS: dict[type[Function], Operator] = {
    functional.Convolution: Operator("convolution", _convolution, ("src", "weights")),
    functional.TransposedConvolution: Operator(
        "transposed_convolution", _transposed_convolution, ("src", "weights")
    ),
    functional.MaxPooling: Operator(
        "max_pooling", _pooled, ("argmax",), {"argmax": lambda _, shape: (shape, np.uint8)}
    ),
    functional.Upsampling: Operator("upsampling", _upsampled),
    functional.BatchNormTraining: Operator(
        "batch_norm_training",
        _same,
        ("src", "scale", "mean", "variance"),
        {"mean": _channels, "variance": _channels},
    ),
    functional.BatchNormInference: Operator(
        "batch_norm_inference", _same, ("src", "scale", "mean", "variance")
    ),
    functional.Relu: Operator("relu", _same, ("dst",)),
    functional.LeakyRelu: Operator("leaky_relu", _same, ("dst",)),
    functional.Sigmoid: Operator("sigmoid", _same, ("dst",)),
    functional.Softmax: Operator("softmax", _same, ("dst",)),
    functional.Concatenation: Operator("concatenation", _concatenated),
    functional.ZeroPadding: Operator("zero_padding", _padded),
    functional.Dropout: Operator(
        "dropout", _same, ("kept",), {"kept": lambda _, shape: (shape, np.bool_)}
    ),
    losses.DiceSums: Operator("dice_sums", _dice_sums, ("logits", "labels"), dtype=np.float64),
    losses.CrossEntropy: Operator(
        "cross_entropy", lambda _: (), ("logits", "labels"), dtype=np.float64
    ),
    Reshape: Operator("reshape", _reshaped),
}
