"""Our ladder of convolutions, each rung as it is called: arrays in to arrays out, reorders included.

The last rung, ``fused``, is the kernel of the compiled net. Tensors are in blocks of 16 channels and stay so.
Weights are packed before, without being timed, because a step packs them once (with many channels the kernel
transforms weights while it uses them, which is timed). The kernel normalises the source while it reads, forms
the gradient of batch norm, and sums its results, all with numbers that change nothing: the result is that of
every other rung. Direct or a form of Winograd: the fastest is taken, for each direction of each layer.
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from kernels.base.arguments import Array, Triple
from kernels.base.buffers import empty
from kernels.base.layout import blocks, reorder_nCdhw16c_to_ndhwc, reorder_ndhwc_to_nCdhw16c
from kernels.base.simd import LANES
from kernels.conv3d import operator as conv3d
from kernels.conv3d import winograd
from kernels.deferred.tensors import NO_MASK, NO_SOURCE, Mask, Source, gradient, plain
from kernels.ladder.direct import FEW_CHANNELS
from kernels.workbench.lessons import RUNGS as RUNGS
from tinyunet.benchmarks.peers import Convolution
from tinyunet.benchmarks.peers.ours import VERSION as VERSION
from tinyunet.benchmarks.peers.ours import use_threads as use_threads
from tinyunet.benchmarks.problem import convolution_arrays
from tinyunet.benchmarks.process import timed

FUSED = "fused"
# Direct, Winograd along all axes, and along d and h only, for a first layer.
_TILES = (None, *winograd.TILES, (2, 2, 1), (4, 4, 1))
_SECONDS = 0.05

#: A function to time, and one that makes its result an array.
Case = tuple[Callable[[], Any], Callable[[Any], Any]]


def convolution(src: Array, weights: Array, diff_dst: Array, rung: str) -> Convolution:
    """Return a single convolution in all directions, on a rung of the ladder."""
    if rung == FUSED:
        # The algorithm is that of the whole layer, a cube, also for a few of its planes.
        cube = (1, *src.shape[2:3] * 3, src.shape[-1])
        return {
            name: make(src, weights, diff_dst, fastest(name, cube, weights.shape))
            for name, make in PASSES.items()
        }
    return whole_calls(RUNGS[rung], src, weights, diff_dst)


def whole_calls(rung: ModuleType, src: Array, weights: Array, diff_dst: Array) -> Convolution:
    """Return calls of a module of kernels, channels last to channels last."""
    size = weights.shape[2:]
    return {
        "forward": (lambda: rung.forward(src, weights), np.asarray),
        "backward_data": (lambda: rung.backward_data(diff_dst, weights, src.shape), np.asarray),
        "backward_weights": (lambda: rung.backward_weights(src, diff_dst, size)[0], np.asarray),
    }


@functools.cache
def fastest(direction: str, src_shape: tuple[int, ...], weights_shape: tuple[int, ...]) -> Triple | None:
    """Return the tile of the fastest algorithm; None is direct."""
    arrays, times = convolution_arrays(src_shape, weights_shape), {}
    for tile in _TILES:
        try:
            run, _ = PASSES[direction](*arrays, tile)
        except ValueError:  # this convolution has no such form
            continue
        times[tile] = min(timed(run, _SECONDS)[0])
    return min(times, key=times.__getitem__)


def _forward(src: Array, weights: Array, diff_dst: Array, tile: Triple | None) -> Case:
    p, oc = _plan(src, weights, tile, keeps_both=False), weights.shape[0]
    packed = empty(conv3d.packed_shape(p))
    conv3d.pack(p, weights, packed)
    source, dst = _source(src), empty(_blocked_shape(diff_dst))
    bias, moments = np.zeros(blocks(oc) * LANES, np.float32), np.empty(conv3d.moments_shape(p))
    return (
        lambda: conv3d.forward(p, source, NO_SOURCE, packed, bias, dst, moments),
        lambda _: reorder_nCdhw16c_to_ndhwc(dst, oc),
    )


def _backward_data(src: Array, weights: Array, diff_dst: Array, tile: Triple | None) -> Case:
    oc, ic, *kernel = weights.shape
    p = conv3d.plan((oc, 0), (ic, 0), src.shape[:4], tuple(kernel), tile)
    packed = empty(conv3d.packed_shape(p))
    conv3d.pack(p, weights, packed, adjoint=True)
    diff, dst = _gradient(diff_dst), empty(_blocked_shape(src))
    x = plain(reorder_ndhwc_to_nCdhw16c(src), ic)
    mask = Mask(*x[:4], x.shift, np.empty(conv3d.sums_shape(p, 0)))
    return (
        lambda: conv3d.backward_data(p, diff, packed, (dst, NO_MASK.x), (mask, NO_MASK)),
        lambda _: reorder_nCdhw16c_to_ndhwc(dst, ic),
    )


def _backward_weights(src: Array, weights: Array, diff_dst: Array, tile: Triple | None) -> Case:
    p = _plan(src, weights, tile, keeps_both=True)
    source, diff = _source(src), _gradient(diff_dst)
    diff_weights, diff_bias = np.empty_like(weights), np.empty(weights.shape[0], np.float32)
    return (
        lambda: conv3d.backward_weights(p, source, NO_SOURCE, diff, diff_weights, diff_bias),
        lambda _: diff_weights,
    )


#: The passes of the last rung: each takes src, weights, diff_dst and a tile (None is direct).
PASSES = {"forward": _forward, "backward_data": _backward_data, "backward_weights": _backward_weights}


def _plan(src: Array, weights: Array, tile: Triple | None, *, keeps_both: bool) -> conv3d.Plan:
    oc, ic, *kernel = weights.shape
    few = {"channels_last": ic <= FEW_CHANNELS, "keeps_both": keeps_both}
    return conv3d.plan((ic, 0), (oc, 0), src.shape[:4], tuple(kernel), tile, **few)


def _source(src: Array) -> Source:
    """Return a source to be normalised, by a scale of 1; a first layer's as it is."""
    if src.shape[-1] <= FEW_CHANNELS:
        return NO_SOURCE._replace(data=src)
    return plain(reorder_ndhwc_to_nCdhw16c(src), src.shape[-1])


def _gradient(diff_dst: Array) -> Source:
    """Return a gradient to be formed of two tensors, one of which counts nothing."""
    dz = plain(reorder_ndhwc_to_nCdhw16c(diff_dst), diff_dst.shape[-1])
    x = reorder_ndhwc_to_nCdhw16c(diff_dst[..., ::-1])
    return gradient(dz.data, x, dz.scale, dz.shift, dz.shift)


def _blocked_shape(array: Array) -> tuple[int, ...]:
    return array.shape[0], blocks(array.shape[-1]), *array.shape[1:4], LANES
