"""Convolutions on blocked tensors: their plans, packed weights and calls.

A plan (``kernels.conv3d.operator.Plan``) fixes the algorithm and all sizes of one direction. It is made
again wherever it is needed, from what the graph knows of the node.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from kernels.base.buffers import empty
from kernels.base.layout import blocks
from kernels.base.simd import LANES
from kernels.conv3d import operator as conv3d
from kernels.conv3d.bricks import NO_MOMENTS
from kernels.deferred.tensors import NO_MASK, NO_SOURCE, Mask
from kernels.ops import fused_conv_transpose3d as conv_transpose3d
from tinyunet.compiler.binder import Array, Binder, Call
from tinyunet.compiler.ir import NDHWC, Graph, Node

_NO_VOLUME = NO_SOURCE.data


def plan_of(node: Node, graph: Graph) -> conv3d.Plan:
    """Return the plan of a convolution node: direct, or Winograd with its setting "tile"."""
    src, other, dst = "src", "src_b", ("dst" if node.op == "convolution" else "diff_dst")
    adjoint = is_adjoint(node)
    if adjoint:  # a convolution from the gradient of dst to those of its sources
        src, other = "diff_src", "diff_src_b"
    names = {**node.inputs, **node.outputs}
    shapes = {role: graph.values[name].shape for role, name in names.items()}
    sources = shapes[src][-1], shapes[other][-1] if other in shapes else 0
    result = shapes[dst][-1], 0
    if adjoint:
        sources, result = result, sources
    return _plan(
        sources,
        result,
        shapes[dst][:4],
        tuple(node.attributes["kernel"]),
        node.attributes.get("tile"),
        graph.values[names[src]].layout == NDHWC,
        node.op in ("convolution_backward_weights", "convolution_backward"),
    )


@functools.lru_cache(maxsize=1024)
def _plan(
    sources: Any, result: Any, size: Any, kernel: Any, tile: Any, last: bool, keeps_both: bool
) -> conv3d.Plan:
    return conv3d.plan(sources, result, size, kernel, tile, channels_last=last, keeps_both=keeps_both)


def is_adjoint(node: Node) -> bool:
    """Whether a convolution goes from the gradient of its result to those of its sources."""
    return node.op in ("convolution_backward_data", "convolution_backward")


def is_transposed(node: Node) -> bool:
    """Whether the node belongs to a transposed convolution."""
    return node.op.startswith("transposed")


def weights_shape(node: Node, graph: Graph) -> tuple[int, ...]:
    """Return the shape of a node's weights: (OC, IC, KD, KH, KW), or transposed (IC, OC, KD, KH, KW)."""
    names = {**node.inputs, **node.outputs}
    src, dst = ("src" if "src" in names else "diff_src"), ("dst" if "dst" in names else "diff_dst")
    channels = {role: graph.values[names[role]].shape[-1] for role in (src, f"{src}_b", dst) if role in names}
    ends = channels.pop(dst), sum(channels.values())
    return (*(ends[::-1] if is_transposed(node) else ends), *node.attributes["kernel"])


def packs(node: Node, graph: Graph) -> bool:
    """Whether a node's weights are packed before it; else it takes them as they are."""
    return is_transposed(node) or plan_of(node, graph).packs


def packed_size(node: Node, graph: Graph) -> int:
    """Return how many floats a node's packed weights take."""
    if is_transposed(node):
        return sum(map(math.prod, _panel_shapes(weights_shape(node, graph))))
    return math.prod(conv3d.packed_shape(plan_of(node, graph)))


