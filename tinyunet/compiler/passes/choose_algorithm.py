"""For each convolution and direction: direct, or Winograd F(2,2,2), F(2,4,4), F(4,4,4).

    before    conv(src), and each of its gradients, direct
    after     conv(src, tile) where tiles take less time: the larger, the fewer multiplications

A model counts what each costs (``algorithms``). Those that it finds within a factor of the best are timed
(``measure``), unless the convolution is too small to matter. If the choice is to be deterministic, the best
of the model is taken: what a clock says differs from run to run, and each algorithm rounds in another way.
"""

from tinyunet.compiler.choices import Tile, costs
from tinyunet.compiler.ir import Graph, Node
from tinyunet.compiler.measure import fastest, in_order
from tinyunet.compiler.passes.switches import Options

_OPS = ("convolution", "convolution_backward_data", "convolution_backward_weights")
# How far from the best of the model an algorithm may be to be timed.
_FACTOR = 1.25


def choose_algorithm(graph: Graph, options: Options) -> Graph:
    """Return the graph with the setting "tile" at the convolutions that Winograd runs faster."""
    convolutions = [node for node in graph.nodes if node.op in _OPS and node.runs_fused]
    changes = {}
    for node in in_order(convolutions):
        tile = _choose(node, graph, options)
        changes[node.name] = [node.with_attributes(tile=tile)]
    return graph.rewrite(changes)


def _choose(node: Node, graph: Graph, options: Options) -> Tile:
    found = costs(node, graph, options.accuracy)
    best = min(found.values())
    if options.deterministic:
        return min(found, key=found.__getitem__)
    candidates = [tile for tile, cost in found.items() if cost <= _FACTOR * best]
    return fastest(node, graph, candidates) if len(candidates) > 1 else candidates[0]
