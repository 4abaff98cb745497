"""The edges of the graph: exactly the plain reorders, on whole numbers."""

import numpy as np
from checkers import assert_exact, integers, unchanged
from deferred import CHANNELS, SIZES, SLOPES, THREADS, blocked, blocked_shape, deferred, poisoned
from hypothesis import given
from hypothesis import strategies as st

from kernels.base import layout, machine
from kernels.deferred.tensors import plain
from kernels.ops import edges

CASES = {
    "size": SIZES,
    "channels": st.one_of(CHANNELS, st.sampled_from([4, 15, 32])),
    "seed": st.integers(0, 99),
    "threads": THREADS,
}


@given(**CASES)
def test_there_and_back(size, channels, seed, threads):
    machine.set_threads(threads)
    src = integers(np.random.default_rng(seed), *size, channels)
    dst, back = poisoned(*blocked_shape(src.shape)), poisoned(*src.shape)
    with unchanged(src):
        edges.to_blocked(src, dst)
    assert_exact(dst, layout.reorder_ndhwc_to_nCdhw16c(src))
    edges.to_ndhwc(plain(dst, channels), back)
    assert_exact(back, src)


@given(**CASES, slope=SLOPES)
def test_deferred_source(size, channels, slope, seed, threads):
    machine.set_threads(threads)
    data = deferred(np.random.default_rng(seed), (*size, channels), slope)
    source, dst = data.source, poisoned(*size, channels)
    with unchanged(*source[:3]):
        edges.to_ndhwc(source, dst)
    assert_exact(dst, data.value())


def test_nan_of_a_neighbour_stays_out():
    """What is loaded past the last channel is the next voxel's; at the end, what was in memory."""
    for channels in (1, 3, 17):
        src = np.zeros((1, 2, 29, 75, channels), np.float32)
        src[0, 0, 0, 2] = np.nan
        for _ in range(5):
            # Freed at once: the next temporary array may find the NaN in its place.
            [np.full(size, np.nan, np.float32) for size in (16, 32, 40)]
            dst = poisoned(*blocked_shape(src.shape))
            edges.to_blocked(src, dst)
            assert_exact(dst, blocked(src))
