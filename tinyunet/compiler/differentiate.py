"""The gradients, written out: for each node of the forward part, newest first, the node that undoes it.

If two nodes read a value, its gradient is a sum, and the sum is a node too. Only gradients that lead to a
parameter are written, so not the gradient of the images.

The gradient of ``x`` is called ``d(x)``. An operator's record lists the nodes of its gradient;
without a list the gradient is one node that calls ``backward``.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from tinyunet.compiler.ir import Graph, Node, Value
from tinyunet.compiler.operators import OPERATORS


def differentiate(graph: Graph) -> Graph:
    """Return the graph with the gradient of its (only) output by every parameter behind it."""
    (loss,) = graph.outputs
    start = replace(graph.values[loss], name=gradient_name(loss), kind="constant", needs_gradient=False)
    one = np.ones((), start.dtype)
    tape = _Tape(graph, dict(graph.values) | {start.name: start}, {loss: start.name})
    for node in reversed(graph.nodes):
        for backward in _backward_nodes(node, tape):
            tape.add(backward)
    nodes = tuple(n.with_inputs({"gradient": start.name}) if n.op == "eager_loss" else n for n in graph.nodes)
    found = {n: tape.of[n] for n, v in graph.values.items() if v.kind == "parameter" and n in tape.of}
    for gradient in found.values():
        tape.values[gradient] = replace(tape.values[gradient], kind="gradient")
    data = {**graph.data, start.name: one}
    whole = replace(graph, nodes=nodes + tuple(tape.nodes), values=tape.values, data=data, gradients=found)
    return whole.rewrite({}).check()


def gradient_name(value: str) -> str:
    """Return the name of a value's gradient, unless it is a sum of several."""
    return f"d({value})"


@dataclass
class _Tape:
    graph: Graph
    values: dict[str, Value]
    of: dict[str, str]  # the gradient found so far of each value
    nodes: list[Node] = field(default_factory=list)

    def add(self, node: Node) -> None:
        """Append a node; where it finds the second gradient of a value, a node that sums both follows."""
        fresh: dict[str, str] = {}
        sums: list[Node] = []
        for role, target in node.outputs.items():
            before = self.of.get(target)
            self.of[target] = fresh[role] = name = gradient_name(target) if before is None else f"{before}+"
            if before is not None:
                fresh[role] = f"{name}more"
                inputs, outputs = {"a": before, "b": fresh[role]}, {"dst": name}
                sums.append(Node(name, "accumulate", inputs, outputs, {}, "backward", {"dst": "a"}))
            like = replace(self.graph.values[target], kind="temporary", needs_gradient=False)
            self.values |= {each: replace(like, name=each) for each in (name, fresh[role])}
        self.nodes.append(replace(node, outputs=fresh))
        self.nodes += sums


def _backward_nodes(node: Node, tape: _Tape) -> Iterator[Node]:
    """Nodes of a gradient; each output still has the name of the value that it is the gradient *of*."""
    if node.op == "eager_loss":
        tape.of[node.inputs["prediction"]] = node.outputs["diff_prediction"]
        return
    gradient = tape.of.get(node.outputs["dst"])
    roles = [role for role, _ in node.attributes["arguments"]]
    wanted = {
        f"diff_{role}": node.inputs[role]
        for role, needed in zip(roles, node.attributes["needs_gradient"], strict=True)
        if needed
    }
    if gradient is None or not wanted:
        return
    record = OPERATORS.get(node.attributes["function"])
    if record and record.differentiate:
        yield from record.differentiate(node, gradient, wanted, tape.graph)
        return
    saved = {f"saved.{name}": node.values[name] for name in node.attributes["saves"] if name}
    settings = dict(node.attributes) | {"of": node.name}
    inputs = {"gradient": gradient} | saved
    yield Node(f"d {node.name}", f"{node.op}_backward", inputs, wanted, settings, "backward")
