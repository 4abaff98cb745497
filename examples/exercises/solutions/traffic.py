"""Bytes of a block: how much memory convolution, normalisation and ReLU move, alone and fused.

A pass reads each of its operands from memory once and writes its result once. Tensors are nCdhw16c: channels
are rounded up to a multiple of 16; numbers are float32. Normalisation has a scale and a shift a channel,
rounded up, too; weights are (OC, IC, 3, 3, 3), not rounded up.
"""


def bytes_moved(voxels, IC, OC):
    """Return bytes of the three passes one after the other, and of one pass that does all of it."""
    # <answer>
    ic, oc = -(-IC // 16) * 16, -(-OC // 16) * 16
    src, dst, weights, vectors = 4 * voxels * ic, 4 * voxels * oc, 4 * 27 * IC * OC, 4 * 2 * oc
    apart = (src + weights + dst) + (dst + vectors + dst) + (dst + dst)
    fused = src + weights + vectors + dst
    return apart, fused
    # </answer>
