"""Rung ``blocked``: channels in blocks of 16, one vector multiply-add for each input channel.

Idea       ``im2col`` writes ``src`` 27 times. This rung writes ``src`` once, in blocks of 16 channels with
           a halo of zeros around the volume. The innermost loop runs over 16 neighbouring output
           channels, which are one vector.
Loop nest  ocb, od, oh | icb, kd, kh, kw | ic, ow | one vector of 16 output channels
Memory     ``nCdhw16c`` activations and ``OIdhw16i16o`` weights (see `kernels.base.layout`)::

               weights, one tap   | i0: o0 ... o15 | i1: o0 ... o15 | ...   16 x 16 floats, 1 KB
               src, one row       | v0: i0 ... i15 | v1: i0 ... i15 | ...   shifted by the tap
               dst, one row       | v0: o0 ... o15 | v1: o0 ... o15 | ...   in cache for all taps

Traffic    operands come from the first-level cache, but every sum is loaded and stored once for each
           tap and input channel: the load and store ports are the limit, not the multiply-adds.
           ``direct`` removes these loads and stores: it gives `convolve` and `weight_gradient` other loops.
Gradients  ``backward_data`` is ``forward`` of ``diff_dst`` with reversed, transposed weights; with a
           stride, zeros are packed between the voxels of ``diff_dst``
What did not help
           Leaving the vector to the compiler, ``for o in range(16): dst[o] += value * weights[o]``,
           ran at a tenth of the speed: LLVM unrolls a loop of 16 to scalars before it looks for vectors,
           since ``dst`` might overlap ``weights``; a loop of unknown length gets vectors for runs of 64
           and half vectors for the rest. And with ``ic`` inside ``ow``, the kernel loads each sum just
           after it has stored the sum, which costs a dozen cycles each time.
Numerics   float32, summed in the order icb, kd, kh, kw, ic
Source     Georganas et al., "Anatomy of high-performance deep learning convolutions on SIMD
           architectures" (2018), section II.B
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from kernels.base.arguments import Floats, Triple
from kernels.base.buffers import empty, scratchpad
from kernels.base.jit import parallel_kernel, prange, split_index
from kernels.base.layout import blocks, pack_src, pack_weights, reorder_nCdhw16c_to_ndhwc, unpack_weights
from kernels.base.simd import LANES, broadcast, fma, load, store
from kernels.ladder.naive import backward_bias
from kernels.ladder.shapes import Geometry, Rung

_ONE = (1, 1, 1)


class Panel(NamedTuple):
    """Voxels of one image, zeros around it included: ``data[at:]`` is [blocks][D][H][W][width]."""

    data: Floats
    at: int
    extent: Triple
    blocks: int


class Rows(NamedTuple):
    """Rows of results: ``data[at:]`` has ``size`` planes, lines and voxels of a row."""

    data: Floats
    at: int
    size: Triple
    strides: tuple[int, int, int, int]  # in floats, of a plane, a line, a voxel and a block of 16 channels


class Filters(NamedTuple):
    """Packed weights [groups][ICB][KD * KH * KW][width][cols * 16], and the bias, which sums start from."""

    weights: Floats
    bias: Floats
    kernel: Triple
    stride: Triple


def convolve(
    loops: Callable[..., None],
    block: tuple[int, int],
    src: Floats,
    weights: Floats,
    bias: Floats | None,
    g: Geometry,
    *,
    adjoint: bool = False,
) -> Floats:
    """Pack weights and each image, and run ``loops(panel, filters, rows, OCB)`` on all rows of the result.

    Where OC is a multiple of 16, the loops write the result channels last; else they write blocks, which are
    reordered at the end. ``block`` is the number of channels in a block of ``src``, and of output blocks
    whose weights are neighbours. The ``adjoint`` convolution goes from ``g.dst_shape`` to ``g.src_shape``.
    """
    MB, OD, OH, OW, OC = g.src_shape if adjoint else g.dst_shape
    stride, before, dilation = (_ONE, g.adjoint_before, g.stride) if adjoint else (g.stride, g.before, _ONE)
    (width, cols), OCB = block, blocks(OC)
    packed = scratchpad("weights", OCB // cols, -(-src.shape[-1] // width), g.taps, width, cols * LANES)
    pack_weights(weights, packed, adjoint=adjoint)
    starts = np.zeros(OCB * LANES, np.float32)
    if bias is not None:
        starts[:OC] = bias
    filters = Filters(packed.reshape(-1), starts, g.kernel, stride)
    last = OC % LANES == 0
    dst = empty((MB, OD, OH, OW, OC) if last else (MB, OCB, OD, OH, OW, LANES))
    voxel, channels = (OC, LANES) if last else (LANES, OD * OH * OW * LANES)
    strides = OH * OW * voxel, OW * voxel, voxel, channels
    D, H, W = ((o - 1) * s + k for o, s, k in zip((OD, OH, OW), stride, g.kernel, strict=True))
    for n in range(MB):
        panel = _pack("src", src[n], width, (D, H, W), before, dilation)
        loops(panel, filters, Rows(dst[n].reshape(-1), 0, (OD, OH, OW), strides), OCB)
    return dst if last else reorder_nCdhw16c_to_ndhwc(dst, OC)


def weight_gradient(
    loops: Callable[..., None], width: int, chunks: int, src: Floats, diff_dst: Floats, g: Geometry
) -> Floats:
    """Pack each image and its gradient, run ``loops(panel, gradient, kernel, stride, sums)``, and unpack.

    Each of ``chunks`` has sums of its own, [OCB][ICB][KD * KH * KW][width][16], which are added in order.
    """
    IC, OC = g.channels
    sums = scratchpad("partial", chunks, blocks(OC), -(-IC // width), g.taps, width, LANES)
    sums[:] = 0.0
    for n in range(len(src)):
        panel = _pack("src", src[n], width, g.panel_size, g.before, _ONE)
        gradient = _pack("gradient", diff_dst[n], LANES, g.out, (0, 0, 0), _ONE)
        loops(panel, gradient, g.kernel, g.stride, sums.reshape(chunks, -1))
    diff_weights = empty(g.weights_shape)
    unpack_weights(sums, diff_weights.reshape(OC, IC, g.taps))
    return diff_weights


def _pack(purpose: str, image: Floats, width: int, extent: Triple, before: Triple, dilation: Triple) -> Panel:
    """Return one image as a panel: without a copy where the image has that form already (1^3 kernels).

    A read-only image is copied, because `run_workers` takes writable arrays only.
    """
    if image.shape == (*extent, width) and image.flags.carray:
        return Panel(image.reshape(-1), 0, extent, 1)
    panel = scratchpad(purpose, -(-image.shape[-1] // width), *extent, width)
    pack_src(image, panel, before, dilation)
    return Panel(panel.reshape(-1), 0, extent, panel.shape[0])


@parallel_kernel
def _forward(panel: Panel, filters: Filters, rows: Rows, OCB: int) -> None:
    (src, _, (D, H, W), ICB), (dst, _, (OD, OH, OW), (plane, line, voxel, block)) = panel, rows
    weights, bias, (KD, KH, KW), (SD, SH, SW) = filters
    for task in prange(OCB * OD * OH):
        ocb, row = split_index(task, OD * OH)
        to, start = ocb * block + row // OH * plane + row % OH * line, load(bias, ocb * LANES)
        for ow in range(OW):
            store(dst, to + ow * voxel, start)
        for icb in range(ICB):
            for tap in range(KD * KH * KW):
                kd, kh, kw = tap // (KH * KW), tap // KW % KH, tap % KW
                d, h = row // OH * SD + kd, row % OH * SH + kh
                x = (((icb * D + d) * H + h) * W + kw) * LANES
                first = ((ocb * ICB + icb) * KD * KH * KW + tap) * LANES * LANES
                for ic in range(LANES):
                    weight = load(weights, first + ic * LANES)
                    for ow in range(OW):
                        value, at = broadcast(src[x + ow * SW * LANES + ic]), to + ow * voxel
                        store(dst, at, fma(value, weight, load(dst, at)))


@parallel_kernel
def _accumulate(panel: Panel, gradient: Panel, kernel: Triple, stride: Triple, sums: Floats) -> None:
    (src, _, (D, H, W), ICB), (diff_dst, _, (OD, OH, OW), OCB) = panel, gradient
    (KD, KH, KW), (SD, SH, SW), total = kernel, stride, sums[0]
    for task in prange(OCB * ICB * KD * KH * KW):
        pair, tap = split_index(task, KD * KH * KW)
        ocb, icb = pair // ICB, pair % ICB
        kd, kh, kw = tap // (KH * KW), tap // KW % KH, tap % KW
        for row in range(OD * OH):
            d, h = row // OH * SD + kd, row % OH * SH + kh
            x = (((icb * D + d) * H + h) * W + kw) * LANES
            for ow in range(OW):
                diff = load(diff_dst, ((ocb * OD * OH + row) * OW + ow) * LANES)
                for ic in range(LANES):
                    value = broadcast(src[x + ow * SW * LANES + ic])
                    at = ((pair * KD * KH * KW + tap) * LANES + ic) * LANES
                    store(total, at, fma(value, diff, load(total, at)))


def _convolve(src: Floats, weights: Floats, bias: Floats | None, g: Geometry, adjoint: bool) -> Floats:
    return convolve(_forward, (LANES, 1), src, weights, bias, g, adjoint=adjoint)


def _gradients(src: Floats, diff_dst: Floats, g: Geometry) -> tuple[Floats, Floats]:
    return weight_gradient(_accumulate, LANES, 1, src, diff_dst, g), backward_bias(diff_dst)


_rung = Rung(_convolve, _gradients)
forward, backward_data, backward_weights = _rung.forward, _rung.backward_data, _rung.backward_weights
