"""The last layer with its loss: 1^3 convolution, softmax, soft Dice and cross-entropy in one pass.

    y = act(scale * x + shift)                       the source, still to be normalised
    logits[v, c] = bias[c] + sum over ic of weights[c, ic] * y[v, ic]
    p = softmax(logits), or the sigmoid if there is one class

The forward pass gives the sums of which Dice is made and the mean cross-entropy, as
`kernels.ops.softmax_dice` does from logits; the backward pass takes their derivatives. Neither writes logits,
probabilities or their gradient: three tensors of the volume's size are never in memory.

Idea       Channels of a voxel lie side by side, but softmax and sums run along voxels. So a block of 128
           voxels is normalised into the first-level cache and turned, 16 x 16 at a time, in registers;
           then one multiply-add works on 16 voxels of a class. Backward makes all of it again, as
           ``x`` must be read for the mask anyway: from the planes of diff_logits it goes back to
           channels with rank-1 updates, which need no turning::

               x     | v0: c0..c15 | v1: c0..c15 | ...      blocked, from memory
               turn  | c0: v0..v15 | c1: v0..v15 | ...      16 vectors in registers
               plane | class 0: v0 ..... v127 |             logits, p, diff_logits: first-level cache
Loop nest  n, d, band | block of 128 voxels | icb | ic    (| register tile: 4 classes x 16 voxels)
Traffic    Forward reads ``x`` and the labels. Backward reads them and writes ``dst``; it reads ``dst``
           if it adds to it.
Saves      nothing
Numerics   float32 in a block; sums over a block's voxels in 16 places, and from there on float64: bands
           in their order. So nothing depends on the number of threads.
Source     Milletari, Navab and Ahmadi, "V-Net" (2016), section 3
"""

from kernels.ops.head.logits import infer
from kernels.ops.head.loss import backward, forward

__all__ = ["backward", "forward", "infer"]
