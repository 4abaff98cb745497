"""What each kernel on blocked tensors may be bound to: checked once, when a program is built.

A kernel works out addresses from the sizes that it is told, and nothing stops it at the end of an array.
So a node is bound only if every one of its arrays has the shape and type that its kernel takes. For each
operator there is a function from a node to the shapes of its roles::

    max_pooling    src          (MB, CB, D, H, W, 16)           src.scale, src.shift    (CB * 16,)
                   dst, argmax  (MB, CB, D//KD, H//KH, W//KW, 16)

Shapes are worked out from *one* of the values and the node's settings. A pass that has put together what does
not belong together, say a source that is not blocked and a kernel that reads blocks, ends here.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np

from kernels.base.layout import blocks
from kernels.base.simd import LANES
from kernels.conv3d import operator as conv3d
from kernels.deferred import masking as epilogue
from tinyunet.compiler.binder import Binder
from tinyunet.compiler.convolutions import is_adjoint, packed_size, plan_of, weights_shape
from tinyunet.compiler.ir import BLOCKED

# By role: a shape, or how many items there are whatever the shape is. "> scale" is the output where there
# is an input of the same role.
Shapes = Mapping[str, tuple[int, ...] | int]
Size = tuple[int, ...]  # MB, D, H, W

_DTYPES: dict[str, type] = dict.fromkeys(("argmax", "saved.argmax", "labels"), np.uint8)
_DTYPES |= dict.fromkeys(("moments", "sums", "sums_b", "dice", "cross_entropy"), np.float64)
_DTYPES |= dict.fromkeys(("diff_dice", "diff_cross_entropy"), np.float64)


def check(b: Binder) -> None:
    """Refuse to bind a node whose arrays its kernel cannot take.

    Raises
    ------
    ValueError
        Names the node, the role, what it has and what the kernel takes.
    """
    if b.node.op not in _SHAPES:  # NumPy runs it, and looks at shapes itself
        return
    expected = _SHAPES[b.node.op](b)
    results = [(f"> {role}", name) for role, name in b.node.outputs.items()]
    for key, name in (*b.node.inputs.items(), *results):
        role = key.removeprefix("> ")
        array, dtype = b.arrays[name], _DTYPES.get(role, np.float32)
        wanted = expected.get(key, expected.get(role))
        if wanted is None:
            raise ValueError(f"graph: {b.node.name}: {b.node.op} has no {role!r}")
        have: tuple[int, ...] | int = array.size if isinstance(wanted, int) else array.shape
        if have != wanted or array.dtype != dtype or not array.flags.c_contiguous:
            raise ValueError(
                f"graph: {b.node.name}: {role} is {array.dtype} of {array.shape}; "
                f"its kernel takes contiguous {np.dtype(dtype)} of {wanted}"
            )


def _volume(size: Size, channels: int) -> tuple[int, ...]:
    """Shape of a blocked tensor of MB, D, H, W."""
    return (size[0], blocks(channels), *size[1:], LANES)


def _lanes(channels: int) -> tuple[int]:
    return (blocks(channels) * LANES,)


def _source(role: str, size: Size, channels: int) -> Shapes:
    """A source, which may be deferred."""
    vectors = dict.fromkeys((f"{role}.scale", f"{role}.shift"), _lanes(channels))
    return {role: _volume(size, channels), **vectors}


def _gradient(role: str, size: Size, channels: int) -> Shapes:
    """A gradient that is read, which may be deferred."""
    vectors = {f"{role}.{part}": _lanes(channels) for part in "abd"}
    return {role: _volume(size, channels), f"{role}.x": _volume(size, channels), **vectors}


def _written(size: Size, channels: int, sums: tuple[int, ...] | None = None, end: str = "") -> Shapes:
    """A gradient that is written, perhaps added to what is there and masked."""
    volume, lanes = _volume(size, channels), _lanes(channels)
    vectors = {f"mask{end}.{part}": lanes for part in ("scale", "shift", "mean")}
    sums = sums or (2, epilogue.partials(volume), *lanes)
    written = dict.fromkeys((f"diff_src{end}", f"mask{end}.x", f"accumulate{end}"), volume)
    return {**written, **vectors, f"sums{end}": sums}


# ---- convolutions ----------------------------------------------------------------------------


def _convolution(b: Binder) -> Shapes:
    plan = plan_of(b.node, b.graph)
    sources, results = plan.channels_in, plan.channels_out
    if is_adjoint(b.node):
        sources, results = results, sources
    first = _source("src", plan.size, sources[0])
    if plan.width < LANES:  # a first layer reads its few channels as they come, and nothing deferred
        first = {"src": (*plan.size, sources[0])}
    expected = {
        **first,
        **_source("src_b", plan.size, sources[1]),
        **_gradient("diff_dst", plan.size, results[0]),
        "weights": math.prod(conv3d.packed_shape(plan)),
        "bias": _lanes(results[0]),
        "dst": _volume(plan.size, results[0]),
        "moments": conv3d.moments_shape(plan),
        "diff_weights": weights_shape(b.node, b.graph),
        "diff_bias": (results[0],),
    }
    if is_adjoint(b.node):
        for place, end in enumerate(("", "_b")):
            sums = conv3d.sums_shape(plan, place)
            expected |= _written(plan.size, sources[place], sums, end)
    return expected


def _transposed(b: Binder) -> Shapes:
    src = "src" if b.has("src") else "diff_src"
    size, (sources, result, *kernel) = b.value(src).shape[:4], weights_shape(b.node, b.graph)
    large = (size[0], *(n * k for n, k in zip(size[1:], kernel, strict=True)))
    return {
        **_source("src", size, sources),
        **_written(size, sources),
        "dst": _volume(large, result),
        "diff_dst": _volume(large, result),
        "weights": packed_size(b.node, b.graph) if b.has("weights") else 0,
        "bias": (result,),
        "diff_weights": weights_shape(b.node, b.graph),
        "diff_bias": (result,),
    }


def _pack_weights(b: Binder) -> Shapes:
    user = b.node.attributes["for"]
    return {"weights": weights_shape(user, b.graph), "packed": (packed_size(user, b.graph),)}


# ---- pooling, the last layer -----------------------------------------------------------------


def _max_pooling(b: Binder) -> Shapes:
    MB, *sizes, C = b.value("src" if b.has("src") else "diff_src").shape
    small = (MB, *(n // k for n, k in zip(sizes, b.node.attributes["size"], strict=True)))
    pooled = dict.fromkeys(("dst", "argmax", "gradient", "saved.argmax"), _volume(small, C))
    return {**_source("src", (MB, *sizes), C), **_written((MB, *sizes), C), **pooled}


def _head(b: Binder) -> Shapes:
    MB, *sizes, C = b.value("src").shape
    classes, voxels = b.value("weights").shape[0], math.prod((MB, *sizes))
    return {
        **_source("src", (MB, *sizes), C),
        **_written((MB, *sizes), C),
        **dict.fromkeys(("weights", "diff_weights"), (classes, C, 1, 1, 1)),
        **dict.fromkeys(("bias", "diff_bias"), (classes,)),
        **dict.fromkeys(("dice", "diff_dice"), (3, MB, classes)),
        **dict.fromkeys(("cross_entropy", "diff_cross_entropy"), ()),
        "labels": voxels,
        "dst": voxels * classes,
    }


# ---- batch norm in pieces, reorders ----------------------------------------------------------


def _moments(b: Binder) -> Shapes:
    *size, C = b.value("src").shape
    volume = _volume(tuple(size), C)
    return {"src": volume, "moments": (epilogue.partials(volume), 3, *_lanes(C))}


def _normalize(b: Binder) -> Shapes:
    *size, C = b.value("src").shape
    return {**_source("src", tuple(size), C), "dst": _volume(tuple(size), C)}


def _mask(b: Binder) -> Shapes:
    *size, C = b.value("diff_src").shape
    return {**_written(tuple(size), C), "gradient": _volume(tuple(size), C)}


def _form_gradient(b: Binder) -> Shapes:
    *size, C = b.value("dst").shape
    return {**_gradient("diff_dst", tuple(size), C), "dst": _volume(tuple(size), C)}


def _statistics(b: Binder) -> Shapes:
    (C,), bricks = b.graph.values[b.node.inputs["scale"]].shape, b.array("moments").shape[0]
    parameters = dict.fromkeys(("scale", "shift", "running_mean", "running_variance"), (C,))
    vectors = dict.fromkeys(("> scale", "> shift", "mean", "rstd"), _lanes(C))
    return {**parameters, **vectors, "moments": (bricks, 3, *_lanes(C))}


def _statistics_backward(b: Binder) -> Shapes:
    (C,), partials = b.value("scale").shape, b.array("sums").shape[1]
    vectors = dict.fromkeys(("mean", "rstd", "a", "b", "d"), _lanes(C))
    parameters = dict.fromkeys(("scale", "diff_scale", "diff_shift"), (C,))
    return {**vectors, **parameters, "sums": (2, partials, *_lanes(C))}


def _reorder(b: Binder) -> Shapes:
    *size, C = b.value("dst").shape
    blocked, last = ("dst", "src") if b.value("dst").layout == BLOCKED else ("src", "dst")
    return {**_source(blocked, tuple(size), C), last: (*size, C)}


_SHAPES: dict[str, Callable[[Binder], Shapes]] = {
    "convolution": _convolution,
    "convolution_backward": _convolution,
    "convolution_backward_data": _convolution,
    "convolution_backward_weights": _convolution,
    "transposed_convolution": _transposed,
    "transposed_convolution_backward_data": _transposed,
    "transposed_convolution_backward_weights": _transposed,
    "pack_weights": _pack_weights,
    "max_pooling": _max_pooling,
    "max_pooling_backward": _max_pooling,
    "head": _head,
    "head_loss": _head,
    "head_loss_backward": _head,
    "moments": _moments,
    "normalize": _normalize,
    "mask": _mask,
    "gradient": _form_gradient,
    "statistics": _statistics,
    "statistics_backward": _statistics_backward,
    "reorder": _reorder,
}
