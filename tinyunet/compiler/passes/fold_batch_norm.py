"""In inference, scale and shift of batch norm go into the weights and the bias of the convolution before.

    conv(src) = W src + b            y = (conv - mean) f + beta,  f = gamma / sqrt(variance + epsilon)
    after     W' = f W,  b' = (b - mean) f + beta        y = W' src + b'

The statistics are fixed then, so ``W'`` and ``b'`` are made once, and again when the model has changed.
Saves a read and a write of each convolution's output; nothing at all is left of the batch norm.
"""

from dataclasses import replace

from tinyunet.compiler.ir import CONVOLUTIONS, Graph, Node
from tinyunet.compiler.passes.switches import Options


def fold_batch_norm(graph: Graph, options: Options) -> Graph:
    """Return the graph without the batch norms that directly follow a convolution; in inference."""
    if graph.gradients:
        return graph
    for node in graph.nodes:
        made = graph.producer(node.inputs["src"]) if node.op == "batch_norm_inference" else None
        alone = made is not None and graph.consumers(made.outputs["dst"]) == [node]
        if made is not None and made.op in CONVOLUTIONS and alone and _are_fixed(graph, made, node):
            graph = _fold(graph, made, node)
    return graph


def _are_fixed(graph: Graph, convolution: Node, norm: Node) -> bool:
    """Whether all but the images that both take is there before a run, and need not be computed."""
    taken = {*convolution.inputs.values(), *norm.inputs.values()}
    taken -= {convolution.inputs["src"], norm.inputs["src"]}
    return graph.are_fixed(taken)


def _fold(graph: Graph, convolution: Node, norm: Node) -> Graph:
    parameters = {role: norm.inputs[role] for role in ("scale", "shift", "mean", "variance")}
    old = {role: convolution.inputs[role] for role in ("weights", "bias") if role in convolution.inputs}
    new = {role: f"{norm.name}:folded {role}" for role in ("weights", "bias")}
    fold = Node(
        f"fold {norm.name}",
        "fold",
        old | parameters,
        new,
        {
            "epsilon": norm.attributes["epsilon"],
            "axis": int(convolution.op == "transposed_convolution"),
            "implementation": "fused",
        },
        "prepare",
    )
    values = [
        replace(graph.values[like], name=new[role], kind="temporary", needs_gradient=False)
        for role, like in (("weights", convolution.inputs["weights"]), ("bias", norm.inputs["shift"]))
    ]
    folded = convolution.with_inputs(**new).with_outputs(dst=norm.outputs["dst"])
    if "bias" not in convolution.inputs:  # it has one now
        order = [*convolution.attributes["arguments"]]
        order = [("bias", None) if role == "bias" else (role, s) for role, s in order]
        folded = folded.with_attributes(arguments=tuple(order))
    return graph.rewrite({convolution.name: [fold, folded], norm.name: []}, values)
