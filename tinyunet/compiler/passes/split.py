"""Batch norm and activation taken apart, so that other passes can move the pieces.

    batch norm, forward    moments of x > statistics: scale, shift > normalize: y = act(scale x + shift)
    backward               mask: dz = dy act'(scale x + shift), and sums of dz and dz (x - mean)
                           > statistics_backward: a, b, d and the gradients of gamma and beta
                           > gradient: dx = a dz + b x + d

Nothing is saved yet: it is the same arithmetic in smaller nodes. An activation that follows the batch
norm becomes part of ``normalize`` and ``mask``; one that follows a convolution becomes a ``normalize``
of its own, with scale 1 and shift 0. The passes that need the pieces call :func:`split` first; it
changes nothing when it is called again.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from kernels.base.layout import blocks
from kernels.base.simd import LANES
from tinyunet.compiler.ir import CONVOLUTIONS, NDHWC, Graph, Node, Value

ACTIVATIONS = ("relu", "leaky_relu")
_FUSED = {"implementation": "fused"}


def split(graph: Graph) -> Graph:
    """Return the graph with every batch norm and activation of blocked volumes in pieces."""
    for node in graph.nodes:
        if node.op == "batch_norm_training" and _is_volume(graph, node):
            graph = _split_batch_norm(graph, node, _statistics(graph, node))
        elif node.op == "batch_norm_inference" and _is_volume(graph, node) and not _has_backward(graph, node):
            graph = _split_batch_norm(graph, node, _fixed_statistics(graph, node))
    for node in graph.nodes:
        made = graph.producer(node.inputs["src"]) if node.op in ACTIVATIONS else None
        if made and made.op in CONVOLUTIONS and _is_volume(graph, node):
            graph = _split_activation(graph, node)
    return graph


def vector(name: str, channels: int) -> Value:
    """Return a value of one number a channel, padded to whole blocks."""
    return Value(name, (blocks(channels) * LANES,), np.dtype(np.float32))


def sums(name: str) -> Value:
    """Return a value of partial sums; its size is known when every kernel is (``finish``)."""
    return Value(name, (0, 0, 0), np.dtype(np.float64))


def plain_vectors(graph: Graph, channels: int) -> tuple[Graph, str, str]:
    """Return the names of a scale of ones and a shift of zeros, both constants of the graph."""
    ones, zeros = f"ones:{channels}", f"zeros:{channels}"
    values, data = dict(graph.values), dict(graph.data)
    for name, number in ((ones, 1), (zeros, 0)):
        values[name] = replace(vector(name, channels), kind="constant")
        array = np.zeros(values[name].shape, np.float32)
        array[:channels] = number
        data.setdefault(name, array)
    return replace(graph, values=values, data=data), ones, zeros


def _is_volume(graph: Graph, node: Node) -> bool:
    value = graph.values[node.inputs["src"]]
    return value.layout == NDHWC and value.dtype == np.float32


def _has_backward(graph: Graph, node: Node) -> bool:
    return _backward_of(graph, node) is not None


def _backward_of(graph: Graph, node: Node) -> Node | None:
    return next((n for n in graph.nodes if n.attributes.get("of") == node.name), None)


def _slope(node: Node | None) -> float:
    if node is None:
        return 1.0
    return float(node.attributes["slope"]) if node.op == "leaky_relu" else 0.0


def _statistics(graph: Graph, node: Node) -> tuple[list[Node], list[Value]]:
    name, channels = node.name, graph.values[node.inputs["src"]].shape[-1]
    outputs = {role: f"{name}:{role}" for role in ("scale", "shift", "mean", "rstd")}
    parameters = ("scale", "shift", "running_mean", "running_variance")
    nodes = [
        Node(f"{name}:moments", "moments", {"src": node.inputs["src"]}, {"moments": f"{name}:moments"}),
        Node(
            f"{name}:statistics",
            "statistics",
            {"moments": f"{name}:moments"} | {role: node.inputs[role] for role in parameters},
            outputs,
            {key: node.attributes[key] for key in ("momentum", "epsilon")} | _combine(node) | _FUSED,
        ),
    ]
    return nodes, [sums(f"{name}:moments"), *(vector(v, channels) for v in outputs.values())]


def _combine(node: Node) -> dict[str, Any]:
    """How sums are combined with those of other processes, if they are."""
    return {key: node.attributes[key] for key in ("combine",) if key in node.attributes}


def _fixed_statistics(graph: Graph, node: Node) -> tuple[list[Node], list[Value]]:
    name, channels = node.name, graph.values[node.inputs["src"]].shape[-1]
    outputs = {role: f"{name}:{role}" for role in ("scale", "shift")}
    inputs = {role: node.inputs[role] for role in ("scale", "shift", "mean", "variance")}
    settings = {"epsilon": node.attributes["epsilon"]} | _FUSED
    phase = "prepare" if graph.are_fixed(inputs.values()) else node.phase
    statistics = Node(f"{name}:statistics", "fixed_statistics", inputs, outputs, settings, phase)
    return [statistics], [vector(v, channels) for v in outputs.values()]


def _split_batch_norm(graph: Graph, node: Node, pieces: tuple[list[Node], list[Value]]) -> Graph:
    nodes, values = pieces
    src, dst = node.inputs["src"], node.outputs["dst"]
    readers = graph.consumers(dst)
    only_activated = len(readers) == 1 and readers[0].op in ACTIVATIONS and dst not in graph.outputs
    activation = readers[0] if only_activated else None
    result = activation.outputs["dst"] if activation else dst
    scale, shift = f"{node.name}:scale", f"{node.name}:shift"
    normalize = Node(
        f"{node.name}:normalize",
        "normalize",
        {"src": src, "src.scale": scale, "src.shift": shift},
        {"dst": result},
        {"src.slope": _slope(activation)},
    )
    changes: dict[str, list[Node]] = {node.name: [*nodes, normalize]}
    if activation:
        changes[activation.name] = []
    backward = _backward_of(graph, node)
    if backward is not None:
        more, added = _batch_norm_backward(graph, node, backward, activation)
        changes |= more
        values = values + added
    return graph.rewrite(changes, values)


def _batch_norm_backward(
    graph: Graph, node: Node, backward: Node, activation: Node | None
) -> tuple[dict[str, list[Node]], list[Value]]:
    name, channels = node.name, graph.values[node.inputs["src"]].shape[-1]
    undo = _backward_of(graph, activation) if activation else None
    incoming = (undo or backward).inputs["gradient"]
    dz = undo.outputs["diff_src"] if undo else f"{incoming}*"
    vectors = {role: f"d {name}:{role}" for role in "abd"}
    found = {r: backward.outputs.get(r, f"d({name}.{r})") for r in ("diff_scale", "diff_shift")}
    values = [sums(f"d {name}:sums"), *(vector(v, channels) for v in vectors.values())]
    values += [replace(graph.values[incoming], name=dz)]
    for value in found.values():
        if value not in graph.values:
            values.append(Value(value, (channels,), np.dtype(np.float32)))
    mask = _mask(
        name, incoming, dz, node.inputs["src"], f"{name}:scale", f"{name}:shift", f"{name}:mean"
    ).with_attributes(mask__slope=_slope(activation))
    statistics = Node(
        f"d {name}.statistics",
        "statistics_backward",
        {
            "sums": f"d {name}:sums",
            "scale": node.inputs["scale"],
            "mean": f"{name}:mean",
            "rstd": f"{name}:rstd",
        },
        {**vectors, **found},
        {"count": int(np.prod(graph.values[node.inputs["src"]].shape[:-1]))} | _combine(node) | _FUSED,
        "backward",
    )
    gradient = Node(
        f"d {name}.gradient",
        "gradient",
        {"diff_dst": dz, "diff_dst.x": node.inputs["src"]}
        | {f"diff_dst.{role}": value for role, value in vectors.items()},
        {"dst": backward.outputs.get("diff_src", "")},
        phase="backward",
    )
    tail = [statistics] + ([gradient] if "diff_src" in backward.outputs else [])
    if undo:
        return {undo.name: [mask], backward.name: tail}, values
    return {backward.name: [mask, *tail]}, values


def _mask(name: str, dy: str, dz: str, x: str, scale: str, shift: str, mean: str) -> Node:
    inputs: dict[str, Any] = {"gradient": dy, "mask.x": x, "mask.scale": scale}
    inputs |= {"mask.shift": shift, "mask.mean": mean}
    outputs = {"diff_src": dz, "sums": f"d {name}:sums"}
    return Node(f"d {name}.mask", "mask", inputs, outputs, {}, "backward", {"diff_src": "gradient"})


def _split_activation(graph: Graph, node: Node) -> Graph:
    src = node.inputs["src"]
    graph, ones, zeros = plain_vectors(graph, graph.values[src].shape[-1])
    normalize = Node(
        f"{node.name}:normalize",
        "normalize",
        {"src": src, "src.scale": ones, "src.shift": zeros},
        {"dst": node.outputs["dst"]},
        {"src.slope": _slope(node)},
    )
    changes = {node.name: [normalize]}
    values: list[Value] = []
    backward = _backward_of(graph, node)
    if backward is not None:
        dy, dz = backward.inputs["gradient"], backward.outputs["diff_src"]
        mask = _mask(node.name, dy, dz, src, ones, zeros, zeros)
        changes[backward.name] = [mask.with_attributes(mask__slope=_slope(node))]
        values.append(sums(f"d {node.name}:sums"))
    return graph.rewrite(changes, values)
