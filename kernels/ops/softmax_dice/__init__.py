"""Softmax, and the losses that are taken from logits in one pass: soft Dice sums and cross-entropy.

The probabilities of a volume are as large as its logits, and a loss needs only sums of them. So the
fused kernels make them a block of voxels at a time, and make them again in the backward pass, rather
than write them and read them back.
"""

from kernels.ops.softmax_dice.binary_cross_entropy import (
    binary_cross_entropy_backward,
    binary_cross_entropy_forward,
)
from kernels.ops.softmax_dice.cross_entropy import cross_entropy_backward, cross_entropy_forward
from kernels.ops.softmax_dice.dice import dice_backward, dice_forward
from kernels.ops.softmax_dice.softmax import softmax_backward, softmax_forward

__all__ = [
    "binary_cross_entropy_backward",
    "binary_cross_entropy_forward",
    "cross_entropy_backward",
    "cross_entropy_forward",
    "dice_backward",
    "dice_forward",
    "softmax_backward",
    "softmax_forward",
]
