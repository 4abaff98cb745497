"""How a node runs on blocked tensors.

Everything is decided when a program is built: a call is a function without arguments that closes over
views of the arena.
"""

from collections.abc import Callable, Mapping

import numpy as np

from kernels.base.layout import blocks
from kernels.base.simd import LANES
from kernels.conv3d import operator as conv3d
from kernels.deferred import masking as epilogue
from kernels.deferred import statistics, whole
from kernels.deferred.tensors import NO_MASK
from kernels.ops import fused_edges as edges
from kernels.ops import fused_pooling as pooling
from kernels.ops import head
from tinyunet.compiler import contracts, convolutions
from tinyunet.compiler.binder import Array, Binder, Call
from tinyunet.compiler.ir import BLOCKED, Graph, Node


def bind(node: Node, graph: Graph, arrays: Mapping[str, Array]) -> Call:
    """Return a function without arguments that runs a node of blocked tensors.

    Raises
    ------
    ValueError
        An array is not what the kernel takes (:mod:`tinyunet.compiler.contracts`).
    """
    binder = Binder(node, graph, arrays)
    contracts.check(binder)
    return _BINDERS[node.op](binder)


def sums_shape(node: Node, role: str, graph: Graph) -> tuple[int, ...]:
    """Return the shape of the partial sums that a node writes; empty for every other role."""
    if role not in _SUMMED:
        return ()
    if node.op == "convolution":
        return conv3d.moments_shape(convolutions.plan_of(node, graph))
    if convolutions.is_adjoint(node):
        return conv3d.sums_shape(convolutions.plan_of(node, graph), int(role == "sums_b"))
    volume = graph.values[node.inputs["src"] if node.op == "moments" else node.outputs["diff_src"]]
    partials = epilogue.partials(volume.storage_shape)
    lanes = blocks(volume.shape[-1]) * LANES
    return (partials, 3, lanes) if role == "moments" else (2, partials, lanes)


_SUMMED = ("moments", "sums", "sums_b")


# ---- pooling ---------------------------------------------------------------------------------


def _max_pooling(b: Binder) -> Call:
    source, dst, size = b.source(), b.array("dst"), tuple(b.node.attributes["size"])
    argmax = b.array("argmax") if b.has("argmax") else np.empty(dst.shape, np.uint8)
    return lambda: pooling.forward(source, dst, argmax, size)


def _max_pooling_backward(b: Binder) -> Call:
    diff_dst, argmax, dst = b.array("gradient"), b.array("saved.argmax"), b.array("diff_src")
    accumulate, mask, size = b.has("accumulate"), b.mask(), tuple(b.node.attributes["size"])
    return lambda: pooling.backward(diff_dst, argmax, dst, accumulate, mask, size)


# ---- the last layer --------------------------------------------------------------------------


def _head(b: Binder) -> Call:
    source, weights, bias, dst = b.source(), b.array("weights"), b.array("bias"), b.array("dst")
    volume = dst.reshape(source.data.shape[0], *source.data.shape[2:5], dst.shape[-1])
    return lambda: head.infer(source, weights, bias, volume)


def _head_loss(b: Binder) -> Call:
    source, weights, bias, labels = (b.source(), b.array("weights"), b.array("bias"), b.array("labels"))
    dice, cross_entropy = b.array("dice"), b.array("cross_entropy").reshape(1)
    return lambda: head.forward(source, weights, bias, labels, dice, cross_entropy)


def _head_loss_backward(b: Binder) -> Call:
    source, weights, bias, labels = (b.source(), b.array("weights"), b.array("bias"), b.array("labels"))
    MB, classes = source.data.shape[0], bias.size
    dice = b.array("diff_dice")[:2] if b.has("diff_dice") else np.zeros((2, MB, classes))
    cross_entropy = b.array("diff_cross_entropy") if b.has("diff_cross_entropy") else np.zeros(())
    dst, diff_weights, diff_bias = (b.array(f"diff_{r}") for r in ("src", "weights", "bias"))
    accumulate, mask = b.has("accumulate"), b.mask()
    return lambda: head.backward(
        source,
        weights,
        bias,
        labels,
        dice,
        float(cross_entropy),
        dst,
        diff_weights,
        diff_bias,
        accumulate,
        mask,
    )


# ---- batch norm in pieces --------------------------------------------------------------------


def _moments(b: Binder) -> Call:
    x, moments = b.array("src"), b.array("moments")
    return lambda: statistics.gather_moments(x, moments)


def _normalize(b: Binder) -> Call:
    source, dst = b.source(), b.array("dst")
    return lambda: whole.normalize(source, dst)


