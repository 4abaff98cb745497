"""Rung ``winograd``: 3-D minimal filtering in cache, with 3.4 to 8 times fewer multiplications.

    dst tile = A^T [ sum over ic of (G weights G^T) * (B^T src tile B) ] A      along d, h and w alike

Idea       what the rung `minimal_filtering` does step by step over whole tensors, a thread does with a
           brick that stays in cache, and for larger tiles, too. F(2, 2, 2) computes 8 outputs in 64
           multiplications a channel pair instead of 216; F(2, 4, 4) 32 in 144 instead of 864; F(4, 4, 4) 64
           in 216 instead of 1728. Each point is a small matrix product, which register tiles compute
Memory     a brick is a dozen to a hundred tiles. Its slab, transformed along d and h, stays in the
           second-level cache; a plane of it at a time becomes V, M and then itself in the first::

               slab  --w-->  V[point][icb][tile][16]  --GEMM-->  M[point][ocb][tile][16]  --w-->  slab

           Transforming all axes at once would take V and M through the second-level cache, 200 lines a
           tile and each way: that took longer than the product
Traffic    src once and a halo, dst once; weights grow from 27 to 64, 144 or 216 numbers a channel pair
           and are read once a brick: bricks are large where channels are many
Numerics   float32; the constants amplify rounding. Largest error against float64, of the largest
           output, in any direction, 16 to 256 channels: 0.2 to 2e-6 for F(2, 2, 2), 1 to 3e-6 for
           F(2, 4, 4), 2 to 8e-6 for F(4, 4, 4)
Source     Lavin and Gray, "Fast algorithms for convolutional neural networks" (2016)

This file checks arguments and reorders tensors. `winograd_bricks` has the loop nest, `winograd_stages` what
it does with a plane of points, `winograd_weights` the transforms of weights; `many_channels` is for layers
with more weights than voxels, `first_layer` for those of few input channels.
"""

import functools

import numpy as np

from kernels.base.arguments import Floats, Triple
from kernels.base.buffers import empty
from kernels.base.layout import reorder_nCdhw16c_to_ndhwc, reorder_ndhwc_to_nCdhw16c
from kernels.base.simd import LANES
from kernels.conv3d import winograd_bricks
from kernels.conv3d.operator import TILES as TILES
from kernels.conv3d.operator import plan
from kernels.conv3d.read import plain_inputs
from kernels.conv3d.winograd_stages import kernel_of
from kernels.conv3d.write import outputs
from kernels.deferred.tensors import NO_SOURCE
from kernels.ladder.shapes import Geometry, Rung, Stride


def forward(
    src: Floats,
    weights: Floats,
    bias: Floats | None = None,
    stride: Stride = 1,
    padding: str = "same",
    tile: Triple | None = None,
) -> Floats:
    """Convolve; arguments, result and errors as `Rung.forward`, float32 and stride 1 only.

    ``tile`` is one of `TILES`; F(2, 4, 4), or F(1, 4, 4) for a 1x3x3 kernel, where it is None.
    """
    return _rung(tile).forward(src, weights, bias, stride, padding)


def backward_data(
    diff_dst: Floats,
    weights: Floats,
    src_shape: tuple[int, ...],
    stride: Stride = 1,
    padding: str = "same",
    tile: Triple | None = None,
) -> Floats:
    """Gradient of ``src``; as `Rung.backward_data`, float32 and stride 1 only; tile as `forward`."""
    return _rung(tile).backward_data(diff_dst, weights, src_shape, stride, padding)


def backward_weights(
    src: Floats,
    diff_dst: Floats,
    kernel: Triple,
    stride: Stride = 1,
    padding: str = "same",
    tile: Triple | None = None,
) -> tuple[Floats, Floats]:
    """Gradients of weights and bias; as `Rung.backward_weights`, float32 and stride 1 only."""
    return _rung(tile).backward_weights(src, diff_dst, kernel, stride, padding)


def _rung(tile: Triple | None) -> Rung:
    return Rung(functools.partial(_convolve, tile), functools.partial(_gradients, tile))


def _tile(g: Geometry, tile: Triple | None) -> Triple:
    tile = tile or ((2, 4, 4) if g.kernel[0] == 3 else (1, 4, 4))
    if tile not in TILES:
        raise ValueError(f"tile is {tile}; it must be one of {TILES}")
    if g.kernel != kernel_of(tile) or g.stride != (1, 1, 1):
        raise ValueError(
            f"kernel {g.kernel} with stride {g.stride} has no Winograd form F{tile}; "
            "it must be 3 along each axis (1 where the tile is 1), with stride 1"
        )
    return tile


def _convolve(
    wanted: Triple | None, src: Floats, weights: Floats, bias: Floats | None, g: Geometry, adjoint: bool
) -> Floats:
    (MB, D, H, W, OC), before = (g.src_shape, g.adjoint_before) if adjoint else (g.dst_shape, g.before)
    tile = _tile(g, wanted)
    p = plan((src.shape[-1], 0), (OC, 0), (MB, D, H, W), g.kernel, tile)._replace(before=before)
    packed, dst = empty(p.algorithm.packed_shape(p)), empty((MB, p.blocks_out, D, H, W, LANES))
    p.algorithm.pack(p, weights, packed, adjoint=adjoint)
    to = outputs((dst, NO_SOURCE.data), bias=bias)
    p.algorithm.convolve(p, plain_inputs(reorder_ndhwc_to_nCdhw16c(src)), packed, to, adjoint=adjoint)
    return reorder_nCdhw16c_to_ndhwc(dst, OC)


def _gradients(wanted: Triple | None, src: Floats, diff_dst: Floats, g: Geometry) -> tuple[Floats, Floats]:
    (IC, OC), tile = g.channels, _tile(g, wanted)
    p = plan((IC, 0), (OC, 0), g.dst_shape[:4], g.kernel, tile, keeps_both=True)._replace(before=g.before)
    source, gradient = (plain_inputs(reorder_ndhwc_to_nCdhw16c(tensor)) for tensor in (src, diff_dst))
    diff_weights = empty(g.weights_shape)
    sums = winograd_bricks.backward_weights(p, source, gradient, diff_weights.reshape(OC, IC, -1))
    return diff_weights, sums.sum(axis=0)[:OC].astype(np.float32)
