"""Which voxels a network gets, and cases read on them."""

import nibabel
import numpy as np
import pytest
from volumes import write

from tinyunet.common.errors import DataError, UserError
from tinyunet.data.cases import Case, load_case, load_image, load_labels
from tinyunet.data.nifti import read_header
from tinyunet.data.spacing import KEEP, differs, from_words, of_network, shape_for

ONE, FINE, THICK = (1.0, 1.0, 1.0), (0.5, 0.5, 0.5), (1.0, 1.0, 5.0)


def ball(shape, radius):
    """A ball around the middle; radius as a share of the side."""
    centres = np.meshgrid(*((np.arange(n) + 0.5) / n - 0.5 for n in shape), indexing="ij")
    return np.sqrt(sum(axis**2 for axis in centres)) < radius


def written(folder, shape, spacing):
    """A head with a tumour in its middle, its sides 40 mm long."""
    bright = np.where(ball(shape, 0.25), 900.0, 300.0) + np.random.default_rng(0).normal(0, 20, shape)
    image = np.stack([bright, 1000 - bright], -1) * ball(shape, 0.4)[..., None]
    affine = np.diag([*spacing, 1])
    paths = [write(folder / "image.nii", image, affine)]
    labels = write(folder / "labels.nii", ball(shape, 0.25).astype(np.uint8), affine)
    return Case("a", tuple(paths), labels, 2, (0, 1))


def test_a_case_is_read_on_the_voxels_of_the_network(tmp_path):
    case = written(tmp_path, (40, 40, 8), THICK)
    image, labels, geometry = load_case(case, spacing=(2.0, 2.0, 2.0))
    assert (image.shape, labels.shape) == ((20, 20, 20, 2), (20, 20, 20))
    assert image.dtype == np.float32
    assert image.flags.c_contiguous
    assert geometry.canonical_shape == (40, 40, 8)
    brain = image.any(-1)
    assert brain.mean() == pytest.approx(ball((40,) * 3, 0.4).mean(), rel=0.1)
    np.testing.assert_allclose(image[brain].mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(image[brain].std(0), 1, atol=1e-5)
    assert labels.mean() == pytest.approx(ball((40,) * 3, 0.25).mean(), rel=0.2)
    assert image[labels == 1, 0].min() > 0
    assert np.array_equal(load_labels(case, read_header(case.image_paths[0])[1]), ball((40, 40, 8), 0.25))


@pytest.mark.parametrize("spacing", [None, ONE, (0.97, 1.04, 1.0)])
def test_nearly_equal_voxels_stay_as_they_are(tmp_path, spacing):
    case = written(tmp_path, (20, 22, 24), ONE)
    for found, expected in zip(load_case(case, spacing=spacing)[:2], load_case(case)[:2], strict=True):
        assert np.array_equal(found, expected)


def test_a_volume_is_not_made_larger_than_memory(tmp_path):
    case = written(tmp_path, (20, 20, 20), (20.0, 20.0, 20.0))
    with pytest.raises(DataError, match=r"image.nii: 20000 x 20000 x 20000 voxels when resampled from 20 x"):
        load_image(case.image_paths, spacing=(0.02, 0.02, 0.02))


def test_a_sequence_without_content_is_refused(tmp_path):
    case = written(tmp_path, (12, 12, 12), ONE)
    image = nibabel.load(case.image_paths[0]).get_fdata().copy()
    image[..., 1] = 0
    write(case.image_paths[0], image)
    with pytest.raises(DataError, match=r"image.nii: sequence 2: is 0 everywhere.*; --allow-missing"):
        load_case(case, allow_missing=False)
    notes: list[str] = []
    assert not load_case(case, notes)[0][..., 1].any()
    assert notes == [f"{case.image_paths[0]}: sequence 2: is 0 everywhere, as if it was absent"]
    write(case.image_paths[0], np.full_like(image, 3))
    with pytest.raises(DataError, match=r"sequence 1, 2: is 3 everywhere.*; expected an image of a head"):
        load_case(case)


def test_the_usual_voxels_are_the_default():
    assert of_network(None, [ONE, ONE, THICK]) == ONE
    assert of_network(KEEP, [ONE, ONE, THICK]) is None
    assert of_network(KEEP, [ONE, (1.0, 1.0, 1.01)]) == ONE
    assert of_network(FINE, [ONE]) == FINE


def test_which_voxels_differ():
    assert not differs(ONE, (1.04, 1.0, 0.96))
    assert differs(ONE, (1.0, 1.0, 1.06))
    assert differs(ONE, (0.94, 1.0, 1.0))
    assert shape_for((10, 10, 10), THICK, ONE) == (10, 10, 50)
    assert shape_for((10, 10, 10), THICK, None) == (10, 10, 10)


@pytest.mark.parametrize(
    ("words", "chosen"),
    [(None, None), (["keep"], KEEP), (["1"], ONE), (["1", "1", "5"], THICK), (["5e-1"], FINE)],
)
def test_words_of_the_option(words, chosen):
    assert from_words(words) == chosen


@pytest.mark.parametrize("words", [[], ["1", "1"], ["0"], ["-1"], ["inf"], ["1000"], ["keep", "1"], ["kept"]])
def test_other_words_are_refused(words):
    with pytest.raises(UserError, match=r"--spacing: .*; expected one size or three"):
        from_words(words)
