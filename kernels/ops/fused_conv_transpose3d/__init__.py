"""Transposed convolution with a kernel as large as its stride, of a source still to be normalised.

    y = act(scale * x + shift)
    dst[n, id*KD + kd, ih*KH + kh, iw*KW + kw, oc] =
        bias[oc] + sum over ic of y[n, id, ih, iw, ic] * weights[ic, oc, kd, kh, kw]

Idea       Every output voxel has one source voxel, so there is nothing to add up but channels, and each
           tap is a matrix product of voxels x IC by IC x OC. Some rows of voxels are packed into a panel
           that stays in the second-level cache; ``y`` is formed while it is packed, so the normalised
           tensor is never in memory. backward_data needs no panel: for one (kd, kh) the outputs of a run
           of voxels lie side by side, and are read where they are. While the products of a register tile
           run, the lines that the next one reads are fetched, one a step (`conv3d.ahead`).
Loop nest  forward: n, id, band | rows | ocb, kd, kh | tiles of a row | ic   (| register tile: voxels x kw)
           backward_data: n, id, band | rows | icb | tiles of a row | kd, kh, ocb, kw, oc   (| voxels x icb)
           backward_weights: rows, ocb | some rows | kd, kh | ic | voxels               (| ic x kw)
Traffic    Everything is read once and written once; ``2 * IC * OC * KD*KH*KW`` FLOPs a source voxel, for
           ``4 * (IC + OC * KD*KH*KW)`` bytes: 13 FLOPs a byte at 32 -> 16 channels.
Numerics   Fused multiply-adds in float32, in the order of ``ic`` (backward_data: kd, kh, ocb, kw, oc).
           backward_weights sums a chunk in registers, a range of rows in float32, and the ranges in
           float64, in their order: nothing depends on the number of threads.
"""

from kernels.ops.fused_conv_transpose3d.data import backward_data, forward
from kernels.ops.fused_conv_transpose3d.panels import Packed, pack, panels
from kernels.ops.fused_conv_transpose3d.weights import backward_weights

__all__ = ["Packed", "backward_data", "backward_weights", "forward", "pack", "panels"]
