"""Every rung of the convolution ladder against the definition, exactly, on small integers.

Products and sums of small integers stay below 2^24, so float32 arithmetic has no rounding and any
order of summation gives the same bits: the check is ``==``.
"""

import os
import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from kernels import conv3d
from kernels.base import machine
from kernels.conv3d import winograd, winograd_bricks
from kernels.ladder import blocked, direct, im2col, minimal_filtering, naive
from kernels.ladder.shapes import geometry

RUNGS = [im2col, blocked, direct]
CHANNELS = [1, 3, 4, 5, 16, 17, 32, 48, 64]


def integers(generator, *shape, dtype=np.float32):
    return generator.integers(-3, 4, shape).astype(dtype)


@st.composite
def convolutions(draw):
    """Shapes, stride and padding, truly 3-D; sizes from 1 up, kernels 1 to 5 along each axis."""
    padding = draw(st.sampled_from(["same", "valid"]))
    kernel = tuple(draw(st.integers(1, 5)) for _ in range(3))
    size = [draw(st.integers(k if padding == "valid" else 1, 9)) for k in kernel]
    # Along W each is compiled by itself.
    stride = tuple(draw(st.sampled_from(of)) for of in ([1, 1, 2, 3], [1, 1, 2, 4], [1, 1, 2]))
    MB = draw(st.sampled_from([1, 1, 2]))
    IC, OC = draw(st.sampled_from(CHANNELS)), draw(st.sampled_from(CHANNELS))
    return (MB, *size, IC), (OC, IC, *kernel), stride, padding


def all_directions(rung, src, weights, bias, diff_dst, stride, padding):
    return (
        rung.forward(src, weights, bias, stride, padding),
        rung.backward_data(diff_dst, weights, src.shape, stride, padding),
        *rung.backward_weights(src, diff_dst, weights.shape[2:], stride, padding),
    )


def problem(src_shape, weights_shape, stride, padding, seed=0, dtype=np.float32):
    generator = np.random.default_rng(seed)
    dst_shape = geometry(src_shape, weights_shape, stride, padding).dst_shape
    arrays = [src_shape, weights_shape, weights_shape[:1], dst_shape]
    src, weights, bias, diff_dst = (integers(generator, *shape, dtype=dtype) for shape in arrays)
    return src, weights, bias, diff_dst, stride, padding


NAMES = ["dst", "diff_src", "diff_weights", "diff_bias"]


@pytest.mark.parametrize("rung", RUNGS, ids=lambda rung: rung.__name__.split(".")[-1])
@given(case=convolutions(), seed=st.integers(0, 1000), threads=st.sampled_from([1, 2]))
def test_rung_equals_naive_exactly(rung: ModuleType, case, seed, threads):
    arguments = problem(*case, seed=seed)
    before = [array.copy() for array in arguments[:4]]
    expected = all_directions(naive, *arguments)
    machine.set_threads(min(threads, machine.threads()))
    actual = all_directions(rung, *arguments)
    for name, got, wanted in zip(NAMES, actual, expected, strict=True):
        assert got.dtype == np.float32, name
        assert got.flags.c_contiguous, name
        assert_array_equal(got, wanted, err_msg=name)
    for array, copy in zip(arguments, before, strict=False):
        assert_array_equal(array, copy, err_msg="an input was changed")


@pytest.mark.parametrize(
    ("src_shape", "weights_shape"),
    [
        ((1, 1, 1, 1, 1), (1, 1, 3, 3, 3)),
        ((1, 3, 24, 25, 16), (16, 16, 3, 3, 3)),
        ((1, 3, 13, 12, 32), (64, 32, 3, 3, 3)),
        ((1, 6, 6, 6, 64), (128, 64, 3, 3, 3)),
        ((1, 1, 20, 21, 4), (16, 4, 1, 3, 3)),
        ((2, 5, 5, 5, 16), (4, 16, 1, 1, 1)),
    ],
)
def test_direct_on_shapes_of_the_unet(src_shape, weights_shape):
    arguments = problem(src_shape, weights_shape, 1, "same")
    expected = all_directions(naive, *arguments)
    for name, got, wanted in zip(NAMES, all_directions(direct, *arguments), expected, strict=True):
        assert_array_equal(got, wanted, err_msg=name)


