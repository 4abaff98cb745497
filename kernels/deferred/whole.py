"""The prologues, as passes of their own over whole tensors: for readers that cannot do them.

    normalize        dst = act(scale * x + shift)
    form_gradient    dst = a * dz + b * x + d

Traffic  Everything is read once and written once: what a fused reader saves.
"""

import numpy as np

from kernels.base.arguments import Floats
from kernels.base.jit import parallel_kernel, prange, signed
from kernels.base.simd import LANES, broadcast, fma, load, read, store
from kernels.deferred.normalizing import flat_source
from kernels.deferred.tensors import Gradient, Shape, Source


def normalize(source: Source, dst: Floats) -> None:
    """Write what a deferred source means.

    Parameters
    ----------
    source : Source, data of shape (MB, CB, D, H, W, 16)
    dst : float32 array, the same shape
        Filled, a plain tensor.
    """
    _normalize(flat_source(source), dst.shape, dst.reshape(-1))


def form_gradient(gradient: Gradient, dst: Floats) -> None:
    """Write what a deferred gradient means.

    Parameters
    ----------
    gradient : Gradient, with ``x``
    dst : float32 array, shape=(MB, CB, D, H, W, 16)
        Filled; may be ``dz`` itself.
    """
    dz, x, a, b, d = gradient
    _form_gradient(dz.reshape(-1), x.reshape(-1), dst.shape, a, b, d, dst.reshape(-1))


@parallel_kernel
def _normalize(source: Source, shape: Shape, dst: Floats) -> None:
    MB, CB, D, H, W, _ = shape
    x, scales, shifts, slope = source
    row = H * W * LANES
    for plane in prange(MB * CB * D):
        image = signed(plane) // D
        channel = image % CB * LANES
        scale, shift = load(scales, channel), load(shifts, channel)
        slopes = broadcast(np.float32(slope))
        for i in range(plane * row, (plane + 1) * row, LANES):
            store(dst, i, read(load(x, i), scale, shift, slopes))


@parallel_kernel
def _form_gradient(dz: Floats, x: Floats, shape: Shape, a: Floats, b: Floats, d: Floats, dst: Floats) -> None:
    MB, CB, D, H, W, _ = shape
    row = H * W * LANES
    for plane in prange(MB * CB * D):
        image = signed(plane) // D
        channel = image % CB * LANES
        slope, tilt, level = load(a, channel), load(b, channel), load(d, channel)
        for i in range(plane * row, (plane + 1) * row, LANES):
            store(dst, i, fma(slope, load(dz, i), fma(tilt, load(x, i), level)))
