"""Transposed 3-D convolution, which enlarges a volume: each source voxel adds the scaled kernel to it.

    dst[n, id*SD + kd - PD, ih*SH + kh - PH, iw*SW + kw - PW, oc] +=
        sum over ic of src[n, id, ih, iw, ic] * weights[ic, oc, kd, kh, kw]

and ``bias[oc]`` once. There is a convolution whose ``backward_data`` is this, with these very weights:
``src`` here is its ``diff_dst``. So its three passes, with the roles exchanged, are ours, in both directions.
A kernel as large as its stride, which is what a U-Net has, runs faster in float32: its scaled kernels do not
overlap, so each output voxel has one source voxel and there is nothing to add up but channels.

Idea       Each tap is a matrix product of voxels x IC by IC x OC, on blocks of 16 channels. Some rows of
           voxels are packed into a panel that stays in the L2 cache. The source may still have to be
           normalised, and is while it is packed, so the normalised tensor is never in memory. backward_data
           needs no panel: for one (kd, kh) the outputs of a run of voxels lie side by side, and are read
           where they are. While the products of a register tile run, the backward kernels prefetch lines that
           they read next, one a step. Eager operators reorder to blocks before and back after.
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

Common parameters
-----------------
src : array, shape (MB, ID, IH, IW, IC)
    float32 or float64; all arrays are of one dtype.
diff_dst : array, shape (MB, OD, OH, OW, OC)
weights : array, shape (IC, OC, KD, KH, KW)
stride : int or (SD, SH, SW)
    From 1 on; an integer stands for all three.
padding : "same" or "valid"

All functions raise TypeError or ValueError if dtypes, shapes, stride or padding do not fit.
"""

from collections.abc import Sequence

import numpy as np

from kernels import conv3d
from kernels.base.arguments import NDHWC, Array, Floats, Triple, tensor, triple
from kernels.base.buffers import empty
from kernels.base.layout import blocks, reorder_nCdhw16c_to_ndhwc, reorder_ndhwc_to_nCdhw16c
from kernels.base.simd import LANES
from kernels.deferred.tensors import plain
from kernels.ladder.naive import backward_bias
from kernels.ops.transposed_conv.data_passes import Packed as Packed
from kernels.ops.transposed_conv.data_passes import backward_data_blocked, forward_blocked, pack, panels
from kernels.ops.transposed_conv.weight_pass import backward_weights_blocked

__all__ = ["backward_data_blocked", "backward_weights_blocked", "forward_blocked", "pack", "panels"]

# Widest kernel that the kernels on blocks take here: its weights of a tap row should stay in registers.
_WIDEST = 8


def forward(
    src: Array,
    weights: Array,
    bias: Array | None = None,
    stride: int | Sequence[int] = (2, 2, 2),
    padding: str = "same",
) -> Array:
    """Enlarge ``src`` to an array of shape (MB, OD, OH, OW, OC); ``bias`` is (OC,), or None."""
    src = tensor("src", src, axes=NDHWC)
    weights = _checked_weights(weights, src)
    if bias is not None:
        bias = tensor("bias", bias, shape=weights.shape[1:2], dtype=src.dtype)
    dst_shape = enlarged_shape(src.shape, weights.shape, stride, padding)
    strides = triple("stride", stride)
    if _has_blocked_kernel(src, weights.shape[2:], strides):
        dst = _empty_blocked(dst_shape)
        forward_blocked(plain(_blocked(src), src.shape[-1]), _packed(weights), bias, dst)
        return _channels_last(dst, dst_shape[-1])
    dst = conv3d.backward_data(src, weights, dst_shape, strides, padding)
    return dst if bias is None else dst + bias


