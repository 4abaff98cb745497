"""Convolutions and transposed convolutions: their gradients, plans, packed weights and calls.

The gradient of a convolution is two nodes, because the gradient of the source and that of the weights want
different kernels; the pass ``fuse_gradients`` joins them again where one kernel finds both.

A plan (``kernels.conv3d.operator.Plan``) fixes the algorithm and all sizes of one direction. It is made again
wherever it is needed, from the values of the graph.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from kernels import ops
from kernels.base.arguments import Floats, tensor
from kernels.base.buffers import empty
from kernels.conv3d import operator as conv3d
from kernels.conv3d.write import NO_MOMENTS
from kernels.deferred.tensors import NO_MASK, NO_SOURCE, Mask
from kernels.ladder.direct import FEW_CHANNELS
from kernels.ladder.shapes import forward_geometry
from tinyunet import functional
from tinyunet.compiler.ir import NDHWC, Graph, Node
from tinyunet.compiler.operators.weightless import check_vectors, checked_volume
from tinyunet.compiler.record import Arguments, Binder, Call, Kernel, Operator, Shape, Shapes, lanes, volume

# ---- what a node is about --------------------------------------------------------------------


def is_adjoint(node: Node) -> bool:
    """Whether a convolution goes from the gradient of its result to those of its sources."""
    return node.op in ("convolution_backward_data", "convolution_backward")


def is_transposed(node: Node) -> bool:
    """Whether the node belongs to a transposed convolution."""
    return node.op.startswith("transposed")


def plan_of(node: Node, graph: Graph) -> conv3d.Plan:
    """Return the plan of a convolution node: direct, or Winograd with its setting "tile"."""
    adjoint = is_adjoint(node)  # a convolution from the gradient of dst to those of its sources
    src, dst = (
        ("diff_src", "diff_dst") if adjoint else ("src", "dst" if "dst" in node.outputs else "diff_dst")
    )
    shapes = {role: graph.values[name].shape for role, name in node.values.items()}
    sources = shapes[src][-1], shapes[f"{src}_b"][-1] if f"{src}_b" in shapes else 0
    result = shapes[dst][-1], 0
    return _plan(
        *((result, sources) if adjoint else (sources, result)),
        shapes[dst][:4],
        tuple(node.attributes["kernel"]),
        node.attributes.get("tile"),
        channels_last=graph.values[node.values[src]].layout == NDHWC,
        keeps_both=node.op in ("convolution_backward_weights", "convolution_backward"),
    )


_plan = functools.lru_cache(maxsize=1024)(conv3d.plan)


def weights_shape(node: Node, graph: Graph) -> Shape:
    """Return the shape of a node's weights: (OC, IC, KD, KH, KW), or transposed (IC, OC, KD, KH, KW)."""
    names = node.values
    src, dst = ("src" if "src" in names else "diff_src"), ("dst" if "dst" in names else "diff_dst")
    channels = {role: graph.values[names[role]].shape[-1] for role in (src, f"{src}_b", dst) if role in names}
    ends = channels.pop(dst), sum(channels.values())
    return (*(ends[::-1] if is_transposed(node) else ends), *node.attributes["kernel"])


def reads_channels_last(node: Node, role: str, graph: Graph) -> bool:
    """Whether a blocked convolution takes a source of few channels as it comes."""
    return (
        node.op in ("convolution", "convolution_backward_weights")
        and role == "src"
        and not {"src.scale", "src_b"} & {*node.inputs}
        and graph.values[node.inputs["src"]].shape[-1] <= FEW_CHANNELS
    )


# ---- traced ----------------------------------------------------------------------------------


def _convolved(a: Arguments) -> Shape:
    return forward_geometry(a["src"], a["weights"], a["bias"], a["stride"], a["padding"]).dst_shape


def _enlarged(a: Arguments) -> Shape:
    tensor("weights", a["weights"], axes="IC, OC, KD, KH, KW", dtype=a["src"].dtype)
    shape = ops.transposed_conv.enlarged_shape(
        checked_volume(a), a["weights"].shape, a["stride"], a["padding"]
    )
    check_vectors(a, shape[-1], "bias")
    return shape


def _differentiate(node: Node, gradient: str, wanted: dict[str, str], graph: Graph) -> Iterator[Node]:
    settings: dict[str, Any] = {n: node.attributes[n] for n in ("stride", "padding", "function", "kernel")}
    settings["of"] = node.name
    data = {role: value for role, value in wanted.items() if role == "diff_src"}
    weights = {role: value for role, value in wanted.items() if role != "diff_src"}
    for end, inputs, outputs in (
        ("data", {"diff_dst": gradient, "weights": node.inputs["weights"]}, data),
        ("weights", {"src": node.inputs["src"], "diff_dst": gradient}, weights),
    ):
        if outputs:
            name = f"d {node.name}.{'src' if end == 'data' else 'weights'}"
            yield Node(name, f"{node.op}_backward_{end}", inputs, outputs, settings, "backward")


# ---- what kernels take -----------------------------------------------------------------------


