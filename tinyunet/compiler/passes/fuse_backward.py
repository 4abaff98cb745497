"""Gradients are added up, masked and summed in the epilogue of the kernel that finds the last of them.

    before    dy = conv_data(...) > memory > dy += other > memory > dz = dy act'(z), S1, S2 > memory
              > dx = a dz + b x + d > memory > conv_data(dx), conv_weights(dx)
    after     dz, S1, S2 = conv_data(...) + other, masked > memory > conv_data, conv_weights: each forms
              dx while it packs

``S1 = sum dz`` and ``S2 = sum dz (x - mean)`` give a, b and d (``kernels.deferred.statistics``). Saves, for
each batch norm, two reads and a write of the gradient, a read of ``x``, and the write of ``dx``; for each
sum of two gradients another two reads and a write.

A large ``dx`` that two kernels read is formed once, in the memory of ``dz``. This pass over memory takes as
long as it saves the two kernels, which then read one tensor instead of two; and ``x`` is free earlier. So the
peak of memory falls by one tensor of full size: an arena of 12.0 GB for 13.5 at 144^3, batch 8.
"""

from dataclasses import replace

from tinyunet.compiler.ir import Graph, Node, Options
from tinyunet.compiler.operators import KERNELS, can_block, split

# Bytes of a gradient above which it is formed once, if two kernels read it: what caches do not hold.
_FORMED_ONCE = 32 * 1024 * 1024


def fuse_backward(graph: Graph, options: Options) -> Graph:
    """Return the graph with ``accumulate``, ``mask`` and ``gradient`` nodes in their neighbours."""
    graph = split(graph)
    for op, fuse in (("accumulate", _fuse_accumulate), ("mask", _fuse_mask), ("gradient", _fuse_gradient)):
        for node in graph.nodes:
            if node.op == op:
                graph = fuse(graph, node)
    return graph


def _writer(graph: Graph, value: str, reader: Node) -> tuple[Node, str, str] | None:
    """Return the node that writes a gradient for this reader alone, the role, and the end of its name.

    None if the kernel of that node can do no more with the gradient.
    """
    made = graph.producer(value)
    if made is None or graph.consumers(value) != [reader] or not can_block(made, graph):
        return None
    role = next(role for role, name in made.outputs.items() if name == value)
    end = "_b" if role.endswith("_b") else ""
    is_masked = f"mask{end}.x" in made.inputs  # the mask is the last: what is added now would miss it
    return (made, role, end) if role in KERNELS[made.op].masks and not is_masked else None


def _fuse_accumulate(graph: Graph, node: Node) -> Graph:
    for last, other in (("b", "a"), ("a", "b")):
        found = _writer(graph, node.inputs[last], node)
        if found is None:
            continue
        made, role, end = found
        earlier, before = graph.nodes[: graph.nodes.index(made)], graph.producer(node.inputs[other])
        is_free = f"accumulate{end}" not in made.inputs and KERNELS[made.op].adds
        if not is_free or before is None or before not in earlier:
            continue
        fused = made.with_inputs({f"accumulate{end}": node.inputs[other]})
        fused = fused.with_outputs({role: node.outputs["dst"]})
        fused = replace(fused, in_place={**fused.in_place, role: f"accumulate{end}"})
        return graph.rewrite({made.name: [fused], node.name: []})
    return graph


def _fuse_mask(graph: Graph, node: Node) -> Graph:
    found = _writer(graph, node.inputs["gradient"], node)
    if found is None:
        return graph
    made, role, end = found
    parts = {f"mask{end}.{part}": node.inputs[f"mask.{part}"] for part in ("x", "scale", "shift", "mean")}
    fused = made.with_inputs(parts).with_attributes({f"mask{end}.slope": node.attributes["mask.slope"]})
    fused = fused.with_outputs({role: node.outputs["diff_src"], f"sums{end}": node.outputs["sums"]})
    return graph.rewrite({made.name: [fused], node.name: []})


def _fuse_gradient(graph: Graph, node: Node) -> Graph:
    readers = graph.consumers(node.outputs["dst"])
    if len(readers) > 1 and graph.values[node.outputs["dst"]].nbytes > _FORMED_ONCE:
        return graph.rewrite({node.name: [replace(node, in_place={"dst": "diff_dst"})]})
    changes = {
        reader.name: [reader.with_inputs(node.inputs)]
        for reader in readers
        if reader.op in KERNELS and KERNELS[reader.op].forms
        if "diff_dst.x" not in reader.inputs and can_block(reader, graph)
    }
    if len(changes) == len(readers):
        changes[node.name] = []
    return graph.rewrite(changes)
