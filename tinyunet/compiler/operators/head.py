"""The last layer, fused: a 1^3 convolution with softmax, or with the sums of the loss and their gradient.

    head                 probabilities = softmax(conv(src))
    head_loss            Dice sums, cross-entropy of conv(src) and labels
    head_loss_backward   d(src), d(weights), d(bias)

The pass ``fuse_epilogue`` makes them: neither logits nor probabilities nor their gradients are in memory.
"""

import math
from collections.abc import Mapping

import numpy as np

from kernels import ops
from tinyunet.compiler.ir import Node
from tinyunet.compiler.record import Binder, Call, Kernel, Shape, Shapes, volume


def _sizes(b: Binder) -> Shapes:
    MB, *sizes, C = b.value("src").shape
    classes, voxels = b.value("weights").shape[0], math.prod((MB, *sizes))
    return {
        **dict.fromkeys(("src", "diff_src"), volume((MB, *sizes), C)),
        **dict.fromkeys(("weights", "diff_weights"), (classes, C, 1, 1, 1)),
        **dict.fromkeys(("bias", "diff_bias"), (classes,)),
        **dict.fromkeys(("dice", "diff_dice"), (3, MB, classes)),
        **dict.fromkeys(("cross_entropy", "diff_cross_entropy"), ()),
        "labels": voxels,
        "class_weights": (max(classes, 2),),
        "dst": voxels * classes,
    }


def _flops(node: Node, shapes: Mapping[str, Shape]) -> int:
    """The convolution, forward or again and twice backward; softmax."""
    source, weights = shapes["src"], shapes["weights"]
    products = 2 * weights[0] * weights[1] * (3 if node.op.endswith("backward") else 1)
    return math.prod(source[:-1]) * (products + 20 * weights[0])


def _infer(b: Binder) -> Call:
    source, weights, bias, dst = b.source(), b.array("weights"), b.array("bias"), b.array("dst")
    probabilities = dst.reshape(source.data.shape[0], *source.data.shape[2:5], dst.shape[-1])
    return lambda: ops.last_layer.infer(source, weights, bias, probabilities)


def _layer(b: Binder) -> "ops.last_layer.Layer":
    bias, weights = b.array("bias"), b.array("class_weights") if b.has("class_weights") else None
    rule = ops.label_losses.weighting(bias.size, weights, b.node.attributes["ignore_label"])
    return ops.last_layer.Layer(b.source(), b.array("weights"), bias, b.array("labels"), rule)


def _loss(b: Binder) -> Call:
    layer, dice, cross_entropy = _layer(b), b.array("dice"), b.array("cross_entropy").reshape(1)
    return lambda: ops.last_layer.forward(layer, dice, cross_entropy)


def _loss_backward(b: Binder) -> Call:
    layer, accumulate, mask = _layer(b), b.has("accumulate"), b.mask()
    no_dice = np.zeros((2, layer.source.data.shape[0], layer.bias.size))
    dice = b.array("diff_dice")[:2] if b.has("diff_dice") else no_dice
    cross_entropy = b.array("diff_cross_entropy") if b.has("diff_cross_entropy") else np.zeros(())
    dst, weights, bias = (b.array(f"diff_{role}") for role in ("src", "weights", "bias"))

    def run() -> None:
        ops.last_layer.backward(layer, dice, float(cross_entropy), dst, weights, bias, accumulate, mask)

    return run


KERNELS = {
    "head": Kernel(_infer, _sizes, reads=("src",), has_eager=False, flops=_flops),
    "head_loss": Kernel(_loss, _sizes, reads=("src",), has_eager=False, flops=_flops),
    "head_loss_backward": Kernel(
        _loss_backward, _sizes, reads=("src",), masks=("diff_src",), adds=True, has_eager=False, flops=_flops
    ),
}
