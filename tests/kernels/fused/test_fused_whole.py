"""Deferred sources and gradients written out, exactly on integers."""

import numpy as np
from checkers import assert_exact, integers, unchanged
from deferred import CHANNELS, SIZES, SLOPES, blocked, per_image, poisoned, unblocked
from hypothesis import given
from hypothesis import strategies as st

from kernels.deferred.normalizing import normalize
from kernels.deferred.tensors import Source, gradient


@given(SIZES, CHANNELS, SLOPES, st.integers(0, 99))
def test_normalize(size, channels, slope, seed):
    generator = np.random.default_rng(seed)
    x, scale, shift = (integers(generator, *s, channels) for s in (size, *[(size[0], 1, 1, 1)] * 2))
    source = Source(blocked(x), per_image(scale), per_image(shift), slope)
    dst = poisoned(*source.data.shape)
    with unchanged(source.data, source.scale, source.shift):
        normalize(source, dst)
    expected = x * scale + shift
    assert_exact(unblocked(dst, channels), np.where(expected > 0, expected, slope * expected))


@given(SIZES, CHANNELS, st.integers(0, 99))
def test_form_gradient_also_in_place(size, channels, seed):
    generator = np.random.default_rng(seed)
    dz, x, a, b, d = (integers(generator, *s, channels) for s in (size, size, *[(size[0], 1, 1, 1)] * 3))
    vectors = [per_image(v) for v in (a, b, d)]
    source = gradient(blocked(dz), blocked(x), *vectors)
    dst = poisoned(*source.data.shape)
    with unchanged(source.data, source.other, *vectors):
        normalize(source, dst)
    assert_exact(unblocked(dst, channels), a * dz + b * x + d)
    normalize(source, source.data)
    assert_exact(source.data, dst)
