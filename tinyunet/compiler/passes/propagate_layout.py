"""Tensors stay in blocks of 16 channels between kernels that want them so; reorders at the edges only.

    before    x (ndhwc) > reorder > pool > reorder > (ndhwc) > reorder > conv > reorder > (ndhwc)
    after     x (ndhwc) > reorder > pool > (nCdhw16c) > conv > (nCdhw16c)

Each reorder reads and writes a tensor: 8 bytes an element, twice for every edge between two kernels.
Without this pass the fused kernels are wrapped in reorders, and a node without fusion runs as the eager
operator does.
"""

from collections.abc import Collection
from dataclasses import replace

import numpy as np

from tinyunet.compiler.ir import BLOCKED, NDHWC, PLAIN, Graph, Node, Options, Value
from tinyunet.compiler.operators import can_block
from tinyunet.compiler.operators.convolutions import reads_channels_last


def propagate_layout(graph: Graph, options: Options) -> Graph:
    """Return the graph with blocked tensors wherever there are kernels for them."""
    blocked = {node.name for node in graph.nodes if can_block(node, graph)}
    return insert_reorders(graph, blocked, stay=True)


def insert_reorders(graph: Graph, blocked: Collection[str], stay: bool) -> Graph:
    """Return the graph with a reorder wherever a node reads another layout than its own.

    Parameters
    ----------
    graph : Graph
        All volumes channels last.
    blocked : collection of str
        Names of the nodes whose kernels want blocks.
    stay : bool
        Whether a tensor stays in the layout that its producer writes, and is reordered once for all
        readers that want the other. If not, every blocked result is put back at once.
    """
    rewriter = _Rewriter(graph, stay)
    for node in graph.nodes:
        rewriter.add(node, BLOCKED if node.name in blocked else NDHWC)
    nodes = tuple(rewriter.nodes)
    return replace(graph, nodes=nodes, values=rewriter.values).rewrite({}).check()


class _Rewriter:
    def __init__(self, graph: Graph, stay: bool) -> None:
        self.graph, self.stay = graph, stay
        self.nodes: list[Node] = []
        self.values = dict(graph.values)
        self.versions: dict[tuple[str, str], str] = {}

    def add(self, node: Node, wanted: str) -> None:
        inputs = {role: self._read(role, value, node, wanted) for role, value in node.inputs.items()}
        outputs, after = dict(node.outputs), []
        for role, value in node.outputs.items() if wanted == BLOCKED else ():
            known = self.values[value]
            if known.layout == PLAIN:
                continue
            blocked = replace(known, layout=BLOCKED)
            stays = self.stay or known.dtype != np.float32  # argmax is read by its own backward only
            if not stays or value in self.graph.outputs:
                blocked = replace(blocked, name=f"{value}|{BLOCKED}")
                after.append(_reorder(blocked, known, node))
            outputs[role] = blocked.name
            self.values[blocked.name] = blocked
        if wanted == BLOCKED:
            node = node.with_attributes({"implementation": "fused"})
        self.nodes += [replace(node, inputs=inputs, outputs=outputs), *after]

    def _read(self, role: str, value: str, node: Node, wanted: str) -> str:
        known = self.values[value]
        if known.layout == NDHWC and reads_channels_last(node, role, self.graph):
            return value
        if known.layout in (PLAIN, wanted) or known.dtype != np.float32:
            return value
        key = (value, wanted)
        if key not in self.versions or not self.stay:
            count = sum(n.name.startswith(f"reorder {value}") for n in self.nodes)
            name = f"{value}|{wanted}{count or ''}"
            version = replace(known, name=name, layout=wanted, kind="temporary")
            self.values[version.name] = version
            self.nodes.append(_reorder(known, version, node, count))
            self.versions[key] = version.name
        return self.versions[key]


def _reorder(src: Value, dst: Value, node: Node, count: int = 0) -> Node:
    name = f"reorder {src.name}" + (f" {count}" if count else "")
    inputs, outputs = {"src": src.name}, {"dst": dst.name}
    return Node(name, "reorder", inputs, outputs, {"implementation": "fused"}, node.phase)
