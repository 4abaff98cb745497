"""Both gradients of a convolution are found in one pass over memory, where that takes less time.

    before    [g = a dz + b x + d > memory >] d(src) = conv_data(g);  d(weights) = conv_weights(g, src)
    after     d(src), d(weights) = conv_backward(g, src), which forms g while it packs

Both need the transformed tiles of ``g``, and the mask of ``d(src)`` is made of ``src``: one reading
of each is saved, and a quarter of the transforms (``kernels.conv3d.winograd_bricks``). That is for
Winograd, few channels and many voxels; else sums and weights leave the caches. The tile is the one that the
model of ``choose_algorithm`` finds best.

The kernel does not sum ``g`` for the gradient of a bias, which follows from sums that are there::

    after batch or instance norm    0: they subtract the mean, and with it the bias
    after group norm                sum of a dz + b x + d, from the sum of dz and the moments of x
    after an activation             sum of dz

Other convolutions with a bias keep two kernels.

If ``fuse_backward`` formed ``g`` for two readers, the one reader that is left forms ``g`` itself, which saves
a pass over memory. But ``dz`` and ``x`` then live longer, so a very large ``g`` is formed as before.
"""

from collections.abc import Mapping
from dataclasses import replace

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
    nodes = _with_bias(both, (formed or both).inputs, graph)
    if not nodes or not _has_kernel(both, graph):
        return graph
    changes = {weights.name: [], data.name: nodes}
    if formed and graph.values[data.inputs["diff_dst"]].nbytes <= _FORMED_FIRST:
        changes |= {data.name: [nodes[0].with_inputs(formed.inputs), *nodes[1:]], formed.name: []}
    return graph.rewrite(changes)


def _has_kernel(both: Node, graph: Graph) -> bool:
    if not both.attributes["tile"] or ("src_b" in both.inputs) != ("diff_src_b" in both.outputs):
        return False
    if graph.values[both.inputs["src"]].layout != BLOCKED:  # a few channels, which are read as they come
        return False
    return conv3d.pays_together(plan_of(both, graph))


def _with_bias(both: Node, gradient: Mapping[str, str], graph: Graph) -> list[Node]:
    """Return a node, and one for the gradient of its bias unless that is 0; nothing if nobody has the sums.

    ``gradient`` are the inputs of the node that reads, or forms, the gradient of the convolution's result.
    """
    norm = graph.producer(gradient.get("diff_dst.a", ""))
    if "diff_bias" not in both.outputs or (norm and centres(norm)):
        return [both]
    statistics = graph.producer(norm.inputs["mean"]) if norm else None
    if norm and statistics:
        sums = {"sums": norm.inputs["sums"], "moments": statistics.inputs["moments"]}
        sums |= {role: norm.outputs[role] for role in "abd"}
    else:
        dz = gradient["diff_dst"]
        written = made.outputs if (made := graph.producer(dz)) else {}
        known = [f"sums{end}" for end in ("", "_b") if written.get(f"diff_src{end}") == dz]
        if not known or known[0] not in written:
            return []
        sums = {"sums": written[known[0]]}
    outputs = {role: name for role, name in both.outputs.items() if role != "diff_bias"}
    bias, settings = {"diff_bias": both.outputs["diff_bias"]}, {"implementation": "fused"}
    found = Node(f"{both.name}.bias", "bias_gradient", sums, bias, settings, "backward")
    return [replace(both, outputs=outputs), found]


def _formed(gradient: str, graph: Graph) -> Node | None:
    """Return the node that forms a gradient of batch norm, if there is one, for two readers."""
    made = graph.producer(gradient)
    forms = made is not None and made.op == "gradient" and len(graph.consumers(gradient)) == 2
    return made if forms else None
