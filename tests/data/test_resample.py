"""Resampling: voxel centres, kernels and low-pass against formulas in float64."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tinyunet.data.resample import resample_image, resample_labels, resample_probabilities, resampled_shape

SIZES = st.tuples(*[st.integers(1, 9)] * 3)


def positions(shape: tuple[int, ...]) -> list[NDArray[np.float64]]:
    """Centres of voxels, as shares of the side."""
    return np.meshgrid(*((np.arange(n) + 0.5) / n for n in shape), indexing="ij")


def ramp(shape: tuple[int, ...]) -> NDArray[np.float64]:
    x, y, z = positions(shape)
    return (3 + 5 * x - 7 * y + 2 * z)[..., None]


def blob(shape: tuple[int, ...], width: float = 0.2) -> NDArray[np.float64]:
    middle = (0.45, 0.5, 0.55)
    squares = sum((axis - at) ** 2 for axis, at in zip(positions(shape), middle, strict=True))
    return np.exp(-np.asarray(squares) / (2 * width**2))[..., None]


def smooth(line: NDArray[np.float64], step: float) -> NDArray[np.float64]:
    """A Gaussian along the first axis, by its definition; the border repeats itself."""
    deviation = np.sqrt(max(0, step**2 - 1)) / 2.3548
    reach = int(4 * deviation) + 2
    taps = np.arange(-reach, reach + 1)
    parts = np.exp(-0.5 * (taps / deviation) ** 2) if deviation else 1.0 * (taps == 0)
    wide = np.pad(line, [(reach, reach)] + [(0, 0)] * (line.ndim - 1), "edge")
    return np.stack([np.tensordot(parts / parts.sum(), wide[i : i + len(taps)], 1) for i in range(len(line))])


def at(line: NDArray[np.float64], place: float) -> NDArray[np.float64]:
    """Between the two nearest voxels."""
    low = int(np.floor(place))
    near = [line[min(max(i, 0), len(line) - 1)] for i in (low, low + 1)]
    return np.asarray(near[0] * (low + 1 - place) + near[1] * (place - low))


def share(line: NDArray[np.float64], begin: float, end: float) -> NDArray[np.float64]:
    """The mean of voxels from one place to another."""
    parts = [max(0.0, min(end, i + 1) - max(begin, i)) for i in range(len(line))]
    return np.tensordot(parts, line, 1) / (end - begin)


def by_definition(
    volume: NDArray[np.float64], shape: tuple[int, ...], of_image: bool = False
) -> NDArray[np.float64]:
    """Linear interpolation, axis by axis and voxel by voxel."""
    for axis, new in enumerate(shape):
        line = np.moveaxis(volume, axis, 0)
        step = len(line) / new
        if step > 1 and not of_image:
            lines = [share(line, i * step, (i + 1) * step) for i in range(new)]
        else:
            line = smooth(line, step)
            lines = [at(line, (i + 0.5) * step - 0.5) for i in range(new)]
        volume = np.moveaxis(np.array(lines), 0, axis)
    return volume


@given(SIZES, SIZES, st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_linear_interpolation_is_the_definition(old, new, seed):
    volume = np.random.default_rng(seed).random(old)
    found = resample_probabilities(volume[..., None], new)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    np.testing.assert_allclose(found[..., 0], by_definition(volume, new), atol=2e-6)
    sides = tuple(m / n for m, n in zip(old, new, strict=True))
    if np.array_equal(resampled_shape(old, (1, 1, 1), sides), new):
        image = resample_image(volume[..., None], (1, 1, 1), sides, linear=True)[..., 0]
        np.testing.assert_allclose(image, by_definition(volume, new, of_image=True), atol=2e-5)


@pytest.mark.parametrize("shape", [(30, 20, 12), (13, 41, 25), (64, 50, 44), (20, 24, 22)])
@pytest.mark.parametrize("linear", [False, True])
def test_a_ramp_stays_a_ramp(shape, linear):
    """A shift by half a voxel, as between corners and centres, would show everywhere."""
    start = (24, 20, 30)
    new = tuple(n / m for n, m in zip(start, shape, strict=True))
    found = resample_image(ramp(start), (1, 1, 1), new, linear=linear)
    assert found.shape == (*shape, 1)
    inner = tuple(slice(m // 5, -(m // 5)) for m in shape)  # the border repeats itself
    np.testing.assert_allclose(found[inner], ramp(shape)[inner], atol=2e-5)
    assert abs(found.mean() - ramp(shape).mean()) < 1e-5


def test_a_blob_comes_back():
    start, coarse = (40, 44, 48), (16, 16, 16)
    probability = blob(coarse)
    back = resample_probabilities(np.concatenate([probability, 1 - probability], -1), start)
    assert back.shape == (*start, 2)
    np.testing.assert_allclose(back[..., :1], blob(start), atol=0.04)
    np.testing.assert_allclose(back.sum(-1), 1, atol=1e-6)
    assert back.min() >= 0
    for axis in positions(start):  # the centre has not moved
        centres = [(axis * each).sum() / each.sum() for each in (back[..., 0], blob(start)[..., 0])]
        assert abs(centres[0] - centres[1]) < 0.0005


def test_cubic_is_nearer_to_a_blob_than_linear():
    errors = [
        np.abs(
            resample_image(blob((20,) * 3, 0.12), (2,) * 3, (1,) * 3, linear) - blob((40,) * 3, 0.12)
        ).max()
        for linear in (False, True)
    ]
    assert errors[0] < 0.3 * errors[1]
    assert errors[0] < 0.02


def test_thick_slices_are_nearer_to_the_truth_than_the_nearest_slice():
    """Voxels of 1 x 1 x 5 mm: nnU-Net interpolates in the plane, and takes the nearest slice."""
    slices, truth = blob((40, 40, 8)), blob((40, 40, 40))
    found = resample_image(slices, (1, 1, 5), (1, 1, 1))
    nearest = np.repeat(slices, 5, axis=2)
    assert np.abs(found - truth).mean() < 0.3 * np.abs(nearest - truth).mean()
    assert found.min() >= slices.min() - 1e-6  # nothing overshoots
    assert found.max() <= slices.max() + 1e-6


def test_nothing_aliases():
    """A wave of 3 voxels, seen at every 4th, would look like a wave of 12."""
    wave = np.cos(2 * np.pi * np.arange(96) / 3)[:, None, None, None] * np.ones((1, 2, 2, 1))
    assert np.abs(wave[2::4]).max() > 0.9
    for linear, most in ((False, 0.06), (True, 0.05)):
        assert np.abs(resample_image(wave, (1, 1, 1), (4, 1, 1), linear)[3:-3]).max() < most


@given(SIZES, SIZES, st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_labels_are_the_largest_part(old, new, seed):
    labels = np.random.default_rng(seed).integers(0, 4, old).astype(np.uint8)
    parts = np.stack([by_definition((labels == label) * 1.0, new) for label in range(4)], -1)
    found = resample_labels(labels, new)
    assert found.dtype == np.uint8
    chosen = np.take_along_axis(parts, found[..., None].astype(int), -1)[..., 0]
    assert (chosen >= parts.max(-1) - 2e-5).all()


def test_tumours_keep_their_volume():
    """A kernel that is wider than the voxel would make all that is round smaller."""
    truth = np.sqrt(sum((axis - 0.5) ** 2 for axis in positions((60, 60, 60)))) < 0.15
    for shape in ((22, 22, 22), (60, 60, 12), (30, 40, 50)):
        found = resample_labels(truth.astype(np.uint8), shape)
        assert found.mean() == pytest.approx(truth.mean(), rel=0.15)


def test_the_same_grid_gives_the_same_voxels():
    generator = np.random.default_rng(0)
    image = generator.standard_normal((5, 6, 7, 2)).astype(np.float32)
    assert np.array_equal(resample_image(image, (1, 1, 3), (1, 1, 3)), image)
    labels = generator.integers(0, 200, (5, 6, 7))
    assert np.array_equal(resample_labels(labels, (5, 6, 7)), labels)


def test_shapes():
    assert resampled_shape((240, 240, 155), (1, 1, 1), (2.75, 2.75, 2.75)) == (87, 87, 56)
    assert resampled_shape((5, 1, 1), (1, 1, 1), (30, 1, 0.5)) == (1, 1, 2)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: resample_image(np.ones((2, 2, 2)), (1, 1, 1), (1, 1, 1)), "image: shape"),
        (lambda: resample_image(np.ones((2, 2, 2, 1)), (1, 1, 0), (1, 1, 1)), "spacing: "),
        (lambda: resample_image(np.ones((2, 2, 2, 1)), (1, 1, 1), (1, np.nan, 1)), "new_spacing: "),
        (lambda: resample_probabilities(np.ones((2, 2, 2, 0)), (1, 1, 1)), "probabilities: shape"),
        (lambda: resample_probabilities(np.ones((2, 2, 2, 1)), (1, 0, 1)), "shape: "),
        (lambda: resample_labels(np.full((2, 2, 2), -1), (1, 1, 1)), "labels: "),
    ],
)
def test_what_is_no_volume_is_refused(call, told):
    with pytest.raises(ValueError, match=told):
        call()
