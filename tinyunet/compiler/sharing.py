"""Weights that the ranks of a node pack together, into memory that all of them read.

By itself, a process packs the weights of a layer just before it uses them, into memory that is used again
right after. Local ranks pack those of all layers before the first one, each rank its part of the layers:
then it has to wait once. See :mod:`tinyunet.engine.local_ranks`.
"""

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from tinyunet.compiler.ir import Graph, Node
from tinyunet.compiler.memory import ALIGNMENT
from tinyunet.engine.local_ranks import LocalRanks


def pack_first(graph: Graph, local: LocalRanks) -> Graph:
    """Return a finished graph with the weights of all layers packed in front, into shared memory.

    It is returned as it is where a process has another one: then no rank shares.
    """
    packing = [
        node
        for node in graph.nodes
        if node.op == "pack_weights" and graph.values[node.inputs["weights"]].kind == "parameter"
    ]
    if not local.is_same(_description(graph, packing)):
        return graph
    names, values = {node.name for node in packing}, dict(graph.values)
    for node in packing:
        packed = values[node.outputs["packed"]]
        values[packed.name] = replace(packed, kind="shared")
    others = [node for node in graph.nodes if node.name not in names]
    return replace(graph, nodes=(*packing, *others), values=values).check()


def is_shared(node: Node, graph: Graph) -> bool:
    """Whether a node packs for all of a local."""
    return any(graph.values[name].kind == "shared" for name in node.outputs.values())


def part_of(graph: Graph, local: LocalRanks) -> set[str]:
    """Return the names of the nodes that this rank packs.

    The largest first, each to whom has least to do so far: the same division in every process.
    """
    packed = {
        node.name: graph.values[node.outputs["packed"]].nbytes
        for node in graph.nodes
        if is_shared(node, graph)
    }
    work, mine = [0] * local.size, set()
    for name in sorted(packed, key=packed.__getitem__, reverse=True):
        rank = work.index(min(work))
        work[rank] += packed[name]
        if rank == local.rank:
            mine.add(name)
    return mine


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
