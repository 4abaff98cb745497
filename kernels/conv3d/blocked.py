"""Rung ``blocked``: channels in blocks of 16, and loops that the compiler vectorises by itself.

Idea       ``im2col`` writes ``src`` 27 times. Here nothing is copied but one halo of zeros: with the
           channels of a voxel in blocks of 16, the innermost loop runs over 16 neighbouring output
           channels and becomes one vector multiply-add.
Loop nest  ocb, od, oh | icb, kd, kh, kw | ow, ic | 16 output channels
Memory     ``nCdhw16c`` activations and ``OIdhw16i16o`` weights (see `kernels.layout`)::

               weights, one tap   | i0: o0 ... o15 | i1: o0 ... o15 | ...   16 x 16 floats, 1 KB
               src, one row       | v0: i0 ... i15 | v1: i0 ... i15 | ...   shifted by the tap
               dst, one row       | v0: o0 ... o15 | v1: o0 ... o15 | ...   in cache for all taps

Traffic    operands come from the first-level cache, but every sum is loaded and stored once for each
           tap and input channel: the load and store ports are the limit, not the multiply-adds.
           ``direct`` removes just this.
Gradients  as in ``direct``: ``backward_data`` is ``forward`` with reversed, transposed weights
Numerics   float32, taps outermost: kd, kh, kw, ic in order, channel blocks outermost
Source     Georganas et al., "Anatomy of high-performance deep learning convolutions on SIMD
           architectures" (2018), section II.B
"""

import numpy as np

from kernels.compiler import parallel_kernel, prange, split_index
from kernels.conv3d.bias import backward_bias
from kernels.conv3d.shapes import (
    Triple,
    adjoint_before,
    backward_data_geometry,
    backward_weights_geometry,
    check_float32,
    forward_geometry,
)
from kernels.layout import (
    Floats,
    blocks,
    pack_src,
    pack_weights,
    reorder_nCdhw16c_to_ndhwc,
    reorder_ndhwc_to_nCdhw16c,
    unpack_weights,
)
from kernels.memory import empty
from kernels.simd import LANES


def forward(
    src: Floats,
    weights: Floats,
    bias: Floats | None = None,
    stride: int | Triple = 1,
    padding: str = "same",
) -> Floats:
    """Convolve; arguments, result and errors as `naive.forward`, float32 only."""
    g = forward_geometry(src, weights, bias, stride, padding)
    check_float32(src)
    dst = _convolve(src, weights, g.dst_shape, g.stride, g.before, (1, 1, 1), adjoint=False)
    return dst if bias is None else dst + bias


def backward_data(
    diff_dst: Floats,
    weights: Floats,
    src_shape: tuple[int, ...],
    stride: int | Triple = 1,
    padding: str = "same",
) -> Floats:
    """Gradient of ``src``; arguments, result and errors as `naive.backward_data`, float32 only."""
    g = backward_data_geometry(diff_dst, weights, src_shape, stride, padding)
    check_float32(diff_dst)
    return _convolve(
        diff_dst, weights, g.src_shape, (1, 1, 1), adjoint_before(g), g.stride, adjoint=True
    )


def backward_weights(
    src: Floats,
    diff_dst: Floats,
    kernel: Triple,
    stride: int | Triple = 1,
    padding: str = "same",
) -> tuple[Floats, Floats]:
    """Gradients of weights and bias; as `naive.backward_weights`, float32 only."""
    g = backward_weights_geometry(src, diff_dst, kernel, stride, padding)
    check_float32(src)
    panel = empty((blocks(g.IC), *g.panel_size, LANES))
    blocked = reorder_ndhwc_to_nCdhw16c(diff_dst)
    partial = np.zeros((blocks(g.OC), blocks(g.IC), *kernel, LANES, LANES), np.float32)
    for n in range(g.MB):
        pack_src(src[n], panel, g.before, (1, 1, 1))
        _accumulate(panel, blocked[n], partial, g.stride)
    diff_weights = empty(g.weights_shape)
    unpack_weights(
        partial.reshape(1, *partial.shape[:2], -1, LANES, LANES),
        diff_weights.reshape(g.OC, g.IC, -1),
    )
    return diff_weights, backward_bias(diff_dst)


def _convolve(
    src: Floats,
    weights: Floats,
    dst_shape: tuple[int, int, int, int, int],
    stride: Triple,
    before: Triple,
    dilation: Triple,
    *,
    adjoint: bool,
) -> Floats:
    MB, OD, OH, OW, OC = dst_shape
    kernel = weights.shape[2:]
    ICB, OCB = blocks(src.shape[-1]), blocks(OC)
    packed = empty((OCB, ICB, *kernel, LANES, LANES))
    pack_weights(weights, packed.reshape(OCB, ICB, -1, LANES, LANES), adjoint=adjoint)
    size = [(o - 1) * s + k for o, s, k in zip((OD, OH, OW), stride, kernel, strict=True)]
    panel = empty((ICB, *size, LANES))
    dst = empty((MB, OCB, OD, OH, OW, LANES))
    dst[:] = 0.0
    for n in range(MB):
        pack_src(src[n], panel, before, dilation)
        _forward(panel, packed, dst[n], stride)
    return reorder_nCdhw16c_to_ndhwc(dst, OC)


@parallel_kernel
def _forward(src: Floats, weights: Floats, dst: Floats, stride: Triple) -> None:
    OCB, ICB, KD, KH, KW, _, _ = weights.shape
    _, OD, OH, OW, _ = dst.shape
    for task in prange(OCB * OD):
        ocb, od = split_index(task, OD)
        for oh in range(OH):
            for icb in range(ICB):
                for kd in range(KD):
                    for kh in range(KH):
                        row = src[icb, od * stride[0] + kd, oh * stride[1] + kh]
                        for kw in range(KW):
                            for ow in range(OW):
                                for ic in range(LANES):
                                    value = row[ow * stride[2] + kw, ic]
                                    for o in range(LANES):
                                        weight = weights[ocb, icb, kd, kh, kw, ic, o]
                                        dst[ocb, od, oh, ow, o] += value * weight


@parallel_kernel
def _accumulate(src: Floats, diff_dst: Floats, partial: Floats, stride: Triple) -> None:
    OCB, ICB, KD, KH, KW, _, _ = partial.shape
    _, OD, OH, OW, _ = diff_dst.shape
    for task in prange(OCB * ICB * KD * KH):
        pair, tap = split_index(task, KD * KH)
        ocb, icb = pair // ICB, pair % ICB
        kd, kh = tap // KH, tap % KH
        for od in range(OD):
            for oh in range(OH):
                row = src[icb, od * stride[0] + kd, oh * stride[1] + kh]
                for kw in range(KW):
                    for ow in range(OW):
                        for ic in range(LANES):
                            value = row[ow * stride[2] + kw, ic]
                            for o in range(LANES):
                                diff = diff_dst[ocb, od, oh, ow, o]
                                partial[ocb, icb, kd, kh, kw, ic, o] += value * diff
