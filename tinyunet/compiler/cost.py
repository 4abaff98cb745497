"""What a node costs by count: bytes that must move, and floating-point operations."""

import math

from tinyunet.compiler.ir import Graph, Node

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
    "binary_cross_entropy": 60,
    "binary_cross_entropy_backward": 60,
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
        sources = [r for r in ("src", "src_b", "diff_src", "diff_src_b") if r in shapes]
        inputs = sum(shapes[role][-1] for role in sources)
        dst = shapes.get("dst") or shapes["diff_dst"]
        # Each voxel of a transposed convolution's small side meets every weight, else of the result.
        volume = shapes[sources[0]] if node.op.startswith("transposed") else dst
        taps = math.prod(node.attributes["kernel"])
        return 2 * taps * inputs * dst[-1] * math.prod(volume[:-1])
    if node.op.startswith("head"):  # the convolution, forward or again and twice backward; softmax
        source, weights = shapes["src"], shapes["weights"]
        products = 2 * weights[0] * weights[1] * (3 if node.op.endswith("backward") else 1)
        return math.prod(source[:-1]) * (products + 20 * weights[0])
    if node.views:
        return 0
    largest = max((math.prod(shape) for shape in shapes.values()), default=0)
    return _ELEMENTWISE.get(node.op, 1) * largest
