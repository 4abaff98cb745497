"""The picture of cases: it shows what the files hold."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib import colors, image
from matplotlib.figure import Figure
from volumes import head, tumour, write_decathlon

from tinyunet.common.errors import DataError
from tinyunet.data.cases import Case, load_case
from tinyunet.data.decathlon import read_dataset
from tinyunet.data.phantom import make_dataset
from tinyunet.viz import volumes as module
from tinyunet.viz.figure import CLASSES as LABEL_COLOURS
from tinyunet.viz.figure import class_colour
from tinyunet.viz.volumes import draw_labels, plot_cases


def is_near(pixels: np.ndarray, colour: str) -> np.ndarray:
    """Say which pixels look like a colour laid half transparent over some grey."""
    target = np.array(colors.to_rgb(colour))
    hue = colors.rgb_to_hsv(np.clip(pixels[..., :3], 0, 1))
    apart = np.abs(hue[..., 0] - colors.rgb_to_hsv(target)[0])
    return (hue[..., 1] > 0.3) & (np.minimum(apart, 1 - apart) < 0.06)


def test_labels_are_coloured_in_the_last_column_only(tmp_path: Path) -> None:
    dataset = read_dataset(make_dataset(tmp_path / "phantom", cases=2, shape=(32, 36, 28)))
    plot_cases(dataset.cases, tmp_path / "a.png", dataset.modalities)
    pixels = image.imread(tmp_path / "a.png")
    assert pixels.shape[0] > pixels.shape[1]  # six rows of five
    last = int(pixels.shape[1] * 0.8)
    for colour in LABEL_COLOURS[:3]:
        assert is_near(pixels[:, last:], colour).sum() > 50
        assert is_near(pixels[:, :last], colour).sum() == 0
    assert (pixels[..., :3].max(axis=-1) < 0.02).mean() > 0.3  # black around the heads


def test_a_legend_names_the_classes(tmp_path: Path) -> None:
    dataset = read_dataset(write_decathlon(tmp_path, cases=1))
    for path, classes in (("without.png", ()), ("with.png", dataset.labels[1:])):
        plot_cases(dataset.cases, tmp_path / path, dataset.modalities, classes)
    without, legend = (image.imread(tmp_path / path) for path in ("without.png", "with.png"))
    assert legend.shape[0] > without.shape[0]
    for number, colour in enumerate(LABEL_COLOURS):
        found = np.isclose(legend[-25:, :, :3], colors.to_rgb(colour), atol=0.01).all(axis=-1)
        assert found.any() == (number < len(dataset.labels) - 1)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_any_number_of_sequences(channels: int, tmp_path: Path) -> None:
    dataset = read_dataset(write_decathlon(tmp_path, cases=1, channels=channels))
    plot_cases(dataset.cases, tmp_path / "a.png")
    assert image.imread(tmp_path / "a.png").shape[0] > 100


def test_without_foreground_or_brain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = read_dataset(write_decathlon(tmp_path, cases=1))
    geometry = load_case(dataset.cases[0])[2]
    empty = np.zeros((6, 7, 5, 4), np.float32), np.zeros((6, 7, 5), np.uint8), geometry
    monkeypatch.setattr(module, "load_case", lambda _: empty)
    plot_cases(dataset.cases, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_best_slice_shows_all_classes() -> None:
    labels = np.zeros((9, 9, 9), np.uint8)
    labels[2, :, :] = 1  # most voxels, but of one class
    labels[5, :6, :] = 1
    labels[5, 7, :2] = 2
    labels[5, 7, 3] = 3
    assert module._best_slice(labels, 0) == 5


def test_the_patients_left_is_left_and_up_is_up() -> None:
    volume = np.zeros((2, 3, 4))
    volume[0, 0, 3] = 1  # left, back, top
    assert np.argwhere(module._slice(volume, 3, 2)).tolist() == [[2, 0]]  # axial: front is up
    assert np.argwhere(module._slice(volume, 0, 1)).tolist() == [[0, 0]]  # coronal
    assert np.argwhere(module._slice(volume, 0, 0)).tolist() == [[0, 0]]  # sagittal: back is left


def test_voxels_keep_their_proportions() -> None:
    volume = np.zeros((4, 5, 6))
    for axis, sides in ((2, (4, 10)), (1, (4, 18)), (0, (10, 18))):  # axial: 2 mm high, 1 mm wide
        axes = Figure().add_subplot()
        module._show(axes, module._slice(volume, 0, axis), module._in_plane((1, 2, 3), axis))
        assert axes.images[0].get_extent() == [0, sides[0], 0, sides[1]]
        assert axes.get_aspect() == 1


def test_grey_values_are_those_of_the_brain() -> None:
    volume = head().astype(np.float32) - 500 * head().any(axis=-1, keepdims=True)
    grey = module._grey(volume)
    brain = volume.any(axis=-1)
    assert not grey[~brain].any()
    assert grey[brain].min() >= 0
    assert grey[brain].max() == 1


def test_draw_labels_leaves_background_clear() -> None:
    axes = Figure().add_subplot()
    draw_labels(axes, tumour()[0])
    drawn = axes.images[0].get_array()
    assert np.array_equal(np.ma.getmaskarray(drawn), tumour()[0] == 0)


def test_more_classes_than_colours_are_drawn_as_in_every_other_picture() -> None:
    figure = Figure()
    axes = figure.add_subplot()
    draw_labels(axes, np.arange(1, 11)[None])
    module._explain(figure, [f"class {label}" for label in range(1, 11)])
    drawn = axes.images[0].to_rgba(np.arange(1, 11))
    legend = [patch.get_facecolor() for patch in figure.legends[0].get_patches()]
    for label, pixel, patch in zip(range(1, 11), drawn, legend, strict=True):
        expected = colors.to_rgb(class_colour(label))
        np.testing.assert_allclose(pixel[:3], expected, atol=1e-6)
        np.testing.assert_allclose(patch[:3], expected, atol=1e-6)


def test_wrong_cases(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^cases: expected one or more"):
        plot_cases([], tmp_path / "a.png")
    missing = Case("T", (tmp_path / "no.nii",), tmp_path / "no.nii", 1, (0, 1))
    with pytest.raises(DataError, match=r"no\.nii: no such file"):
        plot_cases([missing], tmp_path / "a.png")
