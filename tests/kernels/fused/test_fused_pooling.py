"""Fused max pooling: exactly the plain operators, one after the other, on whole numbers."""

import numpy as np
from checkers import assert_exact, integers, normal, unchanged
from deferred import CHANNELS, SLOPES, THREADS, blocked, blocked_shape, deferred, poisoned, totals, unblocked
from hypothesis import given
from hypothesis import strategies as st

from kernels.base import machine
from kernels.ops import pooling

# The U-Net's two, and one with three different sizes.
WINDOWS = st.sampled_from([(2, 2, 2), (1, 2, 2), (3, 1, 2)])


@st.composite
def volumes(draw):
    """Volumes that the largest window fits into, with and without a rest at their end."""
    sizes = [draw(st.integers(low, 9)) for low in (3, 2, 2)]
    sizes = draw(st.sampled_from([sizes, [3, 29, 75]]))
    return (draw(st.integers(1, 2)), *sizes, draw(CHANNELS))


@given(
    shape=volumes(), size=WINDOWS, slope=SLOPES, seed=st.integers(0, 99), threads=THREADS, nan=st.booleans()
)
def test_forward(shape, size, slope, seed, threads, nan):
    machine.set_threads(threads)
    generator = np.random.default_rng(seed)
    data = deferred(generator, shape, slope)
    if nan:
        data.x[generator.random(shape) < 0.1] = np.nan
    wanted, wanted_argmax = pooling.forward(data.value(), size)
    source = data.source
    dst = poisoned(*blocked_shape(wanted.shape))
    argmax = poisoned(*dst.shape, dtype=np.uint8)
    with unchanged(*source[:3]):
        pooling.forward_blocked(source, dst, argmax, size)
    assert_exact(unblocked(dst, shape[-1]), wanted)
    assert_exact(unblocked(argmax, shape[-1]), wanted_argmax)


@given(
    shape=volumes(),
    size=WINDOWS,
    slope=SLOPES,
    seed=st.integers(0, 99),
    threads=THREADS,
    accumulate=st.booleans(),
    masked=st.booleans(),
)
def test_backward(shape, size, slope, seed, threads, accumulate, masked):
    machine.set_threads(threads)
    generator = np.random.default_rng(seed)
    data, channels = deferred(generator, shape, slope), shape[-1]
    pooled, argmax = pooling.forward(data.value(), size)
    diff_dst, before = integers(generator, *pooled.shape), integers(generator, *shape)
    wanted = pooling.backward(diff_dst.astype(np.float64), argmax, shape, size)
    dst = blocked(before) if accumulate else poisoned(*blocked_shape(shape))
    wanted = wanted + before if accumulate else wanted
    mask = data.mask if masked else None
    inputs = blocked(diff_dst), blocked(argmax)
    with unchanged(*inputs, *(mask[:3] if mask else ())):
        pooling.backward_blocked(*inputs, dst, accumulate, mask, size)
    if mask:
        wanted, *wanted_sums = data.masked(wanted)
        for name, *sums in zip(("S1", "S2"), totals(mask, channels), wanted_sums, strict=True):
            assert_exact(*sums, name)
    assert_exact(unblocked(dst, channels), wanted)


def test_repeats_bit_for_bit_whatever_the_threads():
    generator = np.random.default_rng(0)
    shape = (2, 4, 50, 60, 16)
    data = deferred(generator, shape, 0.0)._replace(x=normal(generator, *shape))
    diff_dst = blocked(normal(generator, 2, 2, 25, 30, 16))
    argmax = generator.integers(0, 8, diff_dst.shape).astype(np.uint8)
    results = []
    for threads in (1, machine.cores()):
        machine.set_threads(threads)
        mask, dst = data.mask, poisoned(*blocked_shape(shape))
        pooling.backward_blocked(diff_dst, argmax, dst, mask=mask)
        results.append((dst, mask.sums))
    for first, second in zip(*results, strict=True):
        assert np.isfinite(first).all()
        assert_exact(second, first)
