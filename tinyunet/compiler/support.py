"""What the fused kernels can do: which nodes they run, and what may be fused into which of their roles."""

import numpy as np

from kernels.ladder.direct import FEW_CHANNELS
from tinyunet.compiler.ir import PLAIN, Graph, Node

#: Roles that read a deferred source: ``<role>.scale``, ``<role>.shift`` and the setting
#: ``<role>.slope`` say what is meant.
READS = {
    "convolution": ("src", "src_b"),
    "convolution_backward_weights": ("src", "src_b"),
    "transposed_convolution": ("src",),
    "transposed_convolution_backward_weights": ("src",),
    "max_pooling": ("src",),
    "head": ("src",),
    "head_loss": ("src",),
    "head_loss_backward": ("src",),
}
#: Roles that write a gradient, and can apply ``mask`` on the way.
WRITES = {
    "convolution_backward_data": ("diff_src", "diff_src_b"),
    "transposed_convolution_backward_data": ("diff_src",),
    "max_pooling_backward": ("diff_src",),
    "head_loss_backward": ("diff_src",),
}
#: Those that can add to what is there; the others only mask.
ADDS = ("transposed_convolution_backward_data", "max_pooling_backward", "head_loss_backward")
#: Nodes that read a deferred gradient: ``diff_dst.x``, ``.a``, ``.b`` and ``.d``.
FORMS = ("convolution_backward_data", "convolution_backward_weights")

#: Roles that passes add, beside those with a dot.
_FUSED_ROLES = {"accumulate", "src_b", "diff_src_b", "moments", "sums"}
#: Operators that passes make; they have no eager form.
_PIECES = ("moments", "normalize", "mask", "gradient", "head", "head_loss", "head_loss_backward")


def suffix(role: str) -> str:
    """Return "" for the first, "_b" for the second source or gradient of a convolution."""
    return "_b" if role.endswith("_b") else ""


def needs_fused_kernel(node: Node) -> bool:
    """Whether a pass has put something into the node that its eager operator cannot do."""
    roles = {*node.inputs, *node.outputs}
    extra = any("." in role and not role.startswith("saved.") for role in roles)
    return node.op in _PIECES or extra or bool(roles & _FUSED_ROLES)


def can_block(node: Node, graph: Graph) -> bool:
    """Whether there is a kernel for the node on blocked tensors."""
    values = [graph.values[v] for v in (*node.inputs.values(), *node.outputs.values())]
    volumes = [value for value in values if value.layout != PLAIN and value.dtype != np.uint8]
    if not volumes or any(value.dtype != np.float32 for value in volumes):
        return False
    for role, name in (*node.inputs.items(), *node.outputs.items()):
        value, is_weights = graph.values[name], role in ("weights", "diff_weights")
        # Weights that are computed, and parameters that are taken as volumes, have the other's layout.
        if len(value.shape) == 5 and node.op != "head" and is_weights != (value.layout == PLAIN):
            return False
    if node.op in _PIECES or node.op == "accumulate" or node.op.startswith("max_pooling"):
        return True
    if node.op not in READS and node.op not in WRITES:
        return False
    kernel = tuple(node.attributes["kernel"])
    if node.op.startswith("transposed"):
        return kernel == tuple(node.attributes["stride"])
    return (
        tuple(node.attributes["stride"]) == (1, 1, 1)
        and node.attributes["padding"] == "same"
        and all(k in (1, 3, 5) for k in kernel)
    )


def reads_channels_last(node: Node, role: str, graph: Graph) -> bool:
    """Whether a blocked convolution takes a source of few channels as it comes."""
    return (
        node.op in ("convolution", "convolution_backward_weights")
        and role == "src"
        and not {"src.scale", "src_b"} & {*node.inputs}
        and graph.values[node.inputs["src"]].shape[-1] <= FEW_CHANNELS
    )