def backward_data(
    diff_dst: Array,
    weights: Array,
    src_shape: Sequence[int],
    stride: int | Sequence[int] = (2, 2, 2),
    padding: str = "same",
) -> Array:
    """Gradient of the source, of shape ``src_shape``: a convolution of ``diff_dst``."""
    diff_dst = tensor("diff_dst", diff_dst, axes=NDHWC)
    weights = _checked_weights(weights, diff_dst)
    shape, IC = tuple(src_shape), weights.shape[0]
    if len(shape) != 5 or shape[-1] != IC:
        raise ValueError(f"src_shape must be (MB, ID, IH, IW, {IC}), got {shape}")
    diff_dst = tensor("diff_dst", diff_dst, shape=enlarged_shape(shape, weights.shape, stride, padding))
    strides = triple("stride", stride)
    if _has_blocked_kernel(diff_dst, weights.shape[2:], strides):
        diff_src = _empty_blocked(shape)
        backward_data_blocked(_blocked(diff_dst), _packed(weights), diff_src)
        return _channels_last(diff_src, IC)
    return conv3d.forward(diff_dst, weights, None, strides, padding)


def backward_weights(
    src: Array,
    diff_dst: Array,
    kernel: int | Sequence[int],
    stride: int | Sequence[int] = (2, 2, 2),
    padding: str = "same",
) -> tuple[Array, Array]:
    """Gradients of weights (IC, OC, KD, KH, KW), and bias (OC,); ``kernel`` is (KD, KH, KW)."""
    src = tensor("src", src, axes=NDHWC)
    diff_dst = tensor("diff_dst", diff_dst, axes=NDHWC, dtype=src.dtype)
    sizes, strides = triple("kernel", kernel), triple("stride", stride)
    weights_shape = (src.shape[-1], diff_dst.shape[-1], *sizes)
    dst_shape = enlarged_shape(src.shape, weights_shape, strides, padding)
    diff_dst = tensor("diff_dst", diff_dst, shape=dst_shape)
    if _has_blocked_kernel(src, sizes, strides):
        diff_weights, diff_bias = empty(weights_shape), empty(weights_shape[1:2])
        source = plain(_blocked(src), src.shape[-1])
        backward_weights_blocked(source, _blocked(diff_dst), diff_weights, diff_bias)
        return diff_weights, diff_bias
    diff_weights, _ = conv3d.backward_weights(diff_dst, src, sizes, strides, padding)
    return diff_weights, backward_bias(diff_dst)


def enlarged_shape(
    src_shape: Sequence[int], weights_shape: Sequence[int], stride: int | Sequence[int], padding: str
) -> tuple[int, ...]:
    """Shape of what `forward` returns."""
    IC, OC, *kernel = weights_shape
    if src_shape[-1] != IC:
        raise ValueError(
            f"src must have {IC} channels to go with weights {tuple(weights_shape)}, got {tuple(src_shape)}"
        )
    if padding not in ("same", "valid"):
        raise ValueError(f'padding must be "same" or "valid", got {padding!r}')
    strides = triple("stride", stride)
    overhang = [max(k - s, 0) if padding == "valid" else 0 for k, s in zip(kernel, strides, strict=True)]
    sizes = [i * s + o for i, s, o in zip(src_shape[1:4], strides, overhang, strict=True)]
    return (src_shape[0], *sizes, OC)


def _checked_weights(weights: Array, volume: Array) -> Array:
    return tensor("weights", weights, axes="IC, OC, KD, KH, KW", dtype=volume.dtype)


def _has_blocked_kernel(array: Array, kernel: Sequence[int], stride: Triple) -> bool:
    return array.dtype == np.float32 and tuple(kernel) == stride and stride[2] <= _WIDEST


def _packed(weights: Floats) -> Packed:
    packed = panels(weights.shape)
    pack(weights, packed)
    return packed


# --- Channels last to blocks, and back; 16 channels are the same in both -----------------------------------


def _blocked(src: Floats) -> Floats:
    MB, *sizes, C = src.shape
    return src.reshape(MB, 1, *sizes, C) if C == LANES else reorder_ndhwc_to_nCdhw16c(src)


def _empty_blocked(shape: tuple[int, ...]) -> Floats:
    MB, *sizes, C = shape
    return empty((MB, blocks(C), *sizes, LANES))


def _channels_last(data: Floats, channels: int) -> Floats:
    MB, _, *sizes, _ = data.shape
    return data.reshape(MB, *sizes, LANES) if channels == LANES else reorder_nCdhw16c_to_ndhwc(data, channels)
