"""A convolution as the compiled net runs it: the top of the ladder.

Tensors are in blocks of 16 channels and stay so; weights are packed, which a step does once and is not timed
(where channels are many they are transformed as they are used, and that is). The source is normalised while
it is read, the gradient of batch norm is formed, and sums are gathered of what is written, all with numbers
that change nothing: the result is that of every other rung. Direct or a form of Winograd: the fastest on one
core is taken, for each direction of each layer.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from kernels.base import machine
from kernels.base.arguments import Array, Triple
from kernels.base.buffers import empty
from kernels.base.conv_shapes import Geometry, geometry
from kernels.base.layout import blocks
from kernels.base.reorder import reorder_nCdhw16c_to_ndhwc, reorder_ndhwc_to_nCdhw16c
from kernels.base.simd import LANES
from kernels.conv3d import operator as conv3d
from kernels.conv3d import winograd
from kernels.deferred.tensors import NO_MASK, NO_SOURCE, Gradient, Mask, Source, plain
from kernels.ladder.direct import FEW_CHANNELS
from tinyunet.benchmarks.problem import convolution_arrays
from tinyunet.benchmarks.timing import timed

# Direct, Winograd along all axes, and along d and h only, for a first layer.
_TILES = (None, *winograd.TILES, (2, 2, 1), (4, 4, 1))
_SECONDS = 0.05


class Case(NamedTuple):
    """What runs one direction of a convolution, and what brings its result into the usual layout."""

    run: Callable[[], None]
    result: Callable[[], Array]

    def compute(self) -> Array:
        """Run, and return the result: channels last, or weights."""
        self.run()
        return self.result()


def cases(g: Geometry) -> dict[str, Case]:
    """Return what runs each direction of a convolution with padding "same", on random arrays.

    Parameters
    ----------
    g : Geometry
        Of stride 1, and as high as wide. The algorithm is that of the whole layer, a cube.
    """
    cube = geometry((1, g.OH, *g.src_shape[2:]), g.weights_shape)
    return {name: _MAKERS[name](g, _fastest(name, cube)) for name in _MAKERS}


@functools.cache
def _fastest(direction: str, g: Geometry) -> Triple | None:
    """Return the tile of the fastest algorithm on one core; None is direct."""
    threads = machine.threads()
    machine.set_threads(1)
    times = {}
    for tile in _TILES:
        try:
            case = _MAKERS[direction](g, tile)
        except ValueError:  # this convolution has no such form
            continue
        times[tile] = min(timed(case.run, _SECONDS)[0])
    machine.set_threads(threads)
    return min(times, key=times.__getitem__)


def _forward(g: Geometry, tile: Triple | None) -> Case:
    src, weights, _ = convolution_arrays(g.src_shape, g.weights_shape)
    p = _plan(g, tile, keeps_both=False)
    packed = empty(conv3d.packed_shape(p))
    conv3d.pack(p, weights, packed)
    source, dst = _source(src), _blocked_like(g.dst_shape)
    bias, moments = np.zeros(blocks(g.OC) * LANES, np.float32), np.empty(conv3d.moments_shape(p))
    return Case(
        lambda: conv3d.forward(p, source, NO_SOURCE, packed, bias, dst, moments),
        lambda: reorder_nCdhw16c_to_ndhwc(dst, g.OC),
    )


def _backward_data(g: Geometry, tile: Triple | None) -> Case:
    src, weights, diff_dst = convolution_arrays(g.src_shape, g.weights_shape)
    p = conv3d.plan((g.OC, 0), (g.IC, 0), g.src_shape[:4], (g.KD, g.KH, g.KW), tile)
    packed = empty(conv3d.packed_shape(p))
    conv3d.pack(p, weights, packed, adjoint=True)
    gradient, dst = _gradient(diff_dst), _blocked_like(g.src_shape)
    x = plain(reorder_ndhwc_to_nCdhw16c(src), g.IC)
    mask = Mask(*x, x.shift, np.empty(conv3d.sums_shape(p, 0)))
    return Case(
        lambda: conv3d.backward_data(p, gradient, packed, (dst, NO_MASK.x), (mask, NO_MASK)),
        lambda: reorder_nCdhw16c_to_ndhwc(dst, g.IC),
    )


def _backward_weights(g: Geometry, tile: Triple | None) -> Case:
    src, weights, diff_dst = convolution_arrays(g.src_shape, g.weights_shape)
    p = _plan(g, tile, keeps_both=True)
    source, gradient = _source(src), _gradient(diff_dst)
    diff_weights, diff_bias = np.empty_like(weights), np.empty(g.OC, np.float32)
    return Case(
        lambda: conv3d.backward_weights(p, source, NO_SOURCE, gradient, diff_weights, diff_bias),
        lambda: diff_weights,
    )


def _plan(g: Geometry, tile: Triple | None, *, keeps_both: bool) -> conv3d.Plan:
    return conv3d.plan(
        (g.IC, 0),
        (g.OC, 0),
        g.dst_shape[:4],
        (g.KD, g.KH, g.KW),
        tile,
        channels_last=g.IC <= FEW_CHANNELS,
        keeps_both=keeps_both,
    )


def _source(src: Array) -> Source:
    """Return a source to be normalised, by a scale of 1; a first layer's as it is."""
    if src.shape[-1] <= FEW_CHANNELS:
        return NO_SOURCE._replace(data=src)
    return plain(reorder_ndhwc_to_nCdhw16c(src), src.shape[-1])


def _gradient(diff_dst: Array) -> Gradient:
    """Return a gradient to be formed of two tensors, one of which counts nothing."""
    dz = plain(reorder_ndhwc_to_nCdhw16c(diff_dst), diff_dst.shape[-1])
    x = reorder_ndhwc_to_nCdhw16c(diff_dst[..., ::-1])
    return Gradient(dz.data, x, dz.scale, dz.shift, dz.shift)


def _blocked_like(shape: tuple[int, ...]) -> Array:
    *voxels, channels = shape
    return empty((voxels[0], blocks(channels), *voxels[1:], LANES))


_MAKERS: dict[str, Callable[[Geometry, Triple | None], Case]] = {
    "forward": _forward,
    "backward_data": _backward_data,
    "backward_weights": _backward_weights,
}
