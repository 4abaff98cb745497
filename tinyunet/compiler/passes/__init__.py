"""Passes over the graph, in order; each is one file and can be switched off by name.

At the end, :func:`finish` adds what every graph needs before it can run, whatever passes have done.
"""

from collections.abc import Callable, Collection
from dataclasses import replace

import numpy as np

from tinyunet.compiler.ir import BLOCKED, Graph, Node, Options, Value
from tinyunet.compiler.operators import KERNELS, needs_fused_kernel
from tinyunet.compiler.operators.convolutions import is_transposed
from tinyunet.compiler.passes import (
    choose_algorithm,
    defer_normalization,
    eliminate_concat,
    fold_batch_norm,
    fuse_backward,
    fuse_epilogue,
    fuse_gradients,
    propagate_layout,
)
from tinyunet.compiler.record import vector

__all__ = ["NAMES", "PASSES", "Options", "chosen", "finish"]

Pass = Callable[[Graph, Options], Graph]

#: Name and function, in the order in which they run. ``plan_memory`` is the program's, and last.
PASSES: dict[str, Pass] = {
    "fold_batch_norm": fold_batch_norm.fold_batch_norm,
    "fuse_epilogue": fuse_epilogue.fuse_epilogue,
    "defer_normalization": defer_normalization.defer_normalization,
    "fuse_backward": fuse_backward.fuse_backward,
    "eliminate_concat": eliminate_concat.eliminate_concat,
    "propagate_layout": propagate_layout.propagate_layout,
    "fuse_gradients": fuse_gradients.fuse_gradients,
    "choose_algorithm": choose_algorithm.choose_algorithm,
}

NAMES = (*PASSES, "plan_memory")


def chosen(enable: Collection[str] | None, disable: Collection[str]) -> tuple[str, ...]:
    """Return the names of the passes to run.

    Parameters
    ----------
    enable : collection of str, optional
        Only these; all if left out.
    disable : collection of str
        Not these.

    Raises
    ------
    ValueError
        A name is not that of a pass.
    """
    wanted = set(NAMES) if enable is None else _known("enable", enable)
    unwanted = _known("disable", disable)
    return tuple(name for name in NAMES if name in wanted - unwanted)


def _known(argument: str, names: Collection[str]) -> set[str]:
    given = {names} if isinstance(names, str) else set(names)
    for name in sorted(given - set(NAMES)):
        raise ValueError(f"{argument}: no pass {name!r}; there are {', '.join(NAMES)}")
    return given


def finish(graph: Graph) -> Graph:
    """Return a graph that can be bound: with reorders, packed weights, and sizes of partial sums."""
    any_blocked = any(value.layout == BLOCKED for value in graph.values.values())
    blocked = set() if any_blocked else _must_be_blocked(graph)
    if blocked:
        graph = propagate_layout.insert_reorders(graph, blocked, stay=False)
    graph, values = _packed(graph), []
    for node in graph.nodes:
        for role, value in node.outputs.items():
            if role in ("moments", "sums", "sums_b"):
                values.append(replace(graph.values[value], shape=KERNELS[node.op].sums(node, role, graph)))
    return graph.rewrite({}, values).check()


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
            nodes.append(
                _pack("pack_weights", node, graph, {"weights": weights}, {"packed": values[-1].name})
            )
            done[key] = values[-1].name
        user = node.with_inputs({"weights": done.get(key, weights)})
        if node.op == "convolution" and "bias" in node.inputs:
            values.append(vector(f"{node.name}:bias", graph.values[node.outputs["dst"]].shape[-1]))
            nodes.append(
                _pack("pad_bias", node, graph, {"bias": node.inputs["bias"]}, {"padded": values[-1].name})
            )
            user = user.with_inputs({"bias": values[-1].name})
        graph = graph.rewrite({node.name: [*nodes, user]}, values)
    return graph


def _pack(op: str, user: Node, graph: Graph, inputs: dict[str, str], outputs: dict[str, str]) -> Node:
    """In training weights change at each step; in inference they may depend on the images."""
    once = graph.are_fixed(inputs.values()) and not graph.gradients
    settings = {"implementation": "fused", "for": user}
    return Node(f"{op} {user.name}", op, inputs, outputs, settings, "prepare" if once else user.phase)