@pytest.mark.parametrize("rung", [naive, *RUNGS], ids=lambda rung: rung.__name__.split(".")[-1])
def test_error_against_float64(rung: ModuleType):
    """Rounding of N products summed in float32 grows no faster than N, about sqrt(N) in practice.

    27 * 32 = 864 products: sqrt(864) * 2^-24 is 1.8e-6 of the largest output; four times that is
    allowed. `backward_weights` sums over 2 * 6 * 7 * 8 = 672 voxels, fewer.
    """
    generator = np.random.default_rng(1)
    src = generator.standard_normal((2, 6, 7, 8, 32)).astype(np.float32)
    weights = generator.standard_normal((16, 32, 3, 3, 3)).astype(np.float32)
    bias = generator.standard_normal(16).astype(np.float32)
    diff_dst = generator.standard_normal((2, 6, 7, 8, 16)).astype(np.float32)
    single = all_directions(rung, src, weights, bias, diff_dst, 1, "same")
    arrays = (array.astype(np.float64) for array in (src, weights, bias, diff_dst))
    exact = all_directions(naive, *arrays, 1, "same")
    for name, got, wanted in zip(NAMES, single, exact, strict=True):
        error = np.abs(got - wanted).max() / np.abs(wanted).max()
        assert error < 4 * np.sqrt(864) * 2**-24, name


# Largest error allowed, of the largest value. The transforms' constants amplify rounding; each bound
# is four times what standard normal data show, and 5e-5 is the most that "fast" may take.
WINOGRAD_ERRORS = {(2, 2, 2): 2e-6, (2, 4, 4): 6e-6, (4, 4, 4): 1.2e-5, (1, 2, 2): 2e-6, (1, 4, 4): 6e-6}


def check_winograd(tile, arrays, padding, bound):
    """All directions in float32 are within ``bound`` of float64, of the largest value."""
    src, weights, bias, diff_dst = (array.astype(np.float32) for array in arrays)
    single = (
        winograd.forward(src, weights, bias, 1, padding, tile),
        winograd.backward_data(diff_dst, weights, src.shape, 1, padding, tile),
        *winograd.backward_weights(src, diff_dst, weights.shape[2:], 1, padding, tile),
    )
    check_errors(single, arrays, padding, bound)


def check_errors(single, arrays, padding, bound):
    """Results of all directions are within ``bound`` of float64, of the largest value."""
    exact = all_directions(im2col, *arrays, 1, padding)
    for name, got, wanted in zip(NAMES, single, exact, strict=True):
        assert got.shape == wanted.shape, name
        assert got.dtype == np.float32, name
        assert got.flags.c_contiguous, name
        error = np.abs(got - wanted).max() / np.abs(wanted).max()
        assert error < bound, name


@pytest.mark.parametrize("tile", winograd.TILES, ids=str)
@given(data=st.data(), seed=st.integers(0, 1000))
@settings(max_examples=6)
def test_winograd_against_float64(tile, data, seed):
    """Sizes that the tile does not divide, channels that are no multiple of 16, both paddings."""
    padding = data.draw(st.sampled_from(["same", "valid"]))
    kernel = tuple(3 if m > 1 else 1 for m in tile)
    arrays = normal_arrays(data.draw, kernel, padding, seed)
    check_winograd(tile, arrays, padding, WINOGRAD_ERRORS[tile])


def normal_arrays(draw, kernel, padding, seed):
    """Arrays of a convolution in float64, of a size and channels that are drawn."""
    size = [draw(st.sampled_from([3, 6, 11]) if k == 3 else st.just(1)) for k in kernel]
    MB, IC, OC = (draw(st.sampled_from(c)) for c in ([1, 2], [1, 16, 20], [3, 16]))
    generator = np.random.default_rng(seed)
    src = generator.standard_normal((MB, *size, IC))
    weights = generator.standard_normal((OC, IC, *kernel))
    bias = generator.standard_normal(OC)
    shape = geometry(src.shape, weights.shape, 1, padding).dst_shape
    return src, weights, bias, generator.standard_normal(shape)


@given(data=st.data(), seed=st.integers(0, 1000), threads=st.sampled_from([1, 2]))
def test_minimal_filtering_against_float64(data, seed, threads):
    """The bound of F(2, 2, 2); inputs stay as they are."""
    padding = data.draw(st.sampled_from(["same", "valid"]))
    arrays = normal_arrays(data.draw, (3, 3, 3), padding, seed)
    machine.set_threads(min(threads, machine.threads()))
    single = [array.astype(np.float32) for array in arrays]
    copies = [array.copy() for array in single]
    results = all_directions(minimal_filtering, *single, 1, padding)
    check_errors(results, arrays, padding, WINOGRAD_ERRORS[2, 2, 2])
    for array, copy in zip(single, copies, strict=True):
        assert_array_equal(array, copy, err_msg="an input was changed")


