"""Both gradients of a convolution are found in one pass over memory, where that takes less time.

    before    [g = a dz + b x + d > memory >] d(src) = conv_data(g);  d(weights) = conv_weights(g, src)
    after     d(src), d(weights) = conv_backward(g, src), which forms g while it packs

Both need the transformed tiles of ``g``, and the mask of ``d(src)`` is made of ``src``: one reading
of each is saved, and a quarter of the transforms (``kernels.conv3d.winograd_bricks``). That is for
Winograd, few channels and many voxels; else sums and weights leave the caches. The tile is the one that the
model of ``choose_algorithm`` finds best.

The kernel does not sum ``g`` for the gradient of a bias. Batch and instance norm subtract the mean, and with
it the bias, whose gradient is therefore 0. So only convolutions before one of them, and those without bias,
are fused.

If ``fuse_backward`` formed ``g`` for two readers, the one reader that is left forms ``g`` itself, which saves
a pass over memory. But ``dz`` and ``x`` then live longer, so a very large ``g`` is formed as before.
"""

from kernels.conv3d import operator as conv3d
from tinyunet.compiler.ir import BLOCKED, Graph, Node, Options
from tinyunet.compiler.operators.convolutions import plan_of
from tinyunet.compiler.operators.normalization import centres
from tinyunet.compiler.passes.choose_algorithm import costs

# Bytes of a gradient above which memory counts for more than the 2 % of a step that forming it takes.
_FORMED_FIRST = 512 * 1024 * 1024


def fuse_gradients(graph: Graph, options: Options) -> Graph:
    """Return the graph with ``convolution_backward`` in the place of both gradients of a convolution."""
    if "choose_algorithm" not in options.passes:  # all convolutions are to be direct
        return graph
    weights = {n.attributes["of"]: n for n in graph.nodes if n.op == "convolution_backward_weights"}
    for data in graph.nodes:
        if data.op == "convolution_backward_data" and data.attributes["of"] in weights:
            graph = _fuse(graph, data, weights[data.attributes["of"]], options.accuracy)
    return graph


def _fuse(graph: Graph, data: Node, weights: Node, accuracy: str) -> Graph:
    if not (data.runs_fused and weights.runs_fused):
        return graph
    found = costs(data, graph, accuracy)  # those of the other gradient are the same
    both = Node(
        f"d {data.attributes['of']}",
        "convolution_backward",
        {**weights.inputs, **data.inputs},
        {**weights.outputs, **data.outputs},
        {**weights.attributes, **data.attributes, "tile": min(found, key=found.__getitem__)},
        "backward",
        data.in_place,
    )
    formed = _formed(data.inputs["diff_dst"], graph)
    if not _has_kernel(both, formed, graph):
        return graph
    changes: dict[str, list[Node]] = {data.name: [both], weights.name: []}
    if formed and graph.values[data.inputs["diff_dst"]].nbytes <= _FORMED_FIRST:
        changes |= {data.name: [both.with_inputs(formed.inputs)], formed.name: []}
    return graph.rewrite(changes)


def _has_kernel(both: Node, formed: Node | None, graph: Graph) -> bool:
    if not both.attributes["tile"] or ("src_b" in both.inputs) != ("diff_src_b" in both.outputs):
        return False
    if graph.values[both.inputs["src"]].layout != BLOCKED:  # a few channels, which are read as they come
        return False
    if "diff_bias" in both.outputs and not _is_centred(formed or both, graph):
        return False
    return conv3d.pays_together(plan_of(both, graph))


def _is_centred(node: Node, graph: Graph) -> bool:
    """Whether the gradient that a node forms is that of a norm which takes each channel's mean away."""
    made = graph.producer(node.inputs["diff_dst.a"]) if "diff_dst.a" in node.inputs else None
    return made is not None and centres(made)


def _formed(gradient: str, graph: Graph) -> Node | None:
    """Return the node that forms a gradient of batch norm, if there is one, for two readers."""
    made = graph.producer(gradient)
    forms = made is not None and made.op == "gradient" and len(graph.consumers(gradient)) == 2
    return made if forms else None
