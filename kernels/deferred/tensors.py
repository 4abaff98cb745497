"""What travels between fused kernels: NumPy arrays and a float, in named tuples that Numba takes.

Deferred normalisation
    A convolution stores its raw output ``x``. Whoever reads ``x`` applies batch norm and activation, channel
    by channel: ``act(scale * x + shift)`` with ``act(v) = v where v > 0, else slope * v``. This pair of
    tensor and promise is a `Source`. A tensor that is read as it is has scale 1, shift 0, slope 1 (`plain`).
Deferred gradient
    The gradient of batch norm is ``a * dz + b * x + d`` with three numbers a channel, which are known only
    after all of ``dz``. So ``dz`` is stored, and the convolution that needs the gradient forms it while it
    reads: a `Source` of two tensors (`gradient`).
Mask
    Several kernels may add to the gradient ``dy`` of ``y = act(scale * x + shift)``. The last one turns the
    sum into ``dz = dy * act'(scale * x + shift)``, and gathers the two sums that batch norm needs. A `Mask`
    holds what that takes.

Vectors of numbers a channel (``scale``, ``shift``, ``mean``, ``also``) have a row for each image: shape
(MB, CB * 16), with zeros past the last channel. So the numbers of block ``cb`` of image ``n`` start at
``(n * CB + cb) * 16``. Instance norm has other numbers for each image; batch norm has equal rows, and the
kernels need not know which norm it is. Where a kernel takes one source, mask or tensor less, it gets an empty
array in its place, so that each kernel is compiled once.
"""

from typing import NamedTuple

import numpy as np

from kernels.base.arguments import Doubles, Floats
from kernels.base.simd import LANES

Shape = tuple[int, int, int, int, int, int]

_NOTHING = np.empty((0, 0, 0, 0, 0, LANES), np.float32)
_NO_CHANNELS = np.empty((0, 0), np.float32)


class Source(NamedTuple):
    """Means ``act(scale * data + shift)``, or of two tensors ``scale * data + also * other + shift``."""

    data: Floats  # (MB, CB, D, H, W, 16)
    scale: Floats  # (MB, CB * 16)
    shift: Floats  # (MB, CB * 16)
    slope: float  # of the activation below 0: 0 is ReLU, 1 is none
    other: Floats = _NOTHING  # the shape of ``data``, or of size 0
    also: Floats = _NO_CHANNELS  # (MB, CB * 16)


class Mask(NamedTuple):
    """How to turn ``dy`` into ``dz``, and where to put the sums of ``dz`` and ``dz * (x - mean)``."""

    x: Floats  # (MB, CB, D, H, W, 16)
    scale: Floats  # (MB, CB * 16)
    shift: Floats  # (MB, CB * 16)
    slope: float
    mean: Floats  # (MB, CB * 16)
    sums: Doubles  # (2, partials, CB * 16), filled


NO_SOURCE = Source(_NOTHING, _NO_CHANNELS, _NO_CHANNELS, 1.0)
NO_MASK = Mask(_NOTHING, _NO_CHANNELS, _NO_CHANNELS, 1.0, _NO_CHANNELS, np.empty((2, 0, 0), np.float64))


def plain(data: Floats, channels: int) -> Source:
    """Source that means its data as they are.

    Parameters
    ----------
    data : float32 array, shape=(MB, CB, D, H, W, 16)
    channels : int
        How many of the ``CB * 16`` lanes are channels.
    """
    scale = np.zeros((data.shape[0], data.shape[1] * LANES), np.float32)
    scale[:, :channels] = 1.0
    return Source(data, scale, np.zeros_like(scale), 1.0)


def gradient(dz: Floats, x: Floats, a: Floats, b: Floats, d: Floats) -> Source:
    """Source that means ``a * dz + b * x + d``; with an empty ``x``, ``a * dz + d``."""
    return Source(dz, a, d, 1.0, x, b)
