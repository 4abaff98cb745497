"""All operators, and functions about them for passes. A new operator is one record in one of these files."""

from typing import TYPE_CHECKING

import numpy as np

from tinyunet.autograd import Function
from tinyunet.compiler.ir import PLAIN, Graph, Node
from tinyunet.compiler.operators import convolutions, head, normalization, weightless
from tinyunet.compiler.record import Kernel, Operator

if TYPE_CHECKING:
    from kernels.ops.activation import Activation

_ALL = (*convolutions.OPERATORS, *normalization.OPERATORS, *weightless.OPERATORS)
OPERATORS: dict[type[Function], Operator] = {operator.function: operator for operator in _ALL}
BY_NAME = {operator.name: operator for operator in _ALL}
KERNELS: dict[str, Kernel] = weightless.MADE_BY_PASSES | head.KERNELS
for _operator in _ALL:
    KERNELS |= _operator.kernels

#: Roles that passes add, beside those with a dot.
_FUSED_ROLES = {"accumulate", "src_b", "diff_src_b", "moments", "sums"}


def is_convolution(node: Node) -> bool:
    """Whether a node is a convolution or a transposed one, forward."""
    return node.op in ("convolution", "transposed_convolution")


def activation_of(node: Node, graph: Graph, readers: list[Node]) -> "Activation | None":
    """Return an activation that can be joined with what makes its source; None for every other node.

    Beside the activation and its gradient there may be no ``readers`` of that source.
    """
    operator = BY_NAME.get(node.op)
    if not operator or not operator.activation:
        return None
    undo = graph.backward_of(node)
    if any(reader not in (node, undo) for reader in readers):
        return None
    if (undo and "diff_src" not in undo.outputs) or graph.producer(node.inputs.get("slope", "")):
        return None  # only slopes are learned, or they are computed and may come too late
    return operator.activation(node)


def needs_fused_kernel(node: Node) -> bool:
    """Whether a pass has put something into the node that its eager operator cannot do."""
    roles, kernel = {*node.values}, KERNELS.get(node.op)
    extra = any("." in role and not role.startswith("saved.") for role in roles)
    return (kernel is not None and not kernel.has_eager) or extra or bool(roles & _FUSED_ROLES)


def can_block(node: Node, graph: Graph) -> bool:
    """Whether there is a kernel for the node on blocked tensors."""
    return obstacle(node, graph) is None


def obstacle(node: Node, graph: Graph) -> tuple[str, str] | None:
    """Return why no kernel runs a node on blocked tensors, and what a kernel would run; None if one does."""
    kernel, values = KERNELS.get(node.op), [graph.values[v] for v in node.values.values()]
    volumes = [value for value in values if value.layout != PLAIN and value.dtype != np.uint8]
    if any(value.dtype != np.float32 for value in volumes):
        return "float64 runs the reference", 'model.astype("float32")'
    if kernel is None or not volumes:
        return f"{node.op.removesuffix('_backward')} has no kernel on blocked tensors", "another operator"
    for role, name in node.values.items():
        value, is_weights = graph.values[name], role in ("weights", "diff_weights")
        # Weights that are computed, and parameters that are taken as volumes, have the other's layout.
        if len(value.shape) == 5 and node.op != "head" and is_weights != (value.layout == PLAIN):
            return (
                "its weights are computed, or a parameter is used as a volume",
                "weights that are parameters",
            )
    if not kernel.fits(node, graph):
        settings = {n: node.attributes[n] for n in ("kernel", "stride", "padding") if n in node.attributes}
        words = ", ".join(f"{name} {value}" for name, value in settings.items())
        return f"no kernel for {words or 'its settings'}", kernel.takes
    return None


def split(graph: Graph) -> Graph:
    """Return the graph with normalisations and activations of volumes in pieces, if they are still whole."""
    for node in graph.nodes:
        operator = BY_NAME.get(node.op)
        if operator and operator.split and normalization.is_volume(graph, node):
            readers, dst = graph.consumers(node.outputs["dst"]), node.outputs["dst"]
            after = readers[0] if readers and dst not in graph.outputs else None
            activation = activation_of(after, graph, readers) if after else None
            if after and activation:
                done = operator.split(graph, node, after, activation.slope)
                graph = weightless.join_activation(done, node.name, activation, after, graph)
            else:
                graph = operator.split(graph, node, None, 1.0)
    for node in graph.nodes:
        activation = activation_of(node, graph, [])
        made = graph.producer(node.inputs["src"]) if activation else None
        if activation and made and is_convolution(made) and normalization.is_volume(graph, node):
            done = normalization.split_activation(graph, node, activation.slope)
            graph = weightless.join_activation(done, node.name, activation, node, graph)
    return graph
