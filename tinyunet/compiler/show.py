"""A graph on the terminal: tables, and a line for each kernel that runs."""

import math
from collections.abc import Iterable
from typing import NamedTuple

from tinyunet.common import verbose
from tinyunet.common.terminal import aligned
from tinyunet.compiler.ir import Graph, Node, Value
from tinyunet.compiler.memory import plan
from tinyunet.compiler.operators import BY_NAME, KERNELS
from tinyunet.compiler.passes import Stage


class Figures(NamedTuple):
    """Of a stage: nodes, of which unfused, bytes moved, FLOPs, and bytes of temporary arrays."""

    nodes: int
    unfused: int
    moved: int
    flops: float
    arena: int


def figures(stage: Stage) -> Figures:
    """Return the figures of a graph after a pass."""
    nodes, graph = stage.graph.nodes, stage.graph
    unfused, moved = sum(map(is_unfused, nodes)), sum(nbytes(node, graph) for node in nodes)
    operations = sum(flops(node, graph) for node in nodes)
    return Figures(len(nodes), unfused, moved, operations, plan(graph, stage.reuse).nbytes)


def is_unfused(node: Node) -> bool:
    """Whether the eager operator runs."""
    return not node.runs_fused and not node.views


def summary(stages: Iterable[Stage]) -> str:
    """Return a table with one line for each pass: figures of the graph after it."""
    head = ("pass", "nodes", "unfused", "MB moved", "GFLOP", "arena MB")
    rows = []
    for stage in stages:
        found = figures(stage)
        mega = f"{found.moved / 1e6:.1f}", f"{found.flops / 1e9:.2f}", f"{found.arena / 1e6:.1f}"
        rows.append((stage.name, str(found.nodes), str(found.unfused), *mega))
    return aligned(head, rows)


def nodes_table(graph: Graph) -> str:
    """Return a table of all nodes, in the order in which they run."""
    head = ("node", "operator", "shape", "layout", "kernel", "fused", "MFLOP", "MB")
    rows = []
    for node in graph.nodes:
        value = main_value(node, graph)
        what = node.name, node.op, "x".join(map(str, value.shape)) or "1", value.layout
        work = f"{flops(node, graph) / 1e6:.1f}", f"{nbytes(node, graph) / 1e6:.2f}"
        rows.append((*what, kernel_of(node), fused_parts(node, graph), *work))
    return aligned(head, rows, left=6)


def verbose_line(node: Node, graph: Graph, seconds: float) -> str:
    """Return the line that ``TINYUNET_VERBOSE=1`` prints for a kernel that has just run."""
    value = main_value(node, graph)
    work = flops(node, graph), nbytes(node, graph)
    what = node.op, value.shape, value.layout, kernel_of(node), fused_parts(node, graph)
    return verbose.Ran(*what, seconds, *work, node.name).line()


def main_value(node: Node, graph: Graph) -> Value:
    """Return the largest array that the node writes, whose shape a table shows."""
    values = [graph.values[name] for name in node.outputs.values()]
    volumes = [value for value in values if value.layout != "plain"] or values
    return max(volumes, key=lambda value: math.prod(value.shape))


def kernel_of(node: Node) -> str:
    """Return the algorithm; "eager" for an unfused operator, "view" for a node that moves nothing."""
    if node.views:
        return "view"
    if not node.runs_fused:
        return "eager"
    if "convolution" in node.op and not node.op.startswith("transposed"):
        tile = node.attributes.get("tile")
        return "winograd F" + str(tile).replace(" ", "") if tile else "direct"
    return "fused"


def fused_parts(node: Node, graph: Graph) -> str:
    """Return the fused work of a kernel before (prologue) and after (epilogue) its own operator."""
    roles = {*node.values}
    before = ["concatenation"] if "src_b" in roles else []
    scales = [name for role, name in node.inputs.items() if role in ("src.scale", "src_b.scale")]
    if scales and node.op != "normalize":
        # An activation by itself has a scale of ones, which is a constant.
        only_ones = all(graph.values[name].kind == "constant" for name in scales)
        before.append("activation" if only_ones else "normalisation")
    if "diff_dst.x" in roles and node.op != "gradient":
        before.append("batch-norm gradient")
    packing = node.op == "fold" or not node.runs_fused
    epilogues = {"bias": "bias", "accumulate": "sum", "diff_src_b": "split"}
    after = [name for role, name in epilogues.items() if role in roles and not packing]
    if {"mask.x", "mask_b.x"} & roles and node.op != "mask":
        after.append("activation mask and sums")
    if "moments" in node.outputs and node.op != "moments":
        after.append("moments")
    parts = (("prologue", before), ("epilogue", after))
    return "; ".join(f"{where}: {', '.join(what)}" for where, what in parts if what)


def nbytes(node: Node, graph: Graph) -> int:
    """Bytes of everything the node reads and writes, each once. A view moves nothing."""
    roles = [v for r, v in node.inputs.items() if r not in node.views.values()]
    roles += [v for r, v in node.outputs.items() if r not in node.views]
    return sum(graph.values[value].nbytes for value in roles)


def flops(node: Node, graph: Graph) -> int:
    """Multiplications and additions of the definition, whatever algorithm runs."""
    shapes, kernel = {role: graph.values[v].shape for role, v in node.values.items()}, KERNELS.get(node.op)
    if kernel and kernel.flops:
        return kernel.flops(node, shapes)
    if node.views:
        return 0
    operator = BY_NAME.get(node.op.removesuffix("_backward"))
    work = operator.work[node.op.endswith("_backward")] if operator else 1
    return work * max((math.prod(shape) for shape in shapes.values()), default=0)
