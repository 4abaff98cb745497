"""Rung ``blocked``: channels in blocks of 16, one vector multiply-add for each input channel.

Idea       ``im2col`` writes ``src`` 27 times. Here nothing is copied but one halo of zeros: with the
           channels of a voxel in blocks of 16, the innermost loop runs over 16 neighbouring output
           channels, which is one vector.
Loop nest  ocb, od, oh | icb, kd, kh, kw | ic, ow | one vector of 16 output channels
Memory     ``nCdhw16c`` activations and ``OIdhw16i16o`` weights (see `kernels.base.layout`)::

               weights, one tap   | i0: o0 ... o15 | i1: o0 ... o15 | ...   16 x 16 floats, 1 KB
               src, one row       | v0: i0 ... i15 | v1: i0 ... i15 | ...   shifted by the tap
               dst, one row       | v0: o0 ... o15 | v1: o0 ... o15 | ...   in cache for all taps

Traffic    operands come from the first-level cache, but every sum is loaded and stored once for each
           tap and input channel: the load and store ports are the limit, not the multiply-adds.
           ``direct`` removes just this.
Gradients  as in ``direct``: ``backward_data`` is ``forward`` with reversed, transposed weights
What did not help
           Leaving the vector to the compiler, ``for o in range(16): dst[o] += value * weights[o]``,
           ran at a tenth of the speed: a loop of 16 is unrolled to scalars before vectors are looked
           for, since ``dst`` might overlap ``weights``; with an unknown length, it is vectorised for
           runs of 64 and falls back to half vectors. And with ``ic`` inside ``ow``, each sum is
           stored and loaded again at once, which costs a dozen cycles a time.
Numerics   float32, summed in the order icb, kd, kh, kw, ic
Source     Georganas et al., "Anatomy of high-performance deep learning convolutions on SIMD
           architectures" (2018), section II.B
"""

import numpy as np

from kernels.base.arguments import Floats, Triple
from kernels.base.buffers import empty
from kernels.base.conv_shapes import (
    adjoint_before,
    backward_data_geometry,
    backward_weights_geometry,
    check_float32,
    forward_geometry,
)
from kernels.base.jit import parallel_kernel, prange, split_index
from kernels.base.layout import blocks, pack_src
from kernels.base.reorder import (
    reorder_nCdhw16c_to_ndhwc,
    reorder_ndhwc_to_nCdhw16c,
    reorder_OIdhw16i16o_to_OIdhw,
    reorder_OIdhw_to_OIdhw16i16o,
)
from kernels.base.simd import LANES, broadcast, fma, load, store
from kernels.ladder.bias import backward_bias


def forward(
    src: Floats, weights: Floats, bias: Floats | None = None, stride: int | Triple = 1, padding: str = "same"
) -> Floats:
    """Convolve; arguments, result and errors as `naive.forward`, float32 only."""
    g = forward_geometry(src, weights, bias, stride, padding)
    check_float32(src)
    dst = _convolve(src, weights, g.dst_shape, g.stride, g.before, (1, 1, 1))
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
    adjoint = weights.swapaxes(0, 1)[:, :, ::-1, ::-1, ::-1]
    return _convolve(diff_dst, adjoint, g.src_shape, (1, 1, 1), adjoint_before(g), g.stride)


def backward_weights(
    src: Floats, diff_dst: Floats, kernel: Triple, stride: int | Triple = 1, padding: str = "same"
) -> tuple[Floats, Floats]:
    """Gradients of weights and bias; as `naive.backward_weights`, float32 only."""
    g = backward_weights_geometry(src, diff_dst, kernel, stride, padding)
    check_float32(src)
    kernel = (g.KD, g.KH, g.KW)
    panel = empty((blocks(g.IC), *g.panel_size, LANES))
    blocked = reorder_ndhwc_to_nCdhw16c(diff_dst)
    partial = np.zeros((blocks(g.OC), blocks(g.IC), *kernel, LANES, LANES), np.float32)
    for n in range(g.MB):
        pack_src(src[n], panel, g.before, (1, 1, 1))
        _accumulate(
            panel.reshape(-1),
            panel.shape,
            blocked[n].reshape(-1),
            blocked[n].shape,
            partial.reshape(-1),
            kernel,
            g.stride,
        )
    return reorder_OIdhw16i16o_to_OIdhw(partial, g.OC, g.IC), backward_bias(diff_dst)


