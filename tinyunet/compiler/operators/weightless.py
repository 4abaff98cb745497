"""Operators of volumes without convolution weights: pooling, activations, concatenation, sums, reorders.

Also the arithmetic of tensors, and losses. An operator without kernels here runs as the eager operator does,
unless a pass fuses it: an activation into a normalisation, a loss into the last layer.
"""

import numbers
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.array_utils import normalize_axis_tuple

from kernels import ops
from kernels.base.arguments import NDHWC, Floats, tensor
from kernels.deferred import masking
from kernels.deferred.tensors import NO_MASK
from tinyunet import autograd, functional, losses
from tinyunet.compiler.ir import BLOCKED, Graph, Node
from tinyunet.compiler.record import (
    Arguments,
    Binder,
    Call,
    Kernel,
    Operator,
    Shape,
    Shapes,
    lanes,
    same,
    volume,
)

if TYPE_CHECKING:
    from kernels.ops.activation import Activation


def checked_volume(a: Arguments) -> Shape:
    """Shape of the source, if it has the axes of a volume."""
    if a["src"].ndim != 5:
        raise ValueError(f"src must have the axes ({NDHWC}), got shape {a['src'].shape}")
    return same(a)


def check_vectors(a: Arguments, channels: int, *names: str) -> None:
    """Refuse a vector, where there is one, that has not one number a channel, of the source's type."""
    for name in names:
        if a[name] is not None:
            tensor(name, a[name], shape=(channels,), dtype=a["src"].dtype)


# ---- pooling ---------------------------------------------------------------------------------


