"""Volumes of any size through a model of patches: nothing is lost, shifted or counted twice."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyunet.autograd import Tensor
from tinyunet.nn import Module
from tinyunet.segmentation.sliding_window import (
    gaussian_weights,
    patch_for,
    patch_starts,
    predict_volume,
    segment,
)
from tinyunet.unet import UNet

sizes = st.tuples(*[st.integers(1, 11)] * 3)
patch_sizes = st.tuples(*[st.integers(1, 7)] * 3)
overlaps = st.sampled_from([0.0, 0.25, 0.5, 0.75, 0.9])


class Copy(Module):
    """A "model" that gives back what it is shown, and notes the sizes it was shown."""

    def __init__(self, channels: int = 2, depth: int = 1):
        self.config = {"dim": 3, "in_channels": channels, "classes": channels, "depth": depth}
        self.shapes = set()
        self.modes = set()

    def __call__(self, src):
        assert src.flags.c_contiguous
        self.shapes.add(src.shape)
        self.modes.add(self.training)
        return Tensor(src)


class Place(Copy):
    """Answers by the position in the patch, not by what is there: wrong wherever patches meet."""

    def __call__(self, src):
        d = np.arange(src.shape[1], dtype=np.float32)[:, None, None, None]
        return Tensor(np.broadcast_to(d, src.shape).copy())


@given(sizes, patch_sizes, overlaps)
def test_a_copy_comes_back_as_it_was(shape, patch_size, overlap):
    image = np.random.default_rng(0).standard_normal((*shape, 2)).astype(np.float32)
    before = image.copy()
    model = Copy()
    found = predict_volume(model, image, patch_size, overlap)
    assert found.shape == image.shape
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    np.testing.assert_allclose(found, image, rtol=2e-6, atol=0)
    np.testing.assert_array_equal(image, before)
    assert model.shapes == {(1, *patch_size, 2)}


def test_a_model_that_is_wrong_is_noticed():
    image = np.zeros((9, 4, 4, 2), np.float32)
    found = predict_volume(Place(), image, (4, 4, 4))
    assert np.abs(found[:, 0, 0, 0] - np.arange(9)).max() > 1


def test_the_middle_of_a_patch_counts_more_than_the_border_of_its_neighbour():
    # Patches begin at 0 and 4; voxel 5 is number 5 of the first and number 1 of the second.
    found = predict_volume(Place(), np.zeros((12, 8, 8, 2), np.float32), (8, 8, 8))[:, 3, 3, 0]
    assert found[3] == pytest.approx(3, abs=0.05)
    assert found[8] == pytest.approx(4, abs=0.05)
    assert 1 < found[5] < 5


@given(st.integers(1, 60), st.integers(1, 60), overlaps)
def test_patches_cover_an_axis_and_overlap_as_told(size, patch, overlap):
    patch = min(patch, size)
    starts = patch_starts(size, patch, overlap)
    assert starts[0] == 0
    assert starts[-1] == size - patch
    assert starts == sorted(set(starts))
    least = min(overlap * patch, patch - 1)
    assert all(a + patch - b >= least for a, b in itertools.pairwise(starts))


def test_no_more_patches_than_needed():
    assert patch_starts(10, 10, 0.5) == [0]
    assert patch_starts(11, 10, 0.5) == [0, 1]
    assert patch_starts(20, 10, 0.5) == [0, 5, 10]
    assert patch_starts(21, 10, 0.0) == [0, 6, 11]
    assert patch_starts(100, 10, 0.8) == list(range(0, 91, 2))


@given(st.tuples(*[st.integers(1, 40)] * 3))
def test_weights_are_above_zero_symmetric_and_highest_in_the_middle(patch_size):
    weights = gaussian_weights(patch_size)
    assert weights.shape == patch_size
    assert weights.dtype == np.float32
    assert weights.min() > 0
    assert weights.max() == 1 == weights[tuple(size // 2 for size in patch_size)]
    np.testing.assert_array_equal(weights, weights[::-1, ::-1, ::-1])


def test_large_patches_do_not_underflow():
    corner = gaussian_weights((128, 128, 128))[0, 0, 0]
    assert corner > 1e-12


def test_mode_of_the_model_is_restored_also_after_an_error():
    model = Copy()
    predict_volume(model, np.zeros((4, 4, 4, 2), np.float32), (2, 2, 2))
    assert model.modes == {False}
    assert model.training
    model.eval()
    predict_volume(model, np.zeros((4, 4, 4, 2), np.float32), (2, 2, 2))
    assert not model.training
    model.train().frozen = Copy().eval()
    predict_volume(model, np.zeros((4, 4, 4, 2), np.float32), (2, 2, 2))
    assert model.training
    assert not model.frozen.training

    class Broken(Copy):
        def __call__(self, src):
            raise RuntimeError("broken")

    broken = Broken()
    with pytest.raises(RuntimeError):
        predict_volume(broken, np.zeros((4, 4, 4, 2), np.float32), (2, 2, 2))
    assert broken.training


def test_progress_counts_every_patch():
    told = []
    image = np.zeros((5, 4, 4, 2), np.float32)
    predict_volume(Copy(), image, (4, 4, 4), 0.5, lambda *of: told.append(of))
    assert told == [(1, 2), (2, 2)]


def test_the_whole_volume_is_a_patch_while_it_is_small():
    assert patch_for(5, (64, 72, 56)) == (64, 80, 64)
    assert patch_for(5, (1, 128, 129)) == (16, 128, 128)
    assert patch_for(1, (5, 200, 7)) == (5, 128, 7)
    # Deeper than the largest patch: what the net needs wins.
    assert patch_for(9, (10, 10, 10)) == (256, 256, 256)


@pytest.mark.parametrize(
    ("image", "patch_size", "overlap", "told"),
    [
        (np.zeros((4, 4, 4), np.float32), (2, 2, 2), 0.5, "image has shape"),
        (np.zeros((4, 4, 4, 3), np.float32), (2, 2, 2), 0.5, "image has shape"),
        (np.zeros((4, 0, 4, 2), np.float32), (2, 2, 2), 0.5, "image has shape"),
        (np.zeros((4, 4, 4, 2), np.float32), (2, 2), 0.5, "patch_size is"),
        (np.zeros((4, 4, 4, 2), np.float32), (2, 0, 2), 0.5, "patch_size is"),
        (np.zeros((4, 4, 4, 2), np.float32), (2, 2, 2), 1.0, "overlap is"),
        (np.zeros((4, 4, 4, 2), np.float32), (2, 2, 2), -0.1, "overlap is"),
    ],
)
def test_bad_arguments_are_told(image, patch_size, overlap, told):
    with pytest.raises(ValueError, match=told):
        predict_volume(Copy(), image, patch_size, overlap)


@pytest.mark.parametrize("shape", [(3, 17, 9), (16, 16, 16), (5, 33, 2)])
@pytest.mark.parametrize("classes", [1, 4])
def test_a_real_network_takes_any_size(shape, classes):
    model = UNet(in_channels=3, classes=classes, filters=4, depth=3)
    image = np.random.default_rng(1).standard_normal((*shape, 3)).astype(np.float32)
    probabilities = predict_volume(model, image, (8, 8, 8))
    assert probabilities.shape == (*shape, classes)
    if classes > 1:
        np.testing.assert_allclose(probabilities.sum(axis=-1), 1, rtol=1e-5)
    labels = segment(model, image)
    assert labels.shape == shape
    assert labels.dtype == np.uint8
    assert labels.max() < max(classes, 2)


def test_labels_that_do_not_fit_into_a_byte_are_refused():
    with pytest.raises(ValueError, match="of 256 classes at most, not 257"):
        segment(Copy(channels=257), np.zeros((1, 1, 1, 257), np.float32))


def test_one_patch_is_the_network_itself():
    model = UNet(in_channels=3, classes=3, filters=4, depth=2).eval()
    image = np.random.default_rng(1).standard_normal((6, 8, 4, 3)).astype(np.float32)
    expected = model(image[None]).data[0]
    np.testing.assert_allclose(predict_volume(model, image, (6, 8, 4)), expected, rtol=2e-6)