def _convolve(
    src: Floats,
    weights: Floats,
    dst_shape: tuple[int, int, int, int, int],
    stride: Triple,
    before: Triple,
    dilation: Triple,
) -> Floats:
    MB, OD, OH, OW, OC = dst_shape
    kernel = weights.shape[2:]
    ICB, OCB = blocks(src.shape[-1]), blocks(OC)
    packed = reorder_OIdhw_to_OIdhw16i16o(weights)
    size = [(o - 1) * s + k for o, s, k in zip((OD, OH, OW), stride, kernel, strict=True)]
    panel = empty((ICB, *size, LANES))
    dst = empty((MB, OCB, OD, OH, OW, LANES))
    dst[:] = 0.0
    for n in range(MB):
        pack_src(src[n], panel, before, dilation)
        _forward(
            panel.reshape(-1),
            panel.shape,
            packed.reshape(-1),
            kernel,
            dst[n].reshape(-1),
            dst[n].shape,
            stride,
        )
    return reorder_nCdhw16c_to_ndhwc(dst, OC)


@parallel_kernel
def _forward(
    src: Floats,
    src_shape: tuple[int, int, int, int, int],
    weights: Floats,
    kernel: Triple,
    dst: Floats,
    dst_shape: tuple[int, int, int, int, int],
    stride: Triple,
) -> None:
    ICB, PD, PH, PW, _ = src_shape
    OCB, OD, OH, OW, _ = dst_shape
    KD, KH, KW = kernel
    for task in prange(OCB * OD * OH):
        ocb, row = split_index(task, OD * OH)
        od, oh = row // OH, row % OH
        dst_row = ((ocb * OD + od) * OH + oh) * OW * LANES
        for icb in range(ICB):
            for tap in range(KD * KH * KW):
                kd, kh, kw = tap // (KH * KW), tap // KW % KH, tap % KW
                d, h = od * stride[0] + kd, oh * stride[1] + kh
                src_row = (((icb * PD + d) * PH + h) * PW + kw) * LANES
                block = ((ocb * ICB + icb) * KD * KH * KW + tap) * LANES * LANES
                for ic in range(LANES):
                    weight = load(weights, block + ic * LANES)
                    for ow in range(OW):
                        value = broadcast(src[src_row + ow * stride[2] * LANES + ic])
                        at = dst_row + ow * LANES
                        store(dst, at, fma(value, weight, load(dst, at)))


@parallel_kernel
def _accumulate(
    src: Floats,
    src_shape: tuple[int, int, int, int, int],
    diff_dst: Floats,
    dst_shape: tuple[int, int, int, int, int],
    partial: Floats,
    kernel: Triple,
    stride: Triple,
) -> None:
    ICB, PD, PH, PW, _ = src_shape
    OCB, OD, OH, OW, _ = dst_shape
    KD, KH, KW = kernel
    for task in prange(OCB * ICB * KD * KH * KW):
        pair, tap = split_index(task, KD * KH * KW)
        ocb, icb = pair // ICB, pair % ICB
        kd, kh, kw = tap // (KH * KW), tap // KW % KH, tap % KW
        block = (pair * KD * KH * KW + tap) * LANES * LANES
        for row in range(OD * OH):
            d, h = row // OH * stride[0] + kd, row % OH * stride[1] + kh
            src_row = (((icb * PD + d) * PH + h) * PW + kw) * LANES
            dst_row = (ocb * OD * OH + row) * OW * LANES
            for ow in range(OW):
                diff = load(diff_dst, dst_row + ow * LANES)
                for ic in range(LANES):
                    value = broadcast(src[src_row + ow * stride[2] * LANES + ic])
                    at = block + ic * LANES
                    store(partial, at, fma(value, diff, load(partial, at)))
