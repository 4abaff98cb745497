"""In inference, scale and shift of batch norm go into the weights and the bias of the convolution before.

    conv(src) = W src + b            y = (conv - mean) f + beta,  f = gamma / sqrt(variance + epsilon)
    after     W' = f W,  b' = (b - mean) f + beta        y = W' src + b'

The statistics are fixed then, so ``W'`` and ``b'`` are made once, and again when the model has changed.
Saves a read and a write of each convolution's output; nothing at all is left of the batch norm.
"""

from dataclasses import replace

from tinyunet.compiler.ir import Graph, Node, Options
from tinyunet.compiler.operators import is_convolution


def fold_batch_norm(graph: Graph, options: Options) -> Graph:
    """Return the graph without the batch norms that directly follow a convolution; in inference."""
    if graph.gradients:
        return graph
    for node in graph.nodes:
        made = graph.producer(node.inputs["src"]) if node.op == "batch_norm_inference" else None
        if made is not None and is_convolution(made) and graph.consumers(made.outputs["dst"]) == [node]:
            graph = _fold(graph, made, node)
    return graph


def _fold(graph: Graph, convolution: Node, norm: Node) -> Graph:
    parameters = {"gamma": norm.inputs["scale"], "beta": norm.inputs["shift"]}
    parameters |= {role: norm.inputs[role] for role in ("mean", "variance")}
    old = {role: name for role, name in convolution.inputs.items() if role in ("weights", "bias")}
    if not graph.are_fixed([*parameters.values(), *old.values()]):  # made from the images
        return graph
    new = {role: f"{norm.name}:folded {role}" for role in ("weights", "bias")}
    outputs = {f"folded_{role}": name for role, name in new.items()}
    axis = int(convolution.op == "transposed_convolution")
    settings = {"epsilon": norm.attributes["epsilon"], "axis": axis, "implementation": "fused"}
    fold = Node(f"fold {norm.name}", "fold", old | parameters, outputs, settings, "prepare")
    values = [
        replace(graph.values[like], name=new[role], kind="temporary", needs_gradient=False)
        for role, like in (("weights", old["weights"]), ("bias", norm.inputs["shift"]))
    ]
    folded = convolution.with_inputs(new).with_outputs({"dst": norm.outputs["dst"]})
    return graph.rewrite({convolution.name: [fold, folded], norm.name: []}, values)