@functools.lru_cache(maxsize=64)
def _panel_shapes(weights_shape: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(panel.shape for panel in conv_transpose3d.panels(weights_shape))


def _panels(flat: Any, weights_shape: tuple[int, ...]) -> conv_transpose3d.Packed:
    forward, backward = _panel_shapes(weights_shape)
    at = math.prod(forward)
    return conv_transpose3d.Packed(flat[:at].reshape(forward), flat[at:].reshape(backward))


def _pack_weights(b: Binder) -> Call:
    weights, flat, user = b.array("weights"), b.array("packed"), b.node.attributes["for"]
    if is_transposed(user):
        packed = _panels(flat, weights.shape)

        def run() -> None:
            flat.fill(0)
            conv_transpose3d.pack(weights, packed)

        return run
    plan = plan_of(user, b.graph)
    panel, adjoint = flat.reshape(conv3d.packed_shape(plan)), is_adjoint(user)
    return lambda: conv3d.pack(plan, weights, panel, adjoint=adjoint)


def _pad_bias(b: Binder) -> Call:
    bias, padded = b.array("bias"), b.array("padded")

    def run() -> None:
        padded[: bias.size], padded[bias.size :] = bias, 0.0

    return run


def _forward(b: Binder) -> Call:
    plan, a, other = plan_of(b.node, b.graph), b.source(), b.source("src_b")
    packed, dst = b.array("weights").reshape(conv3d.packed_shape(plan)), b.array("dst")
    no_bias = np.zeros(blocks(b.value("dst").shape[-1]) * LANES, np.float32)
    bias = b.array("bias") if b.has("bias") else no_bias
    moments = b.array("moments") if b.has("moments") else NO_MOMENTS
    return lambda: conv3d.forward(plan, a, other, packed, bias, dst, moments)


def _backward_data(b: Binder) -> Call:
    plan, gradient = plan_of(b.node, b.graph), b.gradient()
    packed, (dst, masks) = b.array("weights").reshape(conv3d.packed_shape(plan)), _destinations(b)
    return lambda: conv3d.backward_data(plan, gradient, packed, dst, masks)


def _destinations(b: Binder) -> tuple[tuple[Array, Array], tuple[Mask, Mask]]:
    second = b.array("diff_src_b") if b.has("diff_src_b") else _NO_VOLUME
    return (b.array("diff_src"), second), (b.mask() or NO_MASK, b.mask("_b") or NO_MASK)


def _backward_weights(b: Binder) -> Call:
    plan, a, other = plan_of(b.node, b.graph), b.source(), b.source("src_b")
    gradient, diff_weights = b.gradient(), _diff_weights(b)
    no_bias = np.empty(diff_weights.shape[0], np.float32)
    diff_bias = b.array("diff_bias") if b.has("diff_bias") else no_bias
    return lambda: conv3d.backward_weights(plan, a, other, gradient, diff_weights, diff_bias)


def _backward(b: Binder) -> Call:
    plan, gradient, a, other = plan_of(b.node, b.graph), b.gradient(), b.source(), b.source("src_b")
    packed, (dst, masks) = b.array("weights").reshape(conv3d.packed_shape(plan)), _destinations(b)
    diff_weights, diff_bias = _diff_weights(b), np.zeros(0, np.float32)
    if b.has("diff_bias"):
        diff_bias = b.array("diff_bias")

    def run() -> None:
        conv3d.backward(plan, gradient, packed, a, other, dst, masks, diff_weights)
        diff_bias.fill(0)  # batch norm takes it away: see the pass `fuse_gradients`

    return run


def _transposed_forward(b: Binder) -> Call:
    source, dst = b.source(), b.array("dst")
    packed = _panels(b.array("weights"), weights_shape(b.node, b.graph))
    bias = b.array("bias") if b.has("bias") else None
    return lambda: conv_transpose3d.forward(source, packed, bias, dst)


def _transposed_backward_data(b: Binder) -> Call:
    diff_dst, dst, mask = b.array("diff_dst"), b.array("diff_src"), b.mask()
    packed, accumulate = (_panels(b.array("weights"), weights_shape(b.node, b.graph)), b.has("accumulate"))
    return lambda: conv_transpose3d.backward_data(diff_dst, packed, dst, accumulate, mask)


def _transposed_backward_weights(b: Binder) -> Call:
    source, diff_dst, diff_weights = b.source(), b.array("diff_dst"), _diff_weights(b)
    no_bias = np.empty(diff_weights.shape[1], np.float32)
    diff_bias = b.array("diff_bias") if b.has("diff_bias") else no_bias
    return lambda: conv_transpose3d.backward_weights(source, diff_dst, diff_weights, diff_bias)


def _diff_weights(b: Binder) -> Array:
    """Where the gradient of the weights goes; nowhere that is read, if they are not learnt."""
    return b.array("diff_weights") if b.has("diff_weights") else empty(weights_shape(b.node, b.graph))


BINDERS: dict[str, Callable[[Binder], Call]] = {
    "pack_weights": _pack_weights,
    "pad_bias": _pad_bias,
    "convolution": _forward,
    "convolution_backward_data": _backward_data,
    "convolution_backward_weights": _backward_weights,
    "convolution_backward": _backward,
    "transposed_convolution": _transposed_forward,
    "transposed_convolution_backward_data": _transposed_backward_data,
    "transposed_convolution_backward_weights": _transposed_backward_weights,
}
