"""Tensors stay in blocks of 16 channels between kernels that want them so; reorders at the edges only.

    before    x (ndhwc) > reorder > pool > reorder > (ndhwc) > reorder > conv > reorder > (ndhwc)
    after     x (ndhwc) > reorder > pool > (nCdhw16c) > conv > (nCdhw16c)

Each reorder reads and writes a tensor: 8 bytes an element, twice for every edge between two kernels.
Without this pass the fused kernels are wrapped in reorders, and what nothing is fused into runs as the
eager operator does.
"""

from tinyunet.compiler.ir import Graph
from tinyunet.compiler.layouts import insert_reorders
from tinyunet.compiler.passes.switches import Options
from tinyunet.compiler.support import can_block


def propagate_layout(graph: Graph, options: Options) -> Graph:
    """Return the graph with blocked tensors wherever there are kernels for them."""
    blocked = {node.name for node in graph.nodes if can_block(node, graph)}
    return insert_reorders(graph, blocked, stay=True)
