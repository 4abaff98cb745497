"""ELU between two convolutions, so that no reorder is left around it.

    before    conv (nCdhw16c) > reorder > ELU (ndhwc) > reorder > conv (nCdhw16c)
    after     conv (nCdhw16c) > ELU (nCdhw16c) > conv (nCdhw16c)

The compiler has no kernel for this ELU, so it reorders each tensor to ndhwc and back: two passes over memory
for each. ELU takes a number at a time, so the layout does not matter to it. And ELU(0) = 0: padding lanes
that are zero stay zero. (What of the sigmoid?)

    dst = src where src > 0, exp(src) - 1 elsewhere
"""

from dataclasses import replace

import numpy as np

operator = "elu"
after = "propagate_layout"


def forward(src):
    """Return ELU of float32 numbers, in an array of any shape."""
    # <answer>
    return np.where(src > 0, src, np.exp(np.minimum(src, 0)) - 1)
    # </answer>


def backward(diff_dst, src):
    """Return the gradient of ``src``, of the same shape."""
    # <answer>
    return diff_dst * np.where(src > 0, np.float32(1), np.exp(np.minimum(src, 0)))
    # </answer>


def rewrite(graph, options):
    """Return a graph in which ELU, forward and backward, reads and writes blocks, wherever it can.

    Its nodes have ``node.op`` "own:elu" and "own:elu_backward", one input and one output (``node.inputs`` and
    ``node.outputs``: dicts of role to the name of a value). A reorder has ``node.op`` "reorder", an input
    "src" and an output "dst". ``graph.values[name].layout`` is "ndhwc" or "nCdhw16c".
    ``graph.producer(name)`` is the node that writes a value (or None), ``graph.consumers(name)`` the nodes
    that read it. Nothing is changed in place: ``dataclasses.replace(node, inputs=...)`` makes another node or
    value, ``graph.rewrite({node.name: [nodes in its place]}, [new values])`` another graph.
    """
    # <answer>
    for node in graph.nodes:
        if node.op in ("own:elu", "own:elu_backward"):
            graph = _reorder_afterwards(graph, node)
    for node in graph.nodes:
        graph = _cancel(graph, node)
    return graph
    # </answer>


# <answer>
def _reorder_afterwards(graph, node):
    """ELU(reorder(x)) = reorder(ELU(x))."""
    (role, given), (result, written) = *node.inputs.items(), *node.outputs.items()
    before = graph.producer(given)
    if before is None or before.op != "reorder":
        return graph
    source = graph.values[before.inputs["src"]]
    blocked = replace(graph.values[written], name=f"{written}|elu", layout=source.layout, kind="temporary")
    inside = replace(node, inputs={role: source.name}, outputs={result: blocked.name})
    names = {"inputs": {"src": blocked.name}, "outputs": {"dst": written}}
    reorder = replace(before, name=f"reorder {blocked.name}", phase=node.phase, **names)
    return _without_unread(graph.rewrite({node.name: [inside, reorder]}, [blocked]), before)


def _cancel(graph, node):
    """A reorder of a reorder is what was there before."""
    before = graph.producer(node.inputs["src"]) if node.op == "reorder" else None
    if before is None or before.op != "reorder":
        return graph
    source, target = before.inputs["src"], node.outputs["dst"]
    if graph.values[source].layout != graph.values[target].layout:
        return graph
    readers = {}
    for reader in graph.consumers(target):
        roles = {role: source for role, value in reader.inputs.items() if value == target}
        readers[reader.name] = [reader.with_inputs(roles)]
    return _without_unread(_without_unread(graph.rewrite(readers), node), before)


def _without_unread(graph, reorder):
    result = reorder.outputs["dst"]
    is_read = graph.consumers(result) or result in graph.outputs
    return graph if is_read else graph.rewrite({reorder.name: []})


# </answer>
