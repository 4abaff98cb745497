"""Weights that the ranks of one node pack together, in memory that they share.

By itself, a process packs the weights of a layer just before it uses them, into memory that is used again
right after. The ranks of a node (:mod:`tinyunet.local_ranks`) pack those of all layers before the first
layer, each rank its part of the layers, into memory that all of them read: then they wait only once.
"""

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from tinyunet.compiler.ir import Graph, Node
from tinyunet.compiler.memory import ALIGNMENT
from tinyunet.local_ranks import LocalRanks


def pack_first(graph: Graph, local: LocalRanks) -> Graph:
    """Return a finished graph with the weights of all layers packed in front, into shared memory.

    It is returned as it is where a process has another one: then no rank shares.
    """
    packing = [node for node in graph.nodes if node.op == "pack_weights"]
    packing = [node for node in packing if graph.values[node.inputs["weights"]].kind == "parameter"]
    if not local.is_same(_description(graph, packing)):
        return graph
    packed = [replace(graph.values[node.outputs["packed"]], kind="shared") for node in packing]
    names = {node.name for node in packing}
    others = [node for node in graph.nodes if node.name not in names]
    values = {**graph.values, **{value.name: value for value in packed}}
    return replace(graph, nodes=(*packing, *others), values=values).check()


def division(graph: Graph, local: LocalRanks) -> tuple[set[str], set[str]]:
    """Return the names of the nodes that pack shared weights: of all, and of those that this rank runs.

    The largest first, each to the rank that has least to do so far: the same division in every process.
    """
    values = {node.name: graph.values[name] for node in graph.nodes for name in node.outputs.values()}
    sizes = {name: value.nbytes for name, value in values.items() if value.kind == "shared"}
    work, mine = [0] * local.size, set()
    for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
        rank = work.index(min(work))
        work[rank] += sizes[name]
        if rank == local.rank:
            mine.add(name)
    return set(sizes), mine


def place(graph: Graph, local: LocalRanks) -> dict[str, npt.NDArray[np.uint8]]:
    """Return memory for each shared value, one after the other in one shared array."""
    sizes = {value.name: value.nbytes for value in graph.values.values() if value.kind == "shared"}
    if not sizes:
        return {}
    ends = np.cumsum([-(-nbytes // ALIGNMENT) * ALIGNMENT for nbytes in sizes.values()])
    memory = local.zeros(int(ends[-1]), np.uint8)
    return dict(zip(sizes, np.split(memory, ends[:-1]), strict=True))


def _description(graph: Graph, packing: list[Node]) -> str:
    """Say all that the packed weights depend on."""
    shapes = [graph.values[name].shape for name in graph.inputs if name in graph.values]
    layers = [
        (node.name, graph.values[node.outputs["packed"]].shape, node.attributes["for"].attributes)
        for node in packing
    ]
    return repr((shapes, layers))
