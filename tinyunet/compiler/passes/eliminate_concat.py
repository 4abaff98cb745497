"""A convolution reads two sources and writes two gradients, so that a concatenation need not be made.

    before    c = [a, b] > memory > conv(c)             dc = conv_data(...) > memory > da, db > memory
    after     conv(a, b)                                da, db = conv_data(...)

Saves a read and a write of both sources and the same of their gradients: 16 bytes an element. Weights
are packed for the split: channel ``i`` of ``b`` follows the whole blocks of ``a``.

Of three or more sources, all but the last are concatenated first, and that is one of the two.

Nodes before and after the concatenation are now neighbours, so the passes that look at neighbours run again.
"""

from dataclasses import replace

from tinyunet.compiler.ir import PLAIN, Graph, Node, Options
from tinyunet.compiler.operators import KERNELS, can_block
from tinyunet.compiler.passes.defer_normalization import defer_normalization
from tinyunet.compiler.passes.fuse_backward import fuse_backward


def eliminate_concat(graph: Graph, options: Options) -> Graph:
    """Return the graph without the concatenations that only convolutions read."""
    for node in graph.nodes:
        if node.op == "concatenation":
            paired = _pair(graph, node)
            without = _eliminate(paired, next(n for n in paired.nodes if n.name == node.name))
            graph = graph if without is paired else without
    if "defer_normalization" in options.passes:
        graph = defer_normalization(graph, options)
    if "fuse_backward" in options.passes:
        graph = fuse_backward(graph, options)
    return graph


def _eliminate(graph: Graph, node: Node) -> Graph:
    whole = node.outputs["dst"]
    readers = graph.consumers(whole)
    fit = all(
        can_block(reader, graph)
        and "src_b" in KERNELS[reader.op].reads
        and reader.inputs["src"] == whole
        and not {"src.scale", "src_b"} & {*reader.inputs}
        for reader in readers
    )
    parts = {graph.values[node.inputs[role]].layout for role in ("a", "b")}
    if not fit or whole in graph.outputs or PLAIN in parts:
        return graph
    a, b = node.inputs["a"], node.inputs["b"]
    changes = {reader.name: [reader.with_inputs({"src": a, "src_b": b})] for reader in readers}
    changes[node.name] = []
    undo = graph.backward_of(node)
    if undo is not None:
        made = graph.producer(undo.inputs["gradient"])
        if made is None or not can_block(made, graph) or "diff_src_b" not in KERNELS[made.op].masks:
            return graph
        if set(undo.outputs) != {"diff_a", "diff_b"} or made.in_place:
            return graph
        outputs = {"diff_src": undo.outputs["diff_a"], "diff_src_b": undo.outputs["diff_b"]}
        changes |= {made.name: [replace(made, outputs=outputs)], undo.name: []}
    return graph.rewrite(changes)


def _pair(graph: Graph, node: Node) -> Graph:
    """Return the graph with a concatenation of three or more as two: of all but the last, and of the last."""
    arguments, needs = node.attributes["arguments"], node.attributes["needs_gradient"]
    *firsts, last = (role for role, _ in arguments)
    if len(firsts) == 1:
        return graph
    name, whole = f"{node.name}:firsts", graph.values[node.outputs["dst"]]
    channels = sum(graph.values[node.inputs[role]].shape[-1] for role in firsts)
    joined = replace(whole, name=f"{name}.dst", shape=(*whole.shape[:-1], channels))
    gradient = replace(joined, name=f"d({joined.name})", needs_gradient=False)
    inner = {"arguments": arguments[:-1], "needs_gradient": needs[:-1]}
    outer = {"arguments": arguments[:2], "needs_gradient": (any(needs[:-1]), needs[-1])}
    inputs = {role: node.inputs[role] for role in firsts}
    first = replace(node.with_attributes(inner), name=name, inputs=inputs, outputs={"dst": joined.name})
    second = replace(node.with_attributes(outer), inputs={"a": joined.name, "b": node.inputs[last]})
    changes = {node.name: [first, second]}
    undo = graph.backward_of(node)
    if undo is not None:
        diffs = dict(undo.outputs)
        whole_diff = {"diff_b": diffs.pop(f"diff_{last}")} if f"diff_{last}" in diffs else {}
        whole_diff |= {"diff_a": gradient.name} if diffs else {}
        changes[undo.name] = [replace(undo.with_attributes(outer), outputs=whole_diff)]
        if diffs:
            split = undo.with_attributes(inner | {"of": name})
            inputs = {"gradient": gradient.name}
            changes[undo.name].append(replace(split, name=f"d {name}", inputs=inputs, outputs=diffs))
    return graph.rewrite(changes, [joined, gradient])
