"""Completes a graph before it can run: reorders, packed weights, and sizes of partial sums."""

from dataclasses import replace

import numpy as np

from tinyunet.compiler.ir import BLOCKED, Graph, Node, Value
from tinyunet.compiler.operators import KERNELS, needs_fused_kernel
from tinyunet.compiler.operators.convolutions import is_transposed
from tinyunet.compiler.passes.propagate_layout import insert_reorders


def finish(graph: Graph) -> Graph:
    """Return a graph that can be bound: with reorders, packed weights, and sizes of partial sums."""
    if all(value.layout != BLOCKED for value in graph.values.values()):
        graph = insert_reorders(graph, _must_be_blocked(graph), stay=False)
    graph = _packed(graph)
    sums = [
        replace(graph.values[value], shape=KERNELS[node.op].sums(node, role, graph))
        for node in graph.nodes
        for role, value in node.outputs.items()
        if role in ("moments", "sums", "sums_b")
    ]
    return graph.rewrite({}, sums).check()


def _must_be_blocked(graph: Graph) -> set[str]:
    """Nodes that only a fused kernel runs, and those with which they share an argmax."""
    blocked = {node.name for node in graph.nodes if needs_fused_kernel(node)}
    for node in graph.nodes:
        for role, name in node.inputs.items():
            made = graph.producer(name) if role.startswith("saved.") else None
            if made and graph.values[name].dtype == np.uint8 and blocked & {node.name, made.name}:
                blocked |= {node.name, made.name}
    return blocked


def _packed(graph: Graph) -> Graph:
    """Weights of blocked convolutions are packed by nodes of their own, just before they are used.

    Some convolutions transform them where they use them, and take them as they are.
    """
    done: dict[str, str] = {}
    for node in graph.nodes:
        packed = KERNELS[node.op].packed if node.runs_fused else None
        if not packed:
            continue
        weights, nodes, values = node.inputs["weights"], list[Node](), list[Value]()
        # Both directions of a transposed convolution read what is packed for both.
        key = weights if is_transposed(node) else node.name
        size = packed(node, graph)
        if key not in done and size:
            values.append(Value(f"{node.name}:weights", (size,), np.dtype(np.float32)))
            done[key] = values[-1].name
            nodes.append(_pack("pack_weights", node, graph, {"weights": weights}, {"packed": done[key]}))
        user = node.with_inputs({"weights": done.get(key, weights)})
        graph = graph.rewrite({node.name: [*nodes, user]}, values)
    return graph


def _pack(op: str, user: Node, graph: Graph, inputs: dict[str, str], outputs: dict[str, str]) -> Node:
    """In training weights change at each step; in inference they may depend on the images."""
    once = graph.are_fixed(inputs.values()) and not graph.gradients
    settings = {"implementation": "fused", "for": user}
    return Node(f"{op} {user.name}", op, inputs, outputs, settings, "prepare" if once else user.phase)
