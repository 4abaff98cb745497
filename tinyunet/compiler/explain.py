"""What a compiled model does not fuse, why, and what would be fused in its place.

A node that no kernel on blocked tensors runs is a call of the eager operator. It reads and writes whole
tensors, and its neighbours need reorders: so each such node costs several passes over memory.
"""

from tinyunet.common.terminal import aligned, count
from tinyunet.compiler.ir import PLAIN, Graph, Node
from tinyunet.compiler.operators import obstacle
from tinyunet.compiler.show import is_unfused, main_value, nbytes


class UnfusedWarning(UserWarning):
    """A compiled model runs eager operators on whole tensors."""


def unfused(graph: Graph) -> list[Node]:
    """Return the nodes that run an eager operator on a volume; numbers of a loss do not count."""
    return [n for n in graph.nodes if is_unfused(n) and main_value(n, graph).layout != PLAIN]


def explain(graph: Graph) -> str:
    """Return a table of the nodes that are not fused, and how many tensors are reordered between layouts."""
    nodes, reorders = unfused(graph), [n for n in graph.nodes if n.op == "reorder"]
    moved = sum(nbytes(node, graph) for node in reorders) / 1e6
    between = f"{count(len(reorders), 'reorder')} between layouts, {moved:.1f} MB moved"
    if not nodes:
        return f"{count(len(graph.nodes), 'node')}, every one on volumes is fused; {between}"
    rows = []
    for node in nodes:
        why, instead = obstacle(node, graph) or ("the pass propagate_layout is off", "all passes enabled")
        shape = "x".join(map(str, main_value(node, graph).shape))
        rows.append((node.name, shape, why, instead, f"{nbytes(node, graph) / 1e6:.2f}"))
    table = aligned(("node", "shape", "runs unfused because", "would be fused", "MB"), rows, left=4)
    return f"{len(nodes)} of {count(len(graph.nodes), 'node')} run unfused on volumes; {between}\n\n{table}"


def warning(graph: Graph) -> str | None:
    """Return a line that names the operators that are not fused, if there are any."""
    nodes = unfused(graph)
    if not nodes:
        return None
    names = dict.fromkeys(node.op.removesuffix("_backward") for node in nodes)
    which = ", ".join(names)
    return f"{count(len(nodes), 'node')} on whole tensors run unfused ({which}): explain() says why"
