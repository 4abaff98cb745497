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
    kernel, values = KERNELS.get(node.op), [graph.values[v] for v in node.values.values()]
    volumes = [value for value in values if value.layout != PLAIN and value.dtype != np.uint8]
    if kernel is None or not volumes or any(value.dtype != np.float32 for value in volumes):
        return False
    return weights_are_given(node, graph) and kernel.fits(node, graph)


def weights_are_given(node: Node, graph: Graph) -> bool:
    """Whether weights are parameters, and no parameter is taken as a volume; else layouts are mixed up."""
    for role, name in node.values.items():
        value, is_weights = graph.values[name], role in ("weights", "diff_weights")
        if len(value.shape) == 5 and node.op != "head" and is_weights != (value.layout == PLAIN):
            return False
    return True


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
