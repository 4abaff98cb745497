"""What the graph knows of each operator without running it: the shape it makes, and what it keeps.

An operator that is not listed here is run in each of the three traces, on arrays of full size, to find
out (see ``trace``), so that any :class:`Function` can be part of a graph. Listed are those for which
that would take long.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kernels.base.arguments import NDHWC, tensor
from kernels.base.conv_shapes import forward_geometry
from kernels.ops.conv_transpose3d import enlarged_shape
from kernels.ops.pooling import pooled_shape
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


def _volume(a: Arguments) -> Shape:
    """Shape of the source, if it has the axes of a volume."""
    if a["src"].ndim != 5:
        raise ValueError(f"src must have the axes ({NDHWC}), got shape {a['src'].shape}")
    return tuple(a["src"].shape)


def _check_vectors(a: Arguments, channels: int, *names: str) -> None:
    """Refuse a vector, where there is one, that has not one number a channel, of the source's type."""
    for name in names:
        if a[name] is not None:
            tensor(name, a[name], shape=(channels,), dtype=a["src"].dtype)


def _normalised(a: Arguments) -> Shape:
    statistics = [name for name in a if name.endswith(("mean", "variance"))]
    _check_vectors(a, a["src"].shape[-1], "scale", "shift", *statistics)
    return _same(a)


def _convolution(a: Arguments) -> Shape:
    given = a["src"], a["weights"], a["bias"], a["stride"], a["padding"]
    return forward_geometry(*given).dst_shape


def _transposed_convolution(a: Arguments) -> Shape:
    tensor("weights", a["weights"], axes="IC, OC, KD, KH, KW", dtype=a["src"].dtype)
    shape = enlarged_shape(_volume(a), a["weights"].shape, a["stride"], a["padding"])
    _check_vectors(a, shape[-1], "bias")
    return shape


def _pooled(a: Arguments) -> Shape:
    return pooled_shape(_volume(a), a["size"])


def _upsampled(a: Arguments) -> Shape:
    MB, *sizes, C = _volume(a)
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
        _normalised,
        ("src", "scale", "mean", "variance"),
        {"mean": _channels, "variance": lambda a, _: (a["src"].shape[-1:], np.float64)},
    ),
    functional.BatchNormInference: Operator(
        "batch_norm_inference", _normalised, ("src", "scale", "mean", "variance")
    ),
    functional.Relu: Operator("relu", _same, ("dst",)),
    functional.LeakyRelu: Operator("leaky_relu", _same, ("dst",)),
    functional.Sigmoid: Operator("sigmoid", _same, ("dst",)),
    functional.Softmax: Operator("softmax", _same, ("dst",)),
    functional.Concatenation: Operator("concatenation", _concatenated),
    functional.ZeroPadding: Operator("zero_padding", _padded),
    functional.Dropout: Operator("dropout", _same, ("kept",), {"kept": lambda _, shape: (shape, np.bool_)}),
    losses.DiceSums: Operator("dice_sums", _dice_sums, ("logits", "labels"), dtype=np.float64),
    losses.CrossEntropy: Operator("cross_entropy", lambda _: (), ("logits", "labels"), dtype=np.float64),
    losses.BinaryCrossEntropy: Operator(
        "binary_cross_entropy", lambda _: (), ("logits", "labels"), dtype=np.float64
    ),
    Reshape: Operator("reshape", _reshaped),
}
