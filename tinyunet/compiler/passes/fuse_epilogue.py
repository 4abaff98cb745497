"""A convolution adds the bias, and takes a norm's sums from the register tile before it is stored.

    before    x = conv(src) + bias > memory > moments(x)
    after     x, moments = conv(src) + bias

Saves one pass over each convolution's output: 4 bytes an element, read once. The bias is an epilogue
of every kernel here. The activation is not: the kernel stores ``x``, which the gradient needs, and
each reader applies the activation (``defer_normalization``).

The last layer has an epilogue of its own: softmax and the sums of the loss. Neither logits nor probabilities
nor their gradients are in memory.

    before    logits = conv(src) > memory > Dice sums, cross-entropy;  two gradients of the logits > memory
              > their sum > memory > conv_data, conv_weights
    after     Dice sums, cross-entropy = head(src);     d(src), d(weights) = head_backward(src)
    inference probabilities = head(src)
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from tinyunet.compiler.ir import NDHWC, PLAIN, Graph, Node, Options, Value
from tinyunet.compiler.operators import KERNELS, can_block, split

_LOSSES = {"dice_sums": "dice", "cross_entropy": "cross_entropy"}
_PROBABILITIES = ("softmax", "sigmoid")


def fuse_epilogue(graph: Graph, options: Options) -> Graph:
    """Return the graph with moments, softmax and loss in the convolutions they come after."""
    for node in graph.nodes:
        if _is_head(graph, node):
            graph = _fuse_loss(graph, node) if graph.gradients else _fuse_probabilities(graph, node)
    graph = split(graph)
    for node in graph.nodes:
        if node.op != "moments":
            continue
        made = graph.producer(node.inputs["src"])
        kernel = KERNELS.get(made.op) if made else None
        if made is None or kernel is None or not kernel.gathers or not can_block(made, graph):
            continue
        if "moments" not in made.outputs:  # of another norm of the same output
            graph = graph.rewrite({made.name: [made.with_outputs(node.outputs)], node.name: []})
    return graph


def _is_head(graph: Graph, node: Node) -> bool:
    if node.op != "convolution" or graph.values[node.outputs["dst"]].dtype != np.float32:
        return False
    layouts = [graph.values[node.inputs[role]].layout for role in ("src", "weights")]
    if layouts != [NDHWC, PLAIN]:  # a parameter as volume, or weights that are computed
        return False
    settings = node.attributes["kernel"], node.attributes["stride"]
    return settings == ((1, 1, 1),) * 2 and "bias" in node.inputs


def _fuse_probabilities(graph: Graph, node: Node) -> Graph:
    logits, gone = node.outputs["dst"], []
    readers = graph.consumers(logits)
    if len(readers) == 1 and readers[0].op == "reshape" and _keeps_classes(graph, readers[0]):
        gone, logits = [readers[0].name], readers[0].outputs["dst"]
        readers = graph.consumers(logits)
    if len(readers) != 1 or readers[0].op not in _PROBABILITIES or logits in graph.outputs:
        return graph
    result = graph.values[readers[0].outputs["dst"]]
    if (readers[0].op == "sigmoid") != (result.shape[-1] == 1):
        return graph
    inputs = {role: node.inputs[role] for role in ("src", "weights", "bias")}
    head = Node(node.name, "head", inputs, {"dst": result.name})
    changes: dict[str, list[Node]] = {name: [] for name in (*gone, readers[0].name)}
    return graph.rewrite(changes | {node.name: [head]}, [replace(result, layout=PLAIN)])


def _fuse_loss(graph: Graph, node: Node) -> Graph:
    around = list(_around(graph, node))
    if any(other is None for other in around):
        return graph
    found = {other.op: other for other in around if other is not None}
    each = [n for n in around if n is not None and n.op.removesuffix("_backward") in _LOSSES]
    if len(each) != len({n.op for n in each}):  # the kernel gives one of each
        return graph
    MB, *_, classes = graph.values[node.outputs["dst"]].shape
    dice = found.get("dice_sums")
    if dice and graph.values[dice.outputs["dst"]].shape != (3, MB, classes):  # other images
        return graph
    losses = [found[op] for op in _LOSSES if op in found]
    ignored = {loss.attributes.get("ignore_label") for loss in losses}
    undone = [found[f"{op}_backward"] for op in _LOSSES if f"{op}_backward" in found]
    weights = found.get("convolution_backward_weights")
    data = found.get("convolution_backward_data")
    if not losses or len(losses) != len(undone) or len(ignored) > 1 or weights is None or data is None:
        return graph
    results = {"diff_src": data.outputs["diff_src"], **weights.outputs}
    if not {"diff_weights", "diff_bias"} <= results.keys():
        return graph
    inputs = {role: node.inputs[role] for role in ("src", "weights", "bias")}
    for loss in losses:
        inputs |= {role: name for role, name in loss.inputs.items() if role in ("labels", "class_weights")}
    settings = {"ignore_label": ignored.pop()}
    gradients = {
        f"diff_{_LOSSES[undo.op.removesuffix('_backward')]}": undo.inputs["gradient"] for undo in undone
    }
    # The kernel writes both sums, also those that this loss does not use.
    known = {_LOSSES[loss.op]: loss.outputs["dst"] for loss in losses}
    outputs = {role: f"{node.name}:{role}" for role in ("dice", "cross_entropy")} | known
    shapes = {"dice": (3, MB, classes), "cross_entropy": ()}
    values = [Value(outputs[r], shapes[r], np.dtype(np.float64)) for r in outputs if r not in known]
    changes: dict[str, list[Node]] = {other.name: [] for other in around if other is not None}
    changes[node.name] = [Node(node.name, "head_loss", inputs, outputs, settings)]
    # In the place of the first of the two: what else is added to diff_src comes right after it.
    inputs = inputs | gradients
    backward = Node(f"d {node.name}", "head_loss_backward", inputs, results, settings, "backward")
    changes[data.name] = [backward]
    return graph.rewrite(changes, values)


def _keeps_classes(graph: Graph, reshape: Node) -> bool:
    before, after = (graph.values[n].shape for n in (reshape.inputs["a"], reshape.outputs["dst"]))
    return after[-1:] == before[-1:]


def _around(graph: Graph, node: Node) -> Iterator[Node | None]:
    """All nodes that read the logits or their gradients; None is one that the head cannot take in."""
    logits, gradients = [node.outputs["dst"]], []
    while logits:
        value = logits.pop()
        if value in graph.outputs:
            yield None
        for reader in graph.consumers(value):
            if reader.op == "reshape" and _keeps_classes(graph, reader):
                logits.append(reader.outputs["dst"])
            elif reader.op.removesuffix("_backward") not in _LOSSES:
                yield None
            elif reader.op.endswith("_backward"):
                gradients.append(reader.outputs["diff_logits"])
            yield reader
    seen = set()
    while gradients:
        for reader in graph.consumers(gradients.pop()):
            if reader.name in seen:
                continue
            seen.add(reader.name)
            if reader.op == "accumulate":
                gradients.append(reader.outputs["dst"])
            elif reader.op == "reshape_backward":
                gradients.append(reader.outputs["diff_a"])
            elif not reader.op.startswith("convolution_backward"):
                yield None
            yield reader