def _mask(b: Binder) -> Call:
    diff, mask = b.array("diff_src"), b.mask() or NO_MASK
    return lambda: epilogue.apply_mask(diff, mask)


def _gradient(b: Binder) -> Call:
    gradient, dst = b.gradient(), b.array("dst")
    return lambda: whole.form_gradient(gradient, dst)


def _statistics(b: Binder) -> Call:
    moments, gamma, beta = (b.arrays[b.node.inputs[r]] for r in ("moments", "scale", "shift"))
    mean, variance = (b.arrays[b.node.inputs[r]] for r in ("running_mean", "running_variance"))
    epsilon, momentum = (float(b.node.attributes[name]) for name in ("epsilon", "momentum"))
    out = [b.arrays[b.node.outputs[role]] for role in ("scale", "shift", "mean", "rstd")]
    combine = b.node.attributes.get("combine")

    def run() -> None:
        found = statistics.combine_moments(moments, combine) if combine else moments
        statistics.finish_moments(found, gamma, beta, epsilon, momentum, mean, variance, *out)

    return run


def _fixed_statistics(b: Binder) -> Call:
    gamma, beta, mean, variance = (b.arrays[b.node.inputs[r]] for r in ("scale", "shift", "mean", "variance"))
    scale, shift = (b.arrays[b.node.outputs[r]] for r in ("scale", "shift"))
    epsilon, channels = b.node.attributes["epsilon"], gamma.size

    def run() -> None:
        scale[:], shift[:] = 0.0, 0.0
        scale[:channels] = gamma / np.sqrt(variance.astype(np.float64) + epsilon)
        shift[:channels] = beta - mean.astype(np.float64) * scale[:channels]

    return run


def _fold(b: Binder) -> Call:
    weights, bias = (b.arrays[b.node.outputs[role]] for role in ("weights", "bias"))
    old = b.arrays[b.node.inputs["weights"]]
    old_bias = b.arrays[b.node.inputs["bias"]] if "bias" in b.node.inputs else np.zeros_like(bias)
    gamma, beta = b.array("scale"), b.array("shift")
    mean, variance = b.array("mean"), b.array("variance")
    epsilon, shape = b.node.attributes["epsilon"], [1] * weights.ndim
    shape[b.node.attributes["axis"]] = bias.size

    def run() -> None:
        factor = gamma / np.sqrt(variance.astype(np.float64) + epsilon)
        weights[:] = old * factor.reshape(shape)
        bias[:] = (old_bias - mean.astype(np.float64)) * factor + beta

    return run


def _statistics_backward(b: Binder) -> Call:
    sums, count = b.array("sums"), b.node.attributes["count"]
    arrays = [b.arrays[b.node.inputs[r]] for r in ("scale", "mean", "rstd")]
    out = [b.arrays[b.node.outputs[r]] for r in ("a", "b", "d", "diff_scale", "diff_shift")]
    combine = b.node.attributes.get("combine")

    def run() -> None:
        statistics.finish_gradient(sums, count, *arrays, *out)
        if combine:
            # The source's gradient goes through everybody's statistics; gamma's and beta's stay
            # this process' own, which are summed with all other gradients.
            own = [diff.copy() for diff in out[3:]]
            everyones, voxels = statistics.combine_sums(sums, count, combine)
            statistics.finish_gradient(everyones, voxels, *arrays, *out)
            out[3][:], out[4][:] = own

    return run


# ---- others ----------------------------------------------------------------------------------


def _reorder(b: Binder) -> Call:
    dst = b.array("dst")
    if b.value("dst").layout == BLOCKED:
        src = b.array("src")
        return lambda: edges.to_blocked(src, dst)
    source = b.source()
    return lambda: edges.to_ndhwc(source, dst)


def _accumulate(b: Binder) -> Call:
    first, second, dst = b.array("a"), b.array("b"), b.array("dst")

    def run() -> None:
        np.add(first, second, out=dst)

    return run


_BINDERS: dict[str, Callable[[Binder], Call]] = {
    **convolutions.BINDERS,
    "accumulate": _accumulate,
    "fold": _fold,
    "fixed_statistics": _fixed_statistics,
    "gradient": _gradient,
    "head": _head,
    "head_loss": _head_loss,
    "head_loss_backward": _head_loss_backward,
    "mask": _mask,
    "max_pooling": _max_pooling,
    "max_pooling_backward": _max_pooling_backward,
    "moments": _moments,
    "normalize": _normalize,
    "reorder": _reorder,
    "statistics": _statistics,
    "statistics_backward": _statistics_backward,
}