def test_minimal_filtering_refuses_what_it_cannot_do():
    src, weights = zeros(1, 4, 4, 4, 2), zeros(3, 2, 3, 3, 3)
    for arguments in ((src, weights, None, 2), (src, zeros(3, 2, 1, 3, 3)), (src, zeros(3, 2, 5, 5, 5))):
        with pytest.raises(ValueError, match="minimal_filtering takes 3x3x3 and 1"):
            minimal_filtering.forward(*arguments)
    with pytest.raises(ValueError, match="minimal_filtering takes"):
        minimal_filtering.backward_data(zeros(1, 4, 4, 4, 3), zeros(3, 2, 1, 1, 1), (1, 4, 4, 4, 2))
    with pytest.raises(ValueError, match="minimal_filtering takes"):
        minimal_filtering.backward_weights(src, zeros(1, 4, 4, 4, 3), (1, 1, 1))


def test_ladder_and_operators_name_the_same_rungs():
    assert (conv3d.direct, conv3d.naive) == (direct, naive)
    assert (conv3d.im2col, conv3d.blocked) == (im2col, blocked)


@pytest.mark.parametrize("tile", winograd.TILES, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_winograd_of_many_channels(tile, seed):
    """Errors grow with the channels that are summed: with those of the net's bottom, they stay in bounds."""
    IC, OC, kernel = 256, 32, tuple(3 if m > 1 else 1 for m in tile)
    generator = np.random.default_rng(seed)
    src = np.maximum(generator.standard_normal((1, 6, 7, 9, IC)), 0.0)
    weights = generator.standard_normal((OC, IC, *kernel)) / np.sqrt(IC)
    diff_dst = generator.standard_normal((1, 6, 7, 9, OC))
    arrays = [src, weights, np.zeros(OC), diff_dst]
    check_winograd(tile, arrays, "same", 4 * WINOGRAD_ERRORS[tile])


@pytest.mark.parametrize("form", ["brick after brick", "pair after pair"])
@given(
    tile=st.sampled_from(winograd.TILES),
    size=st.tuples(*[st.sampled_from([1, 4, 9, 13])] * 3),
    MB=st.sampled_from([1, 3]),
    IC=st.sampled_from([1, 16, 33]),
    OC=st.sampled_from([5, 32, 48]),
)
@settings(max_examples=12)
def test_both_forms_of_weight_gradient(form, tile, size, MB, IC, OC):
    """Whatever there are more of, channels or tiles: as exact, and pair after pair for any threads."""
    limit = np.inf if form == "brick after brick" else 0.0
    generator = np.random.default_rng(IC)
    src, diff_dst = (generator.standard_normal((MB, *size, C)) for C in (IC, OC))
    kernel = tuple(3 if m > 1 else 1 for m in tile)
    exact = im2col.backward_weights(src, diff_dst, kernel, 1, "same")
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd_bricks, "_SUMS_PER_TILE", limit)
        for count in (1, machine.cores()):
            machine.set_threads(count)
            arrays = src.astype(np.float32), diff_dst.astype(np.float32)
            results.append(winograd.backward_weights(*arrays, kernel, 1, "same", tile))
    for name, one, got, wanted in zip(NAMES[2:], *results, exact, strict=True):
        error = np.abs(got - wanted).max() / np.abs(wanted).max()
        assert error < WINOGRAD_ERRORS[tile], name
        if form == "pair after pair":
            assert_array_equal(got, one, err_msg=name)


def test_winograd_refuses_what_it_cannot_do():
    src, weights = zeros(1, 4, 4, 4, 2), zeros(3, 2, 3, 3, 3)
    for arguments in (
        (src, weights, None, 2),
        (src, zeros(3, 2, 1, 3, 3), None, 1, "same", (2, 4, 4)),
        (src, zeros(3, 2, 5, 5, 5)),
    ):
        with pytest.raises(ValueError, match="has no Winograd form"):
            winograd.forward(*arguments)
    with pytest.raises(ValueError, match=r"tile is \(3, 3, 3\); it must be one of"):
        winograd.forward(src, weights, None, 1, "same", (3, 3, 3))


