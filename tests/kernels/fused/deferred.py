"""Blocked tensors for the tests of fused kernels, and what deferred ones mean, in float64.

Integers stay exact in float32: data from -4 to 4, scales and shifts that are small whole numbers, slopes
that are 0, 1/2 or 1. Whatever a kernel fills is NaN before, padding lanes and all.
"""

from typing import NamedTuple

import numpy as np
from checkers import Array, assert_exact, integers
from hypothesis import strategies as st

from kernels.base import machine
from kernels.base.simd import LANES
from kernels.deferred.masking import partials
from kernels.deferred.tensors import Mask, Source

CHANNELS = st.sampled_from([1, 3, 16, 17, 40])
SLOPES = st.sampled_from([0.0, 0.5, 1.0])
THREADS = st.sampled_from([1, machine.cores()])
# Odd sizes, one voxel, and a plane of more than one band.
SIZES = st.one_of(
    st.tuples(st.integers(1, 2), *[st.sampled_from([1, 2, 3, 5, 9])] * 3), st.just((1, 2, 29, 75))
)


def lanes(channels: int) -> int:
    """Channels with their padding lanes."""
    return -(-channels // LANES) * LANES


def poisoned(*shape: int, dtype: type = np.float32) -> Array:
    """What a kernel has to fill."""
    return np.full(shape, np.nan if dtype != np.uint8 else 255, dtype)


def blocked(array: Array) -> Array:
    """(MB, D, H, W, C) to (MB, CB, D, H, W, 16), zeros past channel C."""
    MB, D, H, W, C = array.shape
    padded = np.zeros((MB, D, H, W, lanes(C)), array.dtype)
    padded[..., :C] = array
    split = padded.reshape(MB, D, H, W, -1, LANES)
    return np.ascontiguousarray(split.transpose(0, 4, 1, 2, 3, 5))


def blocked_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    MB, D, H, W, C = shape
    return MB, lanes(C) // LANES, D, H, W, LANES


def unblocked(array: Array, channels: int) -> Array:
    """Back; padding lanes must be zero."""
    MB, CB, D, H, W, _ = array.shape
    merged = array.transpose(0, 2, 3, 4, 1, 5).reshape(MB, D, H, W, CB * LANES)
    assert_exact(merged[..., channels:], np.zeros_like(merged[..., channels:]), "padding lanes")
    return np.ascontiguousarray(merged[..., :channels])


def per_image(values: Array) -> Array:
    """(MB, ..., C) of one number an image and channel, to (MB, CB * 16)."""
    MB, C = values.shape[0], values.shape[-1]
    padded = np.zeros((MB, lanes(C)), np.float32)
    padded[:, :C] = values.reshape(MB, C)
    return padded


class Deferred(NamedTuple):
    """A tensor that is still to be normalised, channels last."""

    x: Array  # (MB, D, H, W, C)
    scale: Array  # (MB, 1, 1, 1, C), some negative
    shift: Array  # the same
    mean: Array  # the same
    slope: float

    @property
    def source(self) -> Source:
        arrays = blocked(self.x), per_image(self.scale), per_image(self.shift)
        return Source(*arrays, self.slope)

    @property
    def mask(self) -> Mask:
        source = self.source
        sums = poisoned(2, partials(source.data.shape), source.scale.shape[1], dtype=np.float64)
        return Mask(*source[:4], per_image(self.mean), sums)

    def value(self) -> Array:
        """What it means, in float64."""
        z = self.scale.astype(np.float64) * self.x + self.shift
        return np.where(z > 0, z, self.slope * z)

    def masked(self, dy: Array) -> tuple[Array, Array, Array]:
        """dz, S1 and S2, in float64."""
        z = self.scale.astype(np.float64) * self.x + self.shift
        dz = np.where(z > 0, dy, self.slope * dy)
        axes = (0, 1, 2, 3)
        return dz, dz.sum(axis=axes), (dz * (self.x.astype(np.float64) - self.mean)).sum(axis=axes)


def deferred(generator: np.random.Generator, shape: tuple[int, ...], slope: float) -> Deferred:
    """Whole numbers all over; other ones for each image, as instance norm has them."""
    size = shape[0], 1, 1, 1, shape[-1]
    scale = generator.choice([-2, -1, 1, 2], size).astype(np.float32)
    return Deferred(integers(generator, *shape), scale, *integers(generator, 2, *size), slope)


def totals(mask: Mask, channels: int) -> tuple[Array, Array]:
    """S1 and S2 that a kernel left; padding lanes must be zero."""
    total = mask.sums.sum(axis=1)
    assert_exact(total[:, channels:], np.zeros_like(total[:, channels:]), "padding lanes of sums")
    return total[0, :channels], total[1, :channels]