def _has_kernel(node: Node, graph: Graph) -> bool:
    settings = tuple(node.attributes["stride"]), node.attributes["padding"]
    return settings == ((1, 1, 1), "same") and all(k in (1, 3, 5) for k in node.attributes["kernel"])


def _has_transposed_kernel(node: Node, graph: Graph) -> bool:
    return tuple(node.attributes["kernel"]) == tuple(node.attributes["stride"])


def _sums(node: Node, role: str, graph: Graph) -> Shape:
    plan = plan_of(node, graph)
    return conv3d.moments_shape(plan) if role == "moments" else conv3d.sums_shape(plan, int(role == "sums_b"))


def _sizes(b: Binder) -> Shapes:
    plan = plan_of(b.node, b.graph)
    sources, results = plan.channels_in, plan.channels_out
    if is_adjoint(b.node):
        sources, results = results, sources
    last = b.has("src") and b.value("src").layout == NDHWC
    first = (*plan.size, sources[0]) if last else volume(plan.size, sources[0])
    written = {role: conv3d.sums_shape(plan, end) for end, role in enumerate(("sums", "sums_b"))}
    return {
        "src": first,
        "diff_src": volume(plan.size, sources[0]),
        **dict.fromkeys(("src_b", "diff_src_b"), volume(plan.size, sources[1])),
        **dict.fromkeys(("dst", "diff_dst"), volume(plan.size, results[0])),
        "weights": math.prod(conv3d.packed_shape(plan)),
        **dict.fromkeys(("bias", "diff_bias"), (results[0],)),
        "moments": conv3d.moments_shape(plan),
        "diff_weights": weights_shape(b.node, b.graph),
        **(written if is_adjoint(b.node) else {}),
    }


def _transposed_sizes(b: Binder) -> Shapes:
    shape = weights_shape(b.node, b.graph)
    size, (sources, result, *kernel) = b.value("src" if b.has("src") else "diff_src").shape[:4], shape
    large = (size[0], *(n * k for n, k in zip(size[1:], kernel, strict=True)))
    return {
        **dict.fromkeys(("src", "diff_src"), volume(size, sources)),
        **dict.fromkeys(("dst", "diff_dst"), volume(large, result)),
        "weights": _transposed_packed(b.node, b.graph),
        **dict.fromkeys(("bias", "diff_bias"), (result,)),
        "diff_weights": shape,
    }


def _flops(node: Node, shapes: Mapping[str, Shape]) -> int:
    """Each voxel of a transposed convolution's small side meets every weight, else of the result."""
    sources = [r for r in ("src", "src_b", "diff_src", "diff_src_b") if r in shapes]
    inputs, dst = sum(shapes[role][-1] for role in sources), shapes.get("dst") or shapes["diff_dst"]
    small = shapes[sources[0]] if is_transposed(node) else dst
    return 2 * math.prod(node.attributes["kernel"]) * inputs * dst[-1] * math.prod(small[:-1])


# ---- packed weights --------------------------------------------------------------------------


def _packed(node: Node, graph: Graph) -> int:
    plan = plan_of(node, graph)
    return math.prod(conv3d.packed_shape(plan)) if plan.packs else 0


def _transposed_packed(node: Node, graph: Graph) -> int:
    return sum(map(math.prod, _panel_shapes(weights_shape(node, graph))))


@functools.lru_cache(maxsize=64)
def _panel_shapes(shape: Any) -> tuple[Shape, ...]:
    return tuple(panel.shape for panel in ops.transposed_conv.panels(shape))


def _panels(flat: Any, shape: Shape) -> "ops.transposed_conv.Packed":
    forward, backward = _panel_shapes(shape)
    at = math.prod(forward)
    return ops.transposed_conv.Packed(flat[:at].reshape(forward), flat[at:].reshape(backward))


def _packing_sizes(b: Binder) -> Shapes:
    return {"weights": weights_shape(b.node.attributes["for"], b.graph), "packed": b.value("packed").shape}


def _pack_weights(b: Binder) -> Call:
    weights, flat, user = b.array("weights"), b.array("packed"), b.node.attributes["for"]
    if is_transposed(user):
        packed = _panels(flat, weights.shape)

        def run() -> None:
            flat.fill(0)
            ops.transposed_conv.pack(weights, packed)

        return run
    plan = plan_of(user, b.graph)
    panel, adjoint = flat.reshape(conv3d.packed_shape(plan)), is_adjoint(user)
    return lambda: conv3d.pack(plan, weights, panel, adjoint=adjoint)


# ---- calls -----------------------------------------------------------------------------------


def _weights(b: Binder) -> Floats:
    return b.array("weights").reshape(conv3d.packed_shape(plan_of(b.node, b.graph)))


def _bias(b: Binder, role: str, shape: Shape) -> Floats:
    """A bias, or its gradient; where the convolution has none zeros, which nobody reads."""
    return b.array(role) if b.has(role) else np.zeros(shape, np.float32)


def _diff_weights(b: Binder) -> Floats:
    """Where the gradient of the weights goes; nowhere that is read, if they are not learnt."""
    return b.array("diff_weights") if b.has("diff_weights") else empty(weights_shape(b.node, b.graph))