@example(case=((1, 5, 4, 11, 17), (3, 17, 2, 3, 2), (3, 4, 3), "same"), seed=0)
@example(case=((1, 5, 4, 11, 3), (17, 3, 2, 3, 2), (3, 4, 5), "valid"), seed=0)
@given(case=convolutions(), seed=st.integers(0, 1000))
def test_adjoint_identity(case, seed):
    """<conv x, y> = <x, backward_data y> = <w, backward_weights(x, y)>, exactly on integers."""
    src, weights, _, diff_dst, stride, padding = problem(*case, seed=seed)
    dst = conv3d.forward(src, weights, None, stride, padding)
    diff_src = conv3d.backward_data(diff_dst, weights, src.shape, stride, padding)
    diff_weights, _ = conv3d.backward_weights(src, diff_dst, weights.shape[2:], stride, padding)
    product = np.vdot(dst.astype(np.float64), diff_dst)
    assert product == np.vdot(src.astype(np.float64), diff_src)
    assert product == np.vdot(weights.astype(np.float64), diff_weights)


def test_repeats_bit_for_bit_whatever_the_threads():
    generator = np.random.default_rng(2)
    src = generator.standard_normal((1, 9, 10, 11, 16)).astype(np.float32)
    weights = generator.standard_normal((32, 16, 3, 3, 3)).astype(np.float32)
    diff_dst = generator.standard_normal((1, 9, 10, 11, 32)).astype(np.float32)
    results = []
    for threads in (1, machine.cores(), machine.cores()):
        machine.set_threads(threads)
        results.append(all_directions(direct, src, weights, None, diff_dst, 1, "same"))
    for name, *values in zip(NAMES, *results, strict=True):
        assert_array_equal(values[0], values[1], err_msg=name)
        assert_array_equal(values[1], values[2], err_msg=name)


def test_nan_in_stale_memory_does_not_leak():
    """Scratchpads are reused: what an earlier call left there, NaN too, must not reach a result."""
    poison = np.full((1, 7, 7, 7, 64), np.nan, np.float32)
    wide = np.full((64, 64, 3, 3, 3), np.nan, np.float32)
    all_directions(direct, poison, wide, None, poison, 1, "same")
    arguments = problem((1, 5, 4, 6, 20), (9, 20, 3, 3, 3), 1, "same")
    expected = all_directions(naive, *arguments)
    for name, got, wanted in zip(NAMES, all_directions(direct, *arguments), expected, strict=True):
        assert_array_equal(got, wanted, err_msg=name)


def test_nan_in_the_source_shows_in_the_result():
    src = np.zeros((1, 3, 3, 3, 4), np.float32)
    src[0, 1, 1, 1, 2] = np.nan
    assert np.isnan(direct.forward(src, np.ones((5, 4, 3, 3, 3), np.float32))).all()


def test_non_contiguous_arguments():
    """Views (every other voxel, channels first) give what their copies give."""
    src, weights, bias, diff_dst, *rest = problem((2, 4, 5, 6, 16), (20, 16, 3, 3, 3), 1, "same")
    expected = all_directions(direct, src, weights, bias, diff_dst, *rest)
    views = []
    for array in (src, weights, bias, diff_dst):
        spread = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), np.float32)
        spread[..., ::2] = array
        views.append(spread[..., ::2])
    for rung in [naive, *RUNGS]:
        for name, got, wanted in zip(NAMES, all_directions(rung, *views, *rest), expected, strict=True):
            assert_array_equal(got, wanted, err_msg=f"{rung.__name__} {name}")


def test_plan_takes_float64():
    src, weights, bias, *_ = problem((1, 3, 3, 3, 2), (3, 2, 3, 3, 3), 1, "same", dtype=np.float64)
    dst = conv3d.forward(src, weights, bias)
    assert dst.dtype == np.float64
    assert_array_equal(dst, naive.forward(src, weights, bias))


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


