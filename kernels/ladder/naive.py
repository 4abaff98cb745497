"""Rung ``naive``: the definition of a 3-D convolution, as loops.

    dst[n, od, oh, ow, oc] = bias[oc] + sum over ic, kd, kh, kw of
        src[n, od*SD + kd - PD, oh*SH + kh - PH, ow*SW + kw - PW, ic] * weights[oc, ic, kd, kh, kw]

where ``src`` is zero outside its bounds. The two gradients run the same loops with the three arrays in other
roles: each multiply-add of the forward pass has one multiply-add in each backward pass. So there is one loop
nest, which is compiled for each direction.

Idea       none: this is what every other rung must equal, and what float64 gradients run on
Loop nest  n, od, oh, ow, oc | kd, kh, kw, ic
Traffic    each multiply-add loads both its factors; nothing is reused on purpose
Numerics   sums in the arrays' own type, in the order of the loops
"""

import functools
from collections.abc import Callable

import numpy as np

from kernels.base.arguments import Array, Doubles, Triple
from kernels.base.buffers import empty
from kernels.base.jit import kernel, parallel_kernel, prange
from kernels.ladder.shapes import Geometry, Rung

_FORWARD, _DATA, _WEIGHTS = range(3)
# Items of a row that `backward_bias` sums at a time, at least, and rows of a chunk.
_ROW, _ROWS = 256, 256


def _convolve(src: Array, weights: Array, bias: Array | None, g: Geometry, adjoint: bool) -> Array:
    made = empty(g.src_shape if adjoint else g.dst_shape, src.dtype)
    made[:] = 0 if bias is None else bias
    if adjoint:
        # Here ``src`` is the gradient of dst: its products with the weights are added to ``made``.
        _make(_DATA)(made, weights, src, g.stride, g.before)
    else:
        _make(_FORWARD)(src, weights, made, g.stride, g.before)
    return made


def _gradients(src: Array, diff_dst: Array, g: Geometry) -> tuple[Array, Array]:
    diff_weights = np.zeros(g.weights_shape, src.dtype)
    _make(_WEIGHTS)(src, diff_weights, diff_dst, g.stride, g.before)
    return diff_weights, backward_bias(diff_dst)


_rung = Rung(_convolve, _gradients, float32=False)
forward, backward_data, backward_weights = _rung.forward, _rung.backward_data, _rung.backward_weights


@functools.cache
def _make(direction: int) -> Callable[..., None]:
    """Compile the loop nest for one direction, a constant: the compiler drops the other directions."""

    @kernel
    def visit(src: Array, weights: Array, dst: Array, stride: Triple, before: Triple) -> None:
        _, ID, IH, IW, IC = src.shape
        _, _, KD, KH, KW = weights.shape
        for n, od, oh, ow, oc in np.ndindex(dst.shape):
            value = dst[n, od, oh, ow, oc]  # the sum so far, or a gradient
            for kd in range(KD):
                d = od * stride[0] + kd - before[0]
                for kh in range(KH):
                    h = oh * stride[1] + kh - before[1]
                    for kw in range(KW):
                        w = ow * stride[2] + kw - before[2]
                        if 0 <= d < ID and 0 <= h < IH and 0 <= w < IW:
                            for ic in range(IC):
                                if direction == _FORWARD:
                                    value += src[n, d, h, w, ic] * weights[oc, ic, kd, kh, kw]
                                elif direction == _DATA:
                                    src[n, d, h, w, ic] += value * weights[oc, ic, kd, kh, kw]
                                else:
                                    weights[oc, ic, kd, kh, kw] += src[n, d, h, w, ic] * value
            if direction == _FORWARD:
                dst[n, od, oh, ow, oc] = value

    return visit


def backward_bias(diff_dst: Array) -> Array:
    """Return the gradient of the bias, (OC,), for all rungs: the sum over all axes but the last.

    A row of several voxels is long enough for vectors, even with few channels. Chunks of rows, cut by size
    alone, are summed in float64 and added in order, so the result does not depend on the number of threads.
    """
    OC = diff_dst.shape[-1]
    row = OC * -(-_ROW // OC)
    partial = np.zeros((-(-diff_dst.size // (row * _ROWS)), row))
    _sum_chunks(diff_dst.reshape(-1), partial)
    return partial.sum(axis=0).reshape(-1, OC).sum(axis=0).astype(diff_dst.dtype)


@parallel_kernel
def _sum_chunks(values: Array, partial: Doubles) -> None:
    row = partial.shape[1]
    for chunk in prange(partial.shape[0]):
        total, end = partial[chunk], min((chunk + 1) * _ROWS * row, values.size)
        for start in range(chunk * _ROWS * row, end, row):
            items = values[start : start + row]
            for i in range(items.size):
                total[i] += items[i]