def _destinations(b: Binder) -> tuple[tuple[Floats, Floats], tuple[Mask, Mask]]:
    second = b.array("diff_src_b") if b.has("diff_src_b") else NO_SOURCE.data
    return (b.array("diff_src"), second), (b.mask() or NO_MASK, b.mask("_b") or NO_MASK)


def _forward(b: Binder) -> Call:
    plan, packed, dst = plan_of(b.node, b.graph), _weights(b), b.array("dst")
    sources = b.source(), b.source("src_b")
    bias = _bias(b, "bias", b.value("dst").shape[-1:])
    padded = np.zeros(lanes(bias.size), np.float32)
    moments = b.array("moments") if b.has("moments") else NO_MOMENTS

    def run() -> None:
        padded[: bias.size] = bias
        conv3d.forward(plan, *sources, packed, padded, dst, moments)

    return run


def _backward_data(b: Binder) -> Call:
    plan, gradient, packed = plan_of(b.node, b.graph), b.gradient(), _weights(b)
    dst, masks = _destinations(b)
    return lambda: conv3d.backward_data(plan, gradient, packed, dst, masks)


def _backward_weights(b: Binder) -> Call:
    plan, sources, gradient = plan_of(b.node, b.graph), (b.source(), b.source("src_b")), b.gradient()
    diff_weights = _diff_weights(b)
    diff_bias = _bias(b, "diff_bias", diff_weights.shape[:1])
    return lambda: conv3d.backward_weights(plan, *sources, gradient, diff_weights, diff_bias)


def _backward(b: Binder) -> Call:
    plan, gradient, packed = plan_of(b.node, b.graph), b.gradient(), _weights(b)
    sources, (dst, masks) = (b.source(), b.source("src_b")), _destinations(b)
    diff_weights, diff_bias = _diff_weights(b), _bias(b, "diff_bias", (0,))

    def run() -> None:
        conv3d.backward(plan, gradient, packed, *sources, dst, masks, diff_weights)
        diff_bias.fill(0)  # if it is found here at all: see the pass `fuse_gradients`

    return run


def _transposed_forward(b: Binder) -> Call:
    source, dst = b.source(), b.array("dst")
    packed = _panels(b.array("weights"), weights_shape(b.node, b.graph))
    bias = b.array("bias") if b.has("bias") else None
    return lambda: ops.transposed_conv.forward_blocked(source, packed, bias, dst)


def _transposed_backward_data(b: Binder) -> Call:
    diff_dst, dst, mask, accumulate = b.array("diff_dst"), b.array("diff_src"), b.mask(), b.has("accumulate")
    packed = _panels(b.array("weights"), weights_shape(b.node, b.graph))
    return lambda: ops.transposed_conv.backward_data_blocked(diff_dst, packed, dst, accumulate, mask)


def _transposed_backward_weights(b: Binder) -> Call:
    source, diff_dst, diff_weights = b.source(), b.array("diff_dst"), _diff_weights(b)
    diff_bias = _bias(b, "diff_bias", diff_weights.shape[1:2])
    return lambda: ops.transposed_conv.backward_weights_blocked(source, diff_dst, diff_weights, diff_bias)


# ---- records ---------------------------------------------------------------------------------

_TAKES = "kernel sizes of 1, 3 or 5, stride 1, padding same"
_convolution = functools.partial(
    Kernel, sizes=_sizes, fits=_has_kernel, takes=_TAKES, sums=_sums, flops=_flops
)
_transposed = functools.partial(
    Kernel,
    sizes=_transposed_sizes,
    fits=_has_transposed_kernel,
    takes="a kernel as large as its stride",
    flops=_flops,
)
_BOTH_SOURCES, _BOTH_GRADIENTS = ("src", "src_b"), ("diff_src", "diff_src_b")

OPERATORS = (
    Operator(
        "convolution",
        functional.Convolution,
        _convolved,
        ("src", "weights"),
        differentiate=_differentiate,
        kernels={
            "convolution": _convolution(_forward, reads=_BOTH_SOURCES, gathers=True, packed=_packed),
            "convolution_backward_data": _convolution(
                _backward_data, forms=True, masks=_BOTH_GRADIENTS, packed=_packed
            ),
            "convolution_backward_weights": _convolution(_backward_weights, reads=_BOTH_SOURCES, forms=True),
            "convolution_backward": _convolution(
                _backward, reads=_BOTH_SOURCES, forms=True, masks=_BOTH_GRADIENTS, packed=_packed
            ),
            "pack_weights": Kernel(_pack_weights, _packing_sizes),
        },
    ),
    Operator(
        "transposed_convolution",
        functional.TransposedConvolution,
        _enlarged,
        ("src", "weights"),
        differentiate=_differentiate,
        kernels={
            "transposed_convolution": _transposed(
                _transposed_forward, reads=("src",), packed=_transposed_packed
            ),
            "transposed_convolution_backward_data": _transposed(
                _transposed_backward_data, masks=("diff_src",), adds=True, packed=_transposed_packed
            ),
            "transposed_convolution_backward_weights": _transposed(
                _transposed_backward_weights, reads=("src",)
            ),
        },
    ),
)
