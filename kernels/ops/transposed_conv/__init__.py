"""Transposed 3-D convolution, which enlarges a volume: each source voxel adds the scaled kernel to it.

    dst[n, id*SD + kd - PD, ih*SH + kh - PH, iw*SW + kw - PW, oc] +=
        sum over ic of src[n, id, ih, iw, ic] * weights[ic, oc, kd, kh, kw]

and ``bias[oc]`` once. There is a convolution whose ``backward_data`` is this, with these very weights:
``src`` here is its ``diff_dst``. So its three passes, with the roles exchanged, are ours, in both directions
(``enlarge``). A kernel as large as its stride, which is what a U-Net has, runs faster in float32: its scaled
kernels do not overlap, so each output voxel has one source voxel and there is nothing to add up but channels.

Idea       Each tap is a matrix product of voxels x IC by IC x OC, on blocks of 16 channels. Some rows of
           voxels are packed into a panel that stays in the L2 cache. The source may still have to be
           normalised, and is while it is packed, so the normalised tensor is never in memory. backward_data
           needs no panel: for one (kd, kh) the outputs of a run of voxels lie side by side, and are read
           where they are. While the products of a register tile run, the kernel prefetches the lines that the
           next one reads, one a step. Eager operators reorder to blocks before and back after.
Loop nest  forward: n, id, band | rows | ocb, kd, kh | tiles of a row | ic   (| register tile: voxels x kw)
           backward_data: n, id, band | rows | icb | tiles of a row | kd, kh, ocb, kw, oc   (| voxels x icb)
           backward_weights: rows, ocb | some rows | kd, kh | ic | voxels               (| ic x kw)
Traffic    Everything is read once and written once; ``2 * IC * OC * KD*KH*KW`` FLOPs a source voxel, for
           ``4 * (IC + OC * KD*KH*KW)`` bytes: 13 FLOPs a byte at 32 -> 16 channels.
Numerics   Fused multiply-adds in float32, in the order of ``ic`` (backward_data: kd, kh, ocb, kw, oc).
           backward_weights sums a chunk in registers, a range of rows in float32, and the ranges in
           float64, in their order: nothing depends on the number of threads.

Passes on blocks take ``src`` as a `Source` with data of shape (MB, ICB, ID, IH, IW, 16), ``diff_dst`` and
``dst`` of shape (MB, OCB, ID * KD, IH * KH, IW * KW, 16), and `Packed` weights. They fill what they write to:
``diff_weights`` (IC, OC, KD, KH, KW), ``diff_bias`` (OC,), and the source's gradient, to which they may add.

Sizes are those of Keras: along each axis ``I * S`` for "same", ``I * S + max(K - S, 0)`` for "valid".

Source: Dumoulin and Visin, "A guide to convolution arithmetic for deep learning" (2016), chapter 4.
"""

from kernels.ops.transposed_conv.data_passes import backward_data_blocked, forward_blocked
from kernels.ops.transposed_conv.enlarge import backward_data, backward_weights, enlarged_shape, forward
from kernels.ops.transposed_conv.panels import Packed, pack, panels
from kernels.ops.transposed_conv.weight_pass import backward_weights_blocked

__all__ = [
    "Packed",
    "backward_data",
    "backward_data_blocked",
    "backward_weights",
    "backward_weights_blocked",
    "enlarged_shape",
    "forward",
    "forward_blocked",
    "pack",
    "panels",
]
