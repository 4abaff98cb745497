"""The matrices of minimal filtering are exact, and the compiled transforms multiply by them."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.base.jit import kernel
from kernels.conv3d.transform import Grid, scratch_vectors, transform_tile
from kernels.ladder.cook_toom import DIFF_DST, DIFF_WEIGHTS, INPUT, OUTPUT, WEIGHTS, matrix, sizes, transpose

fractions = st.integers(-50, 50).map(Fraction)


def times(rows, vector):
    return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in rows]


@pytest.mark.parametrize("m", [2, 4])
@given(data=st.data())
def test_minimal_filtering_is_exact_in_fractions(m, data):
    d = data.draw(st.lists(fractions, min_size=m + 2, max_size=m + 2))
    g = data.draw(st.lists(fractions, min_size=3, max_size=3))
    products = [a * b for a, b in zip(times(matrix(WEIGHTS, m), g), times(matrix(INPUT, m), d), strict=True)]
    direct = [sum(d[i + k] * g[k] for k in range(3)) for i in range(m)]
    assert times(matrix(OUTPUT, m), products) == direct


@pytest.mark.parametrize("m", [2, 4])
@given(data=st.data())
def test_weight_gradient_is_exact_in_fractions(m, data):
    d = data.draw(st.lists(fractions, min_size=m + 2, max_size=m + 2))
    y = data.draw(st.lists(fractions, min_size=m, max_size=m))
    products = [a * b for a, b in zip(times(matrix(DIFF_DST, m), y), times(matrix(INPUT, m), d), strict=True)]
    direct = [sum(d[i + k] * y[i] for i in range(m)) for k in range(3)]
    assert times(matrix(DIFF_WEIGHTS, m), products) == direct


def test_pairs_of_kinds_are_transposes():
    for m in (2, 4):
        assert matrix(DIFF_DST, m) == transpose(matrix(OUTPUT, m))
        assert matrix(DIFF_WEIGHTS, m) == transpose(matrix(WEIGHTS, m))


def make_transform(kind, md, mh, mw):
    @kernel
    def run(src, strides, dst, dst_strides, scratch):
        transform_tile(Grid(src, 0, strides), Grid(dst, 0, dst_strides), scratch, 0, kind, md, mh, mw)

    return run


@pytest.mark.parametrize("kind", [INPUT, OUTPUT, WEIGHTS, DIFF_DST, DIFF_WEIGHTS])
@pytest.mark.parametrize("tile", [(2, 2, 2), (2, 4, 4), (1, 4, 4)], ids=str)
def test_compiled_transform_equals_its_matrices(kind, tile):
    shapes = [sizes(kind, m) for m in tile]
    generator = np.random.default_rng(0)
    src = generator.integers(-9, 9, [n for n, _ in shapes] + [16]).astype(np.float32)
    dst = np.full([n for _, n in shapes] + [16], np.nan, np.float32)
    scratch = np.full(scratch_vectors(kind, *tile) * 16, np.nan, np.float32)
    strides = [tuple(s // 4 for s in array.strides[:3]) for array in (src, dst)]
    run = make_transform(kind, *tile)
    run(src.reshape(-1), strides[0], dst.reshape(-1), strides[1], scratch)
    matrices = [np.array(matrix(kind, m), dtype=np.float64) for m in tile]
    exact = np.einsum("ai,bj,ck,ijkl->abcl", *matrices, src.astype(np.float64))
    # Integers stay exact, but for entries like 1/6 and 2/3.
    whole = all(entry.denominator == 1 for m in tile for row in matrix(kind, m) for entry in row)
    assert np.abs(dst - exact).max() <= (0.0 if whole else 1e-6 * np.abs(exact).max())


def test_transforms_run_only_in_kernels():
    with pytest.raises(NotImplementedError, match="compiled kernel"):
        transform_tile(*[None] * 8)
