"""What every graph needs before it can run, whatever passes have done: layouts, packed weights, sizes."""

from dataclasses import replace

import numpy as np

from tinyunet.compiler import fused
from tinyunet.compiler.convolutions import is_transposed, packed_size, packs
from tinyunet.compiler.ir import BLOCKED, Graph, Node, Phase, Value
from tinyunet.compiler.layouts import insert_reorders
from tinyunet.compiler.passes.split import vector
from tinyunet.compiler.support import needs_fused_kernel

_PACKED = (
    "convolution",
    "convolution_backward_data",
    "convolution_backward",
    "transposed_convolution",
    "transposed_convolution_backward_data",
)


def finish(graph: Graph) -> Graph:
    """Return a graph that an executor can bind."""
    if not any(value.layout == BLOCKED for value in graph.values.values()):
        blocked = {node.name for node in graph.nodes if needs_fused_kernel(node)}
        for node in graph.nodes:
            if node.op == "max_pooling_backward" and blocked & {node.name, node.attributes["of"]}:
                blocked |= {node.name, node.attributes["of"]}  # they share the argmax
        if blocked:
            graph = insert_reorders(graph, blocked, stay=False)
    return _sized(_packed(graph)).check()


def _packed(graph: Graph) -> Graph:
    """Weights of blocked convolutions are packed by nodes of their own, just before they are used.

    Some convolutions transform them where they use them, and take them as they are.
    """
    done: dict[str, str] = {}
    for node in graph.nodes:
        if node.op not in _PACKED or not node.runs_fused:
            continue
        weights, nodes, values = node.inputs["weights"], [], []
        # Both directions of a transposed convolution read what is packed for both.
        key = weights if is_transposed(node) else node.name
        if key not in done and not packs(node, graph):
            done[key] = weights
        elif key not in done:
            done[key] = f"{node.name}:weights"
            size = packed_size(node, graph)
            values.append(Value(done[key], (size,), np.dtype(np.float32)))
            nodes.append(_pack("pack_weights", "weights", "packed", node, weights, done[key]))
        user = node.with_inputs(weights=done[key])
        if node.op == "convolution" and "bias" in node.inputs:
            padded = vector(f"{node.name}:bias", graph.values[node.outputs["dst"]].shape[-1])
            values.append(padded)
            nodes.append(_pack("pad_bias", "bias", "padded", node, node.inputs["bias"], padded.name))
            user = user.with_inputs(bias=padded.name)
        nodes = [replace(n, phase=_phase(n, node, graph)) for n in nodes]
        graph = graph.rewrite({node.name: [*nodes, user]}, values)
    return graph


def _phase(packing: Node, user: Node, graph: Graph) -> Phase:
    """In training weights change at each step; in inference they may depend on the images."""
    fixed = graph.are_fixed(packing.inputs.values())
    return "prepare" if fixed and not graph.gradients else user.phase


def _pack(op: str, role: str, result: str, node: Node, value: str, target: str) -> Node:
    settings = {"implementation": "fused", "for": node}
    return Node(f"{op} {node.name}", op, {role: value}, {result: target}, settings)


def _sized(graph: Graph) -> Graph:
    """Partial sums are as many as the kernel makes that writes them."""
    values = []
    for node in graph.nodes:
        for role, value in node.outputs.items():
            shape = fused.sums_shape(node, role, graph)
            if shape:
                values.append(replace(graph.values[value], shape=shape))
    return graph.rewrite({}, values)
