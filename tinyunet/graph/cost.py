"""What a node costs by count: bytes that must move, and floating-point operations."""

import math

from tinyunet.graph.ir import Graph, Node

# Operations an element, where they are not multiplications of matrices; only their order matters.
_ELEMENTWISE = {
    "batch_norm_training": 8,
    "batch_norm_training_backward": 12,
    "batch_norm_inference": 2,
    "softmax": 20,
    "sigmoid": 20,
    "dice_sums": 30,
    "dice_sums_backward": 30,
    "cross_entropy": 30,
    "cross_entropy_backward": 30,
}


def nbytes(node: Node, graph: Graph) -> int:
    """Bytes of everything the node reads and writes, each once. A view moves nothing."""
    roles = [v for r, v in node.inputs.items() if r not in node.views.values()]
    roles += [v for r, v in node.outputs.items() if r not in node.views]
    return sum(graph.values[value].nbytes for value in roles)


def flops(node: Node, graph: Graph) -> int:
    """Multiplications and additions of the definition, whatever algorithm runs."""
    shapes = {role: graph.values[v].shape for role, v in {**node.inputs, **node.outputs}.items()}
    if "convolution" in node.op:
        weights = shapes.get("weights") or shapes.get("diff_weights", ())
        volume = shapes.get("dst") or shapes["diff_dst"]
        if node.op.startswith("transposed"):  # each voxel of the small side meets every weight
            volume = shapes.get("src") or shapes["diff_src"]
        return 2 * math.prod(weights) * math.prod(volume[:-1])
    if node.views:
        return 0
    largest = max((math.prod(shape) for shape in shapes.values()), default=0)
    return _ELEMENTWISE.get(node.op, 1) * largest
