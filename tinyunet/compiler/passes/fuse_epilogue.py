"""Bias and batch-norm sums are taken from the register tile, before it is stored.

    before    x = conv(src) + bias > memory > moments(x)
    after     x, moments = conv(src) + bias

Saves one pass over each convolution's output: 4 bytes an element, read once. The bias is an epilogue
of every kernel here. The activation is not: what is stored is ``x``, which the gradient needs, and
the activation is taken where it is read (``defer_normalization``). The last layer has an epilogue of
its own: softmax and the sums of the loss (``head``).
"""

from tinyunet.compiler.ir import Graph
from tinyunet.compiler.passes.head import fuse_head
from tinyunet.compiler.passes.split import split
from tinyunet.compiler.passes.switches import Options
from tinyunet.compiler.support import can_block


def fuse_epilogue(graph: Graph, options: Options) -> Graph:
    """Return the graph with moments, softmax and loss in the convolutions they come after."""
    graph = split(fuse_head(graph))
    for node in graph.nodes:
        if node.op != "moments":
            continue
        made = graph.producer(node.inputs["src"])
        if made is None or made.op != "convolution" or not can_block(made, graph):
            continue
        if "moments" in made.outputs:  # of another batch norm of the same output
            continue
        fused = made.with_outputs(moments=node.outputs["moments"])
        graph = graph.rewrite({made.name: [fused], node.name: []})
    return graph