@pytest.mark.parametrize("rung", [conv3d, naive, *RUNGS, minimal_filtering], ids=lambda rung: rung.__name__)
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda r: r.forward(zeros(3, 3, 3, 4), zeros(2, 4, 3, 3, 3)), ValueError, "src has shape"),
        (lambda r: r.forward(zeros(1, 3, 3, 3, 4), zeros(4, 3, 3, 3)), ValueError, "weights have"),
        (lambda r: r.forward(zeros(1, 3, 3, 3, 4), zeros(2, 5, 3, 3, 3)), ValueError, "4 channels"),
        (
            lambda r: r.forward(zeros(1, 3, 3, 3, 4), zeros(2, 4, 3, 3, 3), zeros(3)),
            ValueError,
            "bias has shape",
        ),
        (
            lambda r: r.forward(zeros(1, 3, 3, 3, 4), zeros(2, 4, 3, 3, 6)),
            ValueError,
            "each size must be 1 to 5",
        ),
        (
            lambda r: r.forward(zeros(1, 3, 3, 3, 4), zeros(2, 4, 3, 3, 3), None, 0),
            ValueError,
            "stride must be three whole numbers from 1 on, got 0",
        ),
        (
            lambda r: r.forward(zeros(1, 3, 3, 3, 4), zeros(2, 4, 3, 3, 3), None, 1, "full"),
            ValueError,
            "padding is 'full'",
        ),
        (
            lambda r: r.forward(zeros(1, 2, 3, 3, 4), zeros(2, 4, 3, 3, 3), None, 1, "valid"),
            ValueError,
            "larger than src",
        ),
        (
            lambda r: r.forward(zeros(1, 3, 3, 3, 4), zeros(2, 4, 3, 3, 3, dtype=np.float64)),
            TypeError,
            "weights is float64",
        ),
        (
            lambda r: r.backward_data(zeros(1, 3, 3, 2, 2), zeros(2, 4, 3, 3, 3), (1, 3, 3, 3, 4)),
            ValueError,
            "diff_dst has shape",
        ),
        (
            lambda r: r.backward_weights(zeros(1, 3, 3, 3, 4), zeros(1, 2, 3, 3, 2), (3, 3, 3)),
            ValueError,
            "diff_dst has shape",
        ),
        (
            lambda r: r.backward_weights(zeros(1, 3, 3, 3, 4), zeros(1, 3, 3, 3, 2), (3, 3)),
            ValueError,
            "kernel must be three whole numbers",
        ),
    ],
)
def test_bad_arguments_are_named(rung, call, error, message):
    with pytest.raises(error, match=message.replace("(", r"\(")) as raised:
        call(rung)
    assert "\n" not in str(raised.value)


def test_a_list_is_no_array():
    src, weights, bias, diff_dst, *_ = problem((1, 3, 3, 3, 2), (2, 2, 3, 3, 3), 1, "same")
    for name, call in {
        "src": lambda: conv3d.forward(src.tolist(), weights),
        "weights": lambda: conv3d.forward(src, weights.tolist()),
        "bias": lambda: conv3d.forward(src, weights, bias.tolist()),
        "diff_dst": lambda: conv3d.backward_data(diff_dst.tolist(), weights, src.shape),
    }.items():
        with pytest.raises(TypeError, match=f"{name} must be a NumPy array, got list"):
            call()
    with pytest.raises(TypeError, match="diff_dst must be a NumPy array, got list"):
        conv3d.backward_weights(src, diff_dst.tolist(), (3, 3, 3))


def test_avx2_passes_the_same_tests():
    """Compiled for a Haswell, tiles are smaller and vectors are halves; the results are the same."""
    if os.environ.get("NUMBA_CPU_NAME"):
        pytest.skip("this is the run for another processor")
    environment = dict(os.environ, NUMBA_CPU_NAME="haswell", HYPOTHESIS_PROFILE="dev")
    command = [sys.executable, "-m", "pytest", __file__, "-p", "no:cacheprovider"]
    command += ["-k", "direct and exactly or shapes_of_the_unet or instruction_set"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout[-3000:]
    assert "passed" in run.stdout


def test_instruction_set_follows_numba_cpu_name():
    if os.environ.get("NUMBA_CPU_NAME") == "haswell":
        assert machine.instruction_set() == "avx2"
        assert machine.tile_vectors() == 6
    else:
        assert machine.tile_vectors() in (2, 6, 24)


@given(
    OW=st.integers(1, 100), OCB=st.integers(1, 17), KW=st.integers(1, 5), width=st.sampled_from([1, 3, 4, 16])
)
def test_tiles_fit_registers_and_output(OW, OCB, KW, width):
    tile = direct.tile_shape(OW, OCB)
    assert tile.wide * tile.cols <= machine.tile_vectors()
    assert tile.wide <= OW
    assert OCB % tile.cols == 0
    inputs = direct.weight_tile(KW, width)
    assert width % inputs == 0
    assert inputs == 1 or KW * inputs <= machine.tile_vectors()


def test_a_kernel_of_one_number():
    src, diff_dst = np.ones((1, 3, 4, 5, 2), np.float32), np.ones((1, 3, 4, 5, 3), np.float32)
    expected, _ = naive.backward_weights(src, diff_dst, 3)
    found, _ = blocked.backward_weights(src, diff_dst, 3)
    np.testing.assert_array_equal(found, expected)