def _pooling_sizes(b: Binder) -> Shapes:
    MB, *sizes, C = b.value("src" if b.has("src") else "diff_src").shape
    small = (MB, *(n // k for n, k in zip(sizes, b.node.attributes["size"], strict=True)))
    return {
        **dict.fromkeys(("src", "diff_src"), volume((MB, *sizes), C)),
        **dict.fromkeys(("dst", "argmax", "gradient", "saved.argmax"), volume(small, C)),
    }


def _pool(b: Binder) -> Call:
    source, dst, size = b.source(), b.array("dst"), tuple(b.node.attributes["size"])
    argmax = b.array("argmax") if b.has("argmax") else np.empty(dst.shape, np.uint8)
    return lambda: ops.pooling.forward_blocked(source, dst, argmax, size)


def _pool_backward(b: Binder) -> Call:
    diff_dst, argmax, dst = b.array("gradient"), b.array("saved.argmax"), b.array("diff_src")
    accumulate, mask, size = b.has("accumulate"), b.mask(), tuple(b.node.attributes["size"])
    return lambda: ops.pooling.backward_blocked(diff_dst, argmax, dst, accumulate, mask, size)


_POOLING = Operator(
    "max_pooling",
    functional.MaxPooling,
    lambda a: ops.pooling.pooled_shape(checked_volume(a), a["size"]),
    ("argmax",),
    {"argmax": lambda _, shape: (shape, np.uint8)},
    kernels={
        "max_pooling": Kernel(_pool, _pooling_sizes, reads=("src",)),
        "max_pooling_backward": Kernel(_pool_backward, _pooling_sizes, masks=("diff_src",), adds=True),
    },
)

# ---- activations -----------------------------------------------------------------------------


def join_activation(graph: Graph, before: str, activation: "Activation", node: Node, old: Graph) -> Graph:
    """Return the graph in which the pieces of the node ``before`` compute an activation that is not deferred.

    The pieces are a ``normalize`` and a ``mask``. ``old`` is the graph before the split, and still has the
    activation ``node`` and its gradient.
    """
    if activation.is_deferred:
        return graph
    undo, pieces = old.backward_of(node), {n.name: n for n in graph.nodes}
    learned = {role: name for role, name in node.inputs.items() if role == "slope"}
    diff = {role: name for role, name in undo.outputs.items() if role == "diff_slope"} if undo else {}
    changes = {}
    for name, outputs in ((f"{before}:normalize", {}), (f"d {before}.mask", diff)):
        if name in pieces:
            joined = pieces[name].with_inputs(learned).with_outputs(outputs)
            joined = joined.with_attributes({"activation": activation})
            changes[name] = [replace(joined, op=f"{joined.op}_activation")]
    return graph.rewrite(changes, [old.values[name] for name in (*learned.values(), *diff.values())])


def _activation_sizes(b: Binder) -> Shapes:
    *size, C = b.value("dst" if b.has("dst") else "diff_src").shape
    slope = b.value("slope").shape if b.has("slope") else (1,)
    whole = dict.fromkeys(("src", "dst", "gradient", "diff_src"), volume(tuple(size), C))
    return whole | dict.fromkeys(("slope", "diff_slope"), slope)


def _slopes(b: Binder, channels: int) -> tuple[Floats, Call]:
    """Return the slopes as fused kernels take them, and a call that copies learned slopes there."""
    slopes = np.zeros(lanes(channels), np.float32)
    slopes[:channels] = b.node.attributes["activation"].slope

    def copy() -> None:
        if b.has("slope"):
            slopes[:channels] = b.array("slope")

    return slopes, copy


def _normalize_activation(b: Binder) -> Call:
    source, dst, kind = b.source(), b.array("dst"), b.node.attributes["activation"]
    slopes, copy = _slopes(b, b.value("dst").shape[-1])

    def run() -> None:
        copy()
        ops.activation.normalize_blocked(source, slopes, kind, dst)

    return run


def _mask_activation(b: Binder) -> Call:
    diff, mask, kind = b.array("diff_src"), b.mask() or NO_MASK, b.node.attributes["activation"]
    channels = b.value("diff_src").shape[-1]
    slopes, copy = _slopes(b, channels)
    sums = np.empty((masking.partials(diff.shape), slopes.size))

    def run() -> None:
        copy()
        ops.activation.mask_blocked(diff, mask, slopes, kind, sums)
        if b.has("diff_slope"):
            total, target = sums.sum(axis=0)[:channels], b.array("diff_slope")
            target[:] = total if target.size == channels else total.sum()

    return run


def _with_slopes(a: Arguments) -> Shape:
    if a["slope"].shape not in ((1,), a["src"].shape[-1:]):
        raise ValueError(
            f"prelu: slope must have shape {a['src'].shape[-1:]} or (1,), got {a['slope'].shape}"
        )
    return same(a)


def _kind(node: Node) -> "Activation":
    return node.attributes["function"].kind(node.attributes.get("slope", 0.0))


_ACTIVATIONS = (
    Operator("relu", functional.Relu, same, ("dst",), activation=_kind),
    Operator("leaky_relu", functional.LeakyRelu, same, ("dst",), activation=_kind),
    Operator("elu", functional.Elu, same, ("dst",), work=(20, 1), activation=_kind),
    Operator(
        "prelu",
        functional.PRelu,
        _with_slopes,
        ("src", "slope"),
        activation=lambda node: ops.activation.PRELU,
        kernels={
            "normalize_activation": Kernel(_normalize_activation, _activation_sizes, has_eager=False),
            "mask_activation": Kernel(_mask_activation, _activation_sizes, has_eager=False),
        },
    ),
    Operator("sigmoid", functional.Sigmoid, same, ("dst",), work=(20, 1)),
    Operator("softmax", functional.Softmax, same, ("dst",), work=(20, 1)),
)

# ---- sums of gradients, reorders: passes make them -------------------------------------------


def _accumulate(b: Binder) -> Call:
    first, second, dst = b.array("a"), b.array("b"), b.array("dst")

    def run() -> None:
        np.add(first, second, out=dst)

    return run


def _reorder_sizes(b: Binder) -> Shapes:
    *size, C = b.value("dst").shape
    blocked, last = ("dst", "src") if b.value("dst").layout == BLOCKED else ("src", "dst")
    return {blocked: volume(tuple(size), C), last: (*size, C)}


def _reorder(b: Binder) -> Call:
    dst = b.array("dst")
    if b.value("dst").layout == BLOCKED:
        src = b.array("src")
        return lambda: ops.edges.to_blocked(src, dst)
    source = b.source()
    return lambda: ops.edges.to_ndhwc(source, dst)


MADE_BY_PASSES = {"accumulate": Kernel(_accumulate), "reorder": Kernel(_reorder, _reorder_sizes)}

# ---- shapes ----------------------------------------------------------------------------------


def _upsampled(a: Arguments) -> Shape:
    MB, *sizes, C = checked_volume(a)
    return (MB, *[i * f for i, f in zip(sizes, a["factor"], strict=True)], C)


def _concatenated(a: Arguments) -> Shape:
    first, *others = (part.shape for part in a.values())
    for other in others:
        if first[:-1] != other[:-1]:
            raise ValueError(f"concatenate: shapes {first} and {other} differ before their channels")
    return (*first[:-1], first[-1] + sum(other[-1] for other in others))


def _padded(a: Arguments) -> Shape:
    return (a["src"].shape[0], *a["size"], a["src"].shape[-1])


def _broadcast(name: str) -> Callable[[Arguments], Shape]:
    def shape(a: Arguments) -> Shape:
        first, second = a["a"].shape, a["b"].shape
        try:
            return np.broadcast_shapes(first, second)
        except ValueError:
            raise ValueError(f"{name}: shapes {first} and {second} cannot be broadcast together") from None

    return shape


def _summed(a: Arguments) -> Shape:
    axes, shape = a["axis"], a["a"].shape
    gone = range(len(shape)) if axes is None else normalize_axis_tuple(axes, len(shape))
    kept = [1 if axis in gone else n for axis, n in enumerate(shape)]
    return tuple(kept if a["keepdims"] else [n for axis, n in enumerate(kept) if axis not in gone])


def _powered(a: Arguments) -> Shape:
    if not isinstance(a["exponent"], numbers.Real):
        raise TypeError(f"power: exponent must be a number, not {type(a['exponent']).__name__}")
    return tuple(a["a"].shape)


class _Nothing:
    """In the place of a context."""


def _viewed(function: type[autograd.Function]) -> Callable[[Arguments], Shape]:
    # A view of an array without memory costs nothing.
    return lambda a: function.forward(_Nothing(), *a.values()).shape


def _view_backward(node: Node, gradient: str, wanted: dict[str, str], graph: Graph) -> Iterator[Node]:
    attributes = dict(node.attributes) | {"of": node.name}
    inputs, views = {"gradient": gradient}, {"diff_a": "gradient"}
    yield Node(f"d {node.name}", "reshape_backward", inputs, wanted, attributes, "backward", views=views)


def _either(a: Arguments) -> Any:
    return np.result_type(a["a"], a["b"])


def _double(_: Arguments) -> Any:
    return np.float64


def _byte(_: Arguments) -> Any:
    return np.uint8


def _dice_sums(a: Arguments) -> Shape:
    return (3, a["logits"].shape[0], a["logits"].shape[-1])


_LOGITS = ("logits", "labels")

OPERATORS = (
    _POOLING,
    Operator("upsampling", functional.Upsampling, _upsampled),
    Operator("concatenation", functional.Concatenation, _concatenated),
    Operator("zero_padding", functional.ZeroPadding, _padded),
    Operator("dropout", functional.Dropout, same, ("kept",), {"kept": lambda _, shape: (shape, np.bool_)}),
    Operator(
        "spatial_dropout",
        functional.SpatialDropout,
        same,
        ("kept",),
        {"kept": lambda _, shape: (functional.SpatialDropout.drawn(shape), np.bool_)},
    ),
    *_ACTIVATIONS,
    # Losses.
    Operator("dice_sums", losses.DiceSums, _dice_sums, _LOGITS, dtype=_double, work=(30, 30)),
    Operator("cross_entropy", losses.CrossEntropy, lambda _: (), _LOGITS, dtype=_double, work=(30, 30)),
    Operator(
        "binary_cross_entropy", losses.BinaryCrossEntropy, lambda _: (), _LOGITS, dtype=_double, work=(60, 60)
    ),
    Operator("coarse_labels", losses.CoarseLabels, lambda a: (len(a["labels"]), *a["size"]), dtype=_byte),
    # The arithmetic of tensors.
    Operator("reshape", autograd.Reshape, _viewed(autograd.Reshape), differentiate=_view_backward),
    Operator("slice", autograd.Slice, _viewed(autograd.Slice)),
    Operator("sum", autograd.Sum, _summed),
    Operator("add", autograd.Add, _broadcast("add"), dtype=_either),
    Operator(
        "multiply",
        autograd.Multiply,
        _broadcast("multiply"),
        lambda needs: ("b" if needs[0] else "", "a" if needs[1] else ""),
        dtype=_either,
    ),
    Operator(
        "divide",
        autograd.Divide,
        _broadcast("divide"),
        lambda needs: ("b", "dst" if needs[1] else ""),
        dtype=_either,
    ),
    Operator("power", autograd.Power, _powered, ("a",)),
    Operator("exp", autograd.Exp, lambda a: tuple(a["a"].shape), ("dst",)),
    Operator("log", autograd.Log, lambda a: tuple(a["a"].shape), ("a",)),
)
